"""RMSNorm and rotation by the compiled CPU kernels (csrc/cpu/qk_norm_rope.cpp).

float32 and bfloat16, float32 inside, no fp8. Results are the same bits for any number of threads.
"""

from functools import lru_cache

import torch
from torch import Tensor

from prfl_kernels.extension import empty, is_dry, launch, runs, supported
from prfl_kernels.jit import unit_last
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, placing


@lru_cache(maxsize=16)
def _turns(head_dim: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """[largest side, head_dim]: every cosine twice; and (-sine, sine) of every pair."""
    with torch.inference_mode(False):
        cos, sin = cos_sin(head_dim, grid, False, torch.device("cpu"), torch.float32)
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _common(a: Forward | Backward) -> dict[str, Tensor | int | None]:
    """What both directions take: q and k, weights, sizes and the rotation."""
    batch, length, width = a.q.shape
    head_dim = width // a.num_heads
    cos = sin = None
    if a.grid is not None and not is_dry():  # tables are cached: one without values must not be
        cos, sin = _turns(head_dim, tuple(a.grid))
    return dict(
        q=a.q, k=a.k, weight_q=a.weight_q, weight_k=a.weight_k, rstd_q=a.rstd_q, rstd_k=a.rstd_k,
        batch=batch, length=length, width=width, cos=cos, sin=sin, heads=a.num_heads, head_dim=head_dim,
        **placing(head_dim, a.grid, a.offset),
    )  # fmt: skip


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for e4m3 and for dtypes but float32 and bfloat16."""
    if a.fp8:
        raise ValueError("qk_norm_rope: got fp8 for the compiled CPU kernel, want bfloat16 or float32")
    supported("qk_norm_rope", a.q, a.k, a.weight_q, a.weight_k)
    launch("qk_norm_rope_forward", **_common(a), out_q=a.out_q, out_k=a.out_k, eps=a.eps)


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    supported("qk_norm_rope", a.q, a.k, a.weight_q, a.weight_k)
    # Heads keep their stride: attention may hand its gradient back transposed.
    dout_q, dout_k = (d if d is None else unit_last(d.to(a.q.dtype)) for d in (a.dout_q, a.dout_k))
    batch, length, width = a.q.shape
    count = runs(length)
    part = None if a.dweight is None else empty(a.dweight, batch, count, 2, width)
    launch(
        "qk_norm_rope_backward", **_common(a), dout_q=dout_q, dout_k=dout_k, dq=a.dq, dk=a.dk, part=part,
        dweight=a.dweight, runs=count,
    )  # fmt: skip
