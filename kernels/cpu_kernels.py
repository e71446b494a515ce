"""The C++ kernels for the CPU, each with the signature and results of the Triton launcher it stands
beside; formulas and shapes are documented there. float32 and bfloat16 in and out, float32 inside, no
fp8.

Sums over tokens are made over a number of runs that depends on the shapes alone and then added in
order, so results are the same bits for any number of threads.
"""

import torch
from torch import Tensor

from prfl_kernels.extension import HUGE_BYTES, extension, is_dry, runs, supported, view
from prfl_kernels.jit import unit_last


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
        count = runs(shape[1])
        part = _empty(shape[0], count, slots, shape[2]) if slots else None
        extension().add_norm_backward(
            view(dn), view(dsum), view(x), view(y), _parameter(gate), _parameter(scale),
            *map(view, _pair(stats)), view(dx), view(dy), view(part), view(sums), *shape, count, base,
            parameters, torch.get_num_threads(),
        )  # fmt: skip
    dscale = dshift = dgate = None
    if parameters:
        # A weight [C] is shared by the batch.
        dscale, dshift = (s.contiguous() if scale.dim() == 2 else s.sum(0) for s in sums[:, :2].unbind(1))
    if wants_gate:
        dgate = sums[:, -1].contiguous()
    return dx, dy, dgate, dscale, dshift


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
        count = runs(rows.shape[1])
        part = _empty(rows.shape[0], count, h.shape[-1]) if wants_bias else None
        extension().bias_gelu_backward(
            view(dg), view(rows), view(unit_last(bias)), view(dh.view(rows.shape)),
            view(g.view(rows.shape)), view(part), view(dbias), *rows.shape, count,
            torch.get_num_threads(),
        )  # fmt: skip
    return dh, g, dbias
