"""Pooling by the CUDA C++ kernels (csrc/cuda/reward_pool.cu).

x float32 or bfloat16, C a multiple of 8 up to 5120, N up to 8. ValueError for anything else.
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels as cuda
from prfl_kernels.reward_pool.launch import Backward, Forward


def _inputs(a: Forward | Backward) -> tuple[Tensor, int]:
    """(x with rows that begin at multiples of 16 bytes, the number of runs)."""
    module, (queries, width) = cuda.library(), a.u.shape
    cuda._supported("reward_pool", a.x)
    if not 1 <= queries <= module.reward_pool_queries:
        raise ValueError(f"reward_pool: got {queries} folded queries, want 1 to {module.reward_pool_queries}")
    if width % 8 or width > module.reward_pool_width:
        want = module.reward_pool_width
        raise ValueError(f"reward_pool: got width {width}, want a multiple of 8 up to {want}")
    runs = module.reward_pool_runs(*a.x.shape, a.x.dtype == torch.bfloat16)
    return a.x if cuda._vectors(a.x) else a.x.contiguous(), runs


def forward(a: Forward) -> None:
    """Fill a launch."""
    x, runs = _inputs(a)
    (batch, length, width), queries = x.shape, len(a.u)
    top, total = a.u.new_empty(2, batch, runs, queries)
    acc = a.u.new_empty(batch, runs, queries, width)
    tensors = x, a.u, a.pooled, a.lse, a.scores, top, total, acc
    cuda.library().reward_pool_forward(
        *map(cuda._view, tensors), batch, length, width, queries, cuda._stream(x)
    )


def backward(a: Backward) -> None:
    """Fill a launch."""
    x, runs = _inputs(a)
    part = None if a.du is None else a.u.new_empty(len(x), runs, *a.u.shape)
    tensors = x, a.u, a.dpooled, a.scores, a.lse, a.delta, a.dx, part
    cuda.library().reward_pool_backward(*map(cuda._view, tensors), *x.shape, len(a.u), cuda._stream(x))
    if part is not None:
        torch.sum(part, (0, 1), out=a.du)
