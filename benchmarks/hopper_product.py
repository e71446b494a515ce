"""How Hopper's fp8 tensor cores add, emulated: what attention and linear layers on e4m3 are judged by."""

import torch
from torch import Tensor

# Of one tensor-core instruction (QGMMA) on sm_90: products it adds, significant bits of the sum.
PRODUCTS, BITS = 32, 14


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent.clamp(-126, 127) + 127 << 23).view(torch.float32)


def _truncated(x: Tensor, exponent: Tensor) -> Tensor:
    """x [...] cut, toward zero, to multiples of 2^(exponent - BITS); x is below 2^exponent."""
    return (x * _power_of_two(BITS - exponent)).trunc_() * _power_of_two(exponent - BITS)


def hopper_product(a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    """acc + a @ b as Hopper's fp8 tensor cores add, emulated; float32 [..., M, N].

    a [..., M, K] and b [..., K, N] hold e4m3 values as float32, acc is the accumulator before. An
    emulation after published measurements, not the hardware: an instruction takes 32 exact products
    and the accumulator, aligns them to the largest exponent among them, cuts each to 14 bits below
    it, adds those exactly, and keeps 14 bits of the sum (DeepSeek-V3, section 3.3.2;
    SageAttention2, section 3.2: 1 + 8 + 13 bits). All of this is exact in float32.
    """
    if acc is None:
        acc = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for k in range(0, a.shape[-1], PRODUCTS):
        terms = a[..., k : k + PRODUCTS, None] * b[..., None, k : k + PRODUCTS, :]  # [..., M, 32, N]
        largest = torch.maximum(terms.abs().amax(-2), acc.abs())
        exponent = torch.frexp(largest).exponent
        total = _truncated(terms, exponent[..., None, :]).sum(-2) + _truncated(acc, exponent)
        acc = _truncated(total, torch.frexp(total).exponent)
    return acc
