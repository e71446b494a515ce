"""The denoising chain: per-sample indices, the number of model calls, the way of the gradient."""

import weakref

import pytest
import torch
from helpers import LiteralUniPC, model_and_batch, rows

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
        return torch.tanh(mixed + t.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000)

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
    model, batch = model_and_batch(model_type, 3, dtype=torch.float64)
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
    graded = chain.Chain(velocity, schedule, noise).graded(INDEX)
    latent = graded.x
    direction = torch.randn_like(latent)
    graded.backward((latent * direction).sum())
    got = velocity.weight.grad

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
    chain.Chain(velocity, schedule, noise).graded(torch.zeros(5, dtype=torch.long))
    assert (velocity.calls, velocity.samples) == (1, 5)


def unrolled(velocity, schedule, noise, index, window, detach_input=False):
    """The latent behind step `index` of one sample, with a plain graph through the last `window` steps."""
    state = flow.init_state(noise)
    for i in range(index + 1):
        graded = i > index - window
        with torch.set_grad_enabled(graded):
            x = state.x.detach() if detach_input else state.x
            v = velocity(x, schedule.timesteps[i : i + 1], None)
            state = flow.step(schedule, state, v, torch.tensor([i]))
    return state.x


def gradients_of(velocity, schedule, noise, index, window, detach_input=False):
    """(latents, gradient of the weights) by the chain's own backward, from fixed directions."""
    velocity.weight.grad = None
    graded = chain.Chain(velocity, schedule, noise).graded(index, window, detach_input)
    x = graded.x
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    graded.backward((x * direction).sum())
    return x.detach(), velocity.weight.grad


@pytest.mark.parametrize("detach_input", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_of_a_window_are_those_of_the_plain_graph(solver, window, detach_input, dtype, limit):
    """Samples at different steps, windows cut at the noise where they are longer than the way."""
    velocity, schedule, noise = setup(solver)
    velocity.weight, noise = velocity.weight.detach().to(dtype).requires_grad_(), noise.to(dtype)
    x, got = gradients_of(velocity, schedule, noise, INDEX, window, detach_input)
    direction = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    wanted = [
        unrolled(velocity.of(b), schedule, noise[b : b + 1], int(INDEX[b]), window, detach_input)
        for b in range(5)
    ]
    (want,) = torch.autograd.grad(torch.cat(wanted), velocity.weight, direction)
    assert ((x - torch.cat(wanted)).norm() / x.norm()).item() < limit
    assert ((got - want).norm() / want.norm()).item() < limit


def test_a_longer_window_has_another_gradient():
    velocity, schedule, noise = setup()
    _, one = gradients_of(velocity, schedule, noise, INDEX, 1)
    _, two = gradients_of(velocity, schedule, noise, INDEX, 2)
    assert (two[0] - one[0]).norm() > 1e-3 * one[0].norm()  # at step 3
    assert torch.equal(two[1], one[1])  # at step 0 there is nothing before


def test_a_window_computes_each_of_its_steps_but_the_last_again():
    velocity, schedule, noise = setup()
    gradients_of(velocity, schedule, noise, INDEX, 3)
    assert velocity.samples == (INDEX + 1).sum() + torch.minimum(INDEX, torch.tensor(2)).sum()


@pytest.mark.parametrize("window", [1, 3])
def test_windows_of_one_rollout_are_those_of_their_own_rollouts(window):
    """Also where an index repeats, and where a window reaches back over the one before."""
    velocity, schedule, noise = setup()
    indices = torch.tensor([[0, 1, 2, 0, 2], [2, 1, 3, 0, 3], [4, 4, 3, 5, 4]])
    got, want = [], []
    way = chain.Chain(velocity, schedule, noise)
    for index in indices:
        graded = way.graded(index, window)
        got.append(graded.x.detach())
        graded.backward(graded.x.sum())
    total, velocity.weight.grad = velocity.weight.grad, None
    for index in indices:
        graded = chain.Chain(velocity, schedule, noise).graded(index, window)
        want.append(graded.x.detach())
        graded.backward(graded.x.sum())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, velocity.weight.grad, rtol=1e-12, atol=1e-12)


def test_a_step_with_gradient_is_the_next_step_of_the_rollout():
    """Distinct indices: as many calls as the way to the last one has steps."""
    velocity, schedule, noise = setup(size=1)
    way = chain.Chain(velocity, schedule, noise)
    for index in (1, 3, 4):
        way.graded(torch.tensor([index]))
    assert velocity.calls == 5


def test_only_the_states_that_a_window_needs_are_kept():
    velocity, schedule, noise = setup(size=1)
    way = chain.Chain(velocity, schedule, noise)
    way.graded(torch.tensor([4]), 2)
    assert [s is not None for s in way.states[0]] == [False, False, False, True, True, True]


def test_a_window_keeps_no_states_after_its_backward():
    """Whoever still has it: `enumerate` keeps its last item while the next one is made."""
    way = chain.Chain(Counted(1), flow.make_schedule("euler", 6, 3.0), torch.ones(1, 2, 1, 2, 2).double())
    window = way.graded(torch.tensor([3]), window=2)
    window.backward(window.x.sum())
    state = weakref.ref(way.states[0][-1].x)
    del way
    assert state() is None and window.x is None
