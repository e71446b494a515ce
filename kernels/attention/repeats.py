"""The repeated last key, for implementations of attention that know nothing of it.

They get the key and its value `repeats` times, and what comes back for them is summed up: the result of a
score that is log(repeats) higher, at the price of the longer keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_kernels.extension import device_type
from prfl_kernels.jit import wide


def laid_out(a: Tensor, repeats: int) -> Tensor:
    """a [B, L, H, D] with its last token `repeats` times."""
    return a if repeats == 1 else torch.cat([a, a[:, -1:].expand(-1, repeats - 1, -1, -1)], dim=1)


def gathered(d: Tensor, repeats: int) -> Tensor:
    """The gradient of a from that of laid_out(a, repeats)."""
    if repeats == 1:
        return d
    single, last = d.split([d.shape[1] - repeats, repeats], dim=1)
    return torch.cat([single, last.sum(1, keepdim=True, dtype=wide(d.dtype)).to(d.dtype)], dim=1)


def forward_with_repeats(forward: Callable, native: str = "") -> Callable:
    """forward(q, k, v, scale) as a forward of the contract in `op`; on the device type `native` it takes
    repeats itself."""

    def run(q, k, v, scale, repeats=1):
        if device_type(q) == native:
            return forward(q, k, v, scale, repeats)
        return forward(q, laid_out(k, repeats), laid_out(v, repeats), scale)

    return run


def backward_with_repeats(backward: Callable, native: str = "") -> Callable:
    """The same for backward(dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv)."""

    def run(dout, dlse, q, k, v, out, lse, scale, wants_q=True, wants_kv=True, repeats=1):
        ends = out, lse, scale, wants_q, wants_kv
        if device_type(q) == native:
            return backward(dout, dlse, q, k, v, *ends, repeats)
        dq, dk, dv = backward(dout, dlse, q, laid_out(k, repeats), laid_out(v, repeats), *ends)
        return (dq, gathered(dk, repeats), gathered(dv, repeats)) if wants_kv else (dq, None, None)

    return run
