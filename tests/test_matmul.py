"""Products of matrices, by torch and by oneDNN."""

from types import SimpleNamespace

import pytest
import torch
from fused import normal
from rounding import assert_as_right, rounding

from prfl_kernels import matmul, processor

available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["torch", "oneDNN"] if available else ["torch"])
def way(request, monkeypatch):
    """Every product, however small, by the one or the other."""
    monkeypatch.setattr(matmul, "LEAST", 0)
    monkeypatch.setattr(matmul, "choice", lambda: (request.param == "oneDNN", ""))
    return request.param


def strided(a):
    """The same values with gaps between the rows."""
    wide = torch.zeros(*a.shape[:-1], a.shape[-1] + 3, dtype=a.dtype)
    wide[..., : a.shape[-1]] = a
    return wide[..., : a.shape[-1]]


LAYOUTS = {"rows": lambda a: a, "columns": lambda a: a.mT.contiguous().mT, "gaps": strided}
"""Of the operands in memory."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_products_and_sums_of_products(way, batch, layout, dtype):
    a, b, total = (normal(*batch, *shape, dtype=dtype) for shape in ((5, 7), (7, 4), (5, 4)))
    put = LAYOUTS[layout]
    got = matmul.product(put(a), put(b))
    held = total.clone()
    added = matmul.add_product(held, put(a), put(b))
    assert got.dtype == dtype and added is held
    exact = a.double() @ b.double()
    for found, plain, want in ((got, a @ b, exact), (added, total + a @ b, total.double() + exact)):
        assert_as_right(found, want, plain, rounding(8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_linear_layers(way, shape, bias, layout):
    x, weight, b = normal(*shape), normal(4, 7), normal(4) if bias else None
    got = matmul.linear(LAYOUTS[layout](x), LAYOUTS[layout](weight), b)
    plain = torch.nn.functional.linear(x, weight, b)
    exact = torch.nn.functional.linear(x.double(), weight.double(), b if b is None else b.double())
    assert_as_right(got, exact, plain, rounding(8))


def test_only_large_float32_products_go_to_onednn(monkeypatch):
    monkeypatch.setattr(matmul, "LEAST", 64)
    monkeypatch.setattr(matmul, "choice", lambda: (True, ""))
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(enabled=True))
    seen = []
    monkeypatch.setattr(matmul, "onednn", lambda x, w, b=None: seen.append(x.dtype) or x @ w.mT)
    for size, dtype in ((4, torch.float32), (3, torch.float32), (4, torch.bfloat16), (4, torch.float64)):
        x = normal(size, size, dtype=dtype)
        matmul.product(x, x)
        matmul.linear(x, x, None)
        matmul.add_product(x.clone(), x, x)
    assert seen == [torch.float32] * 2
    torch.backends.mkldnn.enabled = False
    matmul.product(normal(4, 4), normal(4, 4))
    assert len(seen) == 2


@pytest.mark.parametrize("vendor, mkl, dnn, chosen, why", [
    ("AuthenticAMD", True, True, True, "AMD"),
    ("GenuineIntel", True, True, False, "not AMD's"),
    (None, True, True, False, "not AMD's"),
    ("AuthenticAMD", False, True, False, "not MKL's"),
    ("AuthenticAMD", True, False, False, "no oneDNN"),
])  # fmt: skip
def test_the_choice_and_its_reason(vendor, mkl, dnn, chosen, why, monkeypatch):
    monkeypatch.setattr(processor, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: dnn)
    got, reason = matmul.choice()
    assert got == (chosen and hasattr(torch.ops.mkldnn, "_linear_pointwise")) and why in reason
