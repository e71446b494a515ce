"""Classifier-free guidance of chains: against plain code in float64, its cost, what it is refused with."""

from dataclasses import replace
from functools import partial

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
from training_runs import assert_equal, content, run, values

from prfl_engine import chain, flow, phases
from prfl_engine.config import ChainConfig, RolloutConfig
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.objectives import Grader, Grading, bind, chain_velocity
from prfl_engine.rollout.accelerated import Rollout

INDEX = torch.tensor([3, 1])
SCHEDULE = flow.make_schedule("unipc", 6, 5.0)


def setup(kind="t2v", **given):
    """(model, reward, batch, guidance) in float64; scales as they are given, or 1."""
    config = tiny_config(kind)
    model, reward = tiny_model(config).double(), tiny_reward(config).double().freeze()
    pairs = {k: Scales(*given.pop(k, (1, 1)), 700) for k in ("rollout", "graded")}
    text = torch.randn(3, config.text_dim, dtype=torch.float64)
    return model, reward, random_batch(config, 2, dtype=torch.float64), Guidance(text, **pairs, **given)


def plain(model, batch, text, scales, gradient, x, t):
    """v_0 + s (v_1 - v_0), by two plain forwards of one sample."""
    at = scales.high if t >= 700 else scales.low
    t, none = torch.tensor([float(t)]), model.embed_context(text[None])
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient):
        base = model(x, t, none, batch.condition)
    if at == 1:
        return model(x, t, model.embed_context(batch.text), batch.condition)
    return base + at * (model(x, t, model.embed_context(batch.text), batch.condition) - base)


def by_hand(model, reward, batch, guidance, noise, window):
    """(logits [B], gradient of their sum) by a literal sampler and autograd through the last steps."""
    logits = []
    for b, index in enumerate(INDEX.tolist()):
        literal, x = LiteralUniPC(SCHEDULE.sigmas.tolist()), noise[b : b + 1]
        one = rows(batch, slice(b, b + 1))
        for i in range(index + 1):
            with_gradient = i > index - window
            # Steps of a window run as those with gradient do, whatever the rollout before it does.
            scales = guidance.graded if with_gradient else guidance.rollout
            with torch.set_grad_enabled(with_gradient):
                t = SCHEDULE.timesteps[i].item()
                x = literal.step(x, plain(model, one, guidance.text, scales, guidance.gradient, x, t))
        logits.append(reward(x, SCHEDULE.timesteps[index + 1 :][:1], one.text, None, one.condition))
    logits = torch.cat(logits)
    logits.sum().backward()
    return logits.detach(), taken(model)


