"""Whole runs of the command line on tiny models: resuming, accumulating, learning, stopping."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers import SHAPE, one_line, relative, tiny_config, write_data, write_run
from safetensors.torch import load_file

from prfl_engine import chain, flow
from prfl_engine import train as train_module
from prfl_engine import train_reward as train_reward_module
from prfl_engine.checkpoint import load_reward
from prfl_engine.cli import main
from prfl_engine.config import OptimConfig
from prfl_engine.data import Reader, fixed_batches, noise_like, read_lists
from prfl_engine.metrics import read_metrics
from prfl_engine.optim import EMA, lr_factor

NAME = "diffusion_pytorch_model.safetensors"
STATE = "training_state.pt"


def run(command, config, *overrides, code=0):
    assert main([command, str(config), *overrides]) == code


def values(out, prefix="train"):
    """{step: {name: value}} of the metrics of a run; no step comes twice."""
    found = {}
    for record in read_metrics(out):
        part = {k: v for k, v in record["values"].items() if k.startswith(prefix)}
        if part:
            assert record["step"] not in found, record
            found[record["step"]] = part
    return found


def assert_equal(a, b, where=""):
    """The same tensors and numbers to the bit, through dicts and lists."""
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_equal(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def content(folder):
    """Everything of a checkpoint that training goes on from."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix in (".ckpt", ".pt"):
            found[name] = torch.load(path, weights_only=True)
    found[STATE].pop("rng")
    return found


