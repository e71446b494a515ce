"""The CUDA C++ kernels of csrc/cuda, with the signatures of their Triton twins.

Every launcher here takes and returns what the one of the same name does in reward_pool, add_norm and
qk_norm_rope, so that the one stands for the other. They work in units of 16 bytes: tensors that
allow no such access are copied or refused, and ValueError names what a kernel is not made for.
"""

from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels import compiled
from prfl_kernels.add_norm import unit_last

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
VECTOR = 16  # bytes


def library() -> ModuleType:
    """The extension that holds the launchers."""
    return compiled.extension()


def _view(a: Tensor | None) -> tuple[int, ...] | None:
    return None if a is None else (a.data_ptr(), _CODES[a.dtype], *a.stride()[:-1])


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _supported(name: str, *tensors: Tensor | None) -> None:
    for a in tensors:
        if a is not None and a.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: got {a.dtype}, want float32 or bfloat16")


def _vectors(a: Tensor) -> bool:
    """Whether every row of a begins at a multiple of 16 bytes."""
    steps = [a.data_ptr(), *(s * a.element_size() for s in a.stride()[:-1])]
    return a.stride(-1) == 1 and not any(step % VECTOR for step in steps)


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
