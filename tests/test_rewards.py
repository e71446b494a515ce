"""Several rewards, and several draws of noise: their gradient, metrics, validation, and what is refused."""

import re

import pytest
import torch
from helpers import (
    LiteralUniPC,
    one_line,
    random_batch,
    relative,
    rows,
    tiny_config,
    tiny_model,
    tiny_reward,
    write_run,
)
from training_runs import goes_on, run, values

from prfl_engine import flow
from prfl_engine.config import ChainConfig, LossConfig, MoreReward
from prfl_engine.model.checkpoint import save_reward
from prfl_engine.objectives import Grader, Grading, reward_loss
from prfl_engine.planner.command import predict
from prfl_engine.planner.sharded import Shards, exchanged_bytes
from prfl_engine.planner.standing import models_of

SCHEDULE = flow.make_schedule("unipc", 6, 5.0)
INDEX = torch.tensor([3, 1])
FORMS = LossConfig(weight=0.7), MoreReward("clean", "there", weight=0.3, form="log")


def test_more_noise_has_the_distribution_of_its_level():
    """Coefficients of x_0 and of the two noises at the level, from plain arithmetic."""
    sigma, to = torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0.2, 0.8, 1.0]).double()
    one, none = torch.ones(3, 1).double(), torch.zeros(3, 1).double()
    keep = flow.add_more_noise(one, none, sigma, to).flatten()
    more = flow.add_more_noise(none, one, sigma, to).flatten()
    torch.testing.assert_close(keep * (1 - sigma), 1 - to)
    torch.testing.assert_close((keep * sigma) ** 2 + more**2, to**2)
    assert keep[0] == 1 and more[0] == 0


def by_hand(model, rewards, batch, noise, draw, draws, window):
    """(losses by reward, gradient of their sum) by a literal sampler and autograd through the last steps."""
    losses = [[] for _ in rewards]
    for b, index in enumerate(INDEX.tolist()):
        one, literal = rows(batch, slice(b, b + 1)), LiteralUniPC(SCHEDULE.sigmas.tolist())
        x, own = noise[b : b + 1], draw[b : b + 1]
        for i in range(index + 1):
            with torch.set_grad_enabled(i > index - window):
                t = SCHEDULE.timesteps[i : i + 1]
                x = literal.step(x, model(x, t, model.embed_context(one.text, one.clip), one.condition))
        s = SCHEDULE.sigmas[index + 1].item()
        for found, reward, form in zip(losses, rewards, FORMS, strict=False):
            for j in range(draws):
                to = s + (1 - s) * j / draws
                keep = (1 - to) / (1 - s)
                noisy = keep * x + (to**2 - keep**2 * s**2) ** 0.5 * own if j else x
                t = torch.tensor([1000 * to]) if j else SCHEDULE.timesteps[index + 1][None]
                r = torch.sigmoid(reward(noisy, t, one.text, one.clip, one.condition))
                found.append(form.weight * (2 - r if form.form == "hinge" else -r.log()))
    means = [torch.cat(found).mean() for found in losses]
    sum(means).backward()
    return torch.stack(means).detach(), taken(model)


def taken(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind, several, draws, window", [
    ("t2v", True, 1, 2), ("t2v", False, 3, 1), ("i2v", True, 3, 2),
])  # fmt: skip
def test_the_gradient_is_that_of_plain_code(kind, several, draws, window):
    """Of samples at different steps; the rewards differ in depth and in the form of their losses."""
    config = tiny_config(kind)
    model, batch = tiny_model(config).double(), random_batch(config, 2, dtype=torch.float64)
    first, second = (tiny_reward(config, seed, blocks=n).double().freeze() for seed, n in ((1, 1), (2, 2)))
    noise, draw = torch.randn_like(batch.latent), torch.randn_like(batch.latent)
    more = (second,) if several else ()
    grader = Grader(model, first, SCHEDULE, ChainConfig(window), more=more, draws=draws)
    (graded,) = Grading(grader, batch, None, lambda x: draw).windows(noise, INDEX[None])
    assert [len(logits) for logits in graded.logits] == [2 * draws] * (1 + several)
    losses = [reward_loss(own, form).mean() for own, form in zip(graded.logits, FORMS, strict=False)]
    graded.backward(sum(losses))
    assert not any(logits.requires_grad for logits in graded.logits)
    got = taken(model)
    want, gradient = by_hand(model, grader.rewards, batch, noise, draw, draws, window)
    torch.testing.assert_close(torch.stack(losses).detach(), want, rtol=1e-6, atol=1e-9)
    # Timesteps are float32 numbers.
    assert relative(got, gradient) < (1e-9 if draws == 1 else 1e-5)


def moments(out):
    state = torch.load(out / "checkpoint-1/training_state.pt", weights_only=True)["optimizer"]["state"]
    return torch.cat([part["exp_avg"].flatten().double() for part in state.values()])


def other(folder, **fields):
    """reward.more with a reward in the folder."""
    listed = ", ".join(f"{k}: {v}" for k, v in ({"name": "other", "path": folder} | fields).items())
    return f"reward.more=[{{{listed}}}]"


def test_the_same_reward_twice_weighs_as_much_as_both(tmp_path):
    config = write_run(tmp_path, loss={"sft_weight": 0}, optim={"clip": 1e9}, rollout={"samples": 2})
    run("train", config, "train.steps=1", "loss.weight=0.5", f"train.out={tmp_path / 'one'}")
    more = other(tmp_path / "reward", weight=0.3)
    run("train", config, "train.steps=1", "loss.weight=0.2", more, f"train.out={tmp_path / 'two'}")
    assert relative(moments(tmp_path / "two"), moments(tmp_path / "one")) < 1e-5
    found, one = values(tmp_path / "two")[1], values(tmp_path / "one")[1]
    assert found["train/reward"] == found["train/other_reward"] == pytest.approx(one["train/reward"])
    assert found["train/reward_loss"] == pytest.approx(one["train/reward_loss"] * 2 / 5)
    assert found["train/other_reward_loss"] == pytest.approx(one["train/reward_loss"] * 3 / 5)


