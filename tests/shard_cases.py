"""What test_shards.py runs on every rank: a sharded model trained beside the same model whole."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from helpers import random_batch, rows, tiny_config, tiny_model, tiny_reward, under
from torch.distributed.device_mesh import init_device_mesh

from prfl_engine import flow
from prfl_engine.config import ChainConfig, LoraConfig, LossConfig, OptimConfig
from prfl_engine.model import lora
from prfl_engine.objectives import cross_entropy, graded_windows, noisy_reward, reward_loss, sft_loss
from prfl_engine.optim.optimizer import EMA, make_optimizer, update
from prfl_engine.parallel import cut_sequence, shard

SHAPE, SAMPLES = (16, 3, 4, 6), 4  # 18 tokens; as many samples as the largest world has ranks
SCHEDULE = flow.make_schedule("unipc", 6, 5.0)


def mesh_of(replicate: int):
    """[replicate, shard], or [shard] for one replica."""
    size = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    shape = replicate, size // replicate
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def _inputs(kind: str, dtype):
    torch.manual_seed(4)
    batch = random_batch(tiny_config(kind), SAMPLES, SHAPE, dtype=dtype)
    return batch, torch.randn_like(batch.latent), torch.tensor([0.3, 0.8, 0.5, 0.6], dtype=dtype)


def _mine(inputs, sequence: int = 1):
    """The samples of this rank, of which `sequence` ranks share each group."""
    count = SAMPLES * sequence // dist.get_world_size()
    first = dist.get_rank() // sequence * count
    batch, noise, sigma = inputs
    own = slice(first, first + count)
    return (rows(batch, own), noise[own], sigma[own]), own


def sft(model, inputs, own, policy="none"):
    loss = sft_loss(model, *inputs, under(policy)).mean()
    loss.backward()
    return loss


def prfl(model, reward, inputs, own, window, samples):
    """Losses of `samples` graded steps; every rank's indices are alike."""
    batch, noise, _ = inputs
    indices, total = torch.tensor([[2] * SAMPLES, [4] * SAMPLES][:samples])[:, own], 0.0
    config = ChainConfig(window=window)
    for graded in graded_windows(model, reward, SCHEDULE, batch, noise, indices, config, None, under("full")):
        loss = reward_loss(graded.logit, LossConfig(weight=1.0)).mean() / samples
        graded.backward(loss)
        total = total + loss.detach()
    return total


def reward_training(reward, inputs, own):
    loss = cross_entropy(noisy_reward(reward, *inputs), torch.tensor([0.0, 1.0, 1.0, 0.0])[own]).mean()
    loss.backward()
    return loss


def gradients(model) -> dict[str, torch.Tensor]:
    """The whole gradients by name."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def compare(run, make, replicate=1, sequence=1) -> tuple[float, float, str]:
    """(difference of the loss, that of the worst gradient relative to its norm, its name): several ranks
    and one. run(*models, inputs, own); the first model is trained."""
    inputs = _inputs("t2v", torch.float64)
    whole = make()
    want, everyone = run(*whole, inputs, slice(0, SAMPLES)).item(), gradients(whole[0])
    if sequence == 1:
        mesh, group = mesh_of(replicate), None
    else:
        shape = dist.get_world_size() // sequence, sequence
        both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "sequence"))
        mesh, group = mesh_of(1), both.get_group("sequence")
    models = [shard(model, mesh) for model in make()]
    if group is not None:
        models = [cut_sequence(model, group) for model in models]
    loss = run(*models, *_mine(inputs, sequence)).detach()
    dist.all_reduce(loss)
    made = gradients(models[0])
    assert set(made) == set(everyone)
    least = 1e-3 * max(g.norm() for g in everyone.values())
    errors = {k: ((made[k] - g).norm() / g.norm().clamp(min=least)).item() for k, g in everyone.items()}
    name = max(errors, key=errors.get)
    return abs(loss.item() / dist.get_world_size() - want), errors[name], name


def generator(kind="t2v"):
    return [tiny_model(tiny_config(kind)).double()]


def both():
    return [*generator(), tiny_reward(tiny_config()).double().freeze()]


def flow_matching(policy, replicate, sequence):
    return compare(lambda *a: sft(*a, policy), generator, replicate, sequence)


def graded(window, samples, replicate, sequence):
    return compare(lambda *a: prfl(*a, window, samples), both, replicate, sequence)


def rewards(replicate, sequence):
    def make():
        return [tiny_reward(tiny_config(), blocks=2).double()]

    return compare(reward_training, make, replicate, sequence)


def adapter(replicate, sequence):
    def make():
        model = generator()[0]
        lora.start(model, LoraConfig(rank=2), 0, None)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.normal_(generator=torch.Generator().manual_seed(len(name)))
        return [model.double()]

    return compare(sft, make, replicate, sequence)


def trained(settings: dict, dtype, steps: int, replicate: int) -> tuple[float, float]:
    """(relative distance of the weights from those of one process, how far they have moved from the start)
    after some optimizer steps, with an average beside them."""
    torch.manual_seed(0)
    inputs = _inputs("t2v", torch.float32)
    weights = []
    for sharded in (False, True):
        model = tiny_model(tiny_config(dim=256, num_heads=4, ffn_dim=256)).to(dtype)
        start = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        if sharded:
            shard(model, mesh_of(replicate))
        optimizer = make_optimizer([(model, 1e-3)], OptimConfig(**settings))
        ema = EMA(model, 0.5)
        given, own = _mine(inputs) if sharded else (inputs, slice(0, SAMPLES))
        for _ in range(steps):
            sft(model, given, own)
            update(optimizer, None if settings.get("in_backward") else 1.0)
            ema.update()
        found = []
        for context in (nullcontext(), ema.applied()):
            with context, torch.no_grad():
                # The forward sees what the shards hold, not what was gathered before.
                x = sft_loss(model, *given).mean()
                if sharded:
                    dist.all_reduce(x)
                    x /= dist.get_world_size()
                all_of = [p.full_tensor() if sharded else p for p in model.parameters()]
                found.append(torch.cat([*(a.detach().flatten().double() for a in all_of), x.double()[None]]))
        weights.append(torch.cat(found))
    moved = (weights[0][: len(start)] - start).norm()
    return ((weights[1] - weights[0]).norm() / moved).item(), (moved / start.norm()).item()
