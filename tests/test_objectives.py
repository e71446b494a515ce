"""The losses against their formulas, and where their gradients go."""

import math

import pytest
import torch
from helpers import SHAPE, model_and_batch, random_batch, tiny_config, tiny_model, tiny_reward

from prfl_engine import chain, flow
from prfl_engine.config import ChainConfig, LossConfig, RolloutConfig
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import (
    bind,
    bradley_terry,
    cross_entropy,
    graded_windows,
    index_range,
    reward_loss,
    sft_loss,
    stratified_indices,
)

BOTH = pytest.mark.parametrize("model_type", ["t2v", "i2v"])
LOGITS = torch.tensor([-30.0, -2.0, 0.0, 0.7, 30.0], dtype=torch.float64)


@BOTH
def test_sft_loss_is_the_squared_error_of_the_velocity(model_type):
    model, batch = model_and_batch(model_type, 3, dtype=torch.float64)
    noise, sigma = torch.randn_like(batch.latent), torch.tensor([0.1, 0.637, 1.0])
    got = sft_loss(model, batch, noise, sigma)
    assert got.shape == (3,)
    context = model.embed_context(batch.text, batch.clip)
    for b in range(3):
        s, one = sigma[b].double(), slice(b, b + 1)
        x = (1 - s) * batch.latent[one] + s * noise[one]
        condition = None if batch.condition is None else batch.condition[one]
        v = model(x, 1000 * sigma[one], context[one], condition)
        want = (v - (noise[one] - batch.latent[one])).square().mean()
        # The engine may form 1000 sigma or 1 - sigma in float32: 2^-24 relative.
        torch.testing.assert_close(got[b], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", range(2, 45))
def test_thirds_cover_all_steps_but_the_last(steps):
    def steps_of(name):
        first, last = index_range(RolloutConfig(steps=steps, range=name))
        return set(range(first, last + 1))

    everything = set(range(steps - 1))
    assert steps_of("all") == everything
    parts = [steps_of(n) for n in ("early", "middle", "late")]
    assert set().union(*parts) == everything
    assert all(parts)
    assert all(len(p) <= math.ceil((steps - 1) / 3) + 1 for p in parts)
    assert parts[0] == set(range(len(parts[0])))
    assert max(parts[1]) <= max(parts[2]) == steps - 2


def test_thirds_of_40_steps():
    got = {n: index_range(RolloutConfig(range=n)) for n in ("all", "early", "middle", "late")}
    assert got == {"all": (0, 38), "early": (0, 12), "middle": (13, 25), "late": (26, 38)}
    assert index_range(RolloutConfig(range=(3, 7))) == (3, 7)


@pytest.mark.parametrize(
    "form, want",
    [
        ("hinge", lambda r: 0.3 * max(0.6 - r, 0)),
        ("linear", lambda r: -0.3 * r),
        ("log", lambda r: -0.3 * math.log(r)),
    ],
)
def test_reward_loss(form, want):
    got = reward_loss(LOGITS, LossConfig(form=form, weight=0.3, target=0.6))
    expected = [want(1 / (1 + math.exp(-x))) for x in LOGITS.tolist()]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_published_reward_loss():
    r = torch.sigmoid(LOGITS)
    torch.testing.assert_close(reward_loss(LOGITS, LossConfig()), 0.1 * (2 - r))


@pytest.mark.parametrize("form", ["hinge", "linear", "log"])
def test_every_form_rewards_a_larger_logit(form):
    logit = torch.linspace(-5, 5, 5, requires_grad=True)
    (g,) = torch.autograd.grad(reward_loss(logit, LossConfig(form=form)).sum(), logit)
    assert (g < 0).all()


def test_cross_entropy():
    label = torch.tensor([0.0, 1, 1, 0, 1])
    got = cross_entropy(LOGITS, label)
    want = [
        math.log1p(math.exp(-x)) if y else x + math.log1p(math.exp(-x))
        for x, y in zip(LOGITS.tolist(), label.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_bradley_terry():
    lose = LOGITS.flip(0)
    want = [
        math.log1p(math.exp(b - a)) for a, b in zip(LOGITS.tolist(), lose.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        bradley_terry(LOGITS, lose), torch.tensor(want, dtype=torch.float64), atol=1e-15, rtol=1e-7
    )
    both = [a + 0.3 * (math.log1p(math.exp(-w)) + math.log1p(math.exp(b))) / 2
            for a, w, b in zip(want, LOGITS.tolist(), lose.tolist(), strict=True)]  # fmt: skip
    got = bradley_terry(LOGITS, lose, 0.3)
    torch.testing.assert_close(got, torch.tensor(both, dtype=torch.float64), atol=1e-15, rtol=1e-7)


def setup(model_type="t2v", size=2):
    config = tiny_config(model_type)
    policy, reward = tiny_model(config), tiny_reward(config).freeze()
    return policy, reward, flow.make_schedule("unipc", 4, 5.0), random_batch(config, size)


@BOTH
def test_the_reward_gradient_reaches_the_policy_and_nothing_of_the_reward_model(model_type):
    policy, reward, schedule, batch = setup(model_type)
    noise = torch.randn(2, *SHAPE)
    (window,) = graded_windows(policy, reward, schedule, batch, noise, torch.tensor([[2, 0]]))
    window.backward(reward_loss(window.logit, LossConfig()).mean())
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert all(p.grad is None for p in reward.parameters())


def test_the_reward_is_taken_at_the_next_timestep_of_each_sample():
    policy, reward, schedule, batch = setup()
    policy, reward = policy.double(), reward.double()
    batch = batch._replace(latent=batch.latent.double(), text=batch.text.double())
    noise, index = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([2, 0])
    with torch.no_grad():
        (window,) = graded_windows(policy, reward, schedule, batch, noise, index[None])
        got = window.logit
        context = policy.embed_context(batch.text)
        for b in range(2):
            state, one = flow.init_state(noise[b : b + 1]), slice(b, b + 1)
            for i in range(index[b] + 1):
                v = policy(state.x, schedule.timesteps[i : i + 1], context[one])
                state = flow.step(schedule, state, v, torch.tensor([i]))
            t = schedule.timesteps[index[b] + 1][None]
            want = reward(state.x, t, batch.text[one])
            torch.testing.assert_close(got[one], want, rtol=1e-9, atol=1e-9)


def test_the_reward_gradient_is_that_of_finite_differences():
    """Along a random direction of one weight that acts in the graded step alone (index 0)."""
    policy, reward, schedule, batch = setup(size=1)
    policy, reward = policy.double(), reward.double()
    batch = batch._replace(latent=batch.latent.double(), text=batch.text.double())
    noise, index = torch.randn(1, *SHAPE, dtype=torch.float64), torch.tensor([0])
    weight = policy.blocks[1].ffn[2].weight
    direction = torch.randn_like(weight)

    def loss(offset):
        saved = weight.data
        weight.data = saved + offset * direction
        try:
            (window,) = graded_windows(policy, reward, schedule, batch, noise, index[None])
            return window, reward_loss(window.logit, LossConfig()).sum()
        finally:
            weight.data = saved

    window, value = loss(0.0)
    window.backward(value)
    with torch.no_grad():
        slope = (loss(1e-5)[1] - loss(-1e-5)[1]) / 2e-5
    # Central differences: 1e-10 of curvature, and 1e-16 / 1e-5 of rounding, on a slope near 1e-2.
    torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=1e-5, atol=1e-10)


def accumulated(policy, reward, schedule, batch, noise, indices, **config):
    """(logits [K, B], .grad of the policy) of the mean loss over K graded samples of one rollout."""
    policy.zero_grad()
    logits = []
    for window in graded_windows(policy, reward, schedule, batch, noise, indices, ChainConfig(**config)):
        logits.append(window.logit.detach())
        window.backward(torch.sigmoid(window.logit).mean() / len(indices))
    return torch.stack(logits), {k: p.grad.clone() for k, p in policy.named_parameters()}


def setup_rewards(model_type="t2v", size=2):
    config = tiny_config(model_type)
    policy, reward = tiny_model(config).double(), tiny_reward(config).double().freeze()
    batch = random_batch(config, size, dtype=torch.float64)
    return policy, reward, flow.make_schedule("unipc", 5, 5.0), batch, torch.randn_like(batch.latent)


def assert_close(got, want, limit=1e-9):
    for k, w in want.items():
        assert ((got[k] - w).norm() / w.norm()).item() < limit, k


@BOTH
def test_one_sample_with_a_window_of_one_step_is_the_graded_reward(model_type):
    setup = setup_rewards(model_type)
    index = torch.tensor([2, 0])
    logits, got = accumulated(*setup, index[None])
    policy = setup[0]
    policy.zero_grad()
    policy, reward, schedule, batch, noise = setup
    velocity = bind(policy, batch)
    with torch.no_grad():
        state = chain.rollout(velocity, schedule, noise, index)
    x = chain.advance(velocity, schedule, state, index, torch.arange(2)).x
    logit = reward(x, schedule.timesteps[index + 1], batch.text, batch.clip, batch.condition)
    torch.sigmoid(logit).mean().backward()
    torch.testing.assert_close(logits[0], logit.detach(), rtol=1e-12, atol=1e-12)
    assert_close(got, {k: p.grad for k, p in policy.named_parameters()})


@BOTH
def test_every_window_is_whole_so_the_loop_may_be_left_at_any_time(model_type):
    """The first of two windows of three steps: its gradient is that of a rollout of its own."""
    setup = setup_rewards(model_type)
    indices = torch.tensor([[3, 2], [3, 3]])
    _, want = accumulated(*setup, indices[:1], window=3)
    setup[0].zero_grad()
    for window in graded_windows(*setup, indices, ChainConfig(window=3)):
        window.backward(torch.sigmoid(window.logit).mean())
        break
    assert_close({k: p.grad for k, p in setup[0].named_parameters()}, want)


@pytest.mark.parametrize("length", [1, 3])
def test_a_window_is_backpropagated_by_its_own_backward_alone_and_once(length):
    setup = setup_rewards()
    given = *setup, torch.tensor([[3, 2]]), ChainConfig(window=length)
    (window,) = graded_windows(*given)
    with pytest.raises(RuntimeError, match=r"want window.backward\(loss\)"):
        window.logit.sum().backward()
    assert all(p.grad is None for p in setup[0].parameters())
    (window,) = graded_windows(*given)
    window.backward(window.logit.sum())
    with pytest.raises(RuntimeError, match="got a second backward"):
        window.backward(window.logit.sum())


def test_a_window_whose_states_a_later_one_has_dropped_is_refused_before_any_gradient():
    setup = setup_rewards()
    first, _ = graded_windows(*setup, torch.tensor([[2, 1], [3, 3]]), ChainConfig(window=2))
    with pytest.raises(RuntimeError, match="got backward after a later window was made"):
        first.backward(first.logit.sum())
    assert all(p.grad is None for p in setup[0].parameters())


@pytest.mark.parametrize("window", [1, 3, "all"])
@BOTH
def test_samples_of_one_rollout_give_the_mean_gradient_of_rollouts_of_their_own(model_type, window):
    setup = setup_rewards(model_type)
    indices = torch.tensor([[0, 1], [2, 1], [3, 3]])
    logits, got = accumulated(*setup, indices, window=window)
    alone = [accumulated(*setup, index[None], window=window) for index in indices]
    torch.testing.assert_close(logits, torch.cat([one[0] for one in alone]), rtol=1e-12, atol=1e-12)
    want = {k: sum(one[1][k] for one in alone) / 3 for k in got}
    assert_close(got, want)


@pytest.mark.parametrize("detach_input", [False, True])
def test_a_window_over_the_whole_chain_is_the_unrolled_graph(detach_input):
    """The context embedding included, whose gradient is the sum over all steps."""
    setup = policy, reward, schedule, batch, noise = setup_rewards()
    _, got = accumulated(*setup, torch.tensor([[3, 3]]), window="all", detach_input=detach_input)
    policy.zero_grad()
    velocity, state = bind(policy, batch), flow.init_state(noise)
    for i in range(4):
        x = state.x.detach() if detach_input else state.x
        index = torch.tensor([i, i])
        state = flow.step(schedule, state, velocity(x, schedule.timesteps[index], torch.arange(2)), index)
    logit = reward(state.x, schedule.timesteps[[4, 4]], batch.text)
    torch.sigmoid(logit).mean().backward()
    assert_close(got, {k: p.grad for k, p in policy.named_parameters()})


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_the_context_is_embedded_once_a_sample(model_type, monkeypatch):
    setup = setup_rewards(model_type)
    calls, embed = [], WanTransformer.embed_context

    def counted(self, *arguments):
        calls.append(self)
        return embed(self, *arguments)

    monkeypatch.setattr(WanTransformer, "embed_context", counted)
    accumulated(*setup, torch.tensor([[0, 1], [3, 3]]), window=2)
    assert calls == [setup[0], setup[1].transformer]


def test_graded_indices_are_stratified_and_uniform():
    uniform = torch.rand(4, 3000, dtype=torch.float64)
    got = stratified_indices(2, 9, uniform)
    assert got.shape == (4, 3000)
    for j, row in enumerate(got):  # two of the eight indices each
        assert set(row.tolist()) == {2 + 2 * j, 3 + 2 * j}
    assert (got[1:] >= got[:-1]).all()
    uneven = stratified_indices(0, 38, torch.rand(4, 20000, dtype=torch.float64))
    counts = torch.bincount(uneven.flatten(), minlength=39) / 20000
    # 4 / 39 each; the deviation of a count of 20,000 trials is 0.0021.
    assert (counts - 4 / 39).abs().max() < 5 * 0.0022
    one = stratified_indices(5, 5, torch.tensor([[0.0, 0.999999999]], dtype=torch.float64))
    assert one.tolist() == [[5, 5]]


def test_more_samples_than_indices_repeat_some():
    got = stratified_indices(0, 1, torch.full((5, 1), 0.5, dtype=torch.float64))
    assert got.flatten().tolist() == [0, 0, 1, 1, 1]