def test_a_validation_measures_every_reward_by_its_name(tmp_path):
    config = write_run(tmp_path, eval={"every": 1}, loss={"weight": 0.2})
    save_reward(tiny_reward(tiny_config(), seed=7, blocks=2), tmp_path / "second", 0)
    run("train", config, "train.steps=1", other(tmp_path / "second", weight=0.6))
    found = values(tmp_path / "run", "eval")[0]
    assert found["eval/reward_t201"] != found["eval/other_reward_t201"]
    assert "eval/other_reward_t1000" in found
    want = (0.2 * found["eval/reward_t201"] + 0.6 * found["eval/other_reward_t201"]) / 0.8
    assert found["eval/score"] == pytest.approx(want, rel=1e-12)


def test_what_auto_chooses_for_several_rewards_changes_no_result(tmp_path, capsys):
    """The budget is one that only blocks of both that recompute fit."""
    save_reward(tiny_reward(tiny_config(), seed=7, blocks=2), tmp_path / "second", 0)
    config, given = write_run(tmp_path), ["reward.draws=3", other(tmp_path / "second")]
    run("train", config, *given, "model.recompute=auto:1e-6", code=2)
    least = re.search(r"want at least (auto:[0-9.]+)", capsys.readouterr().err)[1]
    for name, mode in (("plain", "none"), ("auto", least)):
        run("train", config, *given, f"model.recompute={mode}", f"train.out={tmp_path / name}")
    assert "recompute: " in capsys.readouterr().out
    for step, one in values(tmp_path / "plain").items():
        assert values(tmp_path / "auto")[step] == pytest.approx(one, rel=1e-5)


def test_a_plan_counts_every_forward_of_a_reward_model(tmp_path):
    """The same twice at three levels: seconds, weights, and what blocks save, as often."""
    path = str(write_run(tmp_path, eval={"every": 1}))
    one, six = (predict(path, given) for given in ([], ["reward.draws=3", other(tmp_path / "reward")]))
    took = [next(row for row in p.times.rows if row.phase == "reward") for p in (one, six)]
    assert took[1].seconds == pytest.approx(6 * took[0].seconds)
    assert took[1].flops == pytest.approx(6 * took[0].flops)
    stands = [
        {e.category: e.bytes for e in p.memory.phases[-1].entries if e.category.startswith("reward")}
        for p in (one, six)
    ]
    assert stands[1] == {name: 2 * size for name, size in stands[0].items()} and len(stands[0]) == 2
    shards = Shards(2)
    found = [p.subject.setup for p in (one, six)]
    gathered = [exchanged_bytes(s, models_of(s, 2), shards, one.memory.reward).gather_reward for s in found]
    assert gathered[1] == 6 * gathered[0] > 0


@pytest.mark.parametrize("mode", ["fresh", "persistent"])
def test_a_run_with_draws_goes_on_to_the_bit(mode, tmp_path):
    config = write_run(tmp_path)
    given = [f"rollout.mode={mode}", "reward.draws=3", other(tmp_path / "reward", form="linear")]
    goes_on(config, *given)
    plain = tmp_path / "plain"
    run("train", config, *given[:1], given[2], f"train.out={plain}", "train.steps=1")
    assert values(plain)[1]["train/reward"] != values(tmp_path / "run")[1]["train/reward"]


def test_a_resumed_run_has_the_same_rewards(tmp_path, capsys):
    config = write_run(tmp_path, train={"steps": 1})
    save_reward(tiny_reward(tiny_config(), seed=7), tmp_path / "second", 0)
    run("train", config, other(tmp_path / "second"))
    again = "train.resume=true", "train.steps=2"
    capsys.readouterr()
    run("train", config, *again, other(tmp_path / "reward"), code=2)
    assert one_line(capsys).startswith("prfl: reward.more: got ")
    (tmp_path / "second").rename(tmp_path / "moved")
    run("train", config, *again, other(tmp_path / "moved", weight=0.5))
    assert list(values(tmp_path / "run")) == [1, 2]


@pytest.mark.parametrize("command, given, line", [
    ("train", "loss.weight=0 MORE", "reward.more: got ['other'], want none with loss.weight 0"),
    ("train", "loss.weight=0 reward.draws=2", "reward.draws: got 2, want 1 with loss.weight 0"),
    ("train", "reward.more=[{name: a, path: b}, {name: a, path: c}]", "reward.more: got ['a', 'a'], want a "),
    ("train", "reward.more=[{name: A, path: b}]", "reward.more.name: got 'A', want text: lower-case letters"),
    ("train", "reward.more=[{name: a, path: nowhere}]", "reward.more a: nowhere"),
    ("eval-reward", "reward.draws=2", "reward.draws: got 2, want 1 in eval-reward"),
    ("train-reward", "reward.draws=2", "reward.draws: got 2, want 1 in reward training"),
    ("train-reward", "MORE", "reward.more: got ['other'], want none in reward training"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(command, given, line, tmp_path, capsys):
    parts = [given] if given.startswith("reward.more") else given.split()
    parts = [other(tmp_path / "reward") if part == "MORE" else part for part in parts]
    run(command, write_run(tmp_path), *parts, code=2)
    assert one_line(capsys).startswith(f"prfl: {line}")
    assert not (tmp_path / "run").exists()
