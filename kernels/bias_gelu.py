"""The bias and the GELU between the two products of an FFN, and their gradients in one pass.

    z = h + bias,   g = gelu_tanh(z) = z sigmoid(2 k (z + 0.044715 z^3)),   k = sqrt(2 / pi)
    dh = dg * gelu_tanh'(z),   d bias = sum over tokens of dh

h [B, L, F] is the first product without its bias [F] (or None). Everything is computed in float32 and
rounded once. Only h is saved; the backward recomputes g, since the weight gradient of the second product
needs it: 2 L F bytes less to save, and one pass over memory for dh and g. Sums over tokens
stay in registers over a run and are added by torch in a fixed order. Source: Hendrycks and Gimpel, "Gaussian
Error Linear Units"; the tanh form is sigmoid(2 x) written out.
"""

import math

import torch
from torch import Tensor

from prfl_kernels import dispatch, extension, tuning
from prfl_kernels.checks import expect, expect_rows
from prfl_kernels.declare import allocator, gradients_like, operation
from prfl_kernels.dispatch import CPU, REFERENCE, TRITON, record
from prfl_kernels.extension import empty, runs, supported
from prfl_kernels.jit import jit, launch, tl, triton, unit_last, wide

CUBIC, TWO_K = 0.044715, 2 * math.sqrt(2 / math.pi)
# Tokens and columns of a tile, warps, and runs of tokens: twice 16 bytes of bfloat16 a thread, many waves on
# 132 SMs, partial sums under 1 % of the traffic.
TILE = (8, 512, 8, 96)
# What `prfl tune` tries in addition to it, by the bits of a value.
CANDIDATES = {
    "bias_gelu forward": {(16,): ((4, 512, 4, 192), (16, 512, 8, 96), (8, 1024, 8, 96))},
    "bias_gelu backward": {(16,): ((4, 512, 4, 192), (4, 1024, 8, 96), (8, 512, 8, 192))},
}


def reference_forward(h, bias, g):
    """Fill g in plain torch, in float32 or wider."""
    z = h.to(wide(h.dtype)) if bias is None else h.to(wide(h.dtype)) + bias
    g.copy_(torch.nn.functional.gelu(z, approximate="tanh"))


def reference_backward(dg, h, bias, dh, g, dbias):
    """Fill dh, g and dbias in plain torch, in float32 or wider."""
    z = h.to(wide(h.dtype)) if bias is None else h.to(wide(h.dtype)) + bias
    square = z * z
    t = TWO_K * z * (1 + CUBIC * square)
    s = torch.sigmoid(t)
    g_wide = z * s
    d = dg.to(z.dtype) * (s + g_wide * torch.sigmoid(-t) * TWO_K * (1 + 3 * CUBIC * square))
    dh.copy_(d)
    g.copy_(g_wide)
    if dbias is not None:
        dbias.copy_(d.sum((0, 1)))


def cpu_forward(h, bias, g):
    """Fill g by the compiled CPU kernel. ValueError for dtypes but float32 and bfloat16."""
    supported("bias_gelu", h, bias)
    h, bias = unit_last(h), unit_last(bias)
    batch, length, width = h.shape
    extension.launch("bias_gelu_forward", h=h, bias=bias, g=g, batch=batch, length=length, width=width)


def cpu_backward(dg, h, bias, dh, g, dbias):
    """Fill dh, g and dbias by the compiled CPU kernel. ValueError for dtypes but float32 and bfloat16."""
    supported("bias_gelu", h, bias)
    dg, h, bias = unit_last(dg.to(h.dtype)), unit_last(h), unit_last(bias)
    (batch, length, width), count = h.shape, runs(h.shape[1])
    part = None if dbias is None else empty(dbias, batch, count, width)
    extension.launch(
        "bias_gelu_backward", dg=dg, h=h, bias=bias, dh=dh, g=g, part=part, dbias=dbias, batch=batch,
        length=length, width=width, runs=count,
    )  # fmt: skip


@jit
def _gelu(z, CUBIC: tl.constexpr, TWO_K: tl.constexpr):
    """(gelu_tanh(z), its derivative)."""
    square = z * z
    t = TWO_K * z * (1.0 + CUBIC * square)
    # sigmoid(t) and sigmoid(-t) from exp(-|t|): no overflow, and no 1 - s that cancels.
    e = tl.exp(-tl.abs(t))
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    s, rest = tl.where(t >= 0.0, near, far), tl.where(t >= 0.0, far, near)
    g = z * s
    return g, s + g * rest * TWO_K * (1.0 + 3.0 * CUBIC * square)


