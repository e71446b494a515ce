"""The kernel pair behind modulate and gated_add: x' = x + gate * y, then LayerNorm, both optional.

    x' = x + gate * y,   n = (x' - mean) * rstd * (scale + base) + shift        base 1 or 0

One pass over memory each way. The two-dimensional grid has one program for every run of `rows`
tokens of a sample; gate, scale and shift stay in its registers. Sums over tokens (d scale, d shift,
d gate) are kept in registers over the run and written once; torch adds the runs in a fixed order,
so results are the same from run to run, without atomics. Everything is computed in float32.

`pair` gives the two functions of the implementation that runs, all of one signature.
"""

import torch
from torch import Tensor

from prfl_kernels import cpu_kernels, cuda_kernels, dispatch, tuning
from prfl_kernels.checks import expect
from prfl_kernels.dispatch import CPU, CUDA, REFERENCE, TRITON, implementation
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows, row_scales
from prfl_kernels.jit import jit, tl, triton, unit_last, wide

# Runs of tokens on the whole batch: enough to fill 132 SMs, few enough that their partial sums stay
# under 5 % of the traffic at 32,760 tokens. A wide row takes a whole SM in the backward.
RUNS_WIDE, RUNS = 264, 528
# Most warps of a program. Three accumulators and six rows of 5,120 in float32 fit the registers of
# one SM with 8 warps (238 a thread); with 16 they spill.
WARPS_FORWARD, WARPS_BACKWARD = 16, 8
# (warps, runs) that `prfl tune` tries beside the default, by the width rounded up to a power of two.
CANDIDATES = {
    "add_norm forward": {
        (2048,): ((8, 528), (8, 264), (4, 528)),
        (8192,): ((16, 528), (8, 264), (8, 528)),
    },
    "add_norm backward": {
        (2048,): ((8, 264), (8, 1056)),
        (8192,): ((8, 132), (8, 528)),
    },
}


_VECTORS = {1.0: ("scale", "shift"), 0.0: ("weight", "bias")}  # by base, as their operations call them


def check_affine(op: str, x: Tensor, vectors: tuple[Tensor, ...], base: float) -> None:
    """Raise ValueError unless base is 0 or 1 and the vectors, scale or scale and shift, are [B, C] or [C] for
    x [B, L, C]."""
    if base not in _VECTORS:
        raise ValueError(f"{op}: got base {base}, want 0 or 1")
    batch, _, width = x.shape
    shape = (width,) if vectors[0].dim() == 1 else (batch, width)
    for name, a in zip(_VECTORS[base], vectors, strict=False):
        expect(op, name, a, shape, x)


def reference_forward(x, y, gate, scale, shift, base, eps, out_dtype):
    """`forward` in plain torch, in float32 or wider."""
    dtype, total = wide(x.dtype), None
    if y is not None:
        x_wide, y = x.to(dtype), y.to(dtype)
        total = x_wide + y if gate is None else torch.addcmul(x_wide, y, gate.to(dtype)[:, None])
        x = total = total.to(x.dtype)
    if scale is None:
        return total, None, None, None
    scale, shift = (a.to(dtype)[:, None] if a.dim() == 2 else a.to(dtype) for a in (scale, shift))
    n, *stats = torch.native_layer_norm(x.to(dtype), x.shape[-1:], None, None, eps)
    n = torch.addcmul(shift, n, scale + base)
    if out_dtype == E4M3:
        return total, *quantize_rows(n), None
    return total, n.to(out_dtype), None, torch.stack(stats)[..., 0]


