"""Training and evaluating the reward model, by the command line on tiny models."""

import numpy as np
import pytest
import torch
from helpers import one_line
from safetensors.torch import load_file
from training_runs import NAME, assert_equal, content, interrupt, reward_run, run, values

from prfl_engine import lora, train_reward
from prfl_engine.checkpoint import load_reward, load_transformer
from prfl_engine.data import Reader, fixed_batches, noise_like, read_lists


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
        x = 0.8 * batch.latent + 0.2 * noise_like(batch.latent, 0)
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
        assert logged["eval/score"] == pytest.approx(np.mean(accuracies))
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
    assert accuracy[-1] == pytest.approx(np.mean(accuracy[:-1]), abs=1e-4)


@pytest.mark.parametrize("start", ["generator", "reward"])
def test_lora_trains_updates_and_heads(start, tmp_path, capsys):
    """What is saved is the adapter and, with it in the weights, a reward model for every reader."""
    given = {"path": str(tmp_path / "reward")} if start == "reward" else {}
    config = reward_run(tmp_path, "ce", reward=given, train={"steps": 2}, lora={"rank": 2, "alpha": 8.0})
    run("train-reward", config, "eval.every=2", "optim.lr=1e-2")
    saved = tmp_path / "run/checkpoint-2"
    updates, _ = lora.read(saved / "adapter")
    assert len(updates) == 10 and all(low.scale == 4 and low.up.any() for low in updates.values())
    folder = tmp_path / ("policy" if start == "generator" else "reward")
    base = load_transformer(folder, trunk=True, blocks=1)
    want = lora.merge(base, saved / "adapter").state_dict()
    found = load_file(saved / NAME)
    assert found.keys() == want.keys() and all(a.dtype == torch.float32 for a in found.values())
    assert_equal(found, {k: want[k] for k in found})
    capsys.readouterr()
    run("eval-reward", config, f"reward.path={saved}")
    mean = float(capsys.readouterr().out.splitlines()[-1].split()[-1])
    assert mean == pytest.approx(values(tmp_path / "run", "eval")[2]["eval/score"], abs=1e-4)
    if start == "generator":
        data = f"data.train=[{tmp_path}/data/all.list]"
        run("train", config, f"reward.path={saved}", f"train.out={tmp_path}/prfl", "lora.rank=0", data)


def test_a_stopped_run_with_lora_goes_on_to_the_bit(tmp_path, monkeypatch):
    config = reward_run(
        tmp_path, "ce", train={"steps": 4, "save_every": 2, "ema": 0.9}, lora={"rank": 2},
        model={"weights_dtype": "bfloat16"},
    )  # fmt: skip
    run("train-reward", config, f"train.out={tmp_path}/whole")
    with monkeypatch.context() as patch:
        interrupt(patch, train_reward, "noisy_reward", 4)
        run("train-reward", config, code=130)
    run("train-reward", config, "train.resume=true")
    one, other = (content(tmp_path / name / "checkpoint-4") for name in ("run", "whole"))
    assert_equal(one, other)
    assert "ema/adapter/adapter_model.safetensors" in one and one[NAME].keys() == one[f"ema/{NAME}"].keys()
    assert values(tmp_path / "run") == values(tmp_path / "whole")
    start = load_reward(tmp_path / "run/checkpoint-2", feature_layer=1, num_heads=8).mlp.fc1.weight
    assert not torch.equal(start, load_reward(tmp_path / "run/checkpoint-4", feature_layer=1).mlp.fc1.weight)


def test_an_adapter_without_lora_is_refused(tmp_path, capsys):
    run("train-reward", reward_run(tmp_path, "ce"), "lora.path=somewhere", code=2)
    assert "lora.path: got 'somewhere', want null with lora.rank 0" in one_line(capsys)
    assert not (tmp_path / "run").exists()
