"""Learned-query pooling of the reward model, after folding the projections out of it.

    s = x u^T  [L, N],   p = softmax over L,   pooled = p^T x  [N, C]         for every sample

where the N = queries * heads rows of u are the folded queries: with the key projection Wk of head
h folded into its query, u_h = Wk_h^T (Wq_h query + bq_h) / sqrt(D), attention over keys Wk x + bk
has the scores x . u_h up to a constant that the softmax drops, and the value projection can be
applied to the pooled vector instead of to every token. 4 L C N operations instead of 4 L C^2 for
the keys and values of torch.nn.MultiheadAttention, and neither is ever stored.

The kernels read the features from memory once: every program takes tiles of a run of tokens, makes
a tile's scores from all its columns, and reads the tile again, now from the L2, for the pooled
columns. Accumulators [N, C] of a run do not fit a program's registers; they too live in the L2 and
are updated once a tile. A second kernel merges the runs, in a fixed order; `merge` does the same
for ranks that hold shards of the tokens: N (C + 1) floats each instead of the features.
Saved for the backward: x, u, the scores [B, L, N], the pooled features and their log-sum-exp. Its one
pass uses that sum_l p_l dp_l = pooled . d pooled is known beforehand:
    dp = x . d pooled,   ds = p (dp - pooled . d pooled + d lse),   dx = p d pooled + ds u,   du = ds^T x
"""

import torch
from torch import Tensor

from prfl_kernels import cpu_kernels, cuda_kernels, dispatch, tuning
from prfl_kernels.checks import checked, expect, expect_rank, expect_rows
from prfl_kernels.dispatch import CPU, CUDA, REFERENCE, TRITON, implementation
from prfl_kernels.jit import jit, register, tl, triton, unit_last, wide

MAX_QUERIES = 64
SMS = 132
# The tiles of all programs together have to stay in the 50 MB of the L2 until their second reading.
TILE_BYTES = 336 << 10
# Columns of a step, most tokens of a tile, warps, stages of the copies in flight (20 KB of features
# for few queries, what one SM needs to keep the memory busy), for up to 16 and up to 64 queries.
FEW, MANY = (64, 64, 4, 6), (32, 16, 4, 3)
# What `prfl tune` tries beside the default, by the queries rounded up to a power of two.
_FEW = ((64, 64, 4, 4), (64, 64, 4, 8), (64, 64, 8, 6))
CANDIDATES = {"reward_pool forward": {(16,): _FEW}, "reward_pool backward": {(16,): _FEW}}


def reference_forward(x, u):
    """`launch_forward` in plain torch, in float32 or wider."""
    x = x.to(wide(x.dtype))
    scores = x @ u.to(x.dtype).T  # [B, L, N]
    return scores.softmax(1).mT @ x, scores.logsumexp(1), scores


def reference_backward(dpooled, delta, x, u, scores, lse, want_x, want_u):
    """`launch_backward` in plain torch, in float32 or wider."""
    x_wide = x.to(scores.dtype)
    p = (scores - lse[:, None]).exp()
    ds = p * (x_wide @ dpooled.mT - delta[:, None])
    dx = (p @ dpooled + ds @ u.to(ds.dtype)).to(x.dtype) if want_x else None
    return dx, (ds.flatten(0, 1).T @ x_wide.flatten(0, 1) if want_u else None)


