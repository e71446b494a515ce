"""Pooling by the compiled CPU kernels (csrc/cpu/reward_pool.cpp).

float32 and bfloat16, float32 inside. Results are the same bits for any number of threads.
"""

import torch.nn.functional as F
from torch import Tensor

from prfl_kernels.extension import empty, launch, supported
from prfl_kernels.reward_pool.launch import Backward, Forward

RUNS, GROUP = 64, 8  # queries are handled in groups of this many


def _grouped(u: Tensor) -> Tensor:
    """u [..., N, C] with zero rows up to a whole number of groups."""
    missing = -u.shape[-2] % GROUP
    return F.pad(u, (0, 0, 0, missing)) if missing else u


def _runs(x: Tensor, queries: int) -> int:
    # A run keeps `queries` rows in float32: 4 % of the features at most.
    return max(1, min(RUNS, x.shape[1] * x.element_size() // (100 * queries)))


def _common(a: Forward | Backward) -> dict[str, Tensor | int]:
    """What both directions take: x, u in whole groups of queries, and sizes."""
    supported("reward_pool", a.x)
    (batch, length, width), u = a.x.shape, _grouped(a.u)
    return dict(
        x=a.x, u=u, batch=batch, length=length, width=width, queries=len(u), wanted=len(a.u),
        runs=_runs(a.x, len(u)),
    )  # fmt: skip


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for features but float32 and bfloat16."""
    given = _common(a)
    sizes = given["batch"], given["runs"], given["queries"]
    part, top, total = (empty(given["u"], *sizes, *rest) for rest in ((given["width"],), (), ()))
    launch(
        "reward_pool_forward", **given, part=part, top=top, total=total, pooled=a.pooled, lse=a.lse,
        scores=a.scores,
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for features but float32 and bfloat16."""
    given = _common(a)
    u = given["u"]
    part = None if a.du is None else empty(u, given["batch"], given["runs"], *u.shape)
    launch(
        "reward_pool_backward", **given, dpooled=_grouped(a.dpooled), delta=a.delta, scores=a.scores,
        lse=a.lse, dx=a.dx, part=part, du=a.du,
    )  # fmt: skip
