"""What an update of the optimizer takes on the device: counted in real updates on the CPU."""

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from prfl_engine.config import OptimConfig
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.optim.block_adamw import BLOCK, BlockAdamW, state_layout
from prfl_engine.optim.optimizer import update
from prfl_engine.planner.setup import ROUND, rounded


class Update(NamedTuple):
    """What an update takes on the device in addition to states and gradients."""

    slots: int  # always there: where blocks from the host pass through
    temporaries: int  # most while it is under way


class Piece(NamedTuple):
    """What an update takes at a time: of a parameter of `whole` values, whose rows of `row` values are always
    together on a rank; None: of one that is not sharded."""

    values: int
    dtype: torch.dtype
    whole: int
    row: int | None = None

    def layout(self, optim: OptimConfig, n: int) -> dict[str, tuple[int, torch.dtype]]:
        """What the optimizer keeps for a block of n of its values."""
        return state_layout(optim, self.dtype, self.whole, self.row or n, n)


class _Pieces(BlockAdamW):
    """The optimizer of parameters that stand for pieces of larger ones."""

    def __init__(self, pieces: dict[nn.Parameter, Piece], optim: OptimConfig):
        self.pieces = pieces
        super().__init__([{"params": list(pieces), "lr": 1e-6, "base_lr": 1e-6}], optim)

    def _layout(self, p: torch.Tensor, n: int) -> dict[str, tuple[int, torch.dtype]]:
        return self.pieces[p].layout(self.config, n)


@cache
def updated(pieces: tuple[Piece, ...], optim: OptimConfig) -> Update:
    """A real update of parameters of these sizes."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(a.values, dtype=a.dtype)) for a in pieces])
    wide = optim.grad_dtype == "float32"
    for p in module:
        if wide and p.dtype != torch.float32:
            p.grad_dtype = torch.float32
    live = LiveBytes(ROUND)
    live.add(module)
    with live:
        before = live.now
        optimizer = _Pieces(dict(zip(module, pieces, strict=True)), optim)
        slots = live.now - before - ROUND * len(pieces)  # without the counters of steps
        for p in module if optim.offload == "none" else ():
            for block in optimizer.state[p]["blocks"]:
                slots -= sum(rounded(a.nbytes) for a in block.values())
        for p in module:
            p.grad = torch.zeros(len(p), dtype=torch.float32 if wide else p.dtype)
        if optim.offload == "all":  # then gradients are on the host by now
            for p in module:
                optimizer._arrived(p)
        stood, _ = live.now, live.lap()
        if optim.in_backward:
            for p in module:
                optimizer._arrived(p)
        update(optimizer, optim.clip)
    return Update(max(0, slots), live.lap() - stood)


def arrival_bytes(values: int, dtype: torch.dtype, optim: OptimConfig) -> int:
    """What the update of a parameter of so many values takes in the backward that makes its gradient, in
    addition to the gradient. Of more than two blocks the first two are updated."""
    return updated((Piece(min(values, 2 * BLOCK), dtype, values),), optim).temporaries