def reference_backward(dn, dsum, x, y, gate, scale, stats, base, parameters, y_dtype):
    """`backward` in plain torch, in float32 or wider."""
    dtype = wide((dsum if dn is None else x).dtype)
    dx = dy = dgate = dscale = dshift = None
    if dn is not None:
        dn, x_wide, scale = (a.to(dtype) for a in (dn, x, scale))
        dx, dscale, dshift = _norm_backward(dn, x_wide, scale, stats, base, parameters)
        if dsum is not None:
            dx += dsum
    total = dsum.to(dtype) if dx is None else dx
    if y is not None and gate is not None:
        dgate = (total * y).sum(1)
    if y_dtype is not None:
        dy = (total if gate is None else total * gate.to(dtype)[:, None]).to(y_dtype)
        dy = dy.clone() if dy is dsum or dy is dx else dy
    return None if dx is None else dx.to(x.dtype), dy, dgate, dscale, dshift


def _norm_backward(dn, x, scale, stats, base, parameters):
    """(dx, d scale, d shift) by torch's own LayerNorm, in one call for every row of scale."""
    if scale.dim() == 1:  # shared by the batch
        dx, *sums = _norm_backward(dn[None], x[None], scale[None], stats[:, None], base, parameters)
        return dx[0], *(None if a is None else a[0] for a in sums)
    dx, sums = torch.empty_like(x, memory_format=torch.contiguous_format), scale.new_zeros(2, *scale.shape)
    for b, factor in enumerate(scale + base):
        dx[b], *made = torch.ops.aten.native_layer_norm_backward(
            dn[b], x[b], x.shape[-1:], *stats[:, b, ..., None], factor, torch.zeros_like(factor),
            [True, parameters, parameters],
        )  # fmt: skip
        if parameters:
            sums[:, b] = torch.stack(made)
    return (dx, *sums) if parameters else (dx, None, None)


@jit
def _row(pointer, stride_b, stride_l, b, l, o_c, m_c):
    return tl.load(pointer + b * stride_b + l * stride_l + o_c, mask=m_c, other=0.0).to(tl.float32)


@jit
def _forward(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, n_ptr, quant_ptr, mean_ptr, rstd_ptr,
    x_b, x_l, y_b, y_l, gate_b, scale_b, shift_b, L, rows, eps, base,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    if gate_ptr is not None:
        gate = _row(gate_ptr, gate_b, 0, b, 0, o_c, m_c)
    if n_ptr is not None:
        scale = _row(scale_ptr, scale_b, 0, b, 0, o_c, m_c) + base
        shift = _row(shift_ptr, shift_b, 0, b, 0, o_c, m_c)
    for i in range(0, tl.minimum(rows, L - first)):
        l = first + i
        p_out = (b * L + l) * C + o_c
        x = _row(x_ptr, x_b, x_l, b, l, o_c, m_c)
        if y_ptr is not None:
            y = _row(y_ptr, y_b, y_l, b, l, o_c, m_c)
            if gate_ptr is not None:
                y = y * gate
            rounded = (x + y).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + p_out, rounded, mask=m_c)
            x = rounded.to(tl.float32)  # the norm sees the residual stream as it is stored
        if n_ptr is not None:
            mean = tl.sum(x, 0) / C
            centered = tl.where(m_c, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centered * centered, 0) / C + eps)
            n = tl.where(m_c, centered * rstd * scale + shift, 0.0)
            if quant_ptr is not None:  # e4m3 with one scale a row
                quant = row_scales(n, 0)
                n = n / quant
                tl.store(quant_ptr + b * L + l, quant)
            tl.store(n_ptr + p_out, n.to(n_ptr.dtype.element_ty), mask=m_c)
            if mean_ptr is not None:
                tl.store(mean_ptr + b * L + l, mean)
                tl.store(rstd_ptr + b * L + l, rstd)


