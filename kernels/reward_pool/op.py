"""Learned-query pooling of the reward model, after folding the projections out of it.

    s = x u^T  [L, N],   p = softmax over L,   pooled = p^T x  [N, C]         for every sample

where the N = queries * heads rows of u are the folded queries: with the key projection Wk of head
h folded into its query, u_h = Wk_h^T (Wq_h query + bq_h) / sqrt(D), attention over keys Wk x + bk
has the scores x . u_h up to a constant that the softmax drops, and the value projection can be
applied to the pooled vector instead of to every token. 4 L C N operations instead of 4 L C^2 for
the keys and values of torch.nn.MultiheadAttention, and neither is ever stored.

The kernels read the features from memory once, in runs of tokens, and merge the runs in a fixed order;
`merge` does the same for ranks that hold shards of the tokens: N (C + 1) floats each instead of the features.
Saved for the backward: x, u, the scores [B, L, N], the pooled features and their log-sum-exp. Its one
pass uses that sum_l p_l dp_l = pooled . d pooled is known beforehand:
    dp = x . d pooled,   ds = p (dp - pooled . d pooled + d lse),   dx = p d pooled + ds u,   du = ds^T x
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import expect, expect_rank, expect_rows
from prfl_kernels.declare import allocator, gradients_like, operation, or_empty
from prfl_kernels.dispatch import record
from prfl_kernels.jit import unit_last, wide
from prfl_kernels.reward_pool import cpu, cuda, triton_kernels
from prfl_kernels.reward_pool.launch import Backward, Forward


def reference_forward(a: Forward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    x = a.x.to(a.u.dtype)
    torch.matmul(x, a.u.T, out=a.scores)
    torch.logsumexp(a.scores, 1, out=a.lse)
    torch.matmul(a.scores.softmax(1).mT, x, out=a.pooled)


def reference_backward(a: Backward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    x = a.x.to(a.u.dtype)
    p = (a.scores - a.lse[:, None]).exp()
    ds = p * (x @ a.dpooled.mT - a.delta[:, None])
    if a.dx is not None:
        a.dx.copy_(p @ a.dpooled + ds @ a.u)
    if a.du is not None:
        torch.matmul(ds.flatten(0, 1).T, x.flatten(0, 1), out=a.du)


_plain = reference_forward, reference_backward
dispatch.register("reward_pool", dispatch.room(_plain, cpu=cpu, triton=triton_kernels, cuda=cuda))


def _folded(x: Tensor, u: Tensor) -> Tensor:
    return u.to(wide(x.dtype)).contiguous()


def forward(fill: Callable[[Forward], None] | None, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled [B, N, C], log-sum-exp [B, N], scores [B, L, N]), float32 or wider, which fill(launch) computes
    unless it is None."""
    (batch, length, width), queries = x.shape, len(u)
    new, dtype = allocator(fill), wide(x.dtype)
    pooled = new(x, batch, queries, width, dtype=dtype)
    lse, scores = new(x, batch, queries, dtype=dtype), new(x, batch, length, queries, dtype=dtype)
    if fill is not None and x.numel():
        fill(Forward(unit_last(x), _folded(x, u), pooled, lse, scores))
    return pooled, lse, scores


def backward(
    fill: Callable[[Backward], None] | None,
    dpooled: Tensor,
    delta: Tensor,
    x: Tensor,
    u: Tensor,
    scores: Tensor,
    lse: Tensor,
    want_x: bool,
    want_u: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [B, L, C] in x.dtype, du [N, C] float32 or wider), each if wanted, which fill(launch) computes
    unless it is None.

    delta [B, N] is pooled . d pooled - d lse.
    """
    dx = allocator(fill)(x, *x.shape) if want_x else None
    du = u.new_zeros(u.shape, dtype=wide(x.dtype)) if want_u else None
    if fill is not None and x.numel():
        numbers = (a.contiguous() for a in (dpooled, delta, scores, lse))
        fill(Backward(unit_last(x), _folded(x, u), *numbers, dx, du))
    return dx, du


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


def _check(op, x, u):
    _, length, width = expect_rows(op, "x", x)
    queries = expect_rank(op, "u", u, "N, C")[0]
    expect(op, "u", u, (queries, width), x)
    if length < 1 or queries < 1:
        raise ValueError(f"{op}: got {length} tokens and {queries} queries, want at least one of each")


def _setup_context(ctx, inputs, output):
    pooled, lse, scores = output
    ctx.mark_non_differentiable(scores)
    ctx.save_for_backward(*inputs, scores, lse, pooled)


def _gradient(ctx, dpooled, dlse, _):
    return torch.ops.prfl.reward_pool_backward(dpooled, dlse, *ctx.saved_tensors, *ctx.needs_input_grad)


@operation("reward_pool", _gradient, _setup_context)
def _reward_pool(fake: bool, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check("reward_pool", x, u)
    return forward(None if fake else record("reward_pool", x).forward, x, u)


@operation("reward_pool_backward")
def _reward_pool_backward(
    fake: bool, dpooled: Tensor, dlse: Tensor, x: Tensor, u: Tensor, scores: Tensor, lse: Tensor,
    pooled: Tensor, want_x: bool, want_u: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "reward_pool_backward"
    _check(op, x, u)
    (batch, length, width), queries, dtype = x.shape, u.shape[0], wide(x.dtype)
    for name, a in (("dpooled", dpooled), ("pooled", pooled)):
        expect(op, name, a, (batch, queries, width), x, dtype)
    for name, a in (("dlse", dlse), ("lse", lse)):
        expect(op, name, a, (batch, queries), x, dtype)
    expect(op, "scores", scores, (batch, length, queries), x, dtype)
    delta = (pooled * dpooled).sum(-1) - dlse
    fill = None if fake else record("reward_pool", x).backward
    dx, du = backward(fill, dpooled, delta, x, u, scores, lse, want_x, want_u)
    return *or_empty(x, dx), *gradients_like(u, du)


def reward_pool_with_lse(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled [B, N, C], log-sum-exp of the scores [B, N]) for `merge`; otherwise as reward_pool."""
    return torch.ops.prfl.reward_pool(x, u)[:2]


def reward_pool(x: Tensor, u: Tensor) -> Tensor:
    """Pooled features [B, N, C], float32 or wider, from x [B, L, C] and folded queries u [N, C].

    x and u of any float dtypes, L, N and C > 0. ValueError for shapes, dtypes or devices that do not fit.
    """
    return reward_pool_with_lse(x, u)[0]
