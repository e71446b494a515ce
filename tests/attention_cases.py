"""Inputs of attention, what it is by definition, and the implementations that run here."""

import pytest
import torch
from fused import laid_out, normal

from prfl_kernels import dispatch
from prfl_kernels.attention import op as op  # registers the implementations

BF16 = torch.bfloat16
CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or dispatch.absence("attention", "cpu", "cpu") is not None,
        reason="the C++ kernels are not built, or a GPU is tested",
    ),
)


def qkv(batch=2, queries=37, keys=61, heads=2, dim=64, dtype=torch.float32):
    return [normal(batch, n, heads, dim, dtype=dtype) for n in (queries, keys, keys)]


def formula(q, k, v):
    """(out, lse) as the definition says, differentiated by autograd."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    return (s.softmax(-1) @ v).transpose(1, 2), s.logsumexp(-1)


def literal(repeats, run=formula):
    """`run` with the last key and value laid out that often."""
    return lambda q, k, v: run(q, laid_out(k, repeats), laid_out(v, repeats))
