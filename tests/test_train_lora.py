"""Whole runs with LoRA: what is trained, what checkpoints hold, resuming, sampling, merging."""

import numpy as np
import pytest
from helpers import one_line, tiny_config, write_run
from safetensors.torch import load_file
from test_lora import mixed
from training_runs import assert_equal, content, interrupt, run, values

from prfl_engine import train as train_module
from prfl_engine.metrics import read_metrics

ADAPTER = "adapter_model.safetensors"


def config(tmp_path, **sections):
    sections = {"lora": {"rank": 2}, "eval": {"every": 2}} | sections
    return write_run(tmp_path, **sections)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, monkeypatch, weights):
    path = config(tmp_path, train={"steps": 4, "save_every": 2, "ema": 0.9}, model={"weights_dtype": weights})
    run("train", path, f"train.out={tmp_path}/whole")
    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "sft_loss", 3)
        run("train", path, code=130)
    run("train", path, "train.resume=true")
    assert_equal(content(tmp_path / "run/checkpoint-4"), content(tmp_path / "whole/checkpoint-4"))
    assert values(tmp_path / "run") == values(tmp_path / "whole")


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    """In the names of PEFT, and in those of ComfyUI and diffusers; either file gives the same samples."""
    path = config(tmp_path, train={"ema": 0.5})
    run("train", path)
    for folder in ("checkpoint-2", "checkpoint-2/ema", "best", "best/ema"):
        held = load_file(tmp_path / "run" / folder / ADAPTER)
        assert held and all("lora_" in k for k in held)
        assert not (tmp_path / "run" / folder / "config.json").exists()
    held = load_file(tmp_path / "run/checkpoint-2" / ADAPTER)
    assert all(a.any() for k, a in held.items() if "lora_B" in k)
    shared = tmp_path / "run/checkpoint-2/lora_comfyui.safetensors"
    assert len(load_file(shared)) == len(held) // 2 * 3
    for adapter, out in ((shared.parent, "peft"), (shared, "shared")):
        run("sample", path, f"lora.path={adapter}", "--out", str(tmp_path / out))
    one, other = (np.load(tmp_path / out / "sample-00.npy") for out in ("peft", "shared"))
    np.testing.assert_array_equal(one, other)


def test_an_adapter_is_trained_on_sampled_and_merged(tmp_path):
    path = config(tmp_path)
    run("train", path, "train.steps=3")
    adapter = tmp_path / "run/checkpoint-3"
    run("train", path, f"lora.path={adapter}", f"train.out={tmp_path}/more", "eval.every=1", "train.steps=1")
    first = [r["values"] for r in read_metrics(tmp_path / "more") if "eval/score" in r["values"]][0]
    last = [r["values"] for r in read_metrics(tmp_path / "run") if "eval/score" in r["values"]][-1]
    assert first["eval/score"] == pytest.approx(last["eval/score"], abs=1e-6)

    run("sample", path, f"lora.path={adapter}", "--out", str(tmp_path / "adapted"))
    run("merge-lora", tmp_path / "policy", str(adapter), "--out", str(tmp_path / "merged"))
    run("sample", path, f"model.path={tmp_path}/merged", "--out", str(tmp_path / "again"))
    run("sample", path, "--out", str(tmp_path / "plain"))
    adapted, again, plain = (np.load(tmp_path / n / "sample-00.npy") for n in ("adapted", "again", "plain"))
    np.testing.assert_allclose(adapted, again, rtol=1e-4, atol=1e-5)
    assert abs(adapted - plain).max() > 1e-4


def test_a_run_from_layers_of_their_own_ranks_goes_on_to_the_bit(tmp_path, monkeypatch):
    ranks = {k: rank for k, (rank, _) in mixed(tmp_path / "adapter", tiny_config()).items()}
    lora = {"rank": 3, "alpha": 6.0, "path": str(tmp_path / "adapter")}
    path = config(tmp_path, lora=lora, train={"steps": 4, "save_every": 2, "ema": 0.9})
    run("train", path, f"train.out={tmp_path}/whole")
    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "sft_loss", 3)
        run("train", path, code=130)
    run("train", path, "train.resume=true")
    last = content(tmp_path / "run/checkpoint-4")
    assert_equal(last, content(tmp_path / "whole/checkpoint-4"))
    start = load_file(tmp_path / "adapter" / ADAPTER)
    for key, a in load_file(tmp_path / "run/checkpoint-4" / ADAPTER).items():
        assert a.shape == start[key].shape and not a.equal(start[key])
        assert ranks[key.removeprefix("base_model.model.").rpartition(".lora_")[0]] in a.shape


@pytest.mark.parametrize(
    "override, message",
    [
        ("lora.rank=-1", "lora.rank: got -1"),
        ("lora.rank=1099511627776", "lora.rank: got 1099511627776, want a whole number in [0, 65536]"),
        ("lora.alpha=0", "lora.alpha: got 0"),
        ("lora.targets=[nowhere]", "lora.targets: got 'nowhere'"),
        ("lora.path=nowhere", "nowhere: no such file, want a folder with adapter_model.safetensors"),
        ("lora.rank=0 lora.path=nowhere", "lora.path: got 'nowhere', want null with lora.rank 0"),
        ("model.chunk=0", "model.chunk: got 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, override, message):
    run("train", config(tmp_path), *override.split(), code=2)
    assert message in one_line(capsys)


def test_chunks_change_rounding_alone(tmp_path):
    path = write_run(tmp_path)
    run("train", path)
    run("train", path, "model.chunk=3", f"train.out={tmp_path}/chunks")
    a, b = values(tmp_path / "run"), values(tmp_path / "chunks")
    assert all(b[s] == pytest.approx(a[s], rel=1e-4) for s in a) and a != b
