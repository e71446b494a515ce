"""What test_shards.py runs on every rank: a sharded model trained beside the same model whole."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from helpers import random_batch, randomize, relative, rows, tiny_config, tiny_model, tiny_reward, under
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from prfl_engine import flow
from prfl_engine.config import ChainConfig, LoraConfig, LossConfig, OptimConfig
from prfl_engine.model import lora
from prfl_engine.model.start import Start
from prfl_engine.objectives import (
    Grader,
    Grading,
    anchored_sft_loss,
    bind,
    cross_entropy,
    noisy_reward,
    reward_loss,
    sft_loss,
)
from prfl_engine.optim.block_adamw import _blocks, master
from prfl_engine.optim.optimizer import EMA, make_optimizer, update
from prfl_engine.parallel import World
from prfl_engine.shards import local
from prfl_engine.train_reward import save_adapted

SHAPE, SAMPLES = (16, 3, 4, 6), 4  # 18 tokens; as many samples as the largest world has ranks
COLLECTIVES = {  # in the names of several versions of torch
    "gather": ("all_gather_into_tensor", "all_gather_single"),
    "scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "all_reduce": ("all_reduce",),
    "exchange": ("all_to_all_single",),
}
SCHEDULE = flow.make_schedule("unipc", 6, 5.0)


@cache
def mesh_of(replicate: int):
    """[replicate, shard], or [shard] for one replica. Made once: a group of gloo has threads that stay, in
    every process, and wake up a hundred times a second."""
    size = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    shape = replicate, size // replicate
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def _inputs(kind: str, dtype):
    torch.manual_seed(4)
    batch = random_batch(tiny_config(kind), SAMPLES, SHAPE, dtype=dtype)
    return batch, torch.randn_like(batch.latent), torch.tensor([0.3, 0.8, 0.5, 0.6], dtype=dtype)


def world_of(replicate: int = 1, sequence: int = 1, resident: bool = False, reduce_dtype=None) -> World:
    """All ranks, as `parallel.started` makes it."""
    group = sequence_group(sequence) if sequence > 1 else None
    place = dist.get_rank(), dist.get_world_size()
    return World(*place, sequence, resident, mesh_of(replicate), group, reduce_dtype=reduce_dtype)


@cache
def sequence_group(sequence: int):
    """This rank's group of so many ranks that share sequences."""
    shape = dist.get_world_size() // sequence, sequence
    both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "sequence"))
    return both.get_group("sequence")


