"""Runs that stop: going on to the bit, what a used folder keeps, what ends a run."""

import numpy as np
import pytest
import torch
import yaml
from helpers import one_line, write_run
from safetensors.torch import load_file
from training_runs import NAME, assert_equal, content, interrupt, reward_run, run, values

from prfl_engine import train_reward as train_reward_module
from prfl_engine.rollout import fresh as fresh_module


@pytest.mark.parametrize("model_type", ["t2v", "i2v-a14b"])
def test_a_stopped_run_goes_on_to_the_bit(model_type, tmp_path, monkeypatch):
    config = write_run(
        tmp_path, model_type,
        optim={"schedule": "cosine", "warmup": 1},
        train={"steps": 4, "save_every": 2, "ema": 0.9, "accumulate": 2},
        data={"text_dropout": 0.3},
        eval={"every": 2},
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, f"train.out={whole}")
    with monkeypatch.context() as patch:
        # Two calls a step: the fourth step begins with the seventh.
        interrupt(patch, fresh_module, "Grading", 7)
        run("train", config, f"train.out={cut}", code=130)
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert max(values(cut)) == 3  # logged after the checkpoint; to be cut back
    run("train", config, f"train.out={cut}", "train.resume=true")

    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))
    assert_equal(content(cut / "checkpoint-2"), content(whole / "checkpoint-2"))
    for prefix in ("train", "eval"):
        assert values(cut, prefix) == values(whole, prefix)
    assert list(values(cut)) == [1, 2, 3, 4]
    assert list(values(cut, "eval")) == [0, 2, 4]
    # And the run did something: weights moved, the average lags behind them.
    last = content(whole / "checkpoint-4")
    before, after, ema = load_file(tmp_path / "policy" / NAME), last[NAME], last[f"ema/{NAME}"]
    for key in before:
        assert not torch.equal(before[key], after[key]), key
        assert (ema[key] - before[key]).norm() < (after[key] - before[key]).norm(), key


def test_stopped_reward_training_goes_on_to_the_bit(tmp_path, monkeypatch):
    config = reward_run(
        tmp_path, "ce", reward={"dropout": 0.3}, train={"steps": 4, "save_every": 2, "ema": 0.9}
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train-reward", config, f"train.out={whole}")
    with monkeypatch.context() as patch:
        interrupt(patch, train_reward_module, "cross_entropy", 4)
        run("train-reward", config, f"train.out={cut}", code=130)
    run("train-reward", config, f"train.out={cut}", "train.resume=true")
    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))
    assert values(cut) == values(whole)
    assert list(values(cut)) == [1, 2, 3, 4]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = write_run(tmp_path)
    run("train", config)
    before = content(tmp_path / "run/checkpoint-2")
    run("train", config, "train.resume=true")
    assert_equal(content(tmp_path / "run/checkpoint-2"), before)
    assert list(values(tmp_path / "run")) == [1, 2]


def test_old_checkpoints_are_removed(tmp_path):
    config = write_run(tmp_path, train={"steps": 5, "save_every": 1, "keep": 2})
    run("train", config, "loss.weight=0")
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-4", "checkpoint-5",
    ]  # fmt: skip


def test_a_used_folder_is_refused(tmp_path, capsys):
    config = write_run(tmp_path)
    run("train", config, "train.steps=1")
    before = content(tmp_path / "run/checkpoint-1")
    capsys.readouterr()
    run("train", config, "train.steps=2", code=2)
    line = one_line(capsys)
    assert "train.out" in line and "train.resume" in line
    assert_equal(content(tmp_path / "run/checkpoint-1"), before)
    config_before = (tmp_path / "run/config.yaml").read_text()
    assert yaml.safe_load(config_before)["train"]["steps"] == 1


def test_a_gradient_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    config = write_run(tmp_path)
    run("train", config)
    out = tmp_path / "run"
    before = {p: p.read_bytes() for p in out.glob("checkpoint-2/**/*") if p.is_file()}
    for i in range(4):
        latent = np.load(tmp_path / f"data/latent-{i}.npy")
        latent[0, 3, 0, 1, 2] = 3e38  # its square is infinite
        np.save(tmp_path / f"data/latent-{i}.npy", latent)
    capsys.readouterr()
    run("train", config, "train.resume=true", "train.steps=4", "train.save_every=1", code=1)
    line = one_line(capsys)
    assert "step 2" in line and "nan" in line
    assert {p: p.read_bytes() for p in out.glob("checkpoint-*/**/*") if p.is_file()} == before
    assert list(values(out)) == [1, 2]
