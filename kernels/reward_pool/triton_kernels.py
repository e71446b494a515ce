"""Pooling in Triton. The kernels read the features from memory once.

Every program takes tiles of a run of tokens, makes a tile's scores from all its columns, and reads the tile
a second time, now from the L2, for the pooled columns. Accumulators [N, C] of a run do not fit a program's
registers; they too live in the L2 and are updated once a tile. A second kernel merges the runs, in a fixed
order.
"""

import torch
from torch import Tensor

from prfl_kernels import tuning
from prfl_kernels.jit import jit, launch, tl, triton
from prfl_kernels.reward_pool.launch import Backward, Forward

MAX_QUERIES = 64
SMS = 132
# The tiles of all programs together have to stay in the 50 MB of the L2 until their second reading.
TILE_BYTES = 336 << 10
# Columns of a step, most tokens of a tile, warps, stages of the copies in flight (20 KB of features
# for few queries, what one SM needs to keep the memory busy), for up to 16 and up to 64 queries.
FEW, MANY = (64, 64, 4, 6), (32, 16, 4, 3)
# What `prfl tune` tries in addition to the default, by the queries rounded up to a power of two.
_FEW = ((64, 64, 4, 4), (64, 64, 4, 8), (64, 64, 8, 6))
CANDIDATES = {"reward_pool forward": {(16,): _FEW}, "reward_pool backward": {(16,): _FEW}}


