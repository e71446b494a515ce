"""RMSNorm and rotation by the CUDA C++ kernels (csrc/cuda/qk_norm_rope.cu).

q, k float32 or bfloat16, C up to 5120, quick for 1536 and 5120 in heads of 128; for e4m3 heads of a power of
two from 8 to 256. ValueError for anything else.
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels as cuda
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import cos_sin, pairs_of


def _turns(a: Forward | Backward) -> tuple:
    """(cosines, sines, places) of a rotation, as the kernels take them."""
    head_dim = a.q.shape[2] // a.num_heads
    if a.grid is None:
        return None, None, (head_dim, 0, 0, 1, 1, 0)
    tables = cos_sin(head_dim, tuple(a.grid), False, a.q.device, torch.float32)
    return *tables, (head_dim, *pairs_of(head_dim)[:2], *a.grid[1:], a.offset)


def _floats(*weights: Tensor | None) -> list[Tensor | None]:
    return [a if a is None else a.float().contiguous() for a in weights]


def forward(a: Forward) -> None:
    """Fill a launch."""
    cuda._supported("qk_norm_rope", a.q, a.k)
    (batch, length, width), head_dim = a.q.shape, a.out_q.shape[3]
    cuda._narrow("qk_norm_rope", width, a.q.dtype, a.q.dtype if a.k is None else a.k.dtype)
    if a.fp8 and (head_dim & (head_dim - 1) or not 8 <= head_dim <= 256):
        raise ValueError(f"qk_norm_rope: got heads of {head_dim} for fp8, want a power of two from 8 to 256")
    cos, sin, places = _turns(a)
    rows = a.q, a.k, *_floats(a.weight_q, a.weight_k), a.out_q, a.out_k
    tensors = *rows, a.quant_q, a.quant_k, a.rstd_q, a.rstd_k, cos, sin
    cuda.library().qk_norm_rope_forward(
        *map(cuda._view, tensors), batch, length, width, places, a.eps, cuda._aligned(width, *rows),
        cuda._stream(a.q),
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    cuda._supported("qk_norm_rope", a.dout_q, a.dout_k, a.q, a.k)
    batch, length, width = a.q.shape
    runs = cuda.library().add_norm_runs(batch, length, width)
    part = None if a.dweight is None else a.dweight.new_empty(batch, runs, 2, width)
    dout = (d if d is None else d.flatten(2) for d in (a.dout_q, a.dout_k))
    cos, sin, places = _turns(a)
    inputs = *dout, a.q, a.k, *_floats(a.weight_q, a.weight_k)
    tensors = *inputs, a.rstd_q, a.rstd_k, a.dq, a.dk, part, cos, sin
    cuda.library().qk_norm_rope_backward(
        *map(cuda._view, tensors), batch, length, width, places, cuda._aligned(width, *inputs, a.dq, a.dk),
        cuda._stream(a.q),
    )  # fmt: skip
    if part is not None:
        torch.sum(part, (0, 1), out=a.dweight)
