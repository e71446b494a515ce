"""The denoising chain: per-sample indices, the number of model calls, the way of the gradient."""

import pytest
import torch
from helpers import LiteralUniPC, random_batch, rows, tiny_config, tiny_model

from prfl_engine import chain, flow
from prfl_engine.objectives import bind

INDEX = torch.tensor([3, 0, 5, 1, 3])


class Counted:
    """A nonlinear velocity with its own weight for every sample of the batch."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        shape = (size, 2, 2)
        self.weight = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        self.calls, self.samples = 0, 0

    def __call__(self, x, t, active):
        assert len(x) == len(t) == len(active)
        self.calls += 1
        self.samples += len(x)
        weight = self.weight[active]
        mixed = torch.einsum("bcthw,bcd->bdthw", x, weight)
        return torch.tanh(mixed + t.double().view(-1, 1, 1, 1, 1) / 1000)

    def of(self, b):
        return lambda x, t, active: self(x, t, torch.tensor([b]))


def setup(solver="unipc", steps=6, size=5):
    noise = torch.randn(size, 2, 1, 2, 2, dtype=torch.float64)
    return Counted(size), flow.make_schedule(solver, steps, 5.0), noise


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_rollout_is_that_of_its_samples(solver):
    velocity, schedule, noise = setup(solver)
    together = chain.rollout(velocity, schedule, noise, INDEX)
    for b in range(len(noise)):
        one = slice(b, b + 1)
        alone = chain.rollout(velocity.of(b), schedule, noise[one], INDEX[one])
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[one], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_every_sample_keeps_its_own_context(model_type):
    config = tiny_config(model_type)
    model, batch = tiny_model(config).double(), random_batch(config, 3, dtype=torch.float64)
    schedule, index = flow.make_schedule("unipc", 4, 5.0), torch.tensor([2, 0, 3])
    noise = torch.randn_like(batch.latent)
    with torch.no_grad():
        together = chain.rollout(bind(model, batch), schedule, noise, index)
        for b in range(3):
            one = slice(b, b + 1)
            alone = chain.rollout(bind(model, rows(batch, one)), schedule, noise[one], index[one])
            torch.testing.assert_close(together.x[one], alone.x, rtol=1e-9, atol=1e-9)


def test_a_rollout_evaluates_no_more_samples_than_it_must():
    velocity, schedule, noise = setup()
    chain.rollout(velocity, schedule, noise, INDEX)
    assert velocity.samples == INDEX.sum()
    assert velocity.calls == INDEX.max()
    before = velocity.calls
    state = chain.rollout(velocity, schedule, noise, torch.zeros(5, dtype=torch.long))
    assert velocity.calls == before
    assert torch.equal(state.x, noise)


def test_a_rollout_leaves_no_graph_and_its_noise_untouched():
    velocity, schedule, noise = setup()
    copy = noise.clone()
    noise.requires_grad_()
    for index in (INDEX, torch.full((5,), 3)):
        state = chain.rollout(velocity, schedule, noise, index)
        assert not any(a.requires_grad for a in state)
    assert torch.equal(noise, copy)


def test_sample_runs_the_whole_chain():
    velocity, schedule, noise = setup()
    want = []
    for b in range(5):
        literal, x = LiteralUniPC(schedule.sigmas.tolist()), noise[b : b + 1]
        for t in schedule.timesteps.double():
            x = literal.step(x, velocity.of(b)(x, t[None], None).detach())
        want.append(x)
    got = chain.sample(velocity, schedule, noise)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-10, atol=1e-10)
    assert not got.requires_grad


def test_the_graded_step_has_the_gradient_of_unrolled_code_with_a_detached_history():
    velocity, schedule, noise = setup()
    state = chain.rollout(velocity, schedule, noise, INDEX)
    latent = chain.graded_step(velocity, schedule, state, INDEX)
    direction = torch.randn_like(latent)
    (got,) = torch.autograd.grad(latent, velocity.weight, direction)

    wanted, t = [], schedule.timesteps.double()
    for b in range(5):
        literal, x = LiteralUniPC(schedule.sigmas.tolist()), noise[b : b + 1]
        with torch.no_grad():
            for i in range(INDEX[b]):
                x = literal.step(x, velocity.of(b)(x, t[i : i + 1], None))
        i = INDEX[b]
        wanted.append(literal.step(x, velocity.of(b)(x, t[i : i + 1], None)))
    torch.testing.assert_close(latent, torch.cat(wanted), rtol=1e-10, atol=1e-10)
    (want,) = torch.autograd.grad(torch.cat(wanted), velocity.weight, direction)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_graded_step_costs_one_call():
    velocity, schedule, noise = setup()
    chain.graded_step(velocity, schedule, flow.init_state(noise), torch.zeros(5, dtype=torch.long))
    assert (velocity.calls, velocity.samples) == (1, 5)