@jit
def _forward(
    h_ptr, bias_ptr, g_ptr, rows, run,
    F: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CUBIC: tl.constexpr, TWO_K: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    first = tl.program_id(1).to(tl.int64) * run
    last = tl.minimum(first + run, rows)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_n, mask=o_n < F, other=0.0).to(tl.float32)
    for i in range(0, tl.cdiv(last - first, M)):
        o_m = first + i * M + tl.arange(0, M)
        o = o_m[:, None] * F + o_n[None, :]
        mask = (o_m < last)[:, None] & (o_n < F)[None, :]
        z = tl.load(h_ptr + o, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += bias[None, :]
        g, _ = _gelu(z, CUBIC, TWO_K)
        tl.store(g_ptr + o, g.to(g_ptr.dtype.element_ty), mask=mask)


@jit
def _backward(
    dg_ptr, h_ptr, bias_ptr, dh_ptr, g_ptr, part_ptr, rows, run,
    F: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CUBIC: tl.constexpr, TWO_K: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    first = tl.program_id(1).to(tl.int64) * run
    last = tl.minimum(first + run, rows)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_n, mask=o_n < F, other=0.0).to(tl.float32)
    dbias = tl.zeros([N], tl.float32)
    for i in range(0, tl.cdiv(last - first, M)):
        o_m = first + i * M + tl.arange(0, M)
        o = o_m[:, None] * F + o_n[None, :]
        mask = (o_m < last)[:, None] & (o_n < F)[None, :]
        z = tl.load(h_ptr + o, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += bias[None, :]
        g, slope = _gelu(z, CUBIC, TWO_K)
        dh = tl.load(dg_ptr + o, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(g_ptr + o, g.to(g_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + o, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        dbias += tl.sum(dh, 0)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(1) * F + o_n, dbias, mask=o_n < F)


def _plan(kernel: str, h: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """(grid, rows, tokens of a run and constants, launch options)."""
    rows, width = h.shape[0] * h.shape[1], h.shape[2]
    key = 8 * h.element_size(), width, tuning.bucket(rows)
    tokens, columns, warps, runs = tuning.choice(kernel, key, TILE, h.device)
    run = triton.cdiv(triton.cdiv(rows, runs), tokens) * tokens
    grid = triton.cdiv(width, columns), triton.cdiv(rows, run)
    constants = rows, run, width, tokens, columns, CUBIC, TWO_K
    return grid, constants, {"num_warps": warps, "enable_fp_fusion": True}


def triton_forward(h, bias, g):
    """Fill g by the Triton kernel."""
    h, bias = h.contiguous(), None if bias is None else bias.contiguous()
    grid, constants, options = _plan("bias_gelu forward", h)
    launch(_forward, grid, h, bias, g, *constants, **options)


def triton_backward(dg, h, bias, dh, g, dbias):
    """Fill dh, g and dbias by the Triton kernel."""
    dg, h, bias = dg.contiguous(), h.contiguous(), None if bias is None else bias.contiguous()
    grid, constants, options = _plan("bias_gelu backward", h)
    part = None if dbias is None else dbias.new_empty(grid[1], len(dbias))
    launch(_backward, grid, dg, h, bias, dh, g, part, *constants, **options)
    if dbias is not None:
        torch.sum(part, 0, out=dbias)


dispatch.register("bias_gelu", dispatch.common({
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu_forward, cpu_backward),
    TRITON: (triton_forward, triton_backward),
}))  # fmt: skip


def forward(fill, h, bias):
    """g [B, L, F] in h.dtype, which fill(h, bias, g) computes unless it is None."""
    g = allocator(fill)(h, *h.shape)
    if fill is not None and h.numel():
        fill(h, bias, g)
    return g


def backward(fill, dg, h, bias, wants_bias):
    """(dh, g [B, L, F] in h.dtype, d bias [F] in float32 or wider), which fill(dg, h, bias, dh, g, d bias)
    computes unless it is None; d bias is None if not wanted."""
    new, shape = allocator(fill), h.shape
    dh, g = new(h, *shape), new(h, *shape)
    dbias = h.new_zeros(shape[2], dtype=wide(h.dtype)) if wants_bias else None
    if fill is not None and h.numel():
        fill(dg, h, bias, dh, g, dbias)
    return dh, g, dbias


def _check(op, h, bias):
    shape = expect_rows(op, "h", h)
    if bias is not None:
        expect(op, "bias", bias, shape[2:], h)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dg):
    wants = ctx.needs_input_grad[1]
    dh, _, dbias = torch.ops.prfl.bias_gelu_backward(dg, *ctx.saved_tensors, wants)
    return dh, dbias if wants else None


@operation("bias_gelu", _gradient, _setup_context)
def _bias_gelu(fake: bool, h: Tensor, bias: Tensor | None) -> Tensor:
    _check("bias_gelu", h, bias)
    return forward(None if fake else record("bias_gelu", h).forward, h, bias)


@operation("bias_gelu_backward")
def _bias_gelu_backward(
    fake: bool, dg: Tensor, h: Tensor, bias: Tensor | None, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bias_gelu_backward"
    _check(op, h, bias)
    expect(op, "dg", dg, h.shape, h)
    if wants_bias and bias is None:
        raise ValueError(f"{op}: got wants_bias without a bias, want a bias")
    dh, g, dbias = backward(None if fake else record("bias_gelu", h).backward, dg, h, bias, wants_bias)
    return dh, g, *gradients_like(h if bias is None else bias, dbias)


def bias_gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu_tanh(h + bias) in h.dtype.

    h [B, L, F], F > 0, bias [F] or None, of any float dtypes. ValueError for shapes, dtypes or devices that
    do not fit.
    """
    return torch.ops.prfl.bias_gelu(h, bias)
