"""Own noise levels of a chain: against a literal sampler, in runs, in samples, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import (
    LiteralUniPC,
    one_line,
    random_batch,
    relative,
    tiny_config,
    tiny_model,
    tiny_reward,
    write_run,
)
from training_runs import goes_on, run, values

from prfl_engine.config import ChainConfig, RolloutConfig
from prfl_engine.objectives import Grader, Grading, index_range, schedule_of, steps_inside

SIGMAS = (0.99, 0.83, 0.6, 0.25)
GIVEN = ("rollout.sigmas=[0.99, 0.83, 0.6, 0.25]", "rollout.steps=4")


def literal_euler(sigmas, i, x, v):
    return x + (sigmas[i + 1] - sigmas[i]) * v


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("window", [1, 2])
def test_the_gradient_is_that_of_a_literal_sampler(solver, window):
    config = tiny_config()
    model, reward = tiny_model(config).double(), tiny_reward(config).double().freeze()
    batch, index = random_batch(config, 1, dtype=torch.float64), 2
    noise = torch.randn_like(batch.latent)
    schedule = schedule_of(RolloutConfig(sigmas=SIGMAS, steps=4, solver=solver))
    assert schedule.timesteps.tolist() == [990, 830, 600, 250]
    grader = Grader(model, reward, schedule, ChainConfig(window))
    (graded,) = Grading(grader, batch).windows(noise, torch.tensor([[index]]))
    graded.backward(graded.logit.sum())
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    sigmas, x = [*SIGMAS, 0.0], noise
    literal = LiteralUniPC(sigmas)
    for i in range(index + 1):
        with torch.set_grad_enabled(i > index - window):
            v = model(x, torch.tensor([1000 * SIGMAS[i]]).round(), model.embed_context(batch.text))
            x = literal.step(x, v) if solver == "unipc" else literal_euler(sigmas, i, x, v)
    logit = reward(x, torch.tensor([250.0]), batch.text)
    logit.sum().backward()
    torch.testing.assert_close(graded.logit, logit.detach(), rtol=1e-9, atol=1e-9)
    assert relative(got, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-9


def test_a_range_is_counted_in_own_steps():
    given = dict(sigmas=SIGMAS, steps=4)
    assert index_range(RolloutConfig(**given)) == (0, 2)
    high = RolloutConfig(**given, sigma_range=(0.7, 1.0))
    assert steps_inside(high) == (0, 2) and index_range(high) == (0, 1)
    low = RolloutConfig(**given, sigma_range=(0.0, 0.7), start="data")
    assert schedule_of(low).timesteps.tolist() == [600, 250] and index_range(low) == (0, 0)


@pytest.mark.parametrize("mode", ["fresh", "persistent"])
def test_a_run_with_own_levels_goes_on_to_the_bit(mode, tmp_path):
    config = write_run(tmp_path, eval={"every": 2})
    given = [*GIVEN, f"rollout.mode={mode}"]
    goes_on(config, *given)
    run("train", config, given[1], given[2], "train.steps=1", f"train.out={tmp_path / 'plain'}")
    for kind in ("train", "eval"):
        mine, other = (next(iter(values(tmp_path / name, kind).values())) for name in ("run", "plain"))
        name = "train/reward" if kind == "train" else "eval/reward_t201"
        assert mine[name] != other[name]


def test_samples_are_made_at_own_levels(tmp_path):
    config = write_run(tmp_path)
    run("sample", config, *GIVEN, "--out", str(tmp_path / "own"))
    run("sample", config, GIVEN[1], "--out", str(tmp_path / "plain"))
    own, plain = (np.load(tmp_path / name / "sample-00.npy") for name in ("own", "plain"))
    assert abs(own - plain).max() > 1e-3


@pytest.mark.parametrize("given, line", [
    (GIVEN[:1], "rollout.steps: got 3, want 4, the length of rollout.sigmas"),
    (["rollout.sigmas=[0.5, 0.6, 0.2]"], "rollout.sigmas: got [0.5, 0.6, 0.2], want each below the"),
    (["rollout.sigmas=[1, 0.6, 0.2]"], "rollout.sigmas: got [1.0, 0.6, 0.2], want levels below 1 with"),
    (["rollout.sigmas=[0.9, 0.6, 0]"], "rollout.sigmas: got (0.9, 0.6, 0.0), want a list, each a number in"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, line, tmp_path, capsys):
    run("train", write_run(tmp_path), *given, code=2)
    assert one_line(capsys).startswith(f"prfl: {line}")
