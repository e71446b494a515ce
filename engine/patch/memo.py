"""What was found out about tensors that calls share: rope tables, and modulation of every token.

A tensor is recognised by its identity and its count of writes, so each is looked at once. Nothing is
remembered across a copy or a pickle.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prfl_kernels.qk_norm_rope.rope import Grid, axis_angles, cos_sin

PIECE = 4096  # tokens whose modulation is compared at a time
KEPT = 8  # tensors of a kind: forwards that wait for their backward, in which blocks may be recomputed


class Memo:
    """The answers of the last tensors of each kind."""

    def __init__(self):
        self.known: dict[str, list[tuple]] = {}
        self.grid: Grid | None = None  # of the newest latents, where a structure's blocks are not told

    def __reduce__(self):
        return Memo, ()

    def __deepcopy__(self, memo: dict) -> "Memo":
        return Memo()

    def ask(self, kind: str, a: Tensor, answer: Callable[[Tensor], Any]) -> Any:
        """answer(a), or what it was for the same tensor."""
        version = None if a.is_inference() else a._version
        known = self.known.setdefault(kind, [])
        for tensor, seen, found in known:
            if tensor() is a and seen == version:
                return found
        known[:] = [entry for entry in known if entry[0]() is not None][-KEPT + 1 :]
        known.append((weakref.ref(a), version, answer(a)))
        return known[-1][2]


def ours(table: Tensor, head_dim: int, part: str) -> bool:
    """Whether a table of rotations holds the angles of prfl_kernels.qk_norm_rope, to twice its rounding.

    table [n, D / 2] complex (part "complex"), or [n, D] cosines or sines, each twice in a row.
    """
    if table.dim() != 2 or table.shape[1] != (head_dim // 2 if part == "complex" else head_dim):
        return False
    angles = axis_angles(head_dim, len(table)).to(table.device)
    if part == "complex":
        turns = torch.polar(torch.ones_like(angles), angles)
        want, got = torch.view_as_real(turns), torch.view_as_real(table)
    else:
        want, got = getattr(angles, part)().repeat_interleave(2, 1), table
    return bool(((got.double() - want).abs() <= 2 * torch.finfo(got.dtype).eps).all())


def grid_of(table: Tensor, head_dim: int, part: int, grid: Grid | None) -> Grid | None:
    """grid, if a table [L, D / 2] of the cosines (part 0) or sines (1) of its tokens, or [L, D] with each
    twice in a row, is ours; else None."""
    if grid is None or table.dim() != 2 or len(table) != math.prod(grid):
        return None
    if table.shape[1] not in (head_dim // 2, head_dim):
        return None
    want = cos_sin(head_dim, grid, True, table.device, torch.float32)[part]
    want = want if table.shape[1] == want.shape[1] else want.repeat_interleave(2, 1)
    near = (table.float() - want).abs() <= 2 * max(torch.finfo(table.dtype).eps, torch.finfo(want.dtype).eps)
    return grid if bool(near.all()) else None


def few_vectors(e: Tensor, grid: Grid, memo: Memo) -> Tensor | None:
    """The modulation of a block, e [B, L, 6, C] of every token, in vectors that whole runs of tokens share.

    [B, 6, C] where all tokens have one; [B, 2, 6, C] where those of the first frame have one and all others
    another, as in TI2V's image mode; None for anything else. Their gradients go to one token of each run, and
    are the sum of the run's: its tokens have one timestep. Every new tensor is read once, and the host waits
    for that: the original code has its timesteps on the device alone.
    """
    first = math.prod(grid[1:])
    vectors = memo.ask(f"modulation {first}", e, lambda a: runs(a, first))
    if vectors == 2:
        return e[:, : first + 1 : first]
    return e[:, 0] if vectors == 1 else None


def runs(e: Tensor, first: int) -> int:
    """How many vectors the tokens of e [B, L, 6, C] have: 1, 2 if the `first` ones have one and the others
    another, 0 if more."""
    parts = (e[:, :first], e[:, first:])
    same = [(piece == part[:, :1]).all() for part in parts for piece in part.split(PIECE, 1)]
    one = (e[:, :1] == e[:, first : first + 1]).all()
    alike, one = torch.stack([torch.stack(same).all(), one]).tolist()
    return 0 if not alike else 1 if one else 2
