"""Rows to e4m3, with and without GELU, and the norms behind a residual that make e4m3."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from e4m3 import CHECKS, assert_rounded
from fused import error, needs_triton, normal, strided
from torch.library import opcheck

from prfl_kernels import dispatch
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.norm.gated_add import (
    gated_add_modulate,
    gated_add_modulate_fp8,
    gated_add_norm,
    gated_add_norm_fp8,
)

fused = pytest.mark.usefixtures("triton")
F32, BF16 = torch.float32, torch.bfloat16
BOTH = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])


@pytest.fixture
def backend(request):
    dispatch.configure(f"quantize_fp8={request.param}")
    yield request.param
    dispatch.configure("")


@BOTH
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 7), (5, 1030), (64,)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("gelu", [False, True])
def test_rows(backend, shape, dtype, gelu):
    x = normal(*shape, dtype=dtype)
    if x.dim() > 1:
        x[..., 0, :], x[..., -1, 3] = 0.0, 300.0
    want = F.gelu(x.double(), approximate="tanh") if gelu else x
    assert_rounded(*quantize_fp8(x, gelu), want)


@needs_triton
@fused
@pytest.mark.parametrize("gelu", [False, True])
def test_the_kernel_is_the_reference(gelu):
    """Values on a boundary of e4m3 may fall to either side: by 2^-3 of some in a thousand."""
    x = normal(3, 50, 200, dtype=BF16)
    out, scale = quantize_fp8(x, gelu)
    dispatch.configure("reference")
    want, want_scale = quantize_fp8(x, gelu)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    assert error(out, want) < 5e-3 and (out.double() != want.double()).double().mean() < 5e-3


@BOTH
def test_strides_empty_input_and_repeats(backend):
    x = normal(2, 9, 48)
    want = quantize_fp8(x, True)
    for other in (strided(x), x.mT.contiguous().mT, x):
        for got, right in zip(quantize_fp8(other, True), want, strict=True):
            assert torch.equal(got.float(), right.float())
    out, scale = quantize_fp8(x[:, :0])
    assert out.shape == (2, 0, 48) and scale.shape == (2, 0)


def test_registration_and_no_gradient():
    x = normal(2, 5, 16)
    opcheck(torch.ops.prfl.quantize_fp8.default, (x, True), test_utils=CHECKS)
    compiled = torch.compile(quantize_fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, True)[0].float(), quantize_fp8(x, True)[0].float())
    with pytest.raises(ValueError, match="quantize_fp8: got an input that requires grad"):
        quantize_fp8(x.requires_grad_())


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "op, plain, rows",
    [(gated_add_modulate_fp8, gated_add_modulate, 2), (gated_add_norm_fp8, gated_add_norm, 1)],
)
def test_norms_behind_a_residual(backend, gated, op, plain, rows):
    x, y = normal(2, 7, 96), normal(2, 7, 96, dtype=BF16)
    gate = normal(2, 96) if gated else None
    vectors = [normal(2, 96) if rows == 2 else normal(96) for _ in range(2)]
    dispatch.configure(backend)
    try:
        total, n, scale = op(x, y, gate, *vectors)
        want_total, want = plain(x, y, gate, *vectors, out_dtype=F32)
        opcheck(
            torch.ops.prfl.gated_add_norm_fp8.default, (x, y, gate, *vectors, float(rows - 1), 1e-6),
            test_utils=CHECKS,
        )  # fmt: skip
    finally:
        dispatch.configure("")
    torch.testing.assert_close(total, want_total, rtol=1e-6, atol=1e-6)
    assert_rounded(n, scale, want)


@needs_triton
@pytest.mark.parametrize("capability, runs", [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_e4m3_is_not_made_where_the_gpu_has_none(monkeypatch, capability, runs):
    x = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"), shape=(1, 1, 128))
    monkeypatch.setattr(dispatch.jit, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for op in ("modulate", "qk_norm_rope"):
        assert dispatch.implementation(op, x) == "triton"
    if runs:
        assert dispatch.implementation("modulate", x, fp8=True) == "triton"
        return
    want = "got triton on cuda: it needs capability 8.9 or higher"
    with pytest.raises(ValueError, match=f"kernels: modulate_fp8 {want}"):
        dispatch.record("modulate", x, fp8=True)
    with pytest.raises(ValueError, match=f"kernels: qk_norm_rope_fp8 {want}"):
        dispatch.record("qk_norm_rope", x, fp8=True)
