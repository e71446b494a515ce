"""The angles of 3-D rotary position embedding: tables by axis, of a few hundred rows.

Of the D/2 pairs of a head the first D/2 - 2 (D/2 // 3) turn with a token's frame, the next D/2 // 3 with its
row and the last D/2 // 3 with its column, each part with its own frequencies theta^(-2j / dim_part).
Source: Su et al., "RoFormer"; Wan2.1 `rope_apply`.
"""

from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]
THETA = 10000.0


def pairs_of(head_dim: int) -> Grid:
    """How many of the head_dim / 2 pairs turn with the frame, the row and the column."""
    third = head_dim // 2 // 3
    return head_dim // 2 - 2 * third, third, third


def placing(head_dim: int, grid: Grid | None, offset: int) -> dict[str, int]:
    """What a kernel finds the angles of a token with: how many pairs of a head turn with its frame and its
    row, rows and columns of the grid, and the number of the first token. Without grid nothing turns."""
    frame_pairs, row_pairs, _ = (0, 0, 0) if grid is None else pairs_of(head_dim)
    _, rows, columns = (1, 1, 1) if grid is None else grid
    return dict(frame_pairs=frame_pairs, row_pairs=row_pairs, rows=rows, columns=columns, offset=offset)


def axis_angles(head_dim: int, size: int) -> Tensor:
    """Angles [size, head_dim / 2] in float64: every pair at positions 0 ... size - 1 of its axis."""
    frequencies = [THETA ** (-torch.arange(n, dtype=torch.float64) / n) for n in pairs_of(head_dim)]
    return torch.arange(size, dtype=torch.float64)[:, None] * torch.cat(frequencies)


def rope_angles(head_dim: int, grid: Grid) -> Tensor:
    """Angles [F * H * W, head_dim / 2] in float64 of every token of a (F, H, W) grid."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # [L, 3]: frame, row, column
    places = places.repeat_interleave(torch.tensor(pairs_of(head_dim)), dim=1)  # [L, D/2]
    return axis_angles(head_dim, max(grid)).gather(0, places)


@lru_cache(maxsize=256)  # a recorded CUDA graph reads its table without asking for it here
def cos_sin(
    head_dim: int, grid: Grid, whole: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token if `whole`, else of every position of an axis."""
    # The cache must hold ordinary tensors, also when the first call comes under inference mode.
    with torch.inference_mode(False):
        angles = rope_angles(head_dim, grid) if whole else axis_angles(head_dim, max(grid))
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of x [..., D] turned by their angles, cosines and sines [..., D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