@jit
def _backward(
    dn_ptr, dsum_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_ptr, part_ptr,
    dn_b, dn_l, dsum_b, dsum_l, x_b, x_l, y_b, y_l, gate_b, scale_b, L, rows, base,
    C: tl.constexpr, BLOCK: tl.constexpr, PARAMETERS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tl.minimum(rows, L - first)):
        l = first + i
        p_out = (b * L + l) * C + o_c
        if dn_ptr is not None:
            # n = x_hat (base + scale) + shift;  g = dn (base + scale);
            # dx' = rstd (g - mean(g) - x_hat mean(g x_hat));  d scale = sum dn x_hat
            dn = _row(dn_ptr, dn_b, dn_l, b, l, o_c, m_c)
            x = _row(x_ptr, x_b, x_l, b, l, o_c, m_c)
            # Scale and gate come from the cache every time: held, they would spill at C = 5120.
            scale = _row(scale_ptr, scale_b, 0, b, 0, o_c, m_c) + base
            rstd = tl.load(rstd_ptr + b * L + l)
            x_hat = tl.where(m_c, (x - tl.load(mean_ptr + b * L + l)) * rstd, 0.0)
            if PARAMETERS:
                dscale += dn * x_hat
                dshift += dn
            g = dn * scale
            dx = (g - tl.sum(g, 0) / C - x_hat * (tl.sum(g * x_hat, 0) / C)) * rstd
            if dsum_ptr is not None:
                dx += _row(dsum_ptr, dsum_b, dsum_l, b, l, o_c, m_c)
            tl.store(dx_ptr + p_out, dx.to(dx_ptr.dtype.element_ty), mask=m_c)
        else:
            dx = _row(dsum_ptr, dsum_b, dsum_l, b, l, o_c, m_c)
        if GATE:
            dgate += dx * _row(y_ptr, y_b, y_l, b, l, o_c, m_c)
        if dy_ptr is not None:
            dy = dx
            if gate_ptr is not None:
                dy = dx * _row(gate_ptr, gate_b, 0, b, 0, o_c, m_c)
            tl.store(dy_ptr + p_out, dy.to(dy_ptr.dtype.element_ty), mask=m_c)
    # Partial sums [B, runs, d scale | d shift | d gate as wanted, C].
    slot = (b * tl.num_programs(0) + tl.program_id(0)) * (2 * PARAMETERS + GATE)
    if PARAMETERS:
        tl.store(part_ptr + slot * C + o_c, dscale, mask=m_c)
        tl.store(part_ptr + (slot + 1) * C + o_c, dshift, mask=m_c)
    if GATE:
        tl.store(part_ptr + (slot + 2 * PARAMETERS) * C + o_c, dgate, mask=m_c)


def _strides(a: Tensor | None) -> tuple[int, int]:
    """Strides of samples and tokens; a vector [C] is the same for every sample."""
    if a is None or a.dim() == 1:
        return 0, 0
    return a.stride(0), a.stride(1) if a.dim() == 3 else 0


