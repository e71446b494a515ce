"""Rows to e4m3 with one scale each, after a GELU if asked for: what stands between two fp8 products.

    z[m]     = x[m]  or  gelu_tanh(x[m])
    scale[m] = max |z[m]| / 448  (1 for a row of zeros),   out[m, k] = z[m, k] / scale[m]

A row is read once, kept in registers while its largest value is found, and written as one byte a value:
3 bytes a value for bfloat16 input, where a GELU and a quantisation of their own take 2 + 2 + 2 + 1 and a
second read for the maximum. Everything is computed in float32. There is no backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.bias_gelu import CUBIC, TWO_K, _gelu
from prfl_kernels.checks import checked, expect_float
from prfl_kernels.dispatch import REFERENCE, TRITON, implementation
from prfl_kernels.fp8.e4m3 import E4M3, forbid_gradient, never, quantize_rows, row_scales
from prfl_kernels.jit import jit, launch, register, tl, triton

# Values of a row for a warp: 32 a thread, two stores of 16 bytes. A row of 13,824 takes 16 warps.
LANES, WARPS = 1024, 16


def reference(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """`triton_forward` in plain torch."""
    return quantize_rows(F.gelu(x.float(), approximate="tanh") if gelu else x)


@jit
def _kernel(
    x_ptr, out_ptr, scale_ptr,
    C: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, CUBIC: tl.constexpr, TWO_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    z = tl.load(x_ptr + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    if GELU:
        z, _ = _gelu(z, CUBIC, TWO_K)
    scale = row_scales(z, 0)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * C + o_c, (z / scale).to(out_ptr.dtype.element_ty), mask=m_c)


def triton_forward(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., C], float32 scales [...]) of x [..., C]."""
    x = x.contiguous()
    out, scale = x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        block = triton.next_power_of_2(x.shape[-1])
        warps = min(WARPS, max(1, block // LANES))
        launch(
            _kernel, (scale.numel(),),
            x, out, scale, x.shape[-1], block, gelu, CUBIC, TWO_K, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, scale


IMPLEMENTATIONS = {REFERENCE: reference, TRITON: triton_forward}
dispatch.register("quantize_fp8", dispatch.common(IMPLEMENTATIONS, e4m3=True))


def _check(x, gelu):
    expect_float("quantize_fp8", "x", x.dtype)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"quantize_fp8: got x {list(x.shape)}, want [..., C] with C > 0")


def _forward(x, gelu):
    return IMPLEMENTATIONS[implementation("quantize_fp8", x)](x, gelu)


def _fake(x, gelu):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


register(
    "quantize_fp8(Tensor x, bool gelu) -> (Tensor, Tensor)",
    *checked(_check, _forward, _fake),
    never,
    forbid_gradient("quantize_fp8"),
)


def quantize_fp8(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., C], float32 scales [...]) of x [..., C], or of gelu_tanh(x): value times scale.

    x of any float dtype and strides, C > 0. Without gradient: an x that requires grad raises ValueError.
    """
    return torch.ops.prfl.quantize_fp8(x, gelu)
