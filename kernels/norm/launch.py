"""What an implementation gets: the tensors and numbers of one launch, checked and allocated by `op`.

Rows are [B, L, C] and vectors [B, C] with unit last stride, or [1, C] with stride 0 if the batch shares one.
Results are contiguous. A launch has at least one element; None is what it does not have.
"""

from typing import NamedTuple

from torch import Tensor


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

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the kernels."""
        return self[:10]


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
    sums: Tensor  # [B, 0 to 3, C] float32, zeros: d scale, d shift and d gate of every sample, as wanted
    base: float

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What is read, in the order of the kernels."""
        return self[:8]

    @property
    def rows(self) -> Tensor:
        """A gradient that is there, for its shape and device."""
        return self.dsum if self.dn is None else self.dn

    @property
    def wants_parameters(self) -> bool:
        """Whether d scale and d shift are wanted."""
        return self.sums.shape[1] > 1

    @property
    def wants_gate(self) -> bool:
        """Whether d gate is wanted."""
        return self.sums.shape[1] % 2 == 1
