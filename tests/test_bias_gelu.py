"""Bias and GELU in one pass: the formula, and the fused kernels against float64."""

import math

import pytest
import torch
from fused import assert_as_good_as_torch, needs_triton, normal, outputs_and_gradients, strided
from torch.library import opcheck

from prfl_kernels import bias_gelu as module
from prfl_kernels import dispatch
from prfl_kernels.bias_gelu import bias_gelu

fused = pytest.mark.usefixtures("triton")
F32, BF16 = torch.float32, torch.bfloat16


def formula(h, bias=None):
    z = h if bias is None else h + bias
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def inputs(batch, length, width, dtype=F32, bias=True):
    return [normal(batch, length, width, dtype=dtype), normal(width) if bias else None]


@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_the_formula_in_float64(bias):
    dispatch.configure("reference")
    held = [a if a is None else a.double() for a in inputs(2, 5, 7, bias=bias)]
    got, want = outputs_and_gradients(bias_gelu, held), outputs_and_gradients(formula, held)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dispatch.configure("")


@needs_triton
@fused
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 7), (3, 5, 1030)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_error_is_at_most_twice_that_of_torch(shape, dtype, bias):
    assert_as_good_as_torch(bias_gelu, inputs(*shape, dtype, bias))


@needs_triton
@fused
def test_far_from_zero():
    """Where the exponential overflows, and where the square of z does not fit float16's range."""
    h = torch.tensor([[[-1e4, -30.0, -0.0, 0.0, 30.0, 1e4]]])
    (g,), (dh,) = outputs_and_gradients(lambda h: bias_gelu(h), [h])
    assert g.tolist() == [[[0, 0, 0, 0, 30, 1e4]]]
    assert not dh.isnan().any()


@needs_triton
@fused
def test_runs_of_several_tiles(monkeypatch):
    """74 rows in runs of 32: four tiles of 8 each, the last run shorter."""
    monkeypatch.setattr(module, "TILE", (8, 512, 8, 3))
    assert_as_good_as_torch(bias_gelu, inputs(2, 37, 520))


@needs_triton
@fused
def test_strides_and_repeats():
    held = inputs(2, 11, 48)
    want = outputs_and_gradients(bias_gelu, held)
    for other in ([strided(a) for a in held], [held[0].mT.contiguous().mT, held[1]], held):
        torch.testing.assert_close(outputs_and_gradients(bias_gelu, other), want, rtol=0, atol=0)


@needs_triton
@fused
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_input(batch, length):
    (g,), (dh, dbias) = outputs_and_gradients(bias_gelu, inputs(batch, length, 24))
    assert g.shape == dh.shape == (batch, length, 24)
    assert dbias.shape == (24,) and not dbias.any()


@needs_triton
@fused
@pytest.mark.parametrize("bias", [True, False])
def test_registration_and_no_graph_break(bias):
    held = [a if a is None else a.requires_grad_() for a in inputs(2, 5, 16, bias=bias)]
    opcheck(torch.ops.prfl.bias_gelu.default, tuple(held))
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    got, want = outputs_and_gradients(compiled, held), outputs_and_gradients(bias_gelu, held)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
