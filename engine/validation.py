"""What makes a metric mean something: labels that are there, finite numbers, pairs of held-out data; and how
several processes share held-out samples."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.data import Reader, by_shape, fixed_batches, label_of, read_meta
from prfl_engine.errors import TrainingError, UserError, named
from prfl_engine.parallel import World

# A label that is made of other fields.
PARTS = {"motion_quality": ("physics_quality", "human_quality")}


def finite(metric: str, values: Tensor, paths: Sequence[Path]) -> Tensor:
    """`values` [n, ...] as they are; TrainingError where one is not finite. It names the metric and the first
    sample, row i being that of paths[i]."""
    good = values.isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()
    if not good.all():
        i = int((~good).nonzero()[0])
        bad = values[i][~values[i].isfinite()].flatten()[0].item()
        raise TrainingError(f"{metric}: got {bad} on {paths[i]}, want a finite number")
    return values


class HeldOut:
    """Held-out samples of which every group of processes evaluates a part, and what they give.

        samples = HeldOut([paths], world)
        for first, (batch,) in samples.batches(reader, size, device):
            samples.put("loss", loss(batch))
        samples.all()["loss", 0].mean()
    """

    def __init__(self, sides: list[list[Path]], world: World):
        """sides: equally long lists; a pair is an entry of each."""
        self.sides, self.world = sides, world
        self.span = self._span(world.reader)
        self._values: dict[tuple[str, int], list[float]] = {}
        self._counts = True  # whether the batch at hand is this rank's to evaluate

    def _span(self, reader: int) -> range:
        count, readers = len(self.sides[0]), self.world.readers
        return range(reader * count // readers, (reader + 1) * count // readers)

    def batches(self, reader: Reader, size: int, device: torch.device) -> Iterator[tuple[int, list[Batch]]]:
        """(number of the first sample, a batch of every side) of this rank's part. Ranks gather weights in
        every forward, so all get as many batches: the last one again where a rank has fewer."""
        own = self.span or range(1)
        reads = [fixed_batches(reader, [side[i] for i in own], size, device) for side in self.sides]
        first, given = own.start, []
        while True:
            with self.world.agreed():  # not by zip, which would keep its first batches alive
                more = [batch for read in reads if (batch := next(read, None)) is not None]
            self._counts = bool(more) and len(self.span) > 0
            if not self.world.any(self._counts):
                return
            given = more or given
            yield first, list(given)
            first += len(given[0].latent) * self._counts

    def put(self, name: str, values: Tensor, side: int = 0) -> None:
        """A value for every sample [n] of the batch at hand."""
        if self._counts:
            self._values.setdefault((name, side), []).extend(values.tolist())

    def all(self) -> dict[tuple[str, int], Tensor]:
        """The values of all samples [n] in float64 on the CPU, by name and side. TrainingError on all ranks
        for one that is not finite."""
        parts = self.world.all(self._values)[:: self.world.sequence]
        names = dict.fromkeys(name for part in parts for name in part)
        found = {name: torch.tensor([v for p in parts for v in p.get(name, [])]).double() for name in names}
        for (name, side), values in found.items():
            finite(name, values, self.sides[side])
        return found

    def first(self, own: list[Tensor], count: int) -> list[Tensor]:
        """Of `own`, tensors of this rank's first samples, those of the first `count` of all samples, on the
        rank that leads."""
        made: list[Tensor] = []
        for reader in range(self.world.readers):
            wanted = max(0, min(count, self._span(reader).stop) - self._span(reader).start)
            if wanted:
                made += self.world.to_first(own[:wanted], reader * self.world.sequence)
        return made


def read_labels(paths: Sequence[Path], name: str, field: str) -> list[float]:
    """The label of every sample. UserError where no sample has the label, or one of its parts."""
    parts = PARTS.get(name, (name,))

    def read(path: Path) -> tuple[float, set[str]]:
        meta = read_meta(path)
        with named(str(path)):
            return label_of(meta, name), {part for part in parts if meta.get(part) is not None}

    with ThreadPoolExecutor(16) as pool:  # most of the time a network file system answers
        found = list(pool.map(read, paths))
    there = set().union(*(held for _, held in found))
    for part in parts:
        if part not in there:
            raise UserError(f"data.label: no sample of {field} has {part!r}, want a field of its meta JSONs")
    return [label for label, _ in found]


def check_labels(paths: Sequence[Path], name: str, field: str) -> None:
    """UserError unless some samples have the label 0 and some 1: of one class a constant is right on all."""
    labels = set(read_labels(paths, name, field))
    if len(labels) < 2:
        value = labels.pop()
        raise UserError(f"data.label: {name} is {value:g} in all of {field}, want samples of 0 and of 1")


def told_right(margin: Tensor) -> Tensor:
    """By margins logit_win - logit_lose: 1 where the winner is ahead, 0 where the loser is, 1/2 where
    neither is, as where both are the same noise; float64."""
    return (margin.double().sign() + 1) / 2


def partners(reader: Reader, win: Sequence[Path], lose: Sequence[Path], field: str) -> list[Path]:
    """For every winner a loser of its latent shape, in turn; `field` names the losers' in the UserError of a
    winner without one."""
    turns = {shape: cycle(paths) for shape, paths in by_shape(reader, lose).items()}
    found = []
    for path in win:
        shape = reader.shape(path)
        if shape not in turns:
            raise UserError(f"{field}: no latent has the shape of {path}, {list(shape)}")
        found.append(next(turns[shape]))
    return found
