"""What test_shards.py runs on every rank: which collectives a phase of a step makes, and rollouts."""

import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from helpers import random_batch, randomize, relative, rows, tiny_config, tiny_model, tiny_reward
from shard_cases import SCHEDULE, collectives, of_first, world_of
from test_graphs import FakeRecorder

from prfl_engine import chain, exposed
from prfl_engine import phases as clocks
from prfl_engine.config import ChainConfig, LoraConfig, LossConfig, RolloutConfig
from prfl_engine.memory.policy import BlockPolicy, named
from prfl_engine.memory.recompute import run_under
from prfl_engine.model import lora
from prfl_engine.objectives import Grader, Grading, reward_loss
from prfl_engine.parallel import World
from prfl_engine.rollout.accelerated import Rollout
from prfl_engine.shards import local

BLOCKS, STEPS = 3, 3


def phases(resident: bool, replicate: int, window: int, last: bool) -> dict[str, Counter]:
    """(collective, ranks of its group) and how often, by phase: a rollout, the forwards inside of it, the
    steps with gradient after it, and their backward. The reward model is whole on every rank."""
    world, config = world_of(replicate, 1, resident), tiny_config(num_layers=BLOCKS)
    model, reward = world.place(tiny_model(config)), tiny_reward(config).freeze()
    batch, index, found = random_batch(config, 1), torch.tensor([STEPS + window - 1]), {}
    grader = Grader(model, reward, SCHEDULE, ChainConfig(window=window), together=world.together(model))
    grading = Grading(grader, batch)
    way, inside = grading.way(torch.randn_like(batch.latent)), []

    def velocity(*given):
        with collectives() as calls:
            made = grading.plain(*given)
        inside.extend(calls)
        return made

    def counted(calls):
        return Counter((c.name, c.ranks) for c in calls)

    with collectives() as calls:
        way.advance_to(torch.tensor([STEPS]), torch.tensor([STEPS]), velocity)
        found["rollout"], found["inside"] = counted(calls), counted(inside)
    with collectives() as calls:
        graded = grading.grade(way, index)
        found["steps"] = counted(calls)
    world.add_up_copies(model, last)
    with collectives() as calls:
        graded.backward(reward_loss(graded.logit, LossConfig(weight=1.0)).mean())
        found["backward"] = counted(calls)
    return found


def resident(updates: bool, replicate: int) -> tuple[bool, list[int], set[torch.dtype], bool]:
    """Two rollouts by replays, with other weights in the second one: (whether latents are to the bit those
    of a rollout that gathers weights in every step, recordings after each, dtypes of the resident matrices,
    whether weights that are not kept are gone)."""
    torch.manual_seed(0)
    config, record, equal, recorded = tiny_config(), FakeRecorder(), [], []
    batch, index = random_batch(config, 2), torch.tensor([4, 2])
    noise = torch.randn_like(batch.latent)
    worlds = [world_of(replicate, 1, flag) for flag in (False, True)]
    model = tiny_model(config).set_precision(torch.bfloat16)
    if updates:
        randomize(lora.attach(model, LoraConfig(rank=2)))
    worlds[0].place(model)
    each, kept = (world.together(model, keep=True) for world in worlds)
    rollouts = [
        (together, Rollout(model, RolloutConfig(steps=6), SCHEDULE, how, together))
        for together, how in ((each, None), (kept, record))
    ]
    for _ in range(2):
        latents = []
        for together, fast in rollouts:
            context = model.embed_context(batch.text).detach()
            way = chain.Chain(None, SCHEDULE, noise, fast.stretches(batch, context), together)
            way.advance_to(index, index)
            latents.append(way.at(index, torch.arange(2)).x)
        equal.append(torch.equal(*latents))
        recorded.append(record.recorded)
        with torch.no_grad():
            for p in model.parameters():
                local(p).mul_(1.01)
    whole = kept.whole[0].model
    matrices = {p.dtype for name, p in whole.blocks.named_parameters() if name.endswith(".q.weight")}
    kept.keep = False
    with kept.rollout(1, 0):
        there = all(p.untyped_storage().nbytes() for p in whole.parameters())
    return all(equal), recorded, matrices, there and not any(
        p.untyped_storage().nbytes() for p in whole.parameters()
    )


def ahead(policy: str | BlockPolicy) -> list[int]:
    """How many units have been gathered in a backward before that of each block begins, last block first."""
    seen = []
    model = world_of().place(tiny_model(tiny_config(num_layers=BLOCKS)))

    def watch():
        def border(tokens):
            tokens.register_hook(lambda _: seen.append(sum(c.name == "gather" for c in calls)))

        return border

    run = run_under(named(policy) if isinstance(policy, str) else policy, watch)
    batch = random_batch(model.config, 1)
    with collectives() as calls:
        loss = chain_loss(model, batch, run)
        calls.clear()
        loss.backward()
    return seen[:BLOCKS]


