"""Checksums of checkpoints: a flipped bit in any file is seen; its file and the last good one are named."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import one_line, write_run
from training_runs import STATE, flip, reward_run, run

from prfl_engine import checksums
from prfl_engine.cli import main
from prfl_engine.errors import UserError
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.model.lora_files import read


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two checkpoints, averaged weights, chains that persist and a best one."""
    folder = tmp_path_factory.mktemp("run")
    config = write_run(
        folder, train={"save_every": 1, "ema": 0.9}, eval={"every": 2}, rollout={"mode": "persistent"}
    )
    run("train", config)
    return folder, config


def test_every_file_is_listed(made):
    for name in ("checkpoint-1", "checkpoint-2", "best"):
        folder = made[0] / "run" / name
        found = checksums.listed(folder)
        assert sorted(found) == [folder / n for n in names(folder) if n != checksums.FILE]
        checksums.check(found)
    assert {STATE, "run.json", "pool.safetensors"} < set(names(made[0] / "run/checkpoint-2"))


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused_by_name(made, tmp_path, capsys):
    folder, config = made
    out = tmp_path / "run"
    files = [n for n in names(folder / "run/checkpoint-2") if n != checksums.FILE]
    assert len(files) == 7
    for name in files:
        shutil.copytree(folder / "run", out)
        flip(out / "checkpoint-2" / name)
        before = names(out)
        assert main(["train", str(config), f"train.out={out}", "train.resume=true", "train.steps=3"]) == 2
        want = rf"prfl: {out}/checkpoint-2/{name}: its checksum is \w{{8}}, want \w{{8}} as {checksums.FILE} "
        line = one_line(capsys)
        assert re.match(want, line) and line.endswith("; checkpoint-1 is the last good checkpoint"), line
        assert names(out) == before
        shutil.rmtree(out)


def test_the_last_good_checkpoint_is_one_whose_files_are_whole(made, tmp_path, capsys):
    folder, config = made
    out = tmp_path / "run"
    resumed = ["train", str(config), f"train.out={out}", "train.resume=true", "train.steps=3"]
    shutil.copytree(folder / "run", out)
    for checkpoint in ("checkpoint-2", "checkpoint-1"):
        flip(out / checkpoint / STATE)
    assert main(resumed) == 2
    assert one_line(capsys).endswith("; none before it is the last good checkpoint")
    (out / "checkpoint-2" / STATE).unlink()
    assert main(resumed) == 2
    assert "checkpoint-2/training_state.pt: no such file, want the file as it was written" in one_line(capsys)


def test_a_checkpoint_without_checksums_goes_on(made, tmp_path):
    folder, config = made
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run/checkpoint-2" / checksums.FILE).unlink()
    run("train", config, f"train.out={tmp_path / 'run'}", "train.resume=true", "train.steps=3")
    assert (tmp_path / "run/checkpoint-3" / checksums.FILE).exists()


def test_models_of_our_own_folders_are_checked_as_they_are_loaded(made, tmp_path):
    shutil.copytree(made[0] / "run/best", tmp_path / "best")
    for part in (".", "ema"):
        folder = tmp_path / "best" / part
        load_transformer(folder)
        flip(folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: its checksum is"):
            load_transformer(folder)
    (tmp_path / "best" / checksums.FILE).unlink()
    load_transformer(tmp_path / "best")


def test_reward_models_and_adapters_are_checked(tmp_path, capsys):
    config = reward_run(tmp_path, "ce", train={"steps": 1})
    run("train-reward", config)
    folder = tmp_path / "run/checkpoint-1"
    load_reward(folder)
    for name in ("mlp_step_1.ckpt", "query_attention_step_1.ckpt"):
        data = (folder / name).read_bytes()
        flip(folder / name)
        with pytest.raises(UserError, match=f"{name}: its checksum is"):
            load_reward(folder)
        (folder / name).write_bytes(data)
    settings = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(settings | {"feature_layer": 1}))
    with pytest.raises(UserError, match="reward.json: its checksum is"):
        load_reward(folder)

    config = write_run(tmp_path / "lora", lora={"rank": 2}, train={"steps": 1})
    run("train", config)
    folder = tmp_path / "lora/run/checkpoint-1"
    read(folder)
    flip(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors: its checksum is"):
        read(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"crc32": 1}', '{"crc32": {"a": 1}}', '{"crc32": {"../a": "00000000"}}']
)
def test_what_is_no_list_of_checksums(text, tmp_path):
    (tmp_path / checksums.FILE).write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/checksums.json: "):
        checksums.check([tmp_path / "a"])


def test_the_checksum_is_that_of_zip_files(tmp_path):
    (tmp_path / "file").write_bytes(b"123456789")
    assert checksums.of(tmp_path / "file") == "cbf43926"  # the check value of CRC-32