def interrupt(monkeypatch, module, name, call):
    """The function `name` of a module is interrupted at its call-th call, as by Ctrl-C."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, function)


# Resuming.


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
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
        interrupt(patch, train_module, "graded_rewards", 7)
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


@pytest.mark.parametrize("dropout, ema", [(0.0, 0.9), (0.3, 0.0), (0.3, 0.9)])
def test_stopped_reward_training_goes_on_to_the_bit(dropout, ema, tmp_path, monkeypatch):
    config = reward_run(
        tmp_path, "ce", reward={"dropout": dropout},
        train={"steps": 4, "save_every": 2, "ema": ema},
    )  # fmt: skip
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


# One step.


def gradient_sum(out, step):
    """The first moment of AdamW: 0.1 times the gradient, plus 0.9 times what it was before."""
    state = torch.load(out / f"checkpoint-{step}" / STATE, weights_only=True)["optimizer"]["state"]
    return torch.cat([state[i]["exp_avg"].flatten().double() for i in range(len(state))])


FROZEN = ("optim.lr=0", "optim.weight_decay=0", "optim.clip=1e9", "train.save_every=1")


def test_accumulated_gradients_are_the_mean_of_their_micro_batches(tmp_path):
    config = write_run(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    run("train", config, f"train.out={one}", "train.steps=2", *FROZEN)
    run("train", config, f"train.out={two}", "train.steps=1", "train.accumulate=2", *FROZEN)
    # With a learning rate of 0 the second step of the first run sees the weights of the first.
    first = gradient_sum(one, 1) / 0.1
    second = (gradient_sum(one, 2) - 0.9 * gradient_sum(one, 1)) / 0.1
    assert relative(second, first) > 0.1
    mean = (first + second) / 2
    # Float32 sums in another order.
    assert relative(gradient_sum(two, 1) / 0.1, mean) < 1e-5
    logged = values(two)[1]
    assert logged["train/grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-5)
    for name in ("train/sft_loss", "train/reward_loss", "train/reward"):
        parts = [values(one)[i][name] for i in (1, 2)]
        assert logged[name] == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_both_losses_make_one_gradient(tmp_path):
    config = write_run(tmp_path)
    moments = {}
    for name, weights in {"both": (0.1, 1), "sft": (0, 1), "reward": (0.1, 0)}.items():
        out = tmp_path / name
        run(
            "train", config, f"train.out={out}", "train.steps=1", *FROZEN,
            f"loss.weight={weights[0]}", f"loss.sft_weight={weights[1]}",
        )  # fmt: skip
        moments[name] = gradient_sum(out, 1)
        assert moments[name].any()
    assert relative(moments["sft"] + moments["reward"], moments["both"]) < 1e-5


def test_the_whole_gradient_is_clipped_once(tmp_path):
    config = write_run(tmp_path)
    run("train", config, "train.steps=1", "train.accumulate=3", "optim.clip=0.01")
    out = tmp_path / "run"
    assert values(out)[1]["train/grad_norm"] > 0.01
    assert gradient_sum(out, 1).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_first_adamw_step(tmp_path):
    config = write_run(tmp_path)
    run("train", config, "train.steps=1", "optim.lr=1e-3", "optim.weight_decay=0.1")
    before, after = (
        load_file(tmp_path / "policy" / NAME),
        load_file(tmp_path / "run/checkpoint-1" / NAME),
    )
    # m / sqrt(v) is the sign of the gradient in the first step.
    for key, old in before.items():
        update = (after[key] - old * (1 - 1e-3 * 0.1)) / 1e-3
        # Rounding of a weight near 1 by 6e-8 is 6e-5 of a step; small gradients meet eps.
        assert update.abs().max() < 1.001, key
        assert update.abs().median() == pytest.approx(1, abs=1e-2), key


def test_levels_and_indices_are_drawn_for_every_sample(tmp_path, monkeypatch):
    config = write_run(tmp_path, rollout={"steps": 6})
    levels, indices = [], []
    sft_loss, graded_rewards = train_module.sft_loss, train_module.graded_rewards

    def sft(model, batch, noise, sigma):
        levels.extend(sigma.tolist())
        return sft_loss(model, batch, noise, sigma)

    def graded(model, reward, schedule, batch, noise, drawn, config, stretches):
        indices.extend(drawn.flatten().tolist())
        return graded_rewards(model, reward, schedule, batch, noise, drawn, config)

    monkeypatch.setattr(train_module, "sft_loss", sft)
    monkeypatch.setattr(train_module, "graded_rewards", graded)
    run("train", config, "train.steps=10", "train.accumulate=2", "data.batch_size=2")
    assert len(levels) == len(indices) == 40
    # 40 of 1000 levels: 0.8 coincidences on average.
    assert len(set(levels)) >= 35
    assert set(levels) <= set(flow.train_sigmas(5.0).tolist())
    # The last of six steps is never graded; one of five is missed with a chance of 5 * 0.8^40.
    assert set(indices) == set(range(5))
    assert indices[::2] != indices[1::2]


def test_the_moving_average():
    module = torch.nn.Linear(3, 2).double()
    ema, want = EMA(module, 0.9), module.weight.detach().clone()
    for _ in range(3):
        module.weight.data += torch.randn(2, 3)
        ema.update()
        want = 0.9 * want + 0.1 * module.weight.detach()
    own = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        torch.testing.assert_close(module.weight.detach(), want, rtol=1e-6, atol=1e-6)
        raise RuntimeError("inside")
    assert torch.equal(module.weight, own)


def test_learning_rates():
    cosine = OptimConfig(schedule="cosine", warmup=4)
    got = [lr_factor(i, 12, cosine) for i in range(12)]
    want = [(i + 1) / 4 for i in range(4)]
    want += [0.5 + 0.5 * np.cos(np.pi * i / 8) for i in range(8)]
    assert got == pytest.approx(want)
    constant = OptimConfig(warmup=2)
    assert [lr_factor(i, 4, constant) for i in range(4)] == [0.5, 1, 1, 1]


def test_the_learning_rate_of_a_run(tmp_path):
    config = write_run(tmp_path, optim={"warmup": 2, "schedule": "cosine"}, train={"steps": 4})
    run("train", config, "loss.weight=0")
    rates = [v["train/lr"] for v in values(tmp_path / "run").values()]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_weight_0_computes_no_rollout(tmp_path, monkeypatch):
    config = write_run(tmp_path)

    def rollout(*args, **kwargs):
        raise AssertionError("a rollout")

    monkeypatch.setattr(chain, "Chain", rollout)
    run("train", config, "loss.weight=0", "reward.path=null")
    logged = values(tmp_path / "run")
    assert all("train/sft_loss" in v and "train/reward" not in v for v in logged.values())
    with pytest.raises(AssertionError, match="a rollout"):
        main(["train", str(config), f"train.out={tmp_path / 'other'}"])


def test_sft_weight_0_computes_no_flow_matching(tmp_path, monkeypatch):
    config = write_run(tmp_path)
    monkeypatch.setattr(train_module, "sft_loss", None)
    run("train", config, "loss.sft_weight=0")
    assert all("train/sft_loss" not in v for v in values(tmp_path / "run").values())


def test_prfl_raises_the_reward(tmp_path):
    config = write_run(
        tmp_path, optim={"lr": 3e-3}, train={"steps": 30}, data={"text_dropout": 0.0}
    )
    run("train", config, "loss.sft_weight=0", "eval.every=30", "rollout.range=late")
    found = values(tmp_path / "run", "eval")
    assert found[30]["eval/score"] > found[0]["eval/score"] + 0.01


def test_a_random_generator_of_a_preset_learns_flow_matching(tmp_path):
    config = tiny_config(text_dim=64, text_len=16)
    data = write_data(tmp_path / "data", config, 2, latents=lambda i, a: np.ones_like(a))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "model": {"preset": "tiny-t2v", "compute_dtype": "float32"},
        "data": {"train": [str(data)], "text_dropout": 0.0, "batch_size": 2, "num_workers": 0},
        "optim": {"lr": 3e-3}, "loss": {"weight": 0},
        "train": {"out": str(tmp_path / "run"), "device": "cpu", "tensorboard": False, "steps": 40},
    }))  # fmt: skip
    run("train", path)
    losses = [v["train/sft_loss"] for v in values(tmp_path / "run").values()]
    # It starts from velocity 0: E (eps - 1)^2 = 2 on average.
    assert np.mean(losses[:3]) == pytest.approx(2, abs=0.5)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


# Validation.


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
        mean = (logged["eval/reward_t201"] + logged["eval/reward_t1000"]) / 2
        assert logged["eval/score"] == pytest.approx(mean)
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


# Stopping.


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
        latent[0, 3, 0, 1, 2] = np.nan
        np.save(tmp_path / f"data/latent-{i}.npy", latent)
    capsys.readouterr()
    run("train", config, "train.resume=true", "train.steps=4", "train.save_every=1", code=1)
    line = one_line(capsys)
    assert "step 2" in line and "nan" in line
    assert {p: p.read_bytes() for p in out.glob("checkpoint-*/**/*") if p.is_file()} == before
    assert list(values(out)) == [1, 2]


# The reward model.


def reward_run(tmp_path, loss, **sections):
    """Good latents are brighter than poor ones, by as much as the noise varies."""

    def latents(good):
        return lambda i, a: 0.3 * a + (1.5 if good(i) else -1.5)

    def labels(good):
        return lambda i: dict.fromkeys(("physics_quality", "human_quality"), int(good(i)))

    kinds = {"mixed": lambda i: i % 2, "win": lambda i: 1, "lose": lambda i: 0}
    config, lists = tiny_config(), {}
    for n, (name, good) in enumerate(kinds.items()):
        lists[name] = str(
            write_data(
                tmp_path / name, config, 12, seed=n, latents=latents(good), labels=labels(good)
            )
        )
    null = str(tmp_path / "mixed/null.npy")
    data = {
        "train": [lists["mixed" if loss == "ce" else "win"]],
        "batch_size": 4,
        "null_text": null,
    }
    path = write_run(
        tmp_path,
        reward={"path": None, "loss": loss} | sections.pop("reward", {}),
        data=data | {"lose": [lists["lose"]], "val": [lists["mixed"]]},
        eval={"timesteps": [201, 400, 600, 800, 1000], "batch_size": 5},
        optim={"lr": 1e-3, "lr_head": 1e-3},
        **sections,
    )
    return path


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


# Sampling.


def test_sample_writes_latents_in_the_layout_of_the_data(tmp_path, capsys):
    config, out = write_run(tmp_path), tmp_path / "samples"
    run("sample", config, "sample.count=4", "--out", str(out))
    names = [f"sample-{i:02d}.npy" for i in range(4)]
    assert sorted(p.name for p in out.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(out / n) for n in names]
    latents = [np.load(out / n) for n in names]
    assert all(a.shape == (1, *SHAPE) and a.dtype == np.float32 for a in latents)
    assert not np.array_equal(latents[0], latents[3])  # prompt 0 again, from other noise
    again = tmp_path / "again"
    run("sample", config, "sample.count=4", "--out", str(again))
    assert all(np.array_equal(np.load(again / n), a) for n, a in zip(names, latents, strict=True))


def test_guidance(tmp_path):
    """Guidance against the prompt itself is none; against another text it moves the sample."""
    config = write_run(tmp_path)
    val = tmp_path / "val"
    same = [f"data.negative_text={val / 'short-0.npy'}", "sample.count=1"]
    other = [f"data.negative_text={val / 'null.npy'}", "sample.count=1"]
    runs = {
        "plain": same,
        "same": [*same, "sample.guidance=5"],
        "other": [*other, "sample.guidance=5"],
    }
    found = {}
    for name, overrides in runs.items():
        run("sample", config, *overrides, "--out", str(tmp_path / name))
        found[name] = torch.from_numpy(np.load(tmp_path / name / "sample-00.npy"))
    assert relative(found["same"], found["plain"]) < 1e-5
    assert relative(found["other"], found["plain"]) > 1e-3


def test_overrides_may_stand_behind_options(tmp_path):
    config, out = write_run(tmp_path), tmp_path / "samples"
    run("sample", config, "--out", str(out), "sample.count=1")
    assert [p.name for p in out.iterdir()] == ["sample-00.npy"]


def test_sample_refuses_an_existing_folder(tmp_path, capsys):
    config = write_run(tmp_path)
    (tmp_path / "samples").mkdir()
    run("sample", config, "--out", str(tmp_path / "samples"), code=2)
    assert str(tmp_path / "samples") in one_line(capsys)
    assert list((tmp_path / "samples").iterdir()) == []