def _split(stats: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if stats is None else (stats[0], stats[1])


def run_grid(
    kernel: str, kind: tuning.Key, batch: int, length: int, block: int, warps: int
) -> tuple[tuple[int, int], int, int]:
    """((runs, samples), tokens of a run, warps) of kernels whose programs walk over runs of tokens.

    kind is what else a tuned choice depends on, warps the default.
    """
    default = warps, RUNS_WIDE if block > 4096 else RUNS
    key = block, *kind, tuning.bucket(batch * length)
    warps, runs = tuning.choice(kernel, key, default)
    rows = triton.cdiv(length, max(1, runs // batch))
    return (triton.cdiv(length, rows), batch), rows, warps


def _plan(
    kernel: str, kind: tuning.Key, like: Tensor, max_warps: int, lanes: int = 256
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """(grid, tokens of a run, constants and launch options) for rows of `like` [B, L, C].

    lanes: values of a row for a warp, 32 times the 16 bytes of a thread at least.
    """
    batch, length, width = like.shape
    block = triton.next_power_of_2(width)
    default = min(max_warps, max(1, block // lanes))
    grid, rows, warps = run_grid(kernel, kind, batch, length, block, default)
    options = {"C": width, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    return grid, rows, options


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    base: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(x', n, row scales, statistics). None: x' without y, n without scale, row scales [B, L]
    unless out_dtype is e4m3, the statistics [2, B, L] (mean, rstd) unless there is a norm to
    differentiate. x, y [B, L, C]; gate [B, C]; scale, shift [B, C] or [C]."""
    x, y, gate, scale, shift = (unit_last(a) for a in (x, y, gate, scale, shift))
    batch, length, width = x.shape
    total = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    n = None if scale is None else x.new_empty(x.shape, dtype=out_dtype)
    fp8 = n is not None and n.dtype == E4M3
    quant = x.new_empty(batch, length, dtype=torch.float32) if fp8 else None
    stats = x.new_empty(2, batch, length, dtype=torch.float32) if n is not None and not fp8 else None
    if x.numel():
        parts = "y" * (y is not None) + "n" * (n is not None) + "8" * fp8
        kind = 8 * x.element_size(), parts
        grid, rows, options = _plan("add_norm forward", kind, x, WARPS_FORWARD, 512 if fp8 else 256)
        _forward[grid](
            x, y, gate, scale, shift, total, n, quant, *_split(stats),
            *_strides(x), *_strides(y), *(_strides(a)[0] for a in (gate, scale, shift)),
            length, rows, eps, base, **options,
        )  # fmt: skip
    return total, n, quant, stats


def backward(
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
    """(dx, dy, d gate, d scale, d shift) of `forward`, each None where it is not wanted.

    x is x' where there was an addition. dy is made for y_dtype, d gate [B, C] where y and gate are
    given, d scale and d shift where `parameters`. Without dn, dx is dsum itself and None here.
    """
    like = dsum if dn is None else dn
    batch, length, width = like.shape
    dn, dsum, x, y, gate, scale = (unit_last(a) for a in (dn, dsum, x, y, gate, scale))
    wants_gate = y is not None and gate is not None
    dx = None if dn is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    dy = None if y_dtype is None else like.new_empty(like.shape, dtype=y_dtype)
    slots = 2 * parameters + wants_gate
    sums = like.new_zeros(batch, slots, width, dtype=torch.float32)
    if like.numel():
        parts = "n" * (dn is not None) + "p" * parameters + "y" * (dy is not None) + "g" * wants_gate
        kind = 8 * (like if x is None else x).element_size(), parts
        grid, rows, options = _plan("add_norm backward", kind, like, WARPS_BACKWARD)
        part = like.new_empty(batch, grid[0], slots, width, dtype=torch.float32)
        _backward[grid](
            dn, dsum, x, y, gate, scale, *_split(stats), dx, dy, part,
            *_strides(dn), *_strides(dsum), *_strides(x), *_strides(y),
            _strides(gate)[0], _strides(scale)[0], length, rows, base,
            PARAMETERS=parameters, GATE=wants_gate, **options,
        )  # fmt: skip
        sums = part.sum(1)
    dscale = dshift = dgate = None
    if parameters:
        # A weight [C] is shared by the batch.
        dscale, dshift = (s.contiguous() if scale.dim() == 2 else s.sum(0) for s in sums[:, :2].unbind(1))
    if wants_gate:
        dgate = sums[:, -1].contiguous()
    return dx, dy, dgate, dscale, dshift


IMPLEMENTATIONS = {
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu_kernels.add_norm_forward, cpu_kernels.add_norm_backward),
    TRITON: (forward, backward),
    CUDA: (cuda_kernels.add_norm_forward, cuda_kernels.add_norm_backward),
}
for _op in ("modulate", "layer_norm", "gated_add", "gated_add_modulate", "gated_add_norm"):
    dispatch.register(_op, dispatch.common(IMPLEMENTATIONS))


def pair(op: str, x: Tensor, fp8: bool = False):
    """(forward, backward) of what runs as operation `op` for x, to e4m3 if fp8."""
    return IMPLEMENTATIONS[implementation(op, x, fp8)]
