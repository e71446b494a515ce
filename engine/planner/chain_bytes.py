"""Bytes of the states that a denoising chain holds, counted from chains without a model."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.objectives import index_range
from prfl_engine.planner.meta import meta_tensors
from prfl_engine.planner.setup import ROUND, Latent, Setup
from prfl_engine.rollout.choice import States, choose, judged_step, ranks

FULL_HISTORY = 4  # steps after which every field of a sampler's state is a tensor of its own


def schedule(steps: int) -> flow.Schedule:
    """Of real tensors; all solvers have the same bytes."""
    with torch.device("cpu"):
        return flow.make_schedule("euler", steps, 1.0)


def farthest(setup: Setup) -> list[list[list[int]]]:
    """Graded indices [K, B], as they may be drawn, with which most states are held. Samples that moved
    together are held as long as one of them is: so they are all at the same step, or as far from each other
    as their windows are long, in turn from one graded step to the next."""
    (first, last), size, count = index_range(setup.rollout), setup.latent[0], setup.rollout.samples
    steps, rows = last + 1 - first, range(count)
    parts = [(first + j * steps // count, first - (-(j + 1) * steps // count) - 1) for j in rows]

    def drawn(low: int, high: int, apart: int) -> list[int]:
        """From the last of a part on, or for a negative distance from the first."""
        if apart < 0:
            return [min(high, low - b * apart) for b in range(size)]
        return [max(low, high - b * apart) for b in range(size)]

    def turning(sign: int) -> list[list[int]]:
        return [drawn(*part, sign * setup.window * (-1) ** j) for j, part in enumerate(parts)]

    together = [drawn(*part, 0) for part in parts]
    early = []  # before seeds are judged: the states up to there are known, too
    if judged_step(setup.rollout):
        early = [[[low] * size for low, _ in parts]]
    if size == 1:
        return [together, *early]
    last_spread = [*together[:-1], drawn(*parts[-1], setup.window)]
    return [together, last_spread, *early, *([turning(1), turning(-1)] if count > 1 else [])]


def longest(setup: Setup) -> int:
    """The most bytes of the chain. Other draws of several samples hold up to a latent more. Of a chain that
    persists every field of its first state is a tensor of its own, as the pool has copied it."""
    first, last = index_range(setup.rollout)
    margin = math.prod(setup.latent) * 4 if setup.latent[0] > 1 and first < last else 0
    copied = setup.rollout.mode == "persistent"
    return max(held(setup, drawn, setup.window, copied) for drawn in farthest(setup)) + margin


def held(
    setup: Setup, indices: list[list[int]], window: int, copied: bool = False, seeds: bool = True
) -> int:
    """Bytes of the chain, most at the begin of a step with gradient of all samples; copied: from a first
    state in which all fields are tensors of their own; seeds: with what is known when they have been
    judged."""
    key, r = tuple(map(tuple, indices)), setup.rollout
    ways = (judged_step(r), len(ranks(r))) if seeds else (0, 1)
    return _held_by(setup.latent, r.steps, key, window, setup.chain.detach_input, copied, *ways)


def chains(
    latent: Latent,
    steps: int,
    indices: list[list[int]],
    window: int,
    velocity: chain.Velocity,
    judged: int,
    seeds: int,
    kept: Sequence[int],
    judge: Callable[[Tensor], None] = lambda x: None,
) -> Iterator[tuple[chain.Chain, Tensor]]:
    """The chains of a sample with the graded steps of each, after all `seeds` have been rolled out to step
    `judged` and scored by judge(x); 0: of one seed."""
    drawn, line = torch.tensor(indices), schedule(steps)
    if not judged:
        noise = torch.empty(latent)
        yield chain.Chain(velocity, line, noise), drawn
        return
    first = (drawn[0] - (window - 1)).clamp(min=0, max=judged)
    number = itertools.count()

    def rolled(_: int) -> States:
        way = chain.Chain(velocity, line, torch.empty(latent))
        way.advance_to(torch.full_like(first, judged), first)
        return way.states

    def score(x: Tensor) -> tuple[list[float], list[float]]:
        judge(x)
        place = [float(next(number))] * len(first)  # rising: every seed is held for a while
        return place, place

    chosen, _ = choose(map(rolled, range(seeds)), score, seeds, kept)
    for i in range(count := len(chosen)):
        yield chain.Chain(velocity, line, chosen.pop(0)), drawn[i::count]


@cache
def _held_by(
    latent: Latent,
    steps: int,
    indices: tuple[tuple[int, ...], ...],
    window: int,
    detach_input: bool,
    copied: bool,
    judged: int,
    count: int,
) -> int:
    live, most = LiveBytes(ROUND), 0
    factor = torch.ones((), requires_grad=True, device="meta")

    def velocity(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        nonlocal most
        if torch.is_grad_enabled() and len(active) == latent[0]:
            most = max(most, live.now)
        return factor * x

    with meta_tensors(), live:
        given = latent, steps, indices, window, velocity, judged, count, range(count)
        for way, drawn in chains(*given):
            if copied:
                way.states = [[flow.SolverState(*map(torch.clone, first))] for [first] in way.states]
            for index in drawn:
                passed = way.graded(index, window, detach_input)
                passed.backward(passed.x.sum())
                del passed
            del way
    return most
