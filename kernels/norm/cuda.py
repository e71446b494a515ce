"""The fused addition and LayerNorm in CUDA C++ (csrc/cuda/add_norm.cu).

Rows in float32 or bfloat16, beside a bfloat16 residual stream in bfloat16 alone; C up to 5120, quick for 1536
and 5120. ValueError for anything else.
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels
from prfl_kernels.extension import CODES
from prfl_kernels.jit import unit_last
from prfl_kernels.norm.launch import Backward, Forward


def _f32(a: Tensor | None, batch: int) -> Tensor | None:
    """A vector in float32, as [B, C]."""
    return None if a is None else unit_last(a.float()).expand(batch, -1)


def forward(a: Forward) -> None:
    """Fill a launch."""
    batch, length, width = a.x.shape
    branch = (a.x if a.y is None else a.y).dtype
    cuda_kernels._supported("add_norm", a.x, a.y)
    cuda_kernels._narrow("add_norm", width, a.x.dtype, branch)
    a = a._replace(**{name: _f32(getattr(a, name), batch) for name in ("gate", "scale", "shift")})
    cuda_kernels.library().add_norm_forward(
        *map(cuda_kernels._view, a.tensors), batch, length, width, a.eps, a.base, CODES[branch],
        cuda_kernels._aligned(width, *a.tensors[:7]), cuda_kernels._stream(a.x),
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    batch, length, width = a.rows.shape
    residual = (a.dsum if a.x is None else a.x).dtype
    grad = residual if a.dn is None else a.dn.dtype
    branch = grad if a.dy is None else a.dy.dtype
    cuda_kernels._supported("add_norm", a.dn, a.dsum, a.x, a.y)
    cuda_kernels._narrow("add_norm", width, residual, branch, grad)
    a = a._replace(gate=_f32(a.gate, batch), scale=_f32(a.scale, batch))
    runs = cuda_kernels.library().add_norm_runs(batch, length, width)
    part = a.sums.new_empty(batch, runs, *a.sums.shape[1:])
    aligned = cuda_kernels._aligned(width, *a.inputs[:6], a.dx, a.dy)
    cuda_kernels.library().add_norm_backward(
        *map(cuda_kernels._view, (*a.inputs, a.dx, a.dy, part)), batch, length, width, a.base,
        CODES[residual], CODES[branch], CODES[grad], aligned, a.wants_parameters, a.wants_gate,
        cuda_kernels._stream(a.rows),
    )  # fmt: skip
    torch.sum(part, 1, out=a.sums)
