"""Pooling by the CUDA C++ kernels (csrc/cuda/reward_pool.cu).

x float32 or bfloat16, C a multiple of 8 up to 5120, N up to 8. ValueError for anything else.
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels as cuda
from prfl_kernels.extension import supported
from prfl_kernels.reward_pool.launch import Backward, Forward


def _common(a: Forward | Backward) -> dict[str, Tensor | int]:
    """What both directions take: x with rows that begin at multiples of 16 bytes, u and sizes."""
    module, (queries, width) = cuda.library(), a.u.shape
    supported("reward_pool", a.x)
    if not 1 <= queries <= module.reward_pool_queries:
        raise ValueError(f"reward_pool: got {queries} folded queries, want 1 to {module.reward_pool_queries}")
    if width % 8 or width > module.reward_pool_width:
        want = module.reward_pool_width
        raise ValueError(f"reward_pool: got width {width}, want a multiple of 8 up to {want}")
    x = a.x if cuda.vectors(a.x) else a.x.contiguous()
    batch, length, _ = x.shape
    bf16 = x.dtype == torch.bfloat16
    return dict(x=x, u=a.u, batch=batch, length=length, width=width, queries=queries, bf16=bf16)


def _runs(given: dict) -> int:
    """How many runs of tokens of a sample leave partial results."""
    return cuda.library().reward_pool_runs(*(given[name] for name in ("batch", "length", "width", "bf16")))


def forward(a: Forward) -> None:
    """Fill a launch."""
    given = _common(a)
    queries, width = a.u.shape
    runs = given["batch"], _runs(given)
    top, total = a.u.new_empty(2, *runs, queries)
    acc = a.u.new_empty(*runs, queries, width)
    cuda.launch(
        "reward_pool_forward", **given, pooled=a.pooled, lse=a.lse, scores=a.scores, top=top, total=total,
        acc=acc,
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    given = _common(a)
    part = None if a.du is None else a.u.new_empty(given["batch"], _runs(given), *a.u.shape)
    cuda.launch(
        "reward_pool_backward", **given, dpooled=a.dpooled, scores=a.scores, lse=a.lse, delta=a.delta,
        dx=a.dx, part=part,
    )  # fmt: skip
    if part is not None:
        torch.sum(part, (0, 1), out=a.du)
