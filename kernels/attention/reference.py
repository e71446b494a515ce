"""Softmax attention in plain torch, by the formulas of `triton_kernels`, with all scores in memory."""

import math

import torch
from torch import Tensor

from prfl_kernels.dispatch import REFERENCE, Implementation, requires
from prfl_kernels.jit import wide

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _scores(q: Tensor, k: Tensor, scale: float, repeats: int) -> Tensor:
    """scale q k^T in float32 at least, of [B, H, L, D], and log(repeats) more for the last key."""
    s = (q @ k.mT).to(wide(q.dtype)) * scale
    if repeats > 1:
        s[..., -1] += math.log(repeats)
    return s


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """(out, lse) of the contract in `op`, for any float dtype; lse is float64 for float64."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    s = _scores(q, k, scale, repeats)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp().to(q.dtype)
    return (p @ v).transpose(1, 2), lse


def backward(dout, dlse, q, k, v, out, lse, scale, wants_q=True, wants_kv=True, repeats=1):
    """(dq, dk, dv) of the contract in `op`. delta is summed over keys, which needs no `out` and makes the
    rows of ds sum to zero, rounding of `out` or not."""
    dout, q, k, v = (a.transpose(1, 2) for a in (dout, q, k, v))
    p = (_scores(q, k, scale, repeats) - lse[..., None]).exp()
    dp = (dout @ v.mT).to(p.dtype)
    delta = (p * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = (p * (dp - delta[..., None]) * scale).to(q.dtype)
    dq = (ds @ k).transpose(1, 2) if wants_q else None
    dk = (ds.mT @ q).transpose(1, 2) if wants_kv else None
    dv = (p.to(q.dtype).mT @ dout).transpose(1, 2) if wants_kv else None
    return dq, dk, dv


IMPLEMENTATION = Implementation(REFERENCE, "plain torch", requires(dtypes=DTYPES), forward, backward)
