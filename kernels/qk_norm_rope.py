"""RMSNorm over the whole width and 3-D rotary position embedding of queries and keys.

    n    = x / sqrt(mean_C(x^2) + eps) * weight               over all C = H * D channels, not per head
    out  = rotate pairs (2i, 2i+1) of every head by angle_i(frame, row, column)

Of the D/2 pairs the first D/2 - 2 (D/2 // 3) turn with the frame index, the next D/2 // 3 with the
row and the last D/2 // 3 with the column; each part has its own frequencies
theta^(-2j / dim_part). Tokens run frame-major over grid = (frames, rows, columns); `offset` is the
index of the first token held here, for shards of a sequence. Norm and rotation run in float32 with
angles computed in float64 (the official code rotates in complex128); the result is rounded once.
Source: Su et al., "RoFormer"; Wan2.1 `rope_apply`, `WanRMSNorm`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from prfl_kernels.modulate import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; x.dtype out."""
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * weight).to(x.dtype)


def rope_angles(head_dim: int, grid: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """Angles [F * H * W, head_dim / 2] in float64 of every token of a (F, H, W) grid."""
    third = head_dim // 2 // 3
    pairs = (head_dim // 2 - 2 * third, third, third)
    frame, row, column = (
        torch.arange(n, dtype=torch.float64)[:, None]
        * theta ** (-torch.arange(p, dtype=torch.float64) / p)
        for n, p in zip(grid, pairs, strict=True)
    )
    frames, rows, columns = grid
    return torch.cat(
        [
            frame[:, None, None].expand(-1, rows, columns, -1),
            row[None, :, None].expand(frames, -1, columns, -1),
            column[None, None].expand(frames, rows, -1, -1),
        ],
        dim=-1,
    ).reshape(frames * rows * columns, head_dim // 2)


@lru_cache(maxsize=8)
def _cos_sin(
    head_dim: int, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # The cache must hold ordinary tensors, also when the first call comes under inference mode.
    with torch.inference_mode(False):
        angles = rope_angles(head_dim, grid)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    grid: tuple[int, int, int],
    num_heads: int,
    eps: float = 1e-6,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k.

    q, k [B, L, C] (any strides), weights [C], grid (frames, rows, columns) of the whole sequence,
    offset + L <= frames * rows * columns. Returns q, k [B, L, num_heads, C / num_heads] in the
    dtype of the inputs.
    """
    length, head_dim = q.shape[1], q.shape[2] // num_heads
    cos, sin = _cos_sin(head_dim, tuple(grid), q.device, wide(q.dtype))
    cos, sin = (a[offset : offset + length, None] for a in (cos, sin))  # [L, 1, D/2]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        n = rms_norm(x.to(wide(x.dtype)), weight, eps).unflatten(-1, (num_heads, head_dim))
        return _rotate(n, cos, sin).to(x.dtype)

    return one(q, weight_q), one(k, weight_k)
