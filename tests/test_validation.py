"""Validation during training: metrics, samples, the best checkpoint."""

import json

import numpy as np
import pytest
from helpers import SHAPE, write_run
from safetensors.torch import load_file
from training_runs import NAME, STATE, assert_equal, content, run, values


def test_validation_writes_metrics_samples_and_the_best_checkpoint(tmp_path):
    config = write_run(tmp_path, train={"steps": 4, "ema": 0.5, "keep": 9}, eval={"every": 1})
    run("train", config, "train.save_every=1")
    out = tmp_path / "run"
    found = values(out, "eval")
    assert list(found) == [0, 1, 2, 3, 4]
    for logged in found.values():
        assert logged.keys() == {
            "eval/sft_loss", "eval/reward_t201", "eval/reward_t1000", "eval/score",
        }  # fmt: skip
        assert logged["eval/score"] == logged["eval/reward_t201"]  # at 1000 there is noise alone
    scores = {step: v["eval/score"] for step, v in found.items()}
    kept = json.loads((out / "best/score.json").read_text())
    assert kept["score"] == max(scores.values())
    assert scores[kept["step"]] == kept["score"]
    source = tmp_path / "policy" if kept["step"] == 0 else out / f"checkpoint-{kept['step']}"
    assert_equal(load_file(out / "best" / NAME), load_file(source / NAME))
    for step in range(5):
        assert [p.name for p in (out / f"samples/step-{step}").iterdir()] == ["sample-00.npy"]
        assert np.load(out / f"samples/step-{step}/sample-00.npy").shape == (1, *SHAPE)
    assert not np.array_equal(*(np.load(out / f"samples/step-{i}/sample-00.npy") for i in (0, 4)))


def test_validation_does_not_disturb_training(tmp_path):
    config = write_run(tmp_path)
    for name, every in {"with": 1, "without": 0}.items():
        run("train", config, f"train.out={tmp_path / name}", f"eval.every={every}", "train.ema=0.5")
    assert values(tmp_path / "with") == values(tmp_path / "without")
    with_, without = (content(tmp_path / n / "checkpoint-2") for n in ("with", "without"))
    for found in (with_, without):
        found[STATE].pop("best")
    assert_equal(with_, without)


def test_validation_measures_the_averaged_weights(tmp_path):
    config = write_run(tmp_path, optim={"lr": 1e-2})
    run("train", config, "train.ema=0.9", "eval.every=2")
    want = values(tmp_path / "run", "eval")[2]
    for name in ("ema", "."):
        path = tmp_path / "run/checkpoint-2" / name
        run(
            "train", config, f"model.path={path}", f"train.out={tmp_path / 'again' / name}",
            "train.steps=1", "eval.every=1",
        )  # fmt: skip
        again = values(tmp_path / "again" / name, "eval")[0]
        assert (again == want) == (name == "ema")
