"""What operations on e4m3 share: rows rounded with one scale each, in torch and Triton, their values, and no
gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_kernels.jit import jit, tl, triton

E4M3 = torch.float8_e4m3fn
_MAX = tl.constexpr(448.0) if triton else 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, scales [...]) of x [..., C]: one scale a row, its largest value becomes 448."""
    amax = x.float().abs().amax(-1)
    scale = torch.where(amax > 0, amax / torch.finfo(E4M3).max, 1.0)
    return (x.float() / scale[..., None]).to(E4M3), scale


def dequantize_rows(x8: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fill out [..., C], bfloat16 or wider, with x8 [..., C] times scale [...], rounded once: every e4m3
    value is one of that dtype, and the product is in float32 at least."""
    out.copy_(x8)
    out.mul_(scale[..., None])


@jit
def row_scales(x, axis: tl.constexpr):
    """The scales of `quantize_rows` for float32 values, whose rows lie along `axis`."""
    amax = tl.max(tl.abs(x), axis)
    return tl.where(amax > 0.0, amax / _MAX, 1.0)


def forbid_gradient(name: str) -> Callable:
    """A setup_context for `register` that refuses inputs that require grad."""

    def setup_context(ctx, inputs, output):
        raise ValueError(f"{name}: got an input that requires grad, want torch.no_grad(): no backward")

    return setup_context


def never(ctx, *gradients):
    """The backward of operations whose setup_context refuses before it."""
    raise AssertionError("unreachable")
