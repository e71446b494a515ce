"""The fused addition and LayerNorm in Triton.

One pass over memory each way. The two-dimensional grid has one program for every run of `rows`
tokens of a sample; gate, scale and shift stay in its registers. No run crosses the boundary between the
tokens that take one vector and those that take another. Sums over tokens (d scale, d shift, d gate) stay in
registers over the run and are written once; torch adds the runs in a fixed order, so results are the same
from run to run, without atomics. Everything is computed in float32.
"""

from torch import Tensor

from prfl_kernels import rows, tuning
from prfl_kernels.fp8.e4m3 import row_scales
from prfl_kernels.jit import jit, launch, tl, triton
from prfl_kernels.norm.launch import Backward, Forward, runs

CANDIDATES = rows.candidates("add_norm")


@jit
def _span(run, rows, before, boundary, L):
    """(side of the boundary, first token, end) of a run."""
    side = (run >= before).to(tl.int64)
    first = run * rows + side * (boundary - before * rows)
    return side, first, tl.minimum(first + rows, tl.where(run >= before, L, boundary))


@jit
def _row(pointer, stride_b, stride_l, b, l, o_c, m_c):
    return tl.load(pointer + b * stride_b + l * stride_l + o_c, mask=m_c, other=0.0).to(tl.float32)


@jit
def _forward(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, n_ptr, quant_ptr, mean_ptr, rstd_ptr,
    x_b, x_l, y_b, y_l, gate_b, gate_s, scale_b, scale_s, shift_b, shift_s,
    L, rows, before, boundary, eps, base,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    side, first, end = _span(tl.program_id(0).to(tl.int64), rows, before, boundary, L)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    if gate_ptr is not None:
        gate = _row(gate_ptr, gate_b, gate_s, b, side, o_c, m_c)
    if n_ptr is not None:
        scale = _row(scale_ptr, scale_b, scale_s, b, side, o_c, m_c) + base
        shift = _row(shift_ptr, shift_b, shift_s, b, side, o_c, m_c)
    for i in range(0, end - first):
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
    dn_b, dn_l, dsum_b, dsum_l, x_b, x_l, y_b, y_l, gate_b, gate_s, scale_b, scale_s,
    L, rows, before, boundary, base,
    C: tl.constexpr, BLOCK: tl.constexpr, PARAMETERS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    side, first, end = _span(tl.program_id(0).to(tl.int64), rows, before, boundary, L)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    for i in range(0, end - first):
        l = first + i
        p_out = (b * L + l) * C + o_c
        if dn_ptr is not None:
            # n = x_hat (base + scale) + shift;  g = dn (base + scale);
            # dx' = rstd (g - mean(g) - x_hat mean(g x_hat));  d scale = sum dn x_hat
            dn = _row(dn_ptr, dn_b, dn_l, b, l, o_c, m_c)
            x = _row(x_ptr, x_b, x_l, b, l, o_c, m_c)
            # Scale and gate come from the cache every time: held, they would spill at C = 5120.
            scale = _row(scale_ptr, scale_b, scale_s, b, side, o_c, m_c) + base
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
                dy = dx * _row(gate_ptr, gate_b, gate_s, b, side, o_c, m_c)
            tl.store(dy_ptr + p_out, dy.to(dy_ptr.dtype.element_ty), mask=m_c)
    # Partial sums [B, runs, d scale | d shift | d gate as wanted, C].
    slot = (b * tl.num_programs(0) + tl.program_id(0)) * (2 * PARAMETERS + GATE)
    if PARAMETERS:
        tl.store(part_ptr + slot * C + o_c, dscale, mask=m_c)
        tl.store(part_ptr + (slot + 1) * C + o_c, dshift, mask=m_c)
    if GATE:
        tl.store(part_ptr + (slot + 2 * PARAMETERS) * C + o_c, dgate, mask=m_c)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of all dimensions but the last; 0 for those of rows that are not there."""
    return tuple(s for a in tensors for s in ((0, 0) if a is None else a.stride()[:-1]))


def _plan(
    way: rows.Way, kind: tuning.Key, like: Tensor, boundary: int, fp8: bool = False
) -> tuple[tuple[int, int], tuple[int, int, int, int], dict[str, int | bool]]:
    """(grid, tokens, of a run, runs and tokens before the boundary, constants and launch options) for rows of
    `like` [B, L, C]."""
    batch, length, width = like.shape
    block = triton.next_power_of_2(width)
    _, run, options = rows.plan("add_norm", way, kind, like, block, 512 if fp8 else 256)
    count, before = runs(length, boundary, run)
    return (count, batch), (length, run, before, boundary), {"C": width, "BLOCK": block, **options}


def forward(a: Forward) -> None:
    """Fill a launch."""
    fp8 = a.quant is not None
    parts = "y" * (a.y is not None) + "n" * (a.n is not None) + "8" * fp8
    kind = 8 * a.x.element_size(), parts
    grid, lengths, options = _plan("forward", kind, a.x, a.boundary, fp8)
    launch(
        _forward, grid,
        *a.tensors, *_strides(a.x, a.y, a.gate, a.scale, a.shift), *lengths, a.eps, a.base, **options,
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    parts = "n" * (a.dn is not None) + "p" * a.wants_parameters
    parts += "y" * (a.dy is not None) + "g" * a.wants_gate
    kind = 8 * (a.rows if a.x is None else a.x).element_size(), parts
    grid, lengths, options = _plan("backward", kind, a.rows, a.boundary)
    batch, _, width = a.rows.shape
    part = a.sums.new_empty(batch, grid[0], a.slots, width)
    launch(
        _backward, grid,
        *a.inputs, a.dx, a.dy, part, *_strides(a.dn, a.dsum, a.x, a.y, a.gate, a.scale), *lengths, a.base,
        PARAMETERS=a.wants_parameters, GATE=a.wants_gate, **options,
    )  # fmt: skip
    _, _, before, _ = lengths
    a.add(part, before)
