"""A linear layer as one operation: it computes in the dtype of its input whatever autocast says, in forward
and backward, and saves for the backward the weight as it is, not a copy in the dtype of the product.

    y = x W^T + b + scale x A^T B^T        x [..., K]; W [N, K], b [N]; A [r, K], B [N, r] or neither

W may also be [G, N, K] for x [G, M, K], a product for every group, then without b, A and B.
"""

import torch
from torch import Tensor

from prfl_kernels.checks import expect, expect_float, expect_matrix, expect_rank
from prfl_kernels.declare import operation
from prfl_kernels.sublayers import products
from prfl_kernels.sublayers.products import LowRank, Product, low_rank


def _check(x, weight, bias, down, up):
    expect_float("linear", "x", x.dtype)
    if x.dim() < 1 or weight.dim() not in (2, 3):
        got = f"x {list(x.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"linear: got {got}, want [..., K] and [N, K], or [G, M, K] and [G, N, K]")
    n, k = weight.shape[-2:]
    if weight.dim() == 3:
        shape = expect_rank("linear", "x", x, "G, M, K")
        expect_matrix("linear", "weight", weight, (shape[0], n, shape[2]), x)
        if any(a is not None for a in (bias, down, up)):
            raise ValueError("linear: got a weight for every group with bias or update, want it alone")
        return
    expect_matrix("linear", "weight", weight, (n, x.shape[-1]), x)
    if min(n, k) < 1:
        raise ValueError(f"linear: got weight {list(weight.shape)}, want no size of 0")
    if bias is not None:
        expect("linear", "bias", bias, (n,), x)
    if (down is None) != (up is None):
        raise ValueError("linear: got one of A and B of an update, want both or neither")
    if down is not None:
        rank = expect_rank("linear", "A", down, "r, K")[0]
        expect("linear", "A", down, (rank, k), x)
        expect("linear", "B", up, (n, rank), x)


def _setup_context(ctx, inputs, output):
    x, *weights, ctx.scale = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *weights)


def _gradient(ctx, d):
    needs = ctx.needs_input_grad
    wants = needs[0], any(needs[1:3]), any(needs[3:5])
    made = torch.ops.prfl.linear_backward(d, *ctx.saved_tensors, ctx.scale, *wants)
    return *(a if need else None for a, need in zip(made, needs[:5], strict=True)), None


@operation("linear", _gradient, _setup_context)
def _linear(
    fake: bool, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, down, up)
    if fake:
        return x.new_empty((*x.shape[:-1], weight.shape[-2]))
    if weight.dim() == 3:
        return x @ weight.to(x.dtype).mT
    return products.linear(x, weight, bias, low_rank(down, up, scale))


@operation("linear_backward")
def _linear_backward(
    fake: bool, d: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, down: Tensor | None,
    up: Tensor | None, scale: float, wants_x: bool, wants: bool, wants_low: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x is None and (wants or wants_low):
        raise ValueError("linear_backward: got no x, want it for the gradients of what is trained")
    if d.dim() < 1 or weight.dim() not in (2, 3):
        got = f"d {list(d.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"linear_backward: got {got}, want [..., N] and [N, K], or [G, M, N] and [G, N, K]")
    shape = *d.shape[:-1], weight.shape[-1]
    like = d.new_empty(1).expand(shape) if x is None else x
    _check(like, weight, bias, down, up)
    expect("linear_backward", "d", d, (*like.shape[:-1], weight.shape[-2]), like, like.dtype)
    places = {"weight": weight, "weight_bias": bias, "weight_down": down, "weight_up": up}
    if fake:
        asked = wants, wants, wants_low, wants_low
        wanted = (a if w else None for a, w in zip(places.values(), asked, strict=True))
        made = (d.new_empty(0) if a is None else a.new_empty(a.shape) for a in wanted)
        return d.new_empty(shape if wants_x else 0), *made
    low = low_rank(down, up, scale)
    layer = Product(low, wants, wants_low and low is not None)
    dx = layer.backward(d, x, weight, bias=bias is not None, wants_x=wants_x)
    made = layer.gradients("weight")
    rest = (made[k].to(a.dtype) if k in made else d.new_empty(0) for k, a in places.items())
    return d.new_empty(0) if dx is None else dx.view(shape), *rest


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, low: LowRank | None = None) -> Tensor:
    """y [..., N] in x.dtype, differentiable in all tensors.

    x [..., K], weight [N, K] or [G, N, K] for x [G, M, K], bias [N]; weight, bias and `low` of any float
    dtype. Raises ValueError for shapes that do not fit.
    """
    down, up, scale = (None, None, 1.0) if low is None else low
    return torch.ops.prfl.linear(x, weight, bias, down, up, scale)
