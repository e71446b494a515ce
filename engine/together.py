"""Rollouts of a sharded generator: all ranks make as many forwards, or none needs the others. And which of
two experts ranks ask at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from prfl_engine.agree import reduced
from prfl_engine.config import Config
from prfl_engine.flow import TRAIN_STEPS, Schedule
from prfl_engine.memory.resident import Resident
from prfl_engine.model.experts import Experts
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import index_range, schedule_of, train_levels


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


class Asked(NamedTuple):
    """How often, on average, all groups of processes together ask both of two experts in a pass."""

    sft: float = 0.0  # of flow matching
    steps: tuple[float, ...] = ()  # of the steps of a window: the graded one, the one before it, and so on
    differ: bool = False  # whether groups may be at different steps at the same time
    several: bool = False  # whether there are several groups, which draw noise levels by themselves

    @property
    def beside(self) -> tuple[str, ...]:
        """The passes in which a group may have no sample for an expert that another one asks, as the planner
        names them."""
        found = ("flow matching",) if self.several and self.sft > 0 else ()
        if self.differ and self.steps and self.steps[0] > 0:
            found += ("graded step",)
        return found + (("window",) if self.differ and any(self.steps[1:]) else ())

    @property
    def apart(self) -> bool:
        """Whether in some step with gradient one group may ask an expert and another group the other one.
        Steps without gradient are made part by part (`Together.parts`)."""
        return "graded step" in self.beside or "window" in self.beside


def asked(config: Config, readers: int) -> Asked:
    """What `readers` groups of processes ask in a training, whichever experts are trained; nothing of one
    model. Where the graded steps of a rollout are several, their parts of the range are not told apart."""
    c, r = config, config.rollout
    if c.model.boundary is None:
        return Asked()
    size, boundary, sft, steps = c.data.batch_size, TRAIN_STEPS * c.model.boundary, 0.0, ()
    alike = readers if r.one_index == "turn" else r.one_index
    same = alike > 0 and alike % readers == 0  # all samples of all groups are at one step
    if c.loss.sft_weight > 0:
        levels = train_levels(r)
        sft = _both(levels.timestep(levels.sigmas) >= boundary, readers * size)
    if c.loss.weight > 0:
        high, (first, last) = schedule_of(r).timesteps >= boundary, index_range(r)
        longest = last + 1 if c.chain.window == "all" else min(c.chain.window, last + 1)
        count = 1 if same else size if r.mode == "persistent" else readers * size
        at = torch.arange(first, last + 1)
        # Whoever has begun at the noise goes on at its graded step, see chain.Window.
        steps = tuple(_both(high[torch.where(at >= d, at - d, at)], count) for d in range(longest))
    return Asked(sft, steps, readers > 1 and r.mode == "fresh" and not same, readers > 1)


def _both(high: Tensor, count: int) -> float:
    """The chance that of `count` draws from these some are and some are not."""
    share = high.double().mean().item()
    return 0.0 if count == 1 else 1 - share**count - (1 - share) ** count
