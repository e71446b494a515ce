"""What makes a metric mean something: labels that are there, finite numbers, pairs of held-out data."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

from torch import Tensor

from prfl_engine.data import Reader, by_shape, label_of, read_meta
from prfl_engine.errors import TrainingError, UserError, named

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
