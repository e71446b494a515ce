"""RMSNorm and rotation by the compiled CPU kernels (csrc/cpu/qk_norm_rope.cpp).

float32 and bfloat16, float32 inside, no fp8. Results are the same bits for any number of threads.
"""

from functools import lru_cache

import torch
from torch import Tensor

from prfl_kernels.extension import empty, extension, is_dry, runs, supported, view
from prfl_kernels.jit import unit_last
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, pairs_of


@lru_cache(maxsize=16)
def _turns(head_dim: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """[largest side, head_dim]: every cosine twice; and (-sine, sine) of every pair."""
    with torch.inference_mode(False):
        cos, sin = cos_sin(head_dim, grid, False, torch.device("cpu"), torch.float32)
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _rope(a: Forward | Backward) -> tuple:
    """(cosines, sines, (heads, head_dim, first channels of rows and columns, rows, columns, offset))."""
    head_dim = a.q.shape[2] // a.num_heads
    if a.grid is None:
        return None, None, (a.num_heads, head_dim, 0, 0, 1, 1, a.offset)
    if is_dry():  # tables are cached: a fake one must not be
        return None, None, ()
    frames, rows, _ = pairs_of(head_dim)
    channels = 2 * frames, 2 * (frames + rows)
    tables = map(view, _turns(head_dim, tuple(a.grid)))
    return *tables, (a.num_heads, head_dim, *channels, *a.grid[1:], a.offset)


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for e4m3 and for dtypes but float32 and bfloat16."""
    if a.fp8:
        raise ValueError("qk_norm_rope: got fp8 for the compiled CPU kernel, want bfloat16 or float32")
    supported(a.q, a.k, a.weight_q, a.weight_k)
    out = (x if x is None else x.flatten(2) for x in (a.out_q, a.out_k))
    tensors = a.q, a.k, a.weight_q, a.weight_k, *out, a.rstd_q, a.rstd_k
    extension().qk_norm_rope_forward(
        *map(view, tensors), *_rope(a), *a.q.shape, a.eps, torch.get_num_threads()
    )


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    supported(a.q, a.k, a.weight_q, a.weight_k)
    # Heads keep their stride: attention may hand its gradient back transposed.
    dout = (d if d is None else unit_last(d.to(a.q.dtype)) for d in (a.dout_q, a.dout_k))
    batch, length, width = a.q.shape
    count = runs(length)
    part = None if a.dweight is None else empty(a.dweight, batch, count, 2, width)
    inputs = *dout, a.q, a.k, a.weight_q, a.weight_k, a.rstd_q, a.rstd_k
    extension().qk_norm_rope_backward(
        *map(view, (*inputs, a.dq, a.dk, part, a.dweight)), *_rope(a), *a.q.shape, count,
        torch.get_num_threads(),
    )  # fmt: skip
