"""What is said of an operation: how to call it, what to compare it with, and its launches."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_bench.shapes import Shape

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def as_is(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    return inputs


class Launch(NamedTuple):
    """A pass of an operation, forward or backward, by the launcher of its Triton kernels."""

    op: str
    kind: str  # bound by memory, or "attention": matrix products with tiles to check
    streams: tuple[torch.dtype, ...]  # dtypes of the residual stream to see; one where it does not matter
    inputs: Callable[[Shape], Sequence[Tensor | None]]
    run: Callable  # (shape, *inputs) -> outputs, None allowed

    def bind(self, s: Shape) -> Callable[[], list[Tensor | None]]:
        """A function that launches on inputs made now, the same in every call, and returns them and the
        outputs."""
        inputs = self.inputs(s)
        return lambda: [*inputs, *self.run(s, *inputs)]


class Operation(NamedTuple):
    """Every function takes the shape first, and then the tensors."""

    name: str
    op: str  # in prfl_kernels.dispatch, which chooses its back end
    inputs: Callable[[Shape], Sequence[Tensor]]
    call: Callable | None  # (shape, *inputs) -> outputs, by the public function; None: a part of another one
    plain: Callable | None  # (shape, *prepared inputs) -> outputs in plain torch
    wanted: tuple[int, ...] = ()  # inputs to differentiate; none: forward only
    flops: Callable[[Shape], tuple[int, int]] = lambda s: (0, 0)  # of the products, forward and backward
    rate: str = "product"  # which of timing.limits they run at, or "fp8"
    divided: str | None = "tokens"  # what a rank has a share of, or "heads"; None: one rank alone
    reads: Callable = lambda inputs, outputs: inputs  # what the backward has to read
    prepare: Callable = as_is  # from the operation's inputs to those of the peers, untimed
    peers: dict[str, Callable] = {}  # more of them than plain, (shape, *prepared inputs) -> outputs
    # The gate compares with `exact` in float64, and its error with that of `yardstick`. Both are
    # plain by default; they differ where the operation quantises, with decode(*outputs) -> values.
    exact: Callable | None = None
    yardstick: Callable | None = None  # takes the operation's inputs
    decode: Callable = lambda *outputs: outputs
    # By the launchers of Triton kernels: (shape, *inputs) -> outputs, and for the backward its inputs first.
    launch: Callable | None = None
    backward: tuple[Callable, Callable] | None = None
    kind: str = "memory"
    streams: tuple[torch.dtype, ...] = (F32, BF16)

    def launches(self) -> Iterator[Launch]:
        if self.launch:
            yield Launch(self.name, self.kind, self.streams, self.inputs, self.launch)
        if self.backward:
            yield Launch(f"{self.name} backward", self.kind, self.streams, *self.backward)
