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


def _parameter(a: Tensor | None) -> tuple[int, ...] | None:
    """View of a [B, C], or of a [C] that every sample shares."""
    return view(a if a is None or a.dim() == 2 else a.expand(1, -1).as_strided((1, a.shape[0]), (0, 1)))


def _pair(stats: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if stats is None else (stats[0], stats[1])


def add_norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    base: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """`add_norm.forward`: (x', n, None, statistics)."""
    x, y, gate, scale, shift = (unit_last(a) for a in (x, y, gate, scale, shift))
    total = None if y is None else _empty(*x.shape, dtype=x.dtype)
    n = None if scale is None else _empty(*x.shape, dtype=out_dtype)
    stats = None if n is None else _empty(2, *x.shape[:2])
    supported(x, y, gate, scale, shift, n)
    if x.numel():
        extension().add_norm_forward(
            view(x), view(y), *map(_parameter, (gate, scale, shift)), view(total), view(n),
            *map(view, _pair(stats)), *x.shape, base, eps, torch.get_num_threads(),
        )  # fmt: skip
    return total, n, None, stats


def add_norm_backward(
    dn: Tensor | None,
    dsum: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    base: float,
    parameters: bool,
    y_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`add_norm.backward`: (dx, dy, d gate, d scale, d shift), each None where it is not wanted."""
    shape = (dsum if dn is None else dn).shape
    dn, dsum, x, y, gate, scale = (unit_last(a) for a in (dn, dsum, x, y, gate, scale))
    if dn is not None and dsum is not None:
        dsum = dsum.to(x.dtype)
    if y is not None and y_dtype is not None:
        y = y.to(y_dtype)
    wants_gate = y is not None and gate is not None
    dx = None if dn is None else _empty(*x.shape, dtype=x.dtype)
    dy = None if y_dtype is None else _empty(*shape, dtype=y_dtype)
    supported(dn, dsum, x, y, gate, scale, dy)
    slots = 2 * parameters + wants_gate
    sums = torch.zeros(shape[0], slots, shape[2])
    if shape.numel():
        runs = _runs(shape[1])
        part = _empty(shape[0], runs, slots, shape[2]) if slots else None
        extension().add_norm_backward(
            view(dn), view(dsum), view(x), view(y), _parameter(gate), _parameter(scale),
            *map(view, _pair(stats)), view(dx), view(dy), view(part), view(sums), *shape, runs, base,
            parameters, torch.get_num_threads(),
        )  # fmt: skip
    dscale = dshift = dgate = None
    if parameters:
        # A weight [C] is shared by the batch.
        dscale, dshift = (s.contiguous() if scale.dim() == 2 else s.sum(0) for s in sums[:, :2].unbind(1))
    if wants_gate:
        dgate = sums[:, -1].contiguous()
    return dx, dy, dgate, dscale, dshift


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


def _rows(a: Tensor) -> Tensor:
    """a [..., F] as [B, L, F] with unit last stride, without a copy where there are three dimensions."""
    return unit_last(a if a.dim() == 3 else a.reshape(1, -1, a.shape[-1]))


def bias_gelu_forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(h + bias) in its tanh form, in h.dtype. h [..., F], bias [F] or None."""
    supported(h, bias)
    rows = _rows(h)
    g = _empty(*h.shape, dtype=h.dtype)
    if h.numel():
        extension().bias_gelu_forward(
            view(rows), view(unit_last(bias)), view(g.view(rows.shape)), *rows.shape,
            torch.get_num_threads(),
        )  # fmt: skip
    return g


def bias_gelu_backward(
    dg: Tensor, h: Tensor, bias: Tensor | None, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dh, g, d bias) of `bias_gelu_forward`, g made again; d bias [F] float32, None if not wanted."""
    supported(h, bias)
    rows, dg = _rows(h), _rows(dg.to(h.dtype))
    dh, g = (_empty(*h.shape, dtype=h.dtype) for _ in range(2))
    dbias = torch.zeros(h.shape[-1]) if wants_bias else None
    if h.numel():
        runs = _runs(rows.shape[1])
        part = _empty(rows.shape[0], runs, h.shape[-1]) if wants_bias else None
        extension().bias_gelu_backward(
            view(dg), view(rows), view(unit_last(bias)), view(dh.view(rows.shape)),
            view(g.view(rows.shape)), view(part), view(dbias), *rows.shape, runs,
            torch.get_num_threads(),
        )  # fmt: skip
    return dh, g, dbias


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
