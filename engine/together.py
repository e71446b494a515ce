"""Rollouts of a sharded generator: all ranks make as many forwards, or none needs the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from prfl_engine.agree import reduced
from prfl_engine.flow import Schedule
from prfl_engine.memory.resident import Resident
from prfl_engine.model.experts import Experts
from prfl_engine.model.wan import WanTransformer


class Ranks(Protocol):
    """What is asked of a `parallel.World`."""

    resident: bool

    def most(self, number: float) -> float:
        """The largest `number` of all ranks."""


class Together:
    """Rollouts of a sharded model on all ranks at the same time, a `chain.Together`."""

    def __init__(self, world: Ranks, model: WanTransformer | Experts, keep: bool = False):
        """keep: resident weights stay where they are from one rollout to the next."""
        self.world, self.apart, self.keep = world, False, keep
        self.boundary = model.boundary if isinstance(model, Experts) else None
        models = (model.high, model.low) if isinstance(model, Experts) else (model,)
        self.whole = [Resident(own) for own in models] if world.resident else []
        self.model = model
        if self.whole:
            copies = [resident.model for resident in self.whole]
            self.model = model.of(*copies) if isinstance(model, Experts) else copies[0]

    def parts(self, schedule: Schedule) -> list[tuple[int, int]]:
        """First step, and the one after the last, of the steps that each model makes: the high-noise expert,
        then the low-noise one, or the only one. A part may be empty."""
        if self.boundary is None:
            return [(0, len(schedule))]
        high = int((schedule.timesteps >= self.boundary).sum())
        return [(0, high), (high, len(schedule))]

    @contextmanager
    def rollout(self, count: int, part: int) -> Iterator[int]:
        """All make as many forwards as the rank that needs most, since all gather weights in each. Resident
        weights of the part's model are gathered once, and dropped in the end; then no rank waits for
        another."""
        more = self.more(count)
        whole = self.whole[part] if self.whole and count + more else None
        if whole is not None:
            whole.gather()
        self.apart = self.world.resident
        try:
            yield 0 if self.apart else more
        finally:
            self.apart = False
            if whole is not None and not self.keep:
                whole.drop()

    def more(self, count: int) -> int:
        """How many steps another rank makes that needs more than `count`; every rank must ask."""
        return int(self.world.most(count)) - count

    def largest(self, values: Tensor) -> Tensor:
        """The largest of every one of `values` on all ranks, which must ask at the same time; those of this
        rank inside a rollout with resident weights, where no rank waits for another."""
        return values if self.apart else reduced(values, dist.ReduceOp.MAX)
