"""Validation during training: metrics, samples, the best checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import SHAPE, one_line, write_run
from safetensors.torch import load_file, save_file
from training_runs import NAME, STATE, assert_equal, content, run, values

from prfl_engine import train as train_module
from prfl_engine.validation import told_right


def test_who_is_ahead():
    margin = torch.tensor([1e-30, -1e-30, 0.0, 5.0], dtype=torch.float32)
    assert told_right(margin).tolist() == [1, 0, 0.5, 1]


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


def test_validation_does_not_depend_on_its_batches(tmp_path):
    """Noise and levels are those of a sample; sums of another batch round differently."""
    config = write_run(tmp_path, eval={"every": 1, "samples": 5}, train={"steps": 1})
    found = []
    for size in (1, 2, 4):
        run("train", config, f"eval.batch_size={size}", f"train.out={tmp_path / str(size)}")
        found.append(values(tmp_path / str(size), "eval")[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_flow_matching_is_validated_at_levels_over_all_samples(tmp_path, monkeypatch):
    config, levels = write_run(tmp_path, rollout={"shift": 1.0}, train={"steps": 1}), []
    loss = train_module.sft_loss

    def sft_loss(model, batch, noise, sigma, *rest):
        if not torch.is_grad_enabled():
            levels.extend(sigma.tolist())
        return loss(model, batch, noise, sigma, *rest)

    monkeypatch.setattr(train_module, "sft_loss", sft_loss)
    run("train", config, "eval.every=1", "eval.samples=4", "eval.batch_size=1")
    assert levels == pytest.approx([0.125, 0.375, 0.625, 0.875] * 2)


def test_without_a_reward_loss_best_is_picked_by_flow_matching(tmp_path):
    config = write_run(tmp_path, eval={"every": 1}, loss={"weight": 0})
    run("train", config)
    for logged in values(tmp_path / "run", "eval").values():
        assert logged["eval/score"] == -logged["eval/sft_loss"]
        assert 0 < logged["eval/reward_t201"] < 1  # shown all the same


@pytest.mark.parametrize("broken, metric", [
    ("val/latent-1.npy", "sft_loss"), ("policy", "sft_loss"), ("reward", "reward_t201"),
])  # fmt: skip
def test_a_metric_that_is_not_a_number_ends_the_run(broken, metric, tmp_path, capsys):
    config = write_run(tmp_path, eval={"every": 1})
    if broken == "policy":
        overflow(tmp_path / "policy" / NAME, "head.head.bias")
    elif broken == "reward":
        overflow(tmp_path / "reward" / NAME, "blocks.0.ffn.2.bias")
    else:
        np.save(tmp_path / broken, np.full((1, *SHAPE), 3e38, np.float32))
    run("train", config, code=1)
    sample = tmp_path / f"val/{1 if broken.startswith('val') else 0}.json"
    assert re.search(rf"{metric}: got (nan|inf) on {sample}", one_line(capsys))
    assert not (tmp_path / "run/best").exists()


def overflow(path, key):
    """Finite values, too large to compute with; others are refused when they are read."""
    state = load_file(path)
    state[key] = torch.full_like(state[key], 3e38)
    save_file(state, path)
