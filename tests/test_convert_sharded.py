"""prfl convert of sharded checkpoints, without their ranks."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import one_line, tiny_config, tiny_model, tiny_reward, write_run
from safetensors.torch import load_file, save_file
from test_convert import equal
from test_lora import model as with_updates
from training_runs import flip

from prfl_engine import checksums
from prfl_engine.checkpoint_shards import save_sharded
from prfl_engine.cli import main
from prfl_engine.config import LoraConfig
from prfl_engine.convert import convert
from prfl_engine.errors import UserError
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import load_reward, load_transformer, save_reward, save_transformer
from prfl_engine.model.lora_files import read
from prfl_engine.model.shard_files import stored_weights
from prfl_engine.optim.optimizer import EMA
from prfl_engine.resume import RUN


def sharded(folder, model, config, ema=None, **sections):
    """A checkpoint as two ranks write it: every tensor in two pieces, in two files."""
    folder.mkdir()
    save_sharded(folder, model, ema=ema, trained=ema is not None)
    (path,) = folder.glob("shard-*.safetensors")
    halves = [{}, {}]
    for name, a in load_file(path).items():
        cut = len(a) // 2
        halves[0][name], halves[1][name.replace("@0", f"@{cut}")] = a[:cut].clone(), a[cut:].clone()
    for rank, held in enumerate(halves):
        save_file({k: a for k, a in held.items() if len(a)}, folder / f"shard-{rank:05d}.safetensors")
    index = json.loads((folder / "shards.json").read_text())
    names = [f"shard-{rank:05d}.safetensors" for rank in range(2)]
    (folder / "shards.json").write_text(json.dumps(index | {"files": names}))
    (folder / RUN).write_text(json.dumps({"config": {"model": config} | sections, "sources": {}}))


def test_a_sharded_checkpoint_without_its_ranks(tmp_path):
    start, trained = tiny_model(), tiny_model(seed=1)
    save_transformer(start, tmp_path / "base")
    sharded(tmp_path / "checkpoint-5", trained, {"path": str(tmp_path / "base"), "preset": None})
    convert(tmp_path / "checkpoint-5", tmp_path / "made", "native")
    made = load_transformer(tmp_path / "made")
    assert made.config == trained.config
    assert all(torch.equal(a, made.state_dict()[k]) for k, a in trained.state_dict().items())


@pytest.mark.parametrize("config, needle", [
    ({"path": "{}/gone", "preset": None}, "run.json: config: model.path: .*gone"),
    ({"path": None, "preset": "x"}, "run.json: config: model.preset: got 'x'"),
    (3, "config: model: got 3"),
])  # fmt: skip
def test_a_sharded_checkpoint_of_an_unknown_model(config, needle, tmp_path):
    if config != 3 and config["path"]:
        config = config | {"path": config["path"].format(tmp_path)}
    sharded(tmp_path / "checkpoint-5", tiny_model(), config)
    with pytest.raises(UserError, match=needle):
        convert(tmp_path / "checkpoint-5", tmp_path / "made", "native")
    assert os.listdir(tmp_path) == ["checkpoint-5"]


PRESET = {"path": None, "preset": "tiny-t2v"}


def averaged(model, factor=2.0):
    """The average of the trained weights, which is `factor` times them."""
    ema = EMA(model, 0.9)
    ema.average = {k: factor * p.detach() for k, p in ema.own.items()}
    return ema


def test_averaged_weights_of_a_sharded_checkpoint(tmp_path):
    start, trained = tiny_model(), tiny_model(seed=1)
    save_transformer(start, tmp_path / "base")
    trained.patch_embedding.requires_grad_(False)
    model = {"path": str(tmp_path / "base"), "preset": None}
    sharded(tmp_path / "checkpoint-5", trained, model)
    with pytest.raises(UserError, match="checkpoint-5/ema: got 'no averaged weights', want a checkpoint"):
        convert(tmp_path / "checkpoint-5/ema", tmp_path / "made", "native")
    sharded(tmp_path / "checkpoint-6", tiny_model(seed=1), model, averaged(trained))
    convert(tmp_path / "checkpoint-6/ema", tmp_path / "made", "native")
    made = load_transformer(tmp_path / "made").state_dict()
    for name, p in trained.named_parameters():
        assert torch.equal(made[name], (2 if p.requires_grad else 1) * p), name


@pytest.mark.parametrize("average", [False, True])
def test_a_sharded_checkpoint_of_an_adapter(average, tmp_path):
    model, path = with_updates(), tmp_path / "checkpoint-5"
    rank = len(next(iter(lora.updates(model).values())).down)
    section = {"rank": rank, "alpha": 3 * rank, "path": None}
    sharded(path, model, PRESET, averaged(model), lora=section)
    convert(path / "ema" if average else path, tmp_path / "made", "peft")
    got, _ = read(tmp_path / "made")
    assert got.keys() == lora.updates(model).keys()
    for name, low in lora.updates(model).items():
        factor = 2 if average else 1
        assert torch.equal(got[name].down, factor * low.down) and torch.equal(got[name].up, factor * low.up)
        assert got[name].scale == 3
    with pytest.raises(UserError, match="--dtype: got torch.bfloat16, want none with an adapter"):
        convert(path, tmp_path / "other", "peft", torch.bfloat16)


@pytest.mark.parametrize("section, needle", [
    (None, "run.json: config: lora: got None, want a section"),
    ({"rank": 0}, "run.json: config: lora.rank: got 0, want"),
    ({"rank": 4, "alpha": -1}, "run.json: config: lora.alpha: got -1, want"),
    ({"rank": 4, "path": "gone"}, "run.json: config: lora.path: gone: no adapter|gone"),
])  # fmt: skip
def test_a_sharded_adapter_whose_scale_is_not_known(section, needle, tmp_path):
    sharded(tmp_path / "checkpoint-5", with_updates(), PRESET, lora=section)
    with pytest.raises(UserError, match=needle):
        convert(tmp_path / "checkpoint-5", tmp_path / "made", "peft")


@pytest.mark.parametrize("begun", ["new", "path"])
def test_a_sharded_checkpoint_of_a_reward_model(begun, tmp_path):
    model, section = tiny_reward(num_heads=4, add_query=False), {"path": None, "num_heads": 4}
    section |= {"feature_layer": "auto", "return_type": None}
    if begun == "path":
        save_reward(tiny_reward(num_heads=4, add_query=False), tmp_path / "begun", 1)
        section = {"path": str(tmp_path / "begun")} | dict.fromkeys(
            ("num_heads", "feature_layer", "return_type"), "auto"
        )
    save_transformer(tiny_model(), tmp_path / "base")
    path = tmp_path / "checkpoint-12"
    sharded(path, model, {"path": str(tmp_path / "base"), "preset": None}, reward=section)
    convert(path, tmp_path / "made", "native", torch.bfloat16)
    assert (tmp_path / "made/mlp_step_12.ckpt").is_file()
    made = load_reward(tmp_path / "made")
    assert (made.pool.multihead_attn.num_heads, made.pool.add_query, made.feature_layer) == (4, False, 1)
    for name, a in model.state_dict().items():
        low = a.bfloat16() if name.startswith("transformer.") else a
        assert torch.equal(made.state_dict()[name], low), name
    with pytest.raises(UserError, match="--to: got 'diffusers', want native for a reward model"):
        convert(path, tmp_path / "other", "diffusers")


def test_a_sharded_adapter_of_a_reward_model_is_refused(tmp_path):
    model = tiny_reward()
    lora.attach(model.transformer, LoraConfig(rank=2))
    sharded(tmp_path / "checkpoint-5", model, PRESET)
    with pytest.raises(UserError, match="checkpoint of the adapter of a reward model, want another one"):
        convert(tmp_path / "checkpoint-5", tmp_path / "made", "native")


# Without a conversion.


def test_readers_take_a_sharded_checkpoint_where_they_are_told_a_path(tmp_path, capsys):
    """As a generator, a reward model and the adapter of one: as what is converted of it."""
    config = write_run(tmp_path)
    base, adapted = {"path": str(tmp_path / "policy"), "preset": None}, with_updates()
    rank = len(next(iter(lora.updates(adapted).values())).down)
    sharded(tmp_path / "checkpoint-5", tiny_model(seed=1), base, averaged(tiny_model(seed=2)))
    reward = {"path": None, "num_heads": 4, "return_type": None}
    sharded(tmp_path / "checkpoint-6", tiny_reward(num_heads=4, add_query=False), base, reward=reward)
    section = {"rank": rank, "alpha": 3 * rank, "path": None}
    sharded(tmp_path / "checkpoint-7", adapted, base, lora=section)
    parts = {"checkpoint-5": "native", "checkpoint-5/ema": "native", "checkpoint-6": "native"}
    for part, to in (parts | {"checkpoint-7": "peft"}).items():
        convert(tmp_path / part, tmp_path / "made" / part.replace("/", "-"), to)
    made, want = tmp_path / "made", load_transformer(tmp_path / "checkpoint-5/ema")
    assert equal(want, load_transformer(made / "checkpoint-5-ema"))
    assert not equal(want, load_transformer(tmp_path / "checkpoint-5"))
    assert equal(load_reward(tmp_path / "checkpoint-6"), load_reward(made / "checkpoint-6"))

    def outcome(*words):
        capsys.readouterr()
        assert main([*words, "train.device=cpu"][: None if "merge-lora" not in words else -1]) == 0
        return capsys.readouterr().out

    for i, folder in enumerate((tmp_path, made)):
        policy, scorer = f"model.path={folder}/checkpoint-5", f"reward.path={folder}/checkpoint-6"
        more = policy, scorer, "reward.num_heads=auto", "reward.return_type=auto"
        outcome("sample", str(config), *more, "sample.count=1", "--out", str(tmp_path / f"sampled-{i}"))
        words = str(folder / "checkpoint-5"), str(folder / "checkpoint-7"), "--out", str(tmp_path / f"m-{i}")
        outcome("merge-lora", *words)
        outcome("train", str(config), *more, "train.steps=1", f"train.out={tmp_path / f'run-{i}'}")
    sampled = [np.load(tmp_path / f"sampled-{i}/sample-00.npy") for i in (0, 1)]
    assert (sampled[0] == sampled[1]).all()
    assert equal(*(load_transformer(tmp_path / f"m-{i}") for i in (0, 1)))
    assert equal(*(load_transformer(tmp_path / f"run-{i}/checkpoint-1") for i in (0, 1)))
    data = str(tmp_path / "val/all.list")
    scores = [outcome("score", str(folder / "checkpoint-6"), data) for folder in (tmp_path, made)]
    assert scores[0] == scores[1] and scores[0]
    plans = [outcome("plan", str(config), f"model.path={f}/checkpoint-5", "--json") for f in (tmp_path, made)]
    assert plans[0].replace(str(tmp_path), "") == plans[1].replace(str(made), "")


def test_a_part_is_read_without_the_rest(tmp_path):
    """Rows of a tensor that is in two pieces, as every rank reads its own."""
    save_transformer(model := tiny_model(), tmp_path / "base")
    sharded(tmp_path / "checkpoint-5", model, {"path": str(tmp_path / "base"), "preset": None})
    weight = model.state_dict()["blocks.0.ffn.0.weight"]
    stored = stored_weights(tmp_path / "checkpoint-5")["blocks.0.ffn.0.weight"]
    n = len(weight)
    for rows in (slice(0, 3), slice(n // 2 - 1, n // 2 + 2), slice(n - 1, None), slice(None), slice(n, n)):
        assert torch.equal(stored.values[rows], weight[rows])
    checksums.write(tmp_path / "checkpoint-5")
    load_transformer(tmp_path / "checkpoint-5")
    flip(tmp_path / "checkpoint-5/shard-00001.safetensors")
    with pytest.raises(UserError, match="shard-00001.safetensors: its checksum is"):
        load_transformer(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5/shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="shard-00001.safetensors: no such file"):
        load_transformer(tmp_path / "checkpoint-5")


def test_what_a_sharded_checkpoint_is_not_is_said(tmp_path):
    base = {"path": None, "preset": "tiny-t2v"}
    rank = len(next(iter(lora.updates(with_updates()).values())).down)
    sharded(tmp_path / "checkpoint-5", tiny_model(), base)
    sharded(tmp_path / "checkpoint-7", with_updates(), base, lora={"rank": rank, "alpha": None, "path": None})
    with pytest.raises(UserError, match="checkpoint-7: got 'an adapter', want a generator or a reward model"):
        load_transformer(tmp_path / "checkpoint-7")
    with pytest.raises(UserError, match="checkpoint-5: got 'a generator', want an adapter"):
        read(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match="checkpoint-5: got 'a generator', want a reward model"):
        load_reward(tmp_path / "checkpoint-5")
    reward = {"path": None, "num_heads": 8, "return_type": "query"}
    sharded(tmp_path / "checkpoint-6", tiny_reward(), base, reward=reward)
    with pytest.raises(UserError, match="reward.mlp: got 'x', want none: .*checkpoint-6 has all parts"):
        load_reward(tmp_path / "checkpoint-6", mlp="x")
    with pytest.raises(UserError, match="reward.num_heads: got 4, want 8 as "):
        load_reward(tmp_path / "checkpoint-6", num_heads=4)


@pytest.mark.parametrize("entry", [
    3, ["float32"], ["float32", 3], [[], [4]], ["float33", [4]], ["int8", [-1]],
])  # fmt: skip
def test_an_index_whose_tensor_has_no_dtype_and_shape(entry, tmp_path):
    sharded(path := tmp_path / "checkpoint-5", tiny_model(), PRESET)
    index = json.loads((path / "shards.json").read_text())
    index["tensors"]["model/head.modulation"] = entry
    (path / "shards.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="shards.json: model/head.modulation: got .*, want a dtype and"):
        load_transformer(path)


@pytest.mark.parametrize("name", ["shards.json", "run.json"])
def test_a_file_that_is_not_as_it_was_written_is_seen_by_every_reader(name, tmp_path):
    made, adapted = PRESET, with_updates()
    rank = len(next(iter(lora.updates(adapted).values())).down)
    section = {"rank": rank, "alpha": None, "path": None}
    sharded(tmp_path / "checkpoint-5", tiny_model(), made)
    sharded(tmp_path / "checkpoint-6", tiny_reward(), made, reward={"path": None})
    sharded(tmp_path / "checkpoint-7", adapted, made, lora=section)
    for number, reader in ((5, load_transformer), (6, load_reward), (7, read)):
        path = tmp_path / f"checkpoint-{number}"
        checksums.write(path)
        with open(path / name, "a") as file:
            file.write(" ")
        to = "peft" if number == 7 else "native"
        for action in (lambda: reader(path), lambda: convert(path, tmp_path / "made", to)):  # noqa: B023
            with pytest.raises(UserError, match=f"checkpoint-{number}/{name}: its checksum is"):
                action()


def test_a_run_is_not_resumed_on_another_part_of_a_sharded_checkpoint(tmp_path, capsys):
    """All parts are in the same files. A checkpoint may move."""
    config, path = write_run(tmp_path), tmp_path / "checkpoint-5"
    model = {"path": str(tmp_path / "policy"), "preset": None}
    sharded(path, tiny_model(seed=1), model, averaged(tiny_model(seed=2)))
    words = "train", str(config), "lora.rank=2", "lora.alpha=2"
    assert main([*words, f"model.path={path}", "train.steps=1"]) == 0
    path = path.rename(tmp_path / "checkpoint-6")
    more = "train.steps=2", "train.resume=true"
    capsys.readouterr()
    assert main([*words, f"model.path={path}/ema", *more]) == 2
    line = one_line(capsys)
    assert f"model.path: got '{path}/ema', want '{tmp_path / 'checkpoint-5'}'" in line
    assert main([*words, f"model.path={path}", *more]) == 0


def test_a_reward_model_is_checked_as_its_reader_checks_it(tmp_path):
    """Two files of one step, and the checksums."""
    save_reward(tiny_reward(), tmp_path / "reward", 7)
    shutil.copytree(tmp_path / "reward", tmp_path / "mixed")
    (tmp_path / "mixed/mlp_step_7.ckpt").rename(tmp_path / "mixed/mlp_step_9.ckpt")
    checksums.write(tmp_path / "reward")
    flip(tmp_path / "reward/mlp_step_7.ckpt")
    for name, needle in (("mixed", "want two files of one step"), ("reward", "7.ckpt: its checksum is")):
        for action in (load_reward, lambda path: convert(path, tmp_path / "made", "native")):
            with pytest.raises(UserError, match=needle):
                action(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_a_reward_model_whose_step_nothing_says_is_of_step_0(tmp_path):
    save_reward(tiny_reward(tiny_config(num_layers=8), blocks=8), path := tmp_path / "reward", 7)
    (path / "reward.json").unlink()
    for part in ("query_attention", "mlp"):
        (path / f"{part}_step_7.ckpt").rename(path / f"{part}.ckpt")
    convert(path, tmp_path / "made", "native")
    assert (tmp_path / "made/mlp_step_0.ckpt").is_file()
    assert equal(load_reward(tmp_path / "made"), load_reward(path))


@pytest.mark.parametrize("official", [False, True])
def test_a_reward_model_of_one_process(official, tmp_path):
    """Ours, and an official one, which has no reward.json, 8 blocks and 8 heads."""
    model = tiny_reward(tiny_config(num_layers=9), blocks=8, num_heads=8 if official else 4)
    save_reward(model, tmp_path / "reward", 7)
    if official:
        (tmp_path / "reward/reward.json").unlink()
    convert(tmp_path / "reward", tmp_path / "made", "native", torch.bfloat16)
    assert (tmp_path / "made/mlp_step_7.ckpt").is_file()
    made = load_reward(tmp_path / "made")
    for name, a in model.state_dict().items():
        low = a.bfloat16() if name.startswith("transformer.") else a
        assert torch.equal(made.state_dict()[name], low), name
