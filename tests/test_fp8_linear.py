"""The row-scaled linear layer on e4m3, against float64, and the emulation of the tensor cores."""

import pytest
import torch
from e4m3 import CHECKS, E4M3, INSTRUCTION, assert_rounded, rounding
from fused import DEVICE, error, normal, strided
from torch.library import opcheck

from prfl_bench.hopper_product import hopper_product
from prfl_kernels import dispatch
from prfl_kernels.fp8.e4m3 import quantize_rows
from prfl_kernels.fp8.linear import fp8_linear, quantize_weight

F32, BF16 = torch.float32, torch.bfloat16


def linear_inputs(*rows, width=96, out=48):
    x, w, bias = normal(*rows, width), normal(out, width), normal(out)
    return x, w, bias, (*quantize_rows(x), *quantize_weight(w), bias)


def test_weight_scales():
    w = normal(64, 128)
    w[3], w[5, 7] = 0.0, 1e6
    assert_rounded(*quantize_weight(w), w)


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 37), (3, 1, 5), ()])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_linear(rows, biased, out_dtype):
    x, w, bias, (x8, x_scale, w8, w_scale, _) = linear_inputs(*rows)
    bias = bias if biased else None
    out = fp8_linear(x8, x_scale, w8, w_scale, bias, out_dtype)
    assert out.dtype == out_dtype and out.shape == (*rows, 48)
    x_back, w_back = x8.double() * x_scale[..., None].double(), w8.double() * w_scale[:, None].double()
    added = 0.0 if bias is None else bias.to(out_dtype).double()
    want = x_back @ w_back.T + added
    sizes = x_back.abs() @ w_back.abs().T + abs(added)
    half_ulp = 2**-8 if out_dtype == BF16 else 2**-24
    limit = half_ulp * want.abs() + (96 * 2**-24 + INSTRUCTION) * sizes
    assert ((out.double() - want).abs() <= limit * (1 + 2**-8)).all()
    # And against the values before quantisation.
    x_off, w_off = rounding(x.double(), x_scale[..., None]), rounding(w.double(), w_scale[:, None])
    limit = limit * 2 + x_off @ w.double().abs().T + (x.double().abs() + x_off) @ w_off.T
    assert ((out.double() - x.double() @ w.double().T - added).abs() <= limit).all()


def test_linear_rounds_once():
    """bfloat16 is the rounded float32 result, where both add in float32."""
    if DEVICE == "cuda":
        pytest.skip("the GPU kernel of float32 adds the bias after it")
    *_, arguments = linear_inputs(19)
    want = fp8_linear(*arguments[:4], arguments[4].to(BF16), F32)
    assert torch.equal(fp8_linear(*arguments), want.to(BF16))


def test_linear_with_outliers_and_zero_rows():
    x, w, *_ = linear_inputs(6)
    x[1], x[2, 5], w[4], w[9, 9] = 0.0, 1e5, 0.0, -1e4
    out = fp8_linear(*quantize_rows(x), *quantize_weight(w), None, F32)
    assert out.isfinite().all() and not out[1].any() and not out[:, 4].any()
    assert error(out[2], x[2].double() @ w.double().T) < 2**-3  # two roundings of the one product
    assert error(out[3], x[3].double() @ w.double().T) < 2**-3