def chain_loss(model, batch, run):
    """A loss of one forward; run: None for its own way of running blocks."""
    context, how = model.embed_context(batch.text), () if run is None else (run,)
    return model(batch.latent, torch.tensor([500.0]), context, None, *how).square().mean()


def rollout(
    precision: str, cache: float, resident: bool, alike: bool, replicate: int, sequence: int
) -> tuple[float, float, int, bool]:
    """(distances of the latents of an accelerated rollout: from that of one process, and that one's from a
    plain one; gathers here; whether the e4m3 weights are those of one process).

    alike: every rank has the same sample and makes as many steps.
    """
    torch.manual_seed(0)
    config, count = tiny_config(dim=256, num_heads=4, ffn_dim=256), 4
    batch = random_batch(config, count, (16, 3, 4, 6))
    noise, index = torch.randn_like(batch.latent), torch.tensor([5, 3, 4, 2])
    if alike:
        first = [0] * count
        batch, noise, index = rows(batch, first), noise[first], torch.full((count,), 5)

    def made(world, settings, own):
        model = world.place(tiny_model(config))
        together = world.together(model)
        fast = Rollout(model, settings, SCHEDULE, together=together)
        given = rows(batch, own)
        context = model.embed_context(given.text).detach()
        way = chain.Chain(None, SCHEDULE, noise[own], fast.stretches(given, context), together)
        with collectives() as calls:
            way.advance_to(index[own], index[own])
        x = way.at(index[own], torch.arange(len(index[own]))).x
        kept = [] if fast.fp8 is None else [p.weight.float() for b in fast.fp8.blocks for p in b.products]
        return x, kept, sum(c.name == "gather" for c in calls)

    world = world_of(replicate, sequence, resident)
    settings = RolloutConfig(steps=6, precision=precision, cache=cache)
    size = count // world.readers  # one process makes batches of this size, too: rounding depends on it
    parts = [slice(i, i + size) for i in range(0, count, size)]
    whole = of_first(lambda: [made(World(), settings, part) for part in parts])
    plain = of_first(lambda: [made(World(), RolloutConfig(steps=6), part) for part in parts])
    x, kept, gathers = made(world, settings, parts[world.reader])
    want, weights, _ = whole[world.reader]
    same = all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))
    moved = relative(*(torch.cat([x for x, _, _ in found]) for found in (whole, plain)))
    return relative(x, want), moved, gathers, same


class Late:
    """Time in which nothing passes but the ten seconds by which the second of two ranks is late."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.count, self.due = folder, rank, 0, None

    def __call__(self) -> None:
        """The second rank waits until the first one has begun its next wait, and is late."""
        self.count += 1
        begun = self.folder / f"begun-{self.count}"
        if self.rank == 0:
            self.due = begun
            return
        while not begun.exists():
            time.sleep(0.001)
        (self.folder / f"late-{self.count}").touch()

    def now(self) -> float:
        """In place of time.perf_counter."""
        found = 10.0 * len(list(self.folder.glob("late-*")))
        if self.due is not None:
            self.due.touch()
            self.due = None
        return found


def waits(folder: str, sequence: int) -> dict[str, float]:
    """Seconds of waits by phase on this rank, where the second one is late for an agreement (data), a gather
    of weights (rollout), an exchange if the sequence is cut (validation), a reduction of gradients (graded),
    and a mean (reward)."""
    world = world_of(1, sequence)
    late, batch = Late(Path(folder), world.rank), random_batch(tiny_config(), 1)
    model = world.place(tiny_model(tiny_config(num_layers=1)))

    def begins(block, given):
        """The weights of the block are there."""
        if given[0].requires_grad:
            given[0].register_hook(lambda _: (clocks.mark("graded"), late())[1])
        elif sequence > 1:
            clocks.mark("validation")
            late()

    model.blocks[0].register_forward_pre_hook(begins)
    with mock.patch.object(clocks.time, "perf_counter", late.now), clocks.timed(torch.device("cpu")) as clock:
        with exposed.measured(clock):
            late()
            with world.agreed():
                pass
            clocks.mark("rollout")
            late()
            with torch.no_grad():
                chain_loss(model, batch, None)
            clocks.mark("optimizer")
            chain_loss(model, batch, None).backward()
            clocks.mark("reward")
            late()
            world.mean(torch.zeros(()))
        return dict(clock.lap().waits())
