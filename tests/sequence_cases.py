"""What test_sequence.py runs on every rank: a cut model against the same model whole, in float64."""

import torch
import torch.distributed as dist
from helpers import random_batch, tiny_config, tiny_model, tiny_reward, under

from prfl_engine import flow
from prfl_engine.config import ChainConfig, LossConfig
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.objectives import cross_entropy, graded_windows, noisy_reward, reward_loss, sft_loss
from prfl_engine.parallel import cut_sequence

EVEN, ODD = (16, 3, 8, 8), (16, 3, 6, 10)  # 48 and 45 tokens
OFFLOAD = BlockPolicy({"input", "rotated"}, {"attention", "projections", "after_attention"})


def _config(kind: str):
    return tiny_config(kind, dim=64, num_heads=4)


def _inputs(kind: str, shape):
    torch.manual_seed(4)
    batch = random_batch(_config(kind), 2, shape, dtype=torch.float64)
    noise = torch.randn_like(batch.latent)
    return batch, noise, torch.tensor([0.3, 0.8], dtype=torch.float64)


def _sft(model, kind, shape, run_blocks):
    loss = sft_loss(model, *_inputs(kind, shape), run_blocks).mean()
    loss.backward()
    return loss.item()


def _prfl(model, reward, kind, shape, window, samples):
    batch, noise, _ = _inputs(kind, shape)
    indices, total = torch.tensor([[2, 1], [4, 3]][:samples]), 0.0
    schedule = flow.make_schedule("unipc", 6, 5.0)
    config = ChainConfig(window=window)
    for graded in graded_windows(model, reward, schedule, batch, noise, indices, config, None, under("full")):
        loss = reward_loss(graded.logit, LossConfig(weight=1.0)).mean() / samples
        graded.backward(loss)
        total += loss.item()
    return total


def _reward_training(reward, kind, shape):
    logit = noisy_reward(reward, *_inputs(kind, shape), under("attention"))
    loss = cross_entropy(logit, torch.tensor([0.0, 1.0])).mean()
    loss.backward()
    return loss.item()


def _mean_gradients(model) -> dict[str, torch.Tensor]:
    """The mean over all ranks, as FSDP makes it."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worst(run, make) -> tuple[float, float, str]:
    """(difference of the loss, largest of a gradient relative to its tensor's norm, which one): cut and whole."""
    whole = make()
    want = run(*whole)
    gradients = {name: p.grad for name, p in whole[0].named_parameters() if p.grad is not None}
    group = dist.group.WORLD
    models = [cut_sequence(model, group) for model in make()]
    got = run(*models)
    made = _mean_gradients(models[0])
    assert set(made) == set(gradients)
    # The bias of keys has no gradient but rounding: the softmax drops it.
    least = 1e-3 * max(g.norm() for g in gradients.values())
    errors = {k: ((made[k] - g).norm() / g.norm().clamp(min=least)).item() for k, g in gradients.items()}
    name = max(errors, key=errors.get)
    return abs(got - want), errors[name], name


def flow_matching(kind, shape, policy, keep, chunk):
    def make():
        return [tiny_model(_config(kind)).double().set_chunk(chunk)]

    run_blocks = under(policy) if isinstance(policy, BlockPolicy) else under(policy, keep)
    return _worst(lambda model: _sft(model, kind, shape, run_blocks), make)


def graded(kind, shape, window, samples):
    def make():
        model = tiny_model(_config(kind)).double()
        return [model, tiny_reward(_config(kind)).double().freeze()]

    return _worst(lambda model, reward: _prfl(model, reward, kind, shape, window, samples), make)


def reward_training(kind, shape):
    def make():
        return [tiny_reward(_config(kind), blocks=2).double()]

    return _worst(lambda reward: _reward_training(reward, kind, shape), make)


def refusal(heads: int, shape=ODD) -> str:
    model = tiny_model(tiny_config(dim=48, num_heads=heads)).double()
    try:
        _sft(cut_sequence(model, dist.group.WORLD), "t2v", shape, under())
    except ValueError as error:
        return str(error)
    return ""