def of_first(make):
    """What make() returns on the first rank, on every rank."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


class Call(NamedTuple):
    """A collective on tensors."""

    name: str
    ranks: tuple[int, ...]  # of its group
    dtype: torch.dtype
    bytes: int  # of its larger side


@contextmanager
def collectives() -> Iterator[list[Call]]:
    """The collectives inside a with block, as they are made."""
    calls = []

    def watched(name, original):
        def call(*arguments, group=None, **settings):
            given = [a for a in (*arguments, *settings.values()) if isinstance(a, torch.Tensor)]
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            calls.append(Call(name, ranks, given[0].dtype, max(a.nbytes for a in given)))
            return original(*arguments, group=group, **settings)

        return call

    with ExitStack() as stack:
        for name, functions in COLLECTIVES.items():
            for function in functions:
                if (original := getattr(dist, function, None)) is not None:
                    stack.enter_context(mock.patch.object(dist, function, watched(name, original)))
        yield calls


def _mine(inputs, sequence: int = 1):
    """The samples of this rank, of which `sequence` ranks share each group."""
    count = SAMPLES * sequence // dist.get_world_size()
    first = dist.get_rank() // sequence * count
    batch, noise, sigma = inputs
    own = slice(first, first + count)
    return (rows(batch, own), noise[own], sigma[own]), own


def sft(model, inputs, own, world=World(), policy="none", keep="all"):  # noqa: B008 - frozen
    loss = sft_loss(model, *inputs, under(policy, keep)).mean()
    loss.backward()
    return loss


def prfl(model, reward, inputs, own, world, window, indices):
    """Losses of the graded steps indices[0], indices[1], ... [K, SAMPLES]."""
    (batch, noise, _), samples, total = inputs, len(indices), 0.0
    together = world.together(model)
    run = under("full")
    grader = Grader(model, reward, SCHEDULE, ChainConfig(window=window), None, run, run, together)
    for graded in Grading(grader, batch).windows(noise, torch.tensor(indices)[:, own]):
        loss = reward_loss(graded.logit, LossConfig(weight=1.0)).mean() / samples
        graded.backward(loss)
        total = total + loss.detach()
    return total


def reward_training(reward, inputs, own, world):
    loss = cross_entropy(noisy_reward(reward, *inputs), torch.tensor([0.0, 1.0, 1.0, 0.0])[own]).mean()
    loss.backward()
    return loss


def gradients(model) -> dict[str, torch.Tensor]:
    """The whole gradients by name."""
    return whole({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def whole(found: dict) -> dict:
    """Tensors by any key, each with the values of all shards. They come together, since the threads of gloo
    take longer for a collective than for what is in it."""
    sharded = {name: a for name, a in found.items() if isinstance(a, DTensor)}
    if not sharded:
        return found
    mesh = next(iter(sharded.values())).device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, [local(a) for a in sharded.values()], group)
    made = zip(sharded.items(), zip(*parts, strict=True), strict=True)
    return found | {name: torch.cat(shards, a.placements[-1].dim) for (name, a), shards in made}


def compare(run, make, layouts, resident=False, kind="t2v") -> list[tuple[float, float, str]]:
    """(difference of the loss, that of the worst gradient relative to its norm, its name) of every layout
    (replicas, ranks that share a sequence): several ranks and one. run(*models, inputs, own, world); the
    first model is trained."""
    inputs = _inputs(kind, torch.float64)

    def alone():
        whole = make()
        return run(*whole, inputs, slice(0, SAMPLES), World()).item(), gradients(whole[0])

    want, everyone = of_first(alone)

    def distance(replicate, sequence):
        world = world_of(replicate, sequence, resident)
        models = [world.place(model) for model in make()]
        loss = run(*models, *_mine(inputs, sequence), world).detach()
        dist.all_reduce(loss)
        return (abs(loss.item() / dist.get_world_size() - want), *worst(gradients(models[0]), everyone))

    return [distance(*layout) for layout in layouts]


def worst(made, everyone) -> tuple[float, str]:
    """Of gradients by name the one that differs most from everyone's, relative to its norm, and its name. A
    bias of keys has no gradient but rounding."""
    assert set(made) == set(everyone)
    least = 1e-3 * max(g.norm() for g in everyone.values())
    errors = {k: ((made[k] - g).norm() / g.norm().clamp(min=least)).item() for k, g in everyone.items()}
    name = max(errors, key=errors.get)
    return errors[name], name


def generator(kind="t2v"):
    return [tiny_model(tiny_config(kind)).double()]


def both(kind="t2v"):
    return [*generator(kind), tiny_reward(tiny_config(kind)).double().freeze()]


def flow_matching(policy, keep, backend, layouts):
    def make():
        model = generator()[0]
        return [model if backend is None else model.compile_blocks(backend)]

    return compare(lambda *a: sft(*a, policy, keep), make, layouts)


def graded(window, indices, resident, layouts):
    return compare(lambda *a: prfl(*a, window, indices), both, layouts, resident)


def image(layouts):
    """Flow matching and a window of an I2V model."""

    def run(model, reward, inputs, own, world):
        loss = sft(model, inputs, own).detach()
        return loss + prfl(model, reward, inputs, own, world, 2, [[1, 3, 0, 2]])

    return compare(run, lambda: both("i2v"), layouts, kind="i2v")


def chains(layouts):
    """A graded step of chains that are known, each at another index: no step without gradient."""

    def run(model, reward, inputs, own, world):
        (batch, noise, _), index = inputs, torch.arange(SAMPLES)[own]
        together = world.together(model)
        grading = Grading(Grader(model, reward, SCHEDULE, together=together), batch)
        known = [flow.init_state(noise[row : row + 1]) for row in range(len(index))]
        way = grading.way([[None] * i + [state] for i, state in zip(index.tolist(), known, strict=True)])
        way.plain = None  # is not called
        graded = grading.grade(way, index)
        loss = reward_loss(graded.logit, LossConfig(weight=1.0)).mean()
        graded.backward(loss)
        return loss.detach()

    return compare(run, both, layouts)


def single(replicate, sequence) -> tuple[float, float]:
    """In float32: distances of the loss and of the whole gradient, relative; several ranks and one."""
    inputs, world = _inputs("t2v", torch.float32), world_of(replicate, sequence)

    def alone():
        model = tiny_model(tiny_config())
        loss = sft(model, inputs, slice(0, SAMPLES)).item()
        return loss, gradients(model)

    want, everyone = of_first(alone)
    model = world.place(tiny_model(tiny_config()))
    loss = world.mean(sft(model, *_mine(inputs, sequence)).detach())
    made = gradients(model)
    whole = (torch.cat([found[name].flatten() for name in everyone]) for found in (made, everyone))
    return abs(loss.item() - want) / want, relative(*whole)


def rewards(layouts):
    def make():
        return [tiny_reward(tiny_config(), blocks=2).double()]

    return compare(reward_training, make, layouts)


def adapter(layouts):
    def make():
        model = generator()[0]
        lora.start(model, LoraConfig(rank=2), 0, None)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.normal_(generator=torch.Generator().manual_seed(len(name)))
        return [model.double()]

    return compare(sft, make, layouts)


def anchored(updates, layouts):
    """Flow matching and a window of a generator that has left its frozen start, which is sharded, too: with
    updates the same shards, otherwise a copy."""

    def make():
        model = generator()[0]
        if updates:
            lora.start(model, LoraConfig(rank=2), 0, None)
        frozen = [] if updates else [tiny_model(tiny_config()).double().requires_grad_(False)]
        return [randomize(model.double(), 5), *both()[1:], *frozen]

    def run(model, reward, *rest):
        *frozen, inputs, own, world = rest
        (batch, noise, sigma), start = inputs, Start(frozen[0] if frozen else model)
        losses = anchored_sft_loss(model, start, batch, noise, sigma, under("full"))
        loss = torch.stack(losses).sum(0).mean()
        loss.backward()
        grader = Grader(model, reward, SCHEDULE, ChainConfig(2), together=world.together(model))
        index = torch.tensor([[1, 3, 0, 2]])[:, own]
        (graded,) = Grading(grader, batch, start).windows(noise, index)
        more = (graded.logit + graded.distance).mean()
        graded.backward(more)
        return loss.detach() + more.detach()

    return compare(run, make, layouts)


def accumulated(layouts):
    """Two micro-batches of flow matching and two windows; copies add up blocks in the last windows alone."""

    def run(model, reward, inputs, own, world):
        total = 0.0
        for last in (False, True):
            world.add_up_copies(model, False)
            total = total + sft(model, inputs, own).detach()
            world.add_up_copies(model, last)
            total = total + prfl(model, reward, inputs, own, world, 2, [[1, 1, 1, 1], [3, 2, 3, 3]])
        return total

    return compare(run, both, layouts)


def placed(p, value):
    """A value of every weight of p, given those of this rank, sharded as p is."""
    if not isinstance(p, DTensor):
        return value.reshape(p.shape)
    value, where = value.reshape(local(p).shape), (p.device_mesh, p.placements)
    return DTensor.from_local(value, *where, shape=p.shape, stride=p.stride())


def weights(optimizer) -> torch.Tensor:
    """All weights in float64, with the 16 bits more that the optimizer may keep of them."""
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own, state = local(p.detach()).flatten(), optimizer.state.get(p, {})
        if "rest" in state.get("blocks", [{}])[0]:  # torch's AdamW, of one process, has no blocks
            own = torch.cat([master(w, b) for w, b in zip(_blocks(p.detach()), state["blocks"], strict=True)])
        found[i] = placed(p, own)
    return torch.cat([a.flatten().double() for a in whole(found).values()])


def trained(settings: dict, dtype, lr: float, steps: int, replicate: int) -> tuple[float, float, float]:
    """After optimizer steps on all ranks and on one: distance of the weights, how far they have moved,
    distance of losses and averaged weights; all relative."""
    inputs = _inputs("t2v", torch.float32)
    config = OptimConfig(**{"eps": 1e-4, **settings})

    def trained_on(world, given, own):
        eights = config.name == "adamw8bit"
        size = dict(dim=256, num_heads=4, ffn_dim=256) if eights else {}
        model = tiny_model(tiny_config(num_layers=1, **size)).to(dtype).set_precision(torch.float32)
        model = world.place(model)
        if eights:  # encoding is slow
            model.requires_grad_(False).blocks[0].ffn.requires_grad_(True)
        optimizer, ema = make_optimizer([(model, lr)], config), EMA(model, 0.5)
        start, losses = weights(optimizer), []
        for _ in range(steps):
            losses.append(sft(model, given, own).detach())
            update(optimizer, config.clip)
            ema.update()
        with ema.applied(), torch.no_grad():  # the forward sees what the shards hold now
            losses.append(sft_loss(model, *given).mean())
        averages = whole({name: placed(p, local(ema.average[name])) for name, p in ema.own.items()})
        seen = [world.mean(torch.stack(losses)), *averages.values()]
        return start, weights(optimizer), torch.cat([a.flatten().double() for a in seen])

    start, want, others = of_first(lambda: trained_on(World(), inputs, slice(0, SAMPLES)))
    reduce_dtype = torch.float32 if config.grad_dtype == "float32" else None
    _, got, seen = trained_on(world_of(replicate, 1, False, reduce_dtype), *_mine(inputs))
    return relative(got, want), relative(want, start), relative(seen, others)


def adapted(folder: str) -> bool:
    """Whether a reward model with updates is written from its shards, values of an average too, as it is
    from one process."""
    folder, world = Path(folder), world_of()

    def save(world, name):
        model = tiny_reward(tiny_config(), blocks=2)
        lora.start(model.transformer, LoraConfig(rank=2), 0, None)
        world.place(randomize(model))
        values = {k: p.detach() * 2 for k, p in model.named_parameters() if p.requires_grad}
        for part, given in (("now", None), ("average", values)):
            save_adapted(model, folder / name / part, 3, given)

    of_first(lambda: save(World(), "one"))
    save(world, "all")

    def content(path):
        if path.suffix != ".ckpt":
            return path.read_bytes()
        return {k: a.tolist() for k, a in torch.load(path, weights_only=True).items()}

    paths = [p.relative_to(folder / "one") for p in (folder / "one").rglob("*") if p.is_file()]
    return all(content(folder / "one" / path) == content(folder / "all" / path) for path in paths)


def float32_sums() -> tuple[dict[str, float], list[str]]:
    """(distance from float32 sums of the gradient of bfloat16 weights after eight micro-batches, by
    optim.grad_dtype; dtypes in which it went from rank to rank)."""
    batch, noise, sigma = _inputs("t2v", torch.float32)
    world, errors, on_the_way = world_of(), {}, set()

    def gradient(world, dtype, own):
        model = world.place(tiny_model().bfloat16().set_precision(torch.float32))
        make_optimizer([(model, 1e-3)], OptimConfig(grad_dtype=dtype))
        for micro in range(8):
            sft(model, (rows(batch, own), noise[own].roll(micro, 2), sigma[own]), own)
        found = gradients(model)
        return torch.cat([found[name].flatten().double() for name in sorted(found)])

    want = of_first(lambda: gradient(World(), "float32", slice(0, SAMPLES)))
    for dtype, reduce_dtype in (("weights", None), ("float32", torch.float32)):
        own = _mine((batch, noise, sigma))[1]
        with collectives() as calls:
            errors[dtype] = relative(gradient(replace(world, reduce_dtype=reduce_dtype), dtype, own), want)
        on_the_way |= {(dtype, str(call.dtype)) for call in calls if call.name == "scatter"}
    return errors, sorted(on_the_way)


def own_precision(updates: bool) -> float:
    """The largest difference, in bfloat16 compute, of the velocity of a sample in a sharded model: norms,
    modulation and time embedding keep the float32 of their weights; so do updates of bfloat16 weights."""
    inputs = _inputs("t2v", torch.float32)

    def velocity(world, given):
        model = tiny_model()
        if updates:
            lora.start(model.bfloat16(), LoraConfig(rank=2), 0, None)
            for p in lora.parameters(model).values():
                torch.nn.init.normal_(p.data, generator=torch.Generator().manual_seed(p.numel()))
        model = world.place(model.set_precision(torch.bfloat16))
        with torch.no_grad():
            return bind(model, given[0])(given[1], 1000 * given[2], torch.arange(len(given[1])))

    given, own = _mine(inputs)
    return (velocity(world_of(), given) - velocity(World(), given)).abs().max().item()


def made(name: str) -> int:
    """How many collectives the optimizer of a sharded model takes to be made."""
    model = world_of().place(tiny_model())
    with CommDebugMode() as seen:
        make_optimizer([(model, 1e-2)], OptimConfig(name=name))
    return seen.get_total_counts()


def one_bad_shard(in_backward: bool) -> tuple[bool, list[str]]:
    """(whether the norm is finite, the matrices of which some value here has changed) in a step in which one
    rank alone finds a gradient that is no number, in the first of two blocks."""
    model = world_of().place(tiny_model())
    named = dict(model.named_parameters())

    def spoil(p):
        if dist.get_rank() == 1:
            local(p.grad).fill_(float("nan"))

    named["blocks.0.self_attn.q.weight"].register_post_accumulate_grad_hook(spoil)
    config = OptimConfig(in_backward=in_backward, clip=None, offload="states")
    optimizer = make_optimizer([(model, 1e-2)], config)
    before = {name: local(p.detach()).clone() for name, p in named.items()}
    sft(model, *_mine(_inputs("t2v", torch.float32)))
    finite = update(optimizer, None).isfinite().item()
    matrices = {k: local(p.detach()) for k, p in named.items() if p.dim() == 2}  # of which all have rows
    return finite, [k for k, a in matrices.items() if not torch.equal(a, before[k])]


def rounded(replicate: int) -> tuple[list[float], set[str]]:
    """(this rank's rows of equal bfloat16 weights after a step that rounds them at random; the states of a
    matrix with fewer than 4,096 values a rank in 8 bits)."""
    world, model = world_of(replicate), torch.nn.Linear(16, 64, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    fully_shard(model, mesh=world.mesh)
    optimizer = make_optimizer([(model, 1e-3)], OptimConfig(rounding="stochastic", weight_decay=0.0))
    model(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
    update(optimizer, None)
    wide = fully_shard(torch.nn.Linear(256, 16, bias=False), mesh=world.mesh)
    (state,) = make_optimizer([(wide, 1e-3)], OptimConfig(name="adamw8bit")).state.values()
    return local(model.weight.detach()).flatten().tolist(), set(state["blocks"][0])
