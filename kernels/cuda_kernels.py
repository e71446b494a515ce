"""What launches of the CUDA C++ kernels of csrc/cuda share, and the launchers of add_norm and solver_step.

The kernels work in units of 16 bytes: tensors that allow no such access are copied or refused, and
ValueError names what a kernel is not made for.
"""

from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels import extension as compiled
from prfl_kernels.extension import CODES
from prfl_kernels.extension import view as _view
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.jit import unit_last

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


def _vector(a: Tensor | None) -> Tensor | None:
    """gate, scale or shift as float32 [B, C] of any stride, 0 for a vector [C] that all samples share."""
    if a is None:
        return None
    a = unit_last(a.float())
    return a if a.dim() == 2 else a.as_strided((1, len(a)), (0, 1))


def add_norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    base: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As add_norm.forward: (x', n, row scales, statistics [2, B, L]).

    x, y float32 or bfloat16, y no wider than x; C up to 5120, quick for 1536 and 5120.
    """
    _supported("add_norm", x, y)
    x, y = unit_last(x), unit_last(y)
    gate, scale, shift = map(_vector, (gate, scale, shift))
    batch, length, width = x.shape
    _narrow("add_norm", width, x.dtype, x.dtype if y is None else y.dtype)
    total = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    n = None if scale is None else x.new_empty(x.shape, dtype=out_dtype)
    fp8 = n is not None and n.dtype == E4M3
    quant = x.new_empty(batch, length, dtype=torch.float32) if fp8 else None
    stats = x.new_empty(2, batch, length, dtype=torch.float32) if n is not None and not fp8 else None
    if x.numel():
        mean, rstd = (None, None) if stats is None else stats
        held = (x, y, gate, scale, shift, total, n, quant, mean, rstd)
        library().add_norm_forward(
            *map(_view, held), batch, length, width, eps, base,
            CODES[x.dtype if y is None else y.dtype], _aligned(width, *held[:7]), _stream(x),
        )  # fmt: skip
    return total, n, quant, stats


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
    """As add_norm.backward: (dx, dy, d gate, d scale, d shift), each None where it is not wanted."""
    like = dsum if dn is None else dn
    batch, length, width = like.shape
    shared = scale is not None and scale.dim() == 1
    _supported("add_norm", dn, dsum, x, y)
    dn, dsum, x, y = (unit_last(a) for a in (dn, dsum, x, y))
    gate, scale = map(_vector, (gate, scale))
    wants_gate = y is not None and gate is not None
    dx = None if dn is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    dy = None if y_dtype is None else like.new_empty(like.shape, dtype=y_dtype)
    stream = (dsum if x is None else x).dtype
    grad = stream if dn is None else dn.dtype
    branch = y_dtype or grad
    _narrow("add_norm", width, stream, branch, grad)
    slots = 2 * parameters + wants_gate
    sums = like.new_zeros(batch, slots, width, dtype=torch.float32)
    if like.numel():
        runs = library().add_norm_runs(batch, length, width)
        part = like.new_empty(batch, runs, slots, width, dtype=torch.float32)
        mean, rstd = (None, None) if stats is None else stats
        held = (dn, dsum, x, y, gate, scale, mean, rstd, dx, dy, part)
        rows = (*held[:6], dx, dy)
        library().add_norm_backward(
            *map(_view, held), batch, length, width, base, CODES[stream], CODES[branch], CODES[grad],
            _aligned(width, *rows), parameters, wants_gate, _stream(like),
        )  # fmt: skip
        sums = part.sum(1)
    dscale = dshift = dgate = None
    if parameters:
        dscale, dshift = (s.sum(0) if shared else s.contiguous() for s in sums[:, :2].unbind(1))
    if wants_gate:
        dgate = sums[:, -1].contiguous()
    return dx, dy, dgate, dscale, dshift


def _narrow(name: str, width: int, stream: torch.dtype, *others: torch.dtype) -> None:
    """A bfloat16 stream meets bfloat16 alone."""
    if width > library().norm_width:
        raise ValueError(f"{name}: got width {width}, want at most {library().norm_width}")
    if stream == torch.bfloat16 and torch.float32 in others:
        raise ValueError(f"{name}: got float32 rows beside a bfloat16 stream, want bfloat16")


def solver_step(
    x: Tensor, x_last: Tensor, m0: Tensor, m1: Tensor, velocity: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As solver_step.reference: (x_next, x_c, m_t) of a step of a sampler.

    The state float32 [B, ...], velocity float32 or bfloat16 of that shape, columns [B, 9].
    """
    for a in (x, x_last, m0, m1, velocity):
        if a.shape != x.shape or (a is not velocity and a.dtype != torch.float32):
            got = f"{list(a.shape)} in {a.dtype}"
            raise ValueError(f"solver_step: got {got} beside x {list(x.shape)}, want that in float32")
    _supported("solver_step", velocity)
    if columns.shape != (len(x), 9):
        raise ValueError(f"solver_step: got columns {list(columns.shape)}, want [{len(x)}, 9]")
    held = tuple(a.contiguous() for a in (x, x_last, m0, m1, velocity, columns.float()))
    made = tuple(torch.empty_like(held[0]) for _ in range(3))
    if x.numel():
        size = x[0].numel()
        aligned = size % 8 == 0 and all(a.data_ptr() % VECTOR == 0 for a in (*held, *made))
        views = (_view(a.view(-1)) for a in (*held, *made))
        library().solver_step(*views, len(x), size, aligned, _stream(x))
    return made