def taken(model):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([a.flatten() for a in found])


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("gradient, at_once", [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("kind, given", [
    ("t2v", {"rollout": (4, 3), "graded": (4, 3)}), ("t2v", {"rollout": (5, 5)}),
    ("i2v-a14b", {"graded": (3.5, 3.5)}),
])  # fmt: skip
def test_the_gradient_is_that_of_plain_code(kind, given, gradient, at_once, window):
    """Of samples at different steps, where the scales differ on the two sides of the boundary."""
    model, reward, batch, guidance = setup(kind, gradient=gradient, at_once=at_once, **given)
    noise = torch.randn_like(batch.latent)
    grader = Grader(model, reward, SCHEDULE, ChainConfig(window), guidance=guidance)
    (graded,) = Grading(grader, batch).windows(noise, INDEX[None])
    graded.backward(graded.logit.sum())
    got = taken(model)
    logits, want = by_hand(model, reward, batch, guidance, noise, window)
    torch.testing.assert_close(graded.logit, logits, rtol=1e-9, atol=1e-9)
    assert relative(got, want) < 1e-9
    unguided = Grader(model, reward, SCHEDULE, ChainConfig(window))
    (other,) = Grading(unguided, batch).windows(noise, INDEX[None])
    assert (other.logit - logits).abs().max() > 1e-6


@pytest.mark.parametrize("gradient, at_once", [(False, False), (True, False), (True, True), (False, True)])
def test_what_guidance_costs(gradient, at_once):
    """Samples and forwards by phase: every step is made for both halves, at once in one call."""
    model, reward, batch, guidance = setup(rollout=(4, 4), graded=(4, 4), gradient=gradient, at_once=at_once)
    calls, inner = [], model.forward

    def counted(x, *rest):
        calls.append((len(x), torch.is_grad_enabled()))
        return inner(x, *rest)

    model.forward = counted
    grader = Grader(model, reward, SCHEDULE, ChainConfig(2), guidance=guidance)
    noise = torch.randn_like(batch.latent)
    with phases.timed(torch.device("cpu")) as clock:
        (graded,) = Grading(grader, batch).windows(noise, torch.tensor([[3, 3]]))
        graded.backward(graded.logit.sum())
        work = {name: n for (name, _), n in clock.lap().work.items()}
    both = 4 if gradient else 2
    assert work == {"rollout": 12 + (4 - both), "graded": both, "earlier": both, "reward": 2}
    # Three steps to the window's last one, of which the last belongs to the window; then two with gradient.
    window = [(4, True)] if at_once and gradient else [(2, gradient), (2, True)]
    before = [(4, False)] if at_once else [(2, False)] * 2
    inside = [(n, False) for n, _ in window]
    assert calls == before * 2 + inside + window * 2


@pytest.mark.parametrize("with_gradient, gradient, at_once", [
    (True, False, False), (True, True, False), (True, True, True), (False, False, False),
    (False, False, True),
])  # fmt: skip
def test_where_the_scale_is_1_a_step_is_an_unguided_one(with_gradient, gradient, at_once):
    """To the bit, and for one forward; in one call with samples that are guided, too."""
    model, _, batch, guidance = setup(rollout=(1, 3), graded=(1, 3), gradient=gradient, at_once=at_once)
    both, calls, inner = guidance.both(batch), [], model.forward
    context = model.embed_context(both.text)
    model.forward = lambda x, *rest: (calls.append(len(x)), inner(x, *rest))[1]
    velocity = guidance.velocity(partial(bind, model), both, context, with_gradient)
    active, got = torch.arange(2), {}
    for t in ([700, 900], [699, 100], [100, 800]):
        calls.clear()
        got[t[0]] = velocity(batch.latent, torch.tensor(t), active), sum(calls), velocity.halves
    plain = bind(model, batch, context[:2])(batch.latent, torch.tensor([700, 900]), active)
    assert torch.equal(got[700][0], plain) and got[700][1:] == (2, 0)
    assert got[699][1:] == (4, 2) and got[100][1:] == (3, 1)
    plain = bind(model, batch, context[:2])(batch.latent, torch.tensor([100, 800]), active)
    torch.testing.assert_close(got[100][0][1], plain[1], rtol=1e-12, atol=1e-12)
    v, base = (model(batch.latent[:1], torch.tensor([100]), c) for c in (context[:1], context[2:3]))
    torch.testing.assert_close(got[100][0][:1], base + 3 * (v - base), rtol=1e-10, atol=1e-10)
    assert got[100][0].requires_grad  # of whoever asks; the halves are as `gradient` says


@pytest.mark.parametrize("at_once", [False, True])
def test_an_accelerated_rollout_is_guided(at_once):
    """A step cache that skips nothing is a plain rollout, with entries of both halves of every sample."""
    model, _, batch, guidance = setup(rollout=(4, 3), at_once=at_once)
    model, guidance = model.float(), replace(guidance, text=guidance.text.float())
    batch = random_batch(model.config)
    noise, index = torch.randn_like(batch.latent), torch.tensor([4, 2])
    rollout = Rollout(model, RolloutConfig(cache=1e-9), SCHEDULE, guidance=guidance)
    assert rollout.drift(batch, noise, index) < 1e-5
    both = guidance.both(batch)
    with torch.no_grad():
        velocity = rollout.stretches(both, model.embed_context(both.text))()
        got = chain.rollout(velocity, SCHEDULE, noise, index).x
        want = chain.rollout(chain_velocity(model, batch, guidance), SCHEDULE, noise, index).x
        free = chain.rollout(bind(model, batch), SCHEDULE, noise, index).x
    assert relative(got, want) < 1e-5 < 1e-3 < relative(free, want)


GUIDED = ("rollout.guidance=3", "chain.guidance=3")


@pytest.mark.parametrize("mode", ["fresh", "persistent"])
def test_a_guided_run_goes_on_to_the_bit(mode, tmp_path):
    negative = {"negative_text": str(tmp_path / "data/null.npy"), "text_dropout": 0}
    config = write_run(tmp_path, data=negative, eval={"every": 2})
    given = [*GUIDED, f"rollout.mode={mode}", "rollout.probe_every=1", "train.save_every=2"]
    run("train", config, *given, "train.steps=4", "rollout.max_drift=1e-3")
    run("train", config, *given, "train.steps=2", "rollout.max_drift=1e-3", f"train.out={tmp_path / 'cut'}")
    run("train", config, *given, "train.steps=4", "rollout.max_drift=1e-3", f"train.out={tmp_path / 'cut'}",
        "train.resume=true")  # fmt: skip
    assert_equal(content(tmp_path / "cut/checkpoint-4"), content(tmp_path / "run/checkpoint-4"))
    plain = tmp_path / "plain"
    run("train", config, "train.steps=2", f"train.out={plain}", f"rollout.mode={mode}")
    assert values(plain)[1]["train/reward"] != values(tmp_path / "run")[1]["train/reward"]


def test_a_validation_is_guided(tmp_path):
    config = write_run(tmp_path, data={"negative_text": str(tmp_path / "data/null.npy")}, eval={"every": 1})
    found = {}
    for name, more in {"plain": [], "guided": ["eval.guidance=4"], "once": ["eval.guidance=4",
                       "rollout.guidance_at_once=true"]}.items():  # fmt: skip
        run("train", config, "train.steps=1", f"train.out={tmp_path / name}", *more)
        found[name] = values(tmp_path / name, "eval")[0]["eval/reward_t201"]
    assert found["guided"] == pytest.approx(found["once"], rel=1e-5)
    assert found["guided"] != pytest.approx(found["plain"], rel=1e-4)


@pytest.mark.parametrize("given, line", [
    ("rollout.guidance=3", "data.negative_text: got null, want a .npy (rollout.guidance is not 1)"),
    ("chain.guidance=3", "data.negative_text: got null, want a .npy (chain.guidance is not 1)"),
    ("eval.guidance=3 eval.every=1", "data.negative_text: got null, want a .npy (eval.guidance is not 1)"),
    ("rollout.guidance=[4,3]", "rollout.guidance: got [4.0, 3.0], want a number without model.boundary"),
    ("rollout.guidance_at_once=true", "rollout.guidance_at_once: got True, want false"),
    ("chain.unconditional=gradient", "chain.unconditional: got 'gradient', want detached with chain"),
    ("rollout.mode=persistent rollout.guidance=3", "rollout.guidance: got 3.0, want chain.guidance's 1.0"),
    ("optim.in_backward=true optim.clip=null loss.alternate=true chain.guidance=3 "
     "chain.unconditional=gradient",
     "chain.unconditional: got 'gradient', want detached with optim.in_backward"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, line, tmp_path, capsys):
    run("train", write_run(tmp_path), *given.split(), code=2)
    assert one_line(capsys).startswith(f"prfl: {line}")
    assert not (tmp_path / "run").exists()
