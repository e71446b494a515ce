"""What an implementation gets: the tensors and numbers of one launch, checked and allocated by `op`.

Rows are [B, L, C]. Vectors are [B, 2, C], or [1, 2, C] where the batch shares them: rows before `boundary`
take the first of a pair, the others the second. Where all rows take one vector the boundary is 0. Last
strides are 1, those of what is shared 0. Results are contiguous. A launch has at least one element; None is
what it does not have.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_VECTORS = "gate", "scale", "shift"


class Forward(NamedTuple):
    """Fill total = x + gate * y with y, and n = LN(total) * (scale + base) + shift with scale."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    total: Tensor | None  # in the dtype of x
    n: Tensor | None
    quant: Tensor | None  # [B, L] float32, the scale of every row of an n in e4m3
    mean: Tensor | None  # [B, L] float32, of total; without e4m3
    rstd: Tensor | None  # [B, L] float32, 1 / standard deviation
    base: float
    eps: float
    boundary: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the kernels."""
        return self[:10]

    def sides(self) -> Iterator["Forward"]:
        """The launches of the rows before the boundary and of the others, with vectors [B or 1, C]."""
        rows = "x", "y", "total", "n", "quant", "mean", "rstd"
        return (side for _, side in _sides(self, self.x.shape[1], rows))


class Backward(NamedTuple):
    """Fill dx, the gradient of total: dsum and what comes through the norm from dn; dy = gate * dx; and sums.

    Without dn there is no dx: it is dsum.
    """

    dn: Tensor | None
    dsum: Tensor | None
    x: Tensor | None  # total, if there was an addition
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    dx: Tensor | None
    dy: Tensor | None
    # [B, 1 or 2, 0 to 3, C] float32, zeros: d scale, d shift and d gate of every sample, as wanted, over all
    # rows or over those on each side of the boundary
    sums: Tensor
    base: float
    boundary: int

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What is read, in the order of the kernels."""
        return self[:8]

    @property
    def rows(self) -> Tensor:
        """A gradient that is there, for its shape and device."""
        return self.dsum if self.dn is None else self.dn

    @property
    def slots(self) -> int:
        """How many sums are wanted."""
        return self.sums.shape[2]

    @property
    def wants_parameters(self) -> bool:
        """Whether d scale and d shift are wanted."""
        return self.slots > 1

    @property
    def wants_gate(self) -> bool:
        """Whether d gate is wanted."""
        return self.slots % 2 == 1

    def sides(self) -> Iterator["Backward"]:
        """The launches of the rows before the boundary and of the others, with vectors [B or 1, C] and their
        part of the sums, [B, 1, 0 to 3, C]."""
        rows = "dn", "dsum", "x", "y", "mean", "rstd", "dx", "dy"
        for i, side in _sides(self, self.rows.shape[1], rows):
            yield side._replace(sums=self.sums.narrow(1, min(i, self.sums.shape[1] - 1), 1))

    def add(self, part: Tensor, before: int) -> None:
        """Fill sums with those of partial sums [B, runs, 0 to 3, C]; `before` runs lie before the boundary
        and none crosses it."""
        parts = [part] if self.sums.shape[1] == 1 else [part[:, :before], part[:, before:]]
        for i, some in enumerate(parts):
            torch.sum(some, 1, out=self.sums[:, i])


def _sides(a: NamedTuple, length: int, rows: tuple[str, ...]) -> Iterator[tuple[int, NamedTuple]]:
    for i, at in enumerate((slice(0, a.boundary), slice(a.boundary, length))):
        if at.start < at.stop:
            there = {name: getattr(a, name)[:, at] for name in rows if getattr(a, name) is not None}
            names = [name for name in _VECTORS if getattr(a, name, None) is not None]
            yield i, a._replace(**there, **{name: getattr(a, name)[:, i] for name in names}, boundary=0)


def runs(length: int, boundary: int, tokens: int) -> tuple[int, int]:
    """(runs of at most `tokens` rows, how many of them lie before the boundary); none crosses it."""
    before = -(-boundary // tokens)
    return before - ((boundary - length) // tokens), before
