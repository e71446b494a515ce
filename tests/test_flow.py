"""Schedules and samplers against published values, exact solutions and the formulas on paper."""

import math

import pytest
import torch
from helpers import LiteralUniPC

from prfl_engine import flow

SOLVERS = pytest.mark.parametrize("solver", ["euler", "unipc"])


def field(seed=0):
    """A smooth nonlinear velocity v(x, t) in float64 on vectors of 6 channels."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 6, 6, dtype=torch.float64, generator=generator) / 2
    c = torch.randn(6, dtype=torch.float64, generator=generator)

    def velocity(x, t):
        return torch.tanh(x @ a + c * t[:, None] / 1000) @ b

    return velocity


def run(schedule, x, velocity, first=0, last=None):
    """States after every step; velocity(x, i)."""
    state, states = flow.init_state(x), []
    for i in range(first, len(schedule) if last is None else last):
        index = torch.full((len(x),), i)
        state = flow.step(schedule, state, velocity(state.x, i), index)
        states.append(state)
    return states


def test_published_schedule_of_40_steps():
    schedule = flow.make_schedule("unipc", 40, 5.0)
    u = [0.999 * (40 - i) / 40 for i in range(40)]
    sigmas = [5 * a / (1 + 4 * a) for a in u] + [0.0]
    torch.testing.assert_close(schedule.sigmas, torch.tensor(sigmas, dtype=torch.float64))
    assert schedule.timesteps.tolist() == [int(1000 * s) for s in sigmas[:-1]]
    assert schedule.timesteps[:3].tolist() == [999, 994, 989]
    assert schedule.timesteps[-2:].tolist() == [208, 113]
    assert len(schedule) == 40


@SOLVERS
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sigmas_fall_to_zero(solver, shift):
    sigmas = flow.make_schedule(solver, 7, shift).sigmas
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0].item() == pytest.approx(shift * 0.999 / (1 + (shift - 1) * 0.999), rel=1e-12)


def test_training_sigmas():
    sigmas = flow.train_sigmas(5.0)
    assert sigmas.shape == (1000,)
    assert sigmas.dtype == torch.float32
    for i in (0, 1, 500, 999):
        u = 1 - i / 1000
        assert sigmas[i].item() == pytest.approx(5 * u / (1 + 4 * u), rel=1e-6)


def test_noise_is_added_per_sample():
    latent, noise = torch.randn(2, 3, 2, 2, 2, 2).unbind()
    sigma = torch.tensor([0.0, 0.25, 1.0])
    x = flow.add_noise(latent, noise, sigma)
    assert torch.equal(x[0], latent[0])
    torch.testing.assert_close(x[1], 0.75 * latent[1] + 0.25 * noise[1])
    assert torch.equal(x[2], noise[2])


@pytest.mark.parametrize(
    "solver, steps, shift", [("heun", 4, 5.0), ("unipc", 0, 5.0), ("euler", 4, 0.0)]
)
def test_impossible_schedules_are_refused(solver, steps, shift):
    with pytest.raises(ValueError):
        flow.make_schedule(solver, steps, shift)


# The formulas in another order of float64 operations; differences of nearly equal log-SNRs lose
# about three of the sixteen digits.
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 1.0), (8, 3.0), (40, 5.0)])
def test_unipc_is_the_literal_algorithm(steps, shift):
    schedule = flow.make_schedule("unipc", steps, shift)
    literal = LiteralUniPC(schedule.sigmas.tolist())
    velocity, x = field(), torch.randn(3, 6, dtype=torch.float64)
    want = x
    t = schedule.timesteps.double()
    for i, state in enumerate(run(schedule, x, lambda x, i: velocity(x, t[i].expand(3)))):
        want = literal.step(want, velocity(want, t[i].expand(3)))
        torch.testing.assert_close(state.x, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.x_last, literal.x_last, rtol=1e-10, atol=1e-10)


def test_euler_is_euler():
    schedule = flow.make_schedule("euler", 8, 5.0)
    velocity, x = field(), torch.randn(3, 6, dtype=torch.float64)
    t, sigmas, want = schedule.timesteps.double(), schedule.sigmas, x
    for i, state in enumerate(run(schedule, x, lambda x, i: velocity(x, t[i].expand(3)))):
        want = want + (sigmas[i + 1] - sigmas[i]) * velocity(want, t[i].expand(3))
        torch.testing.assert_close(state.x, want, rtol=1e-12, atol=1e-12)


@SOLVERS
def test_constant_x0_is_integrated_exactly(solver):
    schedule = flow.make_schedule(solver, 9, 5.0)
    sigmas = schedule.sigmas
    x0, noise = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    states = run(schedule, noise, lambda x, i: (x - x0) / sigmas[i])
    for i, state in enumerate(states, 1):
        left = sigmas[i] / sigmas[0]
        torch.testing.assert_close(state.x, left * noise + (1 - left) * x0, rtol=1e-10, atol=1e-10)


def gaussian_error(solver, steps):
    """Largest error at sigma = 0 of the flow to a Gaussian N(2, 0.5^2), whose solution is known.

    It starts from a given point at the largest sigma, so that nothing but the solver is in error.
    """
    mean, deviation = 2.0, 0.5
    schedule = flow.make_schedule(solver, steps, 3.0)
    sigmas = schedule.sigmas.tolist()

    def spread(s):
        return math.sqrt((1 - s) ** 2 * deviation**2 + s**2)

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def velocity(x, i):
        s = sigmas[i]
        gain = (1 - s) * deviation**2 / spread(s) ** 2
        return (x - (mean + gain * (x - (1 - s) * mean))) / s

    x = (1 - sigmas[0]) * mean + spread(sigmas[0]) * z
    return (run(schedule, x, velocity)[-1].x - (mean + deviation * z)).abs().max().item()


def test_the_error_falls_with_steps_and_faster_for_unipc():
    euler, unipc = ([gaussian_error(s, 10 * 2**n) for n in range(5)] for s in ("euler", "unipc"))
    assert all(u < e for u, e in zip(unipc, euler, strict=True))
    for errors in (euler, unipc):
        assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    # Orders 1 and 2, less what the terms of higher order take (measured: 0.96 and 1.90).
    order_euler, order_unipc = (math.log2(e[0] / e[-1]) / 4 for e in (euler, unipc))
    assert 0.9 < order_euler < 1.1
    assert order_unipc > 1.75


@SOLVERS
def test_samples_at_different_steps_share_a_batch(solver):
    schedule = flow.make_schedule(solver, 6, 5.0)
    state = flow.SolverState(*torch.randn(4, 6, 16, 1, 2, 2))
    velocity = torch.randn(6, 16, 1, 2, 2)
    index = torch.tensor([3, 0, 5, 1, 2, 4])
    together = flow.step(schedule, state, velocity, index)
    for b in range(6):
        alone = flow.step(
            schedule, state.select(index[b : b + 1] * 0 + b), velocity[b : b + 1], index[b : b + 1]
        )
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[b : b + 1], want)


@SOLVERS
def test_the_unset_history_has_no_effect(solver):
    schedule = flow.make_schedule(solver, 4, 5.0)
    noise, velocity = torch.randn(2, 2, 6, dtype=torch.float64).unbind()
    used = flow.SolverState(noise, *torch.randn(3, 2, 6, dtype=torch.float64))
    index = torch.zeros(2, dtype=torch.long)
    fresh = flow.step(schedule, flow.init_state(noise), velocity, index)
    assert torch.equal(flow.step(schedule, used, velocity, index).x, fresh.x)


@SOLVERS
def test_a_step_is_differentiable_in_velocity_and_state(solver):
    schedule = flow.make_schedule(solver, 5, 5.0)
    index = torch.tensor([0, 1, 3, 4])
    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def step(x, x_last, m0, m1, velocity):
        return tuple(flow.step(schedule, flow.SolverState(x, x_last, m0, m1), velocity, index))

    assert torch.autograd.gradcheck(step, inputs)
