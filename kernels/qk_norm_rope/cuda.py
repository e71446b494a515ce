"""RMSNorm and rotation by the CUDA C++ kernels (csrc/cuda/qk_norm_rope.cu).

q, k float32 or bfloat16, C up to 5120, quick for 1536, 3072 and 5120 in heads of 128; for e4m3 heads of a
power of two from 8 to 256. ValueError for anything else.
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels as cuda
from prfl_kernels.extension import CODES, supported
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import cos_sin, placing


def _common(a: Forward | Backward) -> dict[str, Tensor | int | None]:
    """What both directions take: q and k, weights, sizes and the rotation."""
    weight_q, weight_k = (w if w is None else w.float().contiguous() for w in (a.weight_q, a.weight_k))
    batch, length, width = a.q.shape
    head_dim = width // a.num_heads
    cos = sin = None
    if a.grid is not None:
        cos, sin = cos_sin(head_dim, tuple(a.grid), False, a.q.device, torch.float32)
    return dict(
        q=a.q, k=a.k, weight_q=weight_q, weight_k=weight_k, rstd_q=a.rstd_q, rstd_k=a.rstd_k, batch=batch,
        length=length, width=width, cos=cos, sin=sin, head_dim=head_dim, q_kind=CODES[a.q.dtype],
        **placing(head_dim, a.grid, a.offset),
    )  # fmt: skip


def forward(a: Forward) -> None:
    """Fill a launch."""
    supported("qk_norm_rope", a.q, a.k)
    width, head_dim = a.q.shape[2], a.out_q.shape[3]
    cuda.narrow("qk_norm_rope", width, a.q.dtype, a.q.dtype if a.k is None else a.k.dtype)
    if a.fp8 and (head_dim & (head_dim - 1) or not 8 <= head_dim <= 256):
        raise ValueError(f"qk_norm_rope: got heads of {head_dim} for fp8, want a power of two from 8 to 256")
    given = _common(a)
    rows = a.q, a.k, given["weight_q"], given["weight_k"], a.out_q, a.out_k
    cuda.launch(
        "qk_norm_rope_forward", **given, out_q=a.out_q, out_k=a.out_k, quant_q=a.quant_q, quant_k=a.quant_k,
        eps=a.eps, out_kind=CODES[a.out_q.dtype], aligned=cuda.aligned(width, *rows),
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    supported("qk_norm_rope", a.dout_q, a.dout_k, a.q, a.k)
    batch, length, width = a.q.shape
    runs = cuda.library().row_runs(batch, length, width)
    part = None if a.dweight is None else a.dweight.new_empty(batch, runs, 2, width)
    dout_q, dout_k = (d if d is None else d.flatten(2) for d in (a.dout_q, a.dout_k))
    given = _common(a)
    rows = dout_q, dout_k, a.q, a.k, given["weight_q"], given["weight_k"], a.dq, a.dk
    cuda.launch(
        "qk_norm_rope_backward", **given, dout_q=dout_q, dout_k=dout_k, dq=a.dq, dk=a.dk, part=part,
        aligned=cuda.aligned(width, *rows),
    )  # fmt: skip
    if part is not None:
        torch.sum(part, (0, 1), out=a.dweight)
