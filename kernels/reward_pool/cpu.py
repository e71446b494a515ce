"""Pooling by the compiled CPU kernels (csrc/cpu/reward_pool.cpp).

float32 and bfloat16, float32 inside. Results are the same bits for any number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels.extension import empty, extension, supported, view
from prfl_kernels.reward_pool.launch import Backward, Forward

RUNS, GROUP = 64, 8  # queries are handled in groups of this many


def _grouped(u: Tensor) -> Tensor:
    """u [..., N, C] with zero rows up to a whole number of groups."""
    missing = -u.shape[-2] % GROUP
    return F.pad(u, (0, 0, 0, missing)) if missing else u


def _runs(x: Tensor, queries: int) -> int:
    # A run keeps `queries` rows in float32: 4 % of the features at most.
    return max(1, min(RUNS, x.shape[1] * x.element_size() // (100 * queries)))


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for features but float32 and bfloat16."""
    supported(a.x)
    (batch, length, width), u = a.x.shape, _grouped(a.u)
    runs = _runs(a.x, len(u))
    part, top, total = (empty(u, batch, runs, len(u), *rest) for rest in ((width,), (), ()))
    extension().reward_pool_forward(
        *map(view, (a.x, u, part, top, total, a.pooled, a.lse, a.scores)), batch, length, width, len(u),
        len(a.u), runs, torch.get_num_threads(),
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for features but float32 and bfloat16."""
    supported(a.x)
    (batch, length, width), u = a.x.shape, _grouped(a.u)
    runs = _runs(a.x, len(u))
    part = None if a.du is None else empty(u, batch, runs, *u.shape)
    extension().reward_pool_backward(
        *map(view, (a.x, u, _grouped(a.dpooled), a.delta, a.scores, a.lse, a.dx, part, a.du)), batch,
        length, width, len(u), len(a.u), runs, torch.get_num_threads(),
    )  # fmt: skip
