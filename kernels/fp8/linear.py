"""A linear layer on e4m3 values with one scale a row of x and one a row of the weight.

    out[m, n] = x_scale[m] * w_scale[n] * sum_k x8[m, k] * w8[n, k] + bias[n]

x8 [..., K] and w8 [N, K] are e4m3, the scales float32, bias [N] of any float dtype. The sum, the
scales and the bias are float32; the result is rounded once, to bfloat16 (bias rounded to it first,
as the GPU kernel takes it) or float32. Weights are quantised once and used for a whole rollout.
There is no backward.

On CUDA the product is torch._scaled_mm with row-wise scales: cuBLASLt on Hopper with CUDA 12.9 or
newer, else torch's CUTLASS kernels, which have no float32 results. It wants K and N to be multiples
of 16, x by rows and the weight transposed; rows are free, so they are never padded. use_fast_accum
stays off: Hopper's fp8 tensor cores add with 14 bits (benchmarks/hopper_product.py), and off means
that partial sums are moved to float32 registers on the way. Elsewhere the same formula runs in
float32, where every product of two e4m3 values is exact.
Source: torch's aten/src/ATen/native/cuda/ScaledBlas.cpp and RowwiseScaledMM.cu; DeepSeek-V3
technical report, section 3.3.2.
"""

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import expect, expect_rank
from prfl_kernels.declare import operation
from prfl_kernels.dispatch import REFERENCE, SCALED_MM, record
from prfl_kernels.fp8.e4m3 import E4M3, forbid_gradient, never, quantize_rows

MULTIPLE = 16  # of K and N, in _scaled_mm


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], float32 scales [N]) of a weight [N, K]: one scale an output channel."""
    return quantize_rows(w)


def _reference(x8, x_scale, w8, w_scale, bias, out_dtype):
    out = (x8.float() @ w8.float().T) * x_scale[:, None] * w_scale
    if bias is not None:
        out += bias.to(out_dtype).float()
    return out.to(out_dtype)


def _scaled_mm(x8, x_scale, w8, w_scale, bias, out_dtype):
    # With float32 out it takes no bias.
    inside = None if bias is None or out_dtype == torch.float32 else bias.to(out_dtype)
    scales = x_scale[:, None].contiguous(), w_scale[None].contiguous()
    out = torch._scaled_mm(
        x8.contiguous(), w8.contiguous().T, *scales, bias=inside, out_dtype=out_dtype, use_fast_accum=False
    )
    return out if bias is None or inside is not None else out + bias


dispatch.register("fp8_linear", dispatch.common({REFERENCE: _reference, SCALED_MM: _scaled_mm}, e4m3=True))


@operation("fp8_linear", never, forbid_gradient("fp8_linear"))
def _fp8_linear(
    fake: bool, x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    op = "fp8_linear"
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: got out_dtype {out_dtype}, want torch.bfloat16 or torch.float32")
    n, k = expect_rank(op, "w8", w8, "N, K")
    if n % MULTIPLE or k % MULTIPLE or n < 1:
        raise ValueError(f"{op}: got a weight [{n}, {k}], want multiples of {MULTIPLE}")
    if x8.dim() < 1:
        raise ValueError(f"{op}: got x8 {list(x8.shape)}, want [..., {k}]")
    shape = x8.shape[:-1]
    expect(op, "x8", x8, (*shape, k), x8, E4M3)
    expect(op, "x_scale", x_scale, shape, x8, torch.float32)
    expect(op, "w8", w8, (n, k), x8, E4M3)
    expect(op, "w_scale", w_scale, (n,), x8, torch.float32)
    if bias is not None:
        expect(op, "bias", bias, (n,), x8)
    if fake:
        return x8.new_empty(*shape, n, dtype=out_dtype)
    rows = x8.reshape(-1, k), x_scale.reshape(-1)
    return record(op, x8, dtype=out_dtype).forward(*rows, w8, w_scale, bias, out_dtype).view(*shape, n)


def fp8_linear(
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """x w^T + bias [..., N] from x8 [..., K] e4m3 with scales [...], w8 [N, K] with scales [N].

    K and N are multiples of 16, bias [N] or None, out_dtype bfloat16 or float32. Without gradient:
    an input that requires grad raises ValueError.
    """
    return torch.ops.prfl.fp8_linear(x8, x_scale, w8, w_scale, bias, out_dtype)
