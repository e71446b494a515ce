"""The fused addition and LayerNorm in C++ for the CPU (csrc/cpu/add_norm.cpp).

float32 and bfloat16, float32 inside, no fp8. Sums over tokens are made over a number of runs that depends on
the shapes alone and then added in order, so results are the same bits for any number of threads.
"""

import torch

from prfl_kernels.extension import empty, extension, runs, supported, view
from prfl_kernels.norm.launch import Backward, Forward


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    supported(a.x, a.y, a.gate, a.scale, a.shift, a.n)
    tensors = a.x, a.y, a.gate, a.scale, a.shift, a.total, a.n, a.mean, a.rstd
    extension().add_norm_forward(*map(view, tensors), *a.x.shape, a.base, a.eps, torch.get_num_threads())


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    if a.dn is not None and a.dsum is not None:
        a = a._replace(dsum=a.dsum.to(a.x.dtype))
    if a.y is not None and a.dy is not None:
        a = a._replace(y=a.y.to(a.dy.dtype))
    supported(*a.inputs, a.dy)
    (batch, length, width), slots = a.rows.shape, a.sums.shape[1]
    count = runs(length)
    part = empty(a.sums, batch, count, slots, width) if slots else None
    extension().add_norm_backward(
        *map(view, (*a.inputs, a.dx, a.dy, part, a.sums)), batch, length, width, count, a.base,
        a.wants_parameters, torch.get_num_threads(),
    )  # fmt: skip
