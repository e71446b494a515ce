"""What test_sequence.py runs on every rank: a cut model against the same model whole, in float64."""

from datetime import timedelta

import torch
import torch.distributed as dist
from helpers import random_batch, relative, tiny_config, tiny_model, tiny_reward, under
from shard_cases import gradients, of_first, worst
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from prfl_engine import chain, flow
from prfl_engine.config import ChainConfig, LossConfig, RolloutConfig
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.objectives import cross_entropy, graded_windows, noisy_reward, reward_loss, sft_loss
from prfl_engine.parallel import cut_sequence
from prfl_engine.rollout.accelerated import Rollout
from prfl_kernels.exchange import group_of
from prfl_kernels.sublayers.self_attention import KEEP

EVEN, ODD = (16, 3, 8, 8), (16, 3, 6, 10)  # 48 and 45 tokens
OFFLOAD = BlockPolicy({"input", "rotated"}, {"attention", "projections", "after_attention"})


def _config(kind: str, heads: int = 4):
    return tiny_config(kind, dim=64, num_heads=heads)


def _inputs(kind: str, shape):
    torch.manual_seed(4)
    batch = random_batch(_config(kind), 2, shape, dtype=torch.float64)
    if kind == "ti2v":  # in image mode
        batch = batch._replace(condition=batch.latent[:, :, :1])
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


def _worst(run, make) -> tuple[float, float, str]:
    """(difference of the loss, that of the worst gradient relative to its norm, its name): cut and whole. Of
    gradients the mean over all ranks, as FSDP makes it."""

    def alone():
        whole = make()
        return run(*whole), gradients(whole[0])

    want, everyone = of_first(alone)
    models = [cut_sequence(model, dist.group.WORLD) for model in make()]
    got = run(*models)
    made = gradients(models[0])
    both = torch.cat([g.flatten() for g in made.values()])  # since a collective takes longer than a sum
    dist.all_reduce(both)
    parts = (both / dist.get_world_size()).split([g.numel() for g in made.values()])
    made = {name: part.view_as(g) for (name, g), part in zip(made.items(), parts, strict=True)}
    return (abs(got - want), *worst(made, everyone))


def flow_matching(kind, shape, policy, keep, chunk, heads=4):
    def make():
        return [tiny_model(_config(kind, heads)).double().set_chunk(chunk)]

    run_blocks = under(policy) if isinstance(policy, BlockPolicy) else under(policy, keep)
    return _worst(lambda model: _sft(model, kind, shape, run_blocks), make)


def graded(kind, shape, window, samples, heads=4):
    def make():
        model = tiny_model(_config(kind, heads)).double()
        return [model, tiny_reward(_config(kind, heads)).double().freeze()]

    return _worst(lambda model, reward: _prfl(model, reward, kind, shape, window, samples), make)


def reward_training(kind, shape):
    def make():
        return [tiny_reward(_config(kind), blocks=2).double()]

    return _worst(lambda reward: _reward_training(reward, kind, shape), make)


def rollout(precision: str, cache: float, heads: int = 4) -> tuple[float, float]:
    """Relative distances of the latents of an accelerated rollout: cut from whole, whole from plain."""
    torch.manual_seed(0)
    settings = tiny_config(dim=64 * heads, num_heads=heads, ffn_dim=256)
    batch = random_batch(settings, 2, ODD)
    noise, index = torch.randn_like(batch.latent), torch.tensor([5, 4])

    def latents(config: RolloutConfig, cut: bool):
        model = tiny_model(settings)
        if cut:
            cut_sequence(model, dist.group.WORLD)
        schedule = flow.make_schedule(config.solver, config.steps, config.shift)
        context = model.embed_context(batch.text).detach()
        velocity = Rollout(model, config, schedule).stretches(batch, context)()
        return chain.rollout(velocity, schedule, noise, index).x

    accelerated = RolloutConfig(steps=6, precision=precision, cache=cache)
    others = accelerated, RolloutConfig(steps=6)
    whole, plain = of_first(lambda: [latents(config, False) for config in others])
    return relative(latents(accelerated, True), whole), relative(whole, plain)


def fake_shapes(heads: int) -> bool:
    """Whether the fake of a cut self-attention sublayer makes what the operation makes, in all modes."""
    model = tiny_model(_config("t2v", heads)).double()
    cut_sequence(model, dist.group.WORLD)
    block, grid = model.blocks[0], (3, 3, 5)
    cut = block.cut(grid)
    x = torch.randn(2, cut.parts[cut.rank], 64, dtype=torch.float64, requires_grad=True)
    e = torch.randn(2, 6, 64, dtype=torch.float64)

    def saved(mode):
        found = []

        def pack(a):
            found.append((tuple(a.shape), a.dtype))
            return a

        with saved_tensors_hooks(pack, lambda a: a):
            made = block.attend(x, block.vectors(e), grid, mode)
        sum(a.sum() for a in made[:2]).backward()
        return found

    for mode in KEEP:
        want = saved(mode)
        with FakeTensorMode(allow_non_fake_inputs=True):
            if saved(mode) != want:
                return False
    return True


def compiled(heads: int) -> float:
    """Relative distance of the gradient of a compiled cut model from that of a plain one."""
    gradients = []
    for backend in (None, "aot_eager"):
        model = cut_sequence(tiny_model(_config("t2v", heads)).double(), dist.group.WORLD)
        if backend:
            model.compile_blocks(backend)
        _sft(model, "t2v", ODD, under())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return relative(*gradients)


def alone_in_a_group(limit: float) -> str:
    """What the first rank says of a collective of a group that no other rank joins."""
    said, size = "", dist.get_world_size()
    group = group_of(torch.arange(size)[None], timedelta(seconds=limit))
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.zeros(1), group=group)
        except RuntimeError as error:
            said = str(error)
    dist.barrier()
    return said


def refusal(heads: int, shape=ODD) -> str:
    model = tiny_model(tiny_config(dim=48, num_heads=heads)).double()
    try:
        _sft(cut_sequence(model, dist.group.WORLD), "t2v", shape, under())
    except ValueError as error:
        return str(error)
    return ""
