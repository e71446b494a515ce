"""Training and evaluating the reward model, by the command line on tiny models."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import NAME, assert_equal, reward_run, run, values

from prfl_engine.checkpoint import load_reward
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.seeds import Purpose, noise_like


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_reward_training_learns_to_tell_good_from_poor(loss, tmp_path, capsys):
    config = reward_run(tmp_path, loss, train={"steps": 40})
    run("train-reward", config)
    out = tmp_path / "run"
    logged = list(values(out).values())
    assert np.mean([v["train/loss"] for v in logged[-5:]]) < 0.5 * logged[0]["train/loss"]
    assert np.mean([v["train/accuracy"] for v in logged[-5:]]) > 0.75
    model = load_reward(out / "checkpoint-40", feature_layer=1).freeze()
    reader = Reader(model.transformer.config, "motion_quality")

    def logits(name):
        (batch,) = fixed_batches(
            reader, read_lists([str(tmp_path / name / "all.list")], name), 12, "cpu"
        )
        x = 0.8 * batch.latent + 0.2 * noise_like(batch.latent, Purpose.SAMPLE, 0, 0)
        return model(x, torch.full((12,), 200.0), batch.text)

    assert (logits("win") > logits("lose")).float().mean() > 0.9
    if loss == "ce":
        capsys.readouterr()
        run("eval-reward", config, f"reward.path={out / 'checkpoint-40'}")
        accuracy = [float(s.split()[-1]) for s in capsys.readouterr().out.splitlines()]
        assert accuracy[0] > 0.9


def test_reward_training_starts_from_the_generator(tmp_path):
    config = reward_run(tmp_path, "ce")
    run("train-reward", config, "train.steps=1", "optim.lr=0", "optim.weight_decay=0")
    policy, trunk = (
        load_file(tmp_path / "policy" / NAME),
        load_file(tmp_path / "run/checkpoint-1" / NAME),
    )
    assert trunk.keys() == {k for k in policy if not k.startswith(("head.", "blocks.1."))}
    assert_equal(trunk, {k: policy[k] for k in trunk})


def test_reward_validation(tmp_path):
    config = reward_run(tmp_path, "ce", train={"steps": 2})
    run("train-reward", config, "eval.every=1")
    for logged in values(tmp_path / "run", "eval").values():
        accuracies = [logged[f"eval/accuracy_t{t}"] for t in (201, 400, 600, 800, 1000)]
        assert logged["eval/score"] == pytest.approx(np.mean(accuracies[:-1]))  # at 1000 there is noise alone
    best = load_reward(tmp_path / "run/best", feature_layer=1)
    assert len(best.transformer.blocks) == 1


def test_eval_reward_prints_every_accuracy_and_their_mean(tmp_path, capsys):
    config = reward_run(tmp_path, "ce")
    run("eval-reward", config, f"reward.path={tmp_path / 'reward'}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    accuracy = [float(s.split()[-1]) for s in lines]
    for t, line, value in zip((201, 400, 600, 800, 1000), lines, accuracy, strict=False):
        assert line.split()[2] == str(t)
        assert 0 <= value <= 1
        assert 12 * value == pytest.approx(round(12 * value), abs=1e-3)
    assert lines[-1].startswith("mean")
    assert accuracy[-1] == pytest.approx(np.mean(accuracy[:4]), abs=1e-4)
