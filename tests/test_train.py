"""Training by the command line on tiny models: one step by hand, what is drawn, learning."""

import numpy as np
import pytest
import torch
import yaml
from helpers import relative, tiny_config, write_data, write_run
from safetensors.torch import load_file
from training_runs import NAME, STATE, run, values

from prfl_engine import chain, flow
from prfl_engine import train as train_module
from prfl_engine.checks import unused
from prfl_engine.cli import main
from prfl_engine.config import OptimConfig, load_config
from prfl_engine.optim.optimizer import EMA, lr_factor
from prfl_engine.rollout import fresh as fresh_module


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
    sft_loss = train_module.sft_loss

    def sft(model, batch, noise, sigma, *rest):
        levels.extend(sigma.tolist())
        return sft_loss(model, batch, noise, sigma, *rest)

    class Seen(fresh_module.Grading):
        def windows(self, noise, drawn):
            indices.extend(drawn.flatten().tolist())
            return super().windows(noise, drawn)

    monkeypatch.setattr(train_module, "sft_loss", sft)
    monkeypatch.setattr(fresh_module, "Grading", Seen)
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


@pytest.mark.parametrize("given, lines", [
    (["loss.weight=0", "rollout.mode=persistent", "rollout.pool=4", "chain.window=2"],
     ["rollout.mode and rollout.pool and chain.window: with loss.weight 0 this changes nothing"]),
    (["loss.weight=0", "rollout.guidance=2", "rollout.seeds=2", "rollout.seeds_step=1",
      "rollout.seeds_keep=lowest", "chain.guidance=3", "chain.unconditional=gradient"],
     ["rollout.guidance and rollout.seeds and rollout.seeds_step and rollout.seeds_keep and chain.guidance "
      "and chain.unconditional: with loss.weight 0 this changes nothing"]),
    (["rollout.max_drift=0.1", "chain.detach_input=true", "loss.form=log", "loss.target=1", "lora.alpha=3"], [
        "rollout.max_drift: with fresh rollouts by the generator as it is this changes nothing",
        "chain.detach_input: with chain.window 1 this changes nothing",
        "loss.target: with loss.form log this changes nothing",
        "lora.alpha: with lora.rank 0 this changes nothing",
    ]),
    (["reward.more=[{name: a, path: b, form: linear, target: 1}]"],
     ["reward.more a.target: with its form linear this changes nothing"]),
    (["rollout.max_drift=0.1", "rollout.cache=0.1", "loss.target=1", "chain.window=2",
      "chain.detach_input=true", "lora.rank=1", "lora.alpha=3"], []),
])  # fmt: skip
def test_what_a_run_does_not_read_is_named(given, lines):
    assert unused(load_config(None, given)) == lines


def test_a_control_without_rewards_says_what_it_does_not_read(tmp_path, capsys):
    given = "rollout.samples=2", "rollout.guidance=2", "rollout.seeds=2", "chain.guidance=3"
    run("train", write_run(tmp_path), "loss.weight=0", *given, "train.steps=1")
    names = " and ".join(field.split("=")[0] for field in given)
    line = f"prfl: {names}: with loss.weight 0 this changes nothing\n"
    assert line in capsys.readouterr().err


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
