"""Softmax attention in C++ for the CPU, forward and backward: what `attention` runs as "cpu".

Formulas, shapes and results are those of `triton_kernels`: out, lse and gradients from q, out, dout
[B, Lq, H, D] and k, v [B, Lk, H, D] in bfloat16 or float32, with any strides, D up to 256. Scores, softmax
and sums are float32. bfloat16 is multiplied in pairs where the processor does that (avx512_bf16), p and ds
rounded to bfloat16 before; elsewhere it is widened to float32 when it is packed.

The sources, csrc/cpu/attention_*.cpp, say how the work is split. The sums do not depend on the number
of threads: the same bits every time. Memory beside the results: packed copies of k and v in the forward; in
the backward about four of q, three of k and a float32 dq. That is of as many samples at a time as have a MiB
for each thread, at least of one.
"""

import math

import torch
from torch import Tensor

from prfl_kernels import extension as compiled
from prfl_kernels.dispatch import CPU, Implementation, requires
from prfl_kernels.extension import launch

DTYPES = (torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256  # rows of this length are packed on the stack


def _numbers(q: Tensor, k: Tensor, scale: float, repeats: int) -> dict[str, float]:
    """Sizes, and what both directions do to the scores."""
    batch, queries, heads, dim = q.shape
    return dict(
        batch=batch, queries=queries, keys=k.shape[1], heads=heads, dim=dim, scale=scale,
        last=math.log(repeats),
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, D] in q.dtype, lse [B, H, Lq] float32) of at least one query and key; scale > 0. The
    last key counts `repeats` times."""
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    launch("attention_forward", q=q, k=k, v=v, out=out, lse=lse, **_numbers(q, k, scale, repeats))
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wants_q: bool = True,
    wants_kv: bool = True,
    repeats: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) of `forward`, None where not wanted. dlse [B, H, Lq] or None for zero."""
    dq = q.new_empty(q.shape) if wants_q else None
    dk, dv = (k.new_empty(k.shape) if wants_kv else None for _ in range(2))
    launch(
        "attention_backward", dout=dout, dlse=dlse, q=q, k=k, v=v, out=out, lse=lse, dq=dq, dk=dk, dv=dv,
        **_numbers(q, k, scale, repeats),
    )  # fmt: skip
    return dq, dk, dv


IMPLEMENTATION = Implementation(
    CPU, f"own C++ kernels, for head dims up to {LARGEST_HEAD_DIM}",
    requires("cpu", dtypes=DTYPES, head_dims=range(1, LARGEST_HEAD_DIM + 1),
             build=lambda device: compiled.absence(CPU, device)),
    forward, backward,
)  # fmt: skip