def test_linear_of_no_rows_and_of_strided_rows():
    *_, (x8, x_scale, w8, w_scale, bias) = linear_inputs(2, 9)
    assert fp8_linear(x8[:, :0], x_scale[:, :0], w8, w_scale, bias).shape == (2, 0, 48)
    want = fp8_linear(x8, x_scale, w8, w_scale, bias)
    got = fp8_linear(*(strided(a) for a in (x8, x_scale, w8)), w_scale, bias)
    assert torch.equal(got, want)
    assert torch.equal(fp8_linear(x8.mT.contiguous().mT, x_scale, w8.T.contiguous().T, w_scale, bias), want)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"x8": torch.zeros(3, 96)}, "torch.float32"),
        ({"x8": torch.zeros(3, 80).to(E4M3)}, "x8"),
        ({"x_scale": torch.ones(4)}, "x_scale"),
        ({"w_scale": torch.ones(1, 48)}, "w_scale"),
        ({"bias": torch.ones(47)}, "bias"),
        ({"w8": torch.zeros(40, 96).to(E4M3)}, "multiples of 16"),
        ({"w8": torch.zeros(48, 100).to(E4M3)}, "multiples of 16"),
        ({"out_dtype": torch.float16}, "out_dtype"),
    ],
)
def test_linear_names_misfits(change, named):
    names = ("x8", "x_scale", "w8", "w_scale", "bias")
    given = dict(zip(names, linear_inputs(3)[3], strict=True)) | change
    given = {n: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
    with pytest.raises(ValueError, match=named):
        fp8_linear(**given)


def test_linear_registration_and_compile():
    *_, arguments = linear_inputs(2, 9)
    opcheck(torch.ops.prfl.fp8_linear.default, (*arguments, BF16), test_utils=CHECKS)
    opcheck(torch.ops.prfl.fp8_linear.default, (*arguments[:4], None, F32), test_utils=CHECKS)
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), fp8_linear(*arguments))


def test_no_gradient():
    *_, arguments = linear_inputs(5)
    with pytest.raises(ValueError, match="fp8_linear: got an input that requires grad"):
        fp8_linear(*arguments[:4], arguments[4].requires_grad_())
    with torch.no_grad():
        assert not fp8_linear(*arguments).requires_grad


def test_choice_is_explicit():
    if DEVICE == "cuda":
        pytest.skip("a GPU may run it")
    *_, arguments = linear_inputs(5)
    dispatch.configure("fp8_linear=scaled_mm")
    try:
        with pytest.raises(ValueError, match="fp8_linear got scaled_mm on cpu: it needs a cuda device"):
            fp8_linear(*arguments)
    finally:
        dispatch.configure("")


def test_the_dtype_of_the_results_decides(monkeypatch):
    """Not that of x, which is e4m3: what has bfloat16 alone is refused for float32 with its reason."""
    record = dispatch.OPERATIONS["fp8_linear"]["scaled_mm"]
    monkeypatch.setitem(
        dispatch.OPERATIONS["fp8_linear"],
        "scaled_mm",
        record._replace(
            probe=lambda device, dtype=None, *_: "has no float32" if dtype == F32 else None,
            forward=dispatch.OPERATIONS["fp8_linear"]["reference"].forward,
        ),
    )
    *_, arguments = linear_inputs(5)
    dispatch.configure("fp8_linear=scaled_mm")
    try:
        assert fp8_linear(*arguments).dtype == BF16
        with pytest.raises(ValueError, match=r"fp8_linear got scaled_mm on \w+: it has no float32"):
            fp8_linear(*arguments, F32)
    finally:
        dispatch.configure("")


def test_hopper_product_keeps_fourteen_bits():
    ones = torch.ones(1, 32)
    # 2^13 + 1 has 14 bits and is kept; beside 2^14 a step is 2, and every 1 is lost.
    for big, want in ((2.0**13, 2.0**13 + 32), (2.0**14, 2.0**14)):
        assert hopper_product(ones, ones.T, torch.tensor([[big]])).item() == want
    # Aligned to the largest: 448 * 448 = 200704 is 2^17 and more, a step is 16; 3 * 5 = 15 is lost.
    a, b = torch.tensor([[448.0, 3.0, 4.0]]), torch.tensor([[448.0], [5.0], [4.0]])
    assert hopper_product(a, b).item() == 200704 + 16
    # Cut toward zero, on both sides.
    assert hopper_product(-a, b).item() == -200704 - 16


def test_hopper_product_is_exact_where_fourteen_bits_are_enough():
    a = torch.randint(-3, 4, (2, 5, 96)).float()
    b = torch.randint(-3, 4, (2, 96, 7)).float()
    assert torch.equal(hopper_product(a, b), a @ b)