@jit
def _dot(a, b, acc):
    """acc + a b, to float32 accuracy. A bfloat16 or float16 factor is exact; the other one is split
    into three parts of its type, which is twice as fast as three products in tf32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    if a.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = a.to(b.dtype)
            acc = tl.dot(part, b, acc)
            a = a - part.to(tl.float32)
    else:
        for _ in tl.static_range(3):
            part = b.to(a.dtype)
            acc = tl.dot(a, part, acc)
            b = b - part.to(tl.float32)
    return acc


@jit
def _tile(pointer, stride, o_row, m_row, c, C: tl.constexpr, BLOCK: tl.constexpr):
    o_c = c + tl.arange(0, BLOCK)
    mask = m_row[:, None] & (o_c < C)[None, :]
    return tl.load(pointer + o_row[:, None] * stride + o_c[None, :], mask=mask, other=0.0)


@jit
def _forward(
    x_ptr, u_ptr, score_ptr, max_ptr, sum_ptr, acc_ptr, x_b, x_l, L, run, N,
    C: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    last = tl.minimum(first + run, L)
    slot = b * tl.num_programs(0) + tl.program_id(0)
    x_ptr += b * x_b
    acc_ptr += slot * N * C
    o_n = tl.arange(0, QUERIES)
    m_n = o_n < N
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for i in range(0, tl.cdiv(last - first, TOKENS)):
        o_l = first + i * TOKENS + tl.arange(0, TOKENS)
        m_l = o_l < last
        s = tl.zeros([TOKENS, QUERIES], tl.float32)
        for c in range(0, C, BLOCK):
            x = _tile(x_ptr, x_l, o_l, m_l, c, C, BLOCK)
            u = _tile(u_ptr, C, o_n, m_n, c, C, BLOCK)
            s = _dot(x, tl.trans(u), s)
        mask = m_l[:, None] & m_n[None, :]
        tl.store(score_ptr + (b * L + o_l)[:, None] * N + o_n[None, :], s, mask=mask)
        s = tl.where(m_l[:, None], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp(top - new)
        p = tl.exp(s - new[None, :])
        total = total * shrink + tl.sum(p, 0)
        p = tl.trans(p)
        for c in range(0, C, BLOCK):
            x = _tile(x_ptr, x_l, o_l, m_l, c, C, BLOCK)
            acc = _tile(acc_ptr, C, o_n, m_n & (i > 0), c, C, BLOCK)
            acc = _dot(p, x, acc * shrink[:, None])
            o_c = c + tl.arange(0, BLOCK)
            p_acc = acc_ptr + o_n[:, None] * C + o_c[None, :]
            tl.store(p_acc, acc, mask=m_n[:, None] & (o_c < C)[None, :])
        top = new
        tl.debug_barrier()  # the next tile's threads read what other threads of this program wrote
    tl.store(max_ptr + slot * N + o_n, top, mask=m_n)
    tl.store(sum_ptr + slot * N + o_n, total, mask=m_n)


@jit
def _merge(max_ptr, sum_ptr, acc_ptr, pooled_ptr, lse_ptr, runs, N, C: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([1], float("-inf"), tl.float32)
    for r in range(0, runs):
        top = tl.maximum(top, tl.load(max_ptr + (b * runs + r) * N + n))
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for r in range(0, runs):
        slot = (b * runs + r) * N + n
        scale = tl.exp(tl.load(max_ptr + slot) - top)
        total += scale * tl.load(sum_ptr + slot)
        acc += scale * tl.load(acc_ptr + slot * C + o_c, mask=o_c < C, other=0.0)
    tl.store(pooled_ptr + (b * N + n) * C + o_c, acc / total, mask=o_c < C)
    if tl.program_id(0) == 0:
        tl.store(lse_ptr + b * N + n + tl.arange(0, 1), top + tl.log(total))


@jit
def _backward(
    x_ptr, u_ptr, g_ptr, score_ptr, lse_ptr, delta_ptr, dx_ptr, du_ptr, x_b, x_l, L, run, N,
    C: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    last = tl.minimum(first + run, L)
    x_ptr += b * x_b
    g_ptr += b * N * C
    if du_ptr is not None:
        du_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * N * C
    o_n = tl.arange(0, QUERIES)
    m_n = o_n < N
    lse = tl.load(lse_ptr + b * N + o_n, mask=m_n, other=0.0)
    delta = tl.load(delta_ptr + b * N + o_n, mask=m_n, other=0.0)
    for i in range(0, tl.cdiv(last - first, TOKENS)):
        o_l = first + i * TOKENS + tl.arange(0, TOKENS)
        m_l = o_l < last
        dp = tl.zeros([TOKENS, QUERIES], tl.float32)
        for c in range(0, C, BLOCK):
            x = _tile(x_ptr, x_l, o_l, m_l, c, C, BLOCK)
            g = _tile(g_ptr, C, o_n, m_n, c, C, BLOCK)
            dp = _dot(x, tl.trans(g), dp)
        mask = m_l[:, None] & m_n[None, :]
        p_s = score_ptr + (b * L + o_l)[:, None] * N + o_n[None, :]
        p = tl.exp(tl.load(p_s, mask=mask, other=float("-inf")) - lse[None, :])
        ds = p * (dp - delta[None, :])
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            if dx_ptr is not None:
                g = _tile(g_ptr, C, o_n, m_n, c, C, BLOCK)
                u = _tile(u_ptr, C, o_n, m_n, c, C, BLOCK)
                dx = tl.dot(p, g, input_precision="tf32x3")
                dx = tl.dot(ds, u, dx, input_precision="tf32x3").to(dx_ptr.dtype.element_ty)
                p_dx = dx_ptr + (b * L + o_l)[:, None] * C + o_c[None, :]
                tl.store(p_dx, dx, mask=m_l[:, None] & (o_c < C)[None, :])
            if du_ptr is not None:
                x = _tile(x_ptr, x_l, o_l, m_l, c, C, BLOCK)
                du = _tile(du_ptr, C, o_n, m_n & (i > 0), c, C, BLOCK)
                du = _dot(tl.trans(ds), x, du)
                p_du = du_ptr + o_n[:, None] * C + o_c[None, :]
                tl.store(p_du, du, mask=m_n[:, None] & (o_c < C)[None, :])
        tl.debug_barrier()  # as in the forward


def _plan(kernel: str, x: Tensor, queries: int, passes: int) -> tuple[tuple[int, int], int, dict]:
    """(grid, tokens of a run, constants and launch options).

    passes: how often something of the features' size is read or written; 0 without accumulators.
    """
    batch, length, width = x.shape
    padded = max(16, triton.next_power_of_2(queries))
    key = padded, 8 * x.element_size(), width, tuning.bucket(length)
    columns, tokens, warps, stages = tuning.choice(
        f"reward_pool {kernel}", key, FEW if queries <= 16 else MANY, x.device
    )
    while tokens > 16 and tokens * width * x.element_size() > TILE_BYTES:
        tokens //= 2
    # One program an SM, and fewer where the float32 accumulators [N, C] would add over 5 % of traffic.
    most = passes * length * x.element_size() // (4 * queries * 20) if passes else SMS
    runs = max(1, min(SMS, most) // batch)
    run = triton.cdiv(triton.cdiv(length, runs), tokens) * tokens
    options = {
        "C": width, "QUERIES": padded, "TOKENS": tokens,
        "BLOCK": columns, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return (triton.cdiv(length, run), batch), run, options


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for more than 64 queries."""
    (batch, length, width), queries = a.x.shape, len(a.u)
    if queries > MAX_QUERIES:
        raise ValueError(f"reward_pool: got {queries} folded queries, want 1 to {MAX_QUERIES}")
    grid, run, options = _plan("forward", a.x, queries, 1)
    top, total = a.u.new_empty(2, batch, grid[0], queries)
    acc = a.u.new_empty(batch, grid[0], queries, width)
    tensors = a.x, a.u, a.scores, top, total, acc
    launch(_forward, grid, *tensors, *a.x.stride()[:2], length, run, queries, **options)
    block = 512
    launch(
        _merge, (triton.cdiv(width, block), queries, batch),
        top, total, acc, a.pooled, a.lse, grid[0], queries, C=width, BLOCK=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    passes = 0 if a.du is None else 1 if a.dx is None else 2
    grid, run, options = _plan("backward", a.x, len(a.u), passes)
    part = None if a.du is None else a.u.new_empty(len(a.x), grid[0], *a.u.shape)
    launch(
        _backward, grid,
        a.x, a.u, a.dpooled, a.scores, a.lse, a.delta, a.dx, part, *a.x.stride()[:2], a.x.shape[1], run,
        len(a.u), **options,
    )  # fmt: skip
    if part is not None:
        torch.sum(part, (0, 1), out=a.du)
