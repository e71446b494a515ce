"""The C++ kernels for the CPU, each with the signature and results of the Triton launcher it stands
beside; formulas and shapes are documented there. float32 and bfloat16 in and out, float32 inside, no
fp8.

Sums over tokens are made over a number of runs that depends on the shapes alone and then added in
order, so results are the same bits for any number of threads.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels.extension import extension, is_dry, supported, view
from prfl_kernels.jit import unit_last
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, pairs_of

# Runs of tokens of a sample: enough for the threads of a large machine, few enough that their partial
# sums (at most three rows a run) stay under 5 % of the traffic.
RUNS, TOKENS_OF_A_RUN = 128, 16
# Results from here on get large pages: the first touch of small ones costs more than the kernels.
HUGE_BYTES = 4 << 20
POOL_RUNS, POOL_GROUP = 64, 8  # queries are handled in groups of this many (csrc/cpu/reward_pool.cpp)


def _runs(length: int) -> int:
    return max(1, min(RUNS, length // TOKENS_OF_A_RUN))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    a = torch.empty(shape, dtype=dtype)
    if a.nbytes >= HUGE_BYTES and not is_dry():
        extension().advise_huge_pages(a.data_ptr(), a.nbytes)
    return a


@lru_cache(maxsize=16)
def _turns(head_dim: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """[largest side, head_dim]: every cosine twice; and (-sine, sine) of every pair."""
    with torch.inference_mode(False):
        cos, sin = cos_sin(head_dim, grid, False, torch.device("cpu"), torch.float32)
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _rope(grid: Grid | None, num_heads: int, head_dim: int, offset: int) -> tuple:
    """(cosines, sines, (heads, head_dim, first channels of rows and columns, rows, columns, offset))."""
    if grid is None:
        return None, None, (num_heads, head_dim, 0, 0, 1, 1, offset)
    if is_dry():  # tables are cached: a fake one must not be
        return None, None, ()
    frames, rows, _ = pairs_of(head_dim)
    channels = 2 * frames, 2 * (frames + rows)
    tables = map(view, _turns(head_dim, tuple(grid)))
    return *tables, (num_heads, head_dim, *channels, *grid[1:], offset)


def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    grid: Grid | None,
    num_heads: int,
    eps: float,
    offset: int,
    fp8: bool = False,
) -> tuple[list[Tensor | None], list[None], Tensor]:
    """`norm_rope.launch_forward`: ([q, k] out, [None, None], 1/rms). ValueError with fp8."""
    if fp8:
        raise ValueError("qk_norm_rope: got fp8 for the compiled CPU kernel, want bfloat16 or float32")
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    supported(q, k, weight_q, weight_k)
    head_dim = q.shape[2] // num_heads
    out = [None if a is None else _empty(*a.shape[:2], num_heads, head_dim, dtype=a.dtype) for a in (q, k)]
    rstd = _empty(1 if k is None else 2, *q.shape[:2])
    if q.numel():
        flat = (None if a is None else view(a.flatten(2)) for a in out)
        extension().qk_norm_rope_forward(
            view(q), view(k), view(weight_q), view(weight_k), *flat, view(rstd[0]), view(rstd[-1]),
            *_rope(grid, num_heads, head_dim, offset), *q.shape, eps, torch.get_num_threads(),
        )  # fmt: skip
    return out, [None, None], rstd


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rstd: Tensor,
    grid: Grid | None,
    num_heads: int,
    offset: int,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`norm_rope.launch_backward`: (d q, d k, d weights [2, C] in float32 if `parameters`)."""
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    head_dim = q.shape[2] // num_heads
    shape = (*q.shape[:2], num_heads, head_dim)
    # Heads keep their stride: attention may hand its gradient back transposed.
    dq, dk = (
        None if d is None else unit_last((d if d.dim() == 4 else d.view(shape)).to(q.dtype))
        for d in (dq, dk)
    )
    supported(q, k, weight_q, weight_k)
    out = [None if a is None else _empty(*a.shape, dtype=a.dtype) for a in (q, k)]
    dweight = torch.zeros(2, q.shape[2]) if parameters else None
    if q.numel():
        runs = _runs(q.shape[1])
        part = _empty(q.shape[0], runs, 2, q.shape[2]) if parameters else None
        extension().qk_norm_rope_backward(
            view(dq), view(dk), view(q), view(k), view(weight_q), view(weight_k), view(rstd[0]),
            view(rstd[-1]), *map(view, out), view(part), view(dweight),
            *_rope(grid, num_heads, head_dim, offset), *q.shape, runs, torch.get_num_threads(),
        )  # fmt: skip
    return *out, dweight


def _grouped(u: Tensor) -> Tensor:
    """u [..., N, C] in float32 with zero rows up to a whole number of groups."""
    u, missing = u.float().contiguous(), -u.shape[-2] % POOL_GROUP
    return F.pad(u, (0, 0, 0, missing)) if missing else u


def _pool_runs(x: Tensor, queries: int) -> int:
    # A run keeps `queries` rows in float32: 4 % of the features at most.
    return max(1, min(POOL_RUNS, x.shape[1] * x.element_size() // (100 * queries)))


def reward_pool_forward(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reward_pool.launch_forward`: (pooled [B, N, C], log-sum-exp [B, N], scores [B, L, N])."""
    x = unit_last(x)
    supported(x)
    (batch, length, width), wanted = x.shape, len(u)
    pooled, lse = _empty(batch, wanted, width), _empty(batch, wanted)
    scores = _empty(batch, length, wanted)
    if x.numel():
        u = _grouped(u)
        runs = _pool_runs(x, len(u))
        part, top, total = (_empty(batch, runs, len(u), *rest) for rest in ((width,), (), ()))
        extension().reward_pool_forward(
            *map(view, (x, u, part, top, total, pooled, lse, scores)), batch, length, width, len(u),
            wanted, runs, torch.get_num_threads(),
        )  # fmt: skip
    return pooled, lse, scores


def reward_pool_backward(
    dpooled: Tensor,
    delta: Tensor,
    x: Tensor,
    u: Tensor,
    scores: Tensor,
    lse: Tensor,
    want_x: bool,
    want_u: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`reward_pool.launch_backward`: (dx in x.dtype, du [N, C] float32), each if wanted."""
    x = unit_last(x)
    supported(x)
    (batch, length, width), wanted = x.shape, len(u)
    dx = _empty(*x.shape, dtype=x.dtype) if want_x else None
    if not x.numel():
        return dx, torch.zeros(u.shape) if want_u else None
    u, dpooled, delta, lse = _grouped(u), _grouped(dpooled), delta.contiguous(), lse.contiguous()
    runs = _pool_runs(x, len(u))
    part = _empty(batch, runs, *u.shape) if want_u else None
    du = _empty(*u.shape) if want_u else None
    extension().reward_pool_backward(
        *map(view, (x, u, dpooled, delta, scores, lse, dx, part, du)), batch, length, width, len(u),
        wanted, runs, torch.get_num_threads(),
    )  # fmt: skip
    return dx, None if du is None else du[:wanted]
