"""The CUDA C++ kernels of csrc/cuda, with the signatures of their Triton twins.

Every launcher here takes and returns what the one of the same name does in reward_pool, add_norm and
norm_rope, so that the one stands for the other. They work in units of 16 bytes: tensors that
allow no such access are copied or refused, and ValueError names what a kernel is not made for.
"""

from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels import extension as compiled
from prfl_kernels.extension import view as _view
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.jit import unit_last
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, pairs_of

VECTOR = 16  # bytes


def library() -> ModuleType:
    """The extension that holds the launchers."""
    return compiled.extension()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _supported(name: str, *tensors: Tensor | None) -> None:
    for a in tensors:
        if a is not None and a.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: got {a.dtype}, want float32 or bfloat16")


def _vectors(a: Tensor) -> bool:
    """Whether every row of a begins at a multiple of 16 bytes."""
    strides = zip(a.shape[:-1], a.stride(), strict=False)
    steps = [a.data_ptr(), *(s * a.element_size() for n, s in strides if n > 1)]
    return a.stride(-1) == 1 and not any(step % VECTOR for step in steps)


def _aligned(width: int, *tensors: Tensor | None) -> bool:
    return width % 8 == 0 and all(_vectors(a) for a in tensors if a is not None)


def _turns(q: Tensor, grid: Grid | None, num_heads: int, offset: int):
    """(cosines, sines, places) of a rotation, as the launchers take them."""
    head_dim = q.shape[2] // num_heads
    if grid is None:
        return None, None, (head_dim, 0, 0, 1, 1, 0)
    tables = cos_sin(head_dim, tuple(grid), False, q.device, torch.float32)
    return *tables, (head_dim, *pairs_of(head_dim)[:2], *grid[1:], offset)


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
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """As norm_rope.launch_forward: ([q, k] out, their scales if fp8, 1/rms [2, B, L] if not).

    q, k float32 or bfloat16, C up to 5120, quick for 1536 and 5120 in heads of 128; for fp8 heads of a
    power of two from 8 to 256.
    """
    _supported("qk_norm_rope", q, k)
    q, k = unit_last(q), unit_last(k)
    (batch, length, width), head_dim = q.shape, q.shape[2] // num_heads
    _narrow("qk_norm_rope", width, q.dtype, q.dtype if k is None else k.dtype)
    if fp8 and (head_dim & (head_dim - 1) or not 8 <= head_dim <= 256):
        raise ValueError(f"qk_norm_rope: got heads of {head_dim} for fp8, want a power of two from 8 to 256")
    shape = (batch, length, num_heads, head_dim)
    dtype = E4M3 if fp8 else q.dtype
    out = [None if a is None else a.new_empty(shape, dtype=dtype) for a in (q, k)]
    quant = [None if a is None or not fp8 else a.new_empty(shape[:3], dtype=torch.float32) for a in (q, k)]
    rstd = None if fp8 else q.new_empty(1 if k is None else 2, batch, length, dtype=torch.float32)
    if q.numel():
        weights = [None if a is None else a.float().contiguous() for a in (weight_q, weight_k)]
        cos, sin, places = _turns(q, grid, num_heads, offset)
        stats = (None, None) if fp8 else (rstd[0], rstd[-1])
        held = (q, k, *weights, *out, *quant, *stats, cos, sin)
        library().qk_norm_rope_forward(
            *map(_view, held), batch, length, width, places, eps, _aligned(width, *held[:6]), _stream(q)
        )
    return out, quant, rstd


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
    """As norm_rope.launch_backward: (d q, d k [B, L, C], d weights [2, C] in float32 if `parameters`)."""
    _supported("qk_norm_rope", dq, dk, q, k)
    q, k = unit_last(q), unit_last(k)
    dq, dk = (None if a is None else unit_last(a.flatten(2)) for a in (dq, dk))
    batch, length, width = q.shape
    out = [None if a is None else a.new_empty(a.shape) for a in (q, k)]
    dweight = q.new_zeros(2, width, dtype=torch.float32) if parameters else None
    if q.numel():
        runs = library().add_norm_runs(batch, length, width)
        part = q.new_empty(batch, runs, 2, width, dtype=torch.float32) if parameters else None
        weights = [None if a is None else a.float().contiguous() for a in (weight_q, weight_k)]
        cos, sin, places = _turns(q, grid, num_heads, offset)
        held = (dq, dk, q, k, *weights, rstd[0], rstd[-1], *out, part, cos, sin)
        rows = (*held[:6], *out)
        library().qk_norm_rope_backward(
            *map(_view, held), batch, length, width, places, _aligned(width, *rows), _stream(q)
        )
        if parameters:
            dweight = part.sum((0, 1))
    return *out, dweight


def _narrow(name: str, width: int, stream: torch.dtype, *others: torch.dtype) -> None:
    """A bfloat16 stream meets bfloat16 alone."""
    if width > library().norm_width:
        raise ValueError(f"{name}: got width {width}, want at most {library().norm_width}")
    if stream == torch.bfloat16 and torch.float32 in others:
        raise ValueError(f"{name}: got float32 rows beside a bfloat16 stream, want bfloat16")


def _pool_inputs(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    module = library()
    _supported("reward_pool", x)
    if not 1 <= len(u) <= module.reward_pool_queries:
        raise ValueError(f"reward_pool: got {len(u)} folded queries, want 1 to {module.reward_pool_queries}")
    if u.shape[1] % 8 or u.shape[1] > module.reward_pool_width:
        width = module.reward_pool_width
        raise ValueError(f"reward_pool: got width {u.shape[1]}, want a multiple of 8 up to {width}")
    return x if _vectors(x) else x.contiguous(), u.float().contiguous()


def reward_pool_forward(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As reward_pool.launch_forward: (pooled [B, N, C], log-sum-exp [B, N], scores [B, L, N]).

    x float32 or bfloat16, C a multiple of 8 up to 5120, N up to 8.
    """
    x, u = _pool_inputs(x, u)
    (batch, length, width), queries = x.shape, len(u)
    pooled, lse, scores = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((batch, queries, width), (batch, queries), (batch, length, queries))
    )
    if x.numel():
        runs = library().reward_pool_runs(batch, length, width, x.dtype == torch.bfloat16)
        top, total = x.new_empty(2, batch, runs, queries, dtype=torch.float32)
        acc = x.new_empty(batch, runs, queries, width, dtype=torch.float32)
        held = (x, u, pooled, lse, scores, top, total, acc)
        library().reward_pool_forward(*map(_view, held), batch, length, width, queries, _stream(x))
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
    """As reward_pool.launch_backward: (dx [B, L, C] in x.dtype, du [N, C] float32), each if wanted."""
    x, u = _pool_inputs(x, u)
    (batch, length, width), queries = x.shape, len(u)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    du = x.new_zeros(u.shape, dtype=torch.float32) if want_u else None
    if x.numel():
        runs = library().reward_pool_runs(batch, length, width, x.dtype == torch.bfloat16)
        part = x.new_empty(batch, runs, queries, width, dtype=torch.float32) if want_u else None
        held = (x, u, *(a.contiguous() for a in (dpooled, scores, lse, delta)), dx, part)
        library().reward_pool_backward(*map(_view, held), batch, length, width, queries, _stream(x))
        if want_u:
            du = part.sum((0, 1))
    return dx, du