def merge(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join pooled features [R, B, N, C] and log-sum-exps [R, B, N] of R shards of the tokens.

    Returns what reward_pool_with_lse would for all the tokens: [B, N, C] and [B, N].
    Differentiable in both; a shard without tokens has lse = -inf and takes no part. ValueError for shapes
    that do not fit.
    """
    shape = expect_rank("merge", "pooled", pooled, "R, B, N, C")
    expect("merge", "lse", lse, shape[:3], pooled)
    total = torch.logsumexp(lse, 0)
    return (torch.exp(lse - total)[..., None] * pooled).sum(0), total


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
        f"reward_pool {kernel}", key, FEW if queries <= 16 else MANY
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


def launch_forward(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled [B, N, C], log-sum-exp [B, N], scores [B, L, N]), all float32; N is 1 to 64."""
    if not 1 <= len(u) <= MAX_QUERIES:
        raise ValueError(f"reward_pool: got {len(u)} folded queries, want 1 to {MAX_QUERIES}")
    x, u = unit_last(x), u.float().contiguous()
    (batch, length, width), queries = x.shape, len(u)
    pooled, lse, scores = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((batch, queries, width), (batch, queries), (batch, length, queries))
    )
    if x.numel():
        grid, run, options = _plan("forward", x, queries, 1)
        top, total = x.new_empty(2, batch, grid[0], queries, dtype=torch.float32)
        acc = x.new_empty(batch, grid[0], queries, width, dtype=torch.float32)
        _forward[grid](
            x, u, scores, top, total, acc, x.stride(0), x.stride(1), length, run, queries, **options
        )
        block = 512
        _merge[(triton.cdiv(width, block), queries, batch)](
            top, total, acc, pooled, lse, grid[0], queries, C=width, BLOCK=block, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return pooled, lse, scores


def launch_backward(
    dpooled: Tensor,
    delta: Tensor,
    x: Tensor,
    u: Tensor,
    scores: Tensor,
    lse: Tensor,
    want_x: bool,
    want_u: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [B, L, C] in x.dtype, du [N, C] float32), each if wanted.

    delta [B, N] is pooled . d pooled - d lse.
    """
    x, dpooled = unit_last(x), dpooled.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    du = torch.zeros_like(u, dtype=torch.float32) if want_u else None
    if x.numel():
        grid, run, options = _plan("backward", x, len(u), (1 + want_x) * want_u)
        part = x.new_empty(len(x), grid[0], *u.shape, dtype=torch.float32) if want_u else None
        _backward[grid](
            x, u.float().contiguous(), dpooled, scores, lse, delta, dx, part,
            x.stride(0), x.stride(1), x.shape[1], run, len(u), **options,
        )  # fmt: skip
        if want_u:
            du = part.sum((0, 1))
    return dx, du


IMPLEMENTATIONS = {
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu_kernels.reward_pool_forward, cpu_kernels.reward_pool_backward),
    TRITON: (launch_forward, launch_backward),
    CUDA: (cuda_kernels.reward_pool_forward, cuda_kernels.reward_pool_backward),
}
dispatch.register("reward_pool", dispatch.common(IMPLEMENTATIONS))


def pair(x: Tensor):
    """(forward, backward) of what runs for x."""
    return IMPLEMENTATIONS[implementation("reward_pool", x)]


def _check(x, u, op="reward_pool"):
    _, length, width = expect_rows(op, "x", x)
    queries = expect_rank(op, "u", u, "N, C")[0]
    expect(op, "u", u, (queries, width), x)
    if length < 1 or queries < 1:
        raise ValueError(f"{op}: got {length} tokens and {queries} queries, want at least one of each")


def _check_backward(dpooled, dlse, x, u, scores, lse, pooled, want_x, want_u):
    op = "reward_pool_backward"
    _check(x, u, op)
    (batch, length, width), queries, dtype = x.shape, u.shape[0], wide(x.dtype)
    for name, a in (("dpooled", dpooled), ("pooled", pooled)):
        expect(op, name, a, (batch, queries, width), x, dtype)
    for name, a in (("dlse", dlse), ("lse", lse)):
        expect(op, name, a, (batch, queries), x, dtype)
    expect(op, "scores", scores, (batch, length, queries), x, dtype)


def _pool(x, u):
    return pair(x)[0](x, u)


def _pool_fake(x, u):
    (batch, length, width), queries = x.shape, len(u)
    return tuple(
        x.new_empty(shape, dtype=wide(x.dtype))
        for shape in ((batch, queries, width), (batch, queries), (batch, length, queries))
    )


def _pool_backward(dpooled, dlse, x, u, scores, lse, pooled, want_x, want_u):
    delta = (pooled * dpooled).sum(-1) - dlse
    dx, du = pair(x)[1](dpooled, delta, x, u, scores.contiguous(), lse.contiguous(), want_x, want_u)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if du is None else du.to(u.dtype)


def _pool_backward_fake(dpooled, dlse, x, u, scores, lse, pooled, want_x, want_u):
    return x.new_empty(x.shape if want_x else 0), u.new_empty(u.shape) if want_u else x.new_empty(0)


def _pool_setup_context(ctx, inputs, output):
    pooled, lse, scores = output
    ctx.mark_non_differentiable(scores)
    ctx.save_for_backward(*inputs, scores, lse, pooled)


def _pool_gradient(ctx, dpooled, dlse, _):
    want_x, want_u = ctx.needs_input_grad
    dx, du = torch.ops.prfl.reward_pool_backward(
        dpooled, dlse, *ctx.saved_tensors, want_x, want_u
    )
    return dx if want_x else None, du if want_u else None


register(
    "reward_pool(Tensor x, Tensor u) -> (Tensor, Tensor, Tensor)",
    *checked(_check, _pool, _pool_fake),
    _pool_gradient,
    _pool_setup_context,
)
register(
    "reward_pool_backward(Tensor dpooled, Tensor dlse, Tensor x, Tensor u, Tensor scores, Tensor lse, "
    "Tensor pooled, bool want_x, bool want_u) -> (Tensor, Tensor)",
    *checked(_check_backward, _pool_backward, _pool_backward_fake),
)


def reward_pool_with_lse(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled [B, N, C], log-sum-exp of the scores [B, N]) for `merge`; otherwise as reward_pool."""
    return torch.ops.prfl.reward_pool(x, u)[:2]


def reward_pool(x: Tensor, u: Tensor) -> Tensor:
    """Pooled features [B, N, C], float32 or wider, from x [B, L, C] and folded queries u [N, C].

    x and u of any float dtypes, L, N and C > 0. ValueError for shapes, dtypes or devices that do not fit.
    """
    return reward_pool_with_lse(x, u)[0]
