"""Two vectors a sample: the tokens before a boundary take the first, the others the second."""

from functools import partial

import pytest
import torch
from boundary_cases import NAMES, case
from e4m3 import assert_rounded
from fused import assert_as_good_as_torch, normal, outputs_and_gradients
from torch.library import opcheck

from prfl_kernels import dispatch, extension, jit, rows
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate_fp8, gated_add_norm_fp8
from prfl_kernels.norm.op import layer_norm, modulate, modulate_fp8

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ALL = pytest.mark.parametrize("name", NAMES)
prfl = torch.ops.prfl


@pytest.fixture(params=["cpu", "triton"])
def kernels(request, fresh_memory_is_nan):
    if request.param == "cpu" and extension.absence("cpu", "cpu"):
        pytest.skip("the extension is not built")
    if request.param == "triton" and jit.triton is None:
        pytest.skip("Triton is not installed")
    dispatch.configure(request.param)
    yield
    dispatch.configure("")


@ALL
@pytest.mark.parametrize("boundary", [0, 1, 4, 7])
def test_results_and_gradients_are_those_of_a_vector_for_every_token(name, boundary):
    op, formula, inputs = case(name, 2, 7, 5, boundary, F64, F64, F64)
    inputs = [a.double() for a in inputs]
    got, want = outputs_and_gradients(op, inputs), outputs_and_gradients(formula, inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@ALL
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("boundary", [0, 1, 13, 36, 37])
def test_kernels_err_at_most_twice_as_much_as_torch(name, boundary, monkeypatch):
    monkeypatch.setattr(rows, "RUNS", 9)  # runs of several tokens, the last of each side shorter
    op, formula, inputs = case(name, 2, 37, 40, boundary)
    assert_as_good_as_torch(op, inputs, formula)


@ALL
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("types", [(F32, F32, BF16), (BF16, BF16, F32)])
def test_kernels_in_every_dtype(name, types):
    op, formula, inputs = case(name, 1, 12, 131, 5, *types)
    assert_as_good_as_torch(op, inputs, formula)


@pytest.mark.usefixtures("kernels")
def test_kernels_at_the_width_of_ti2v_5b():
    op, formula, inputs = case("gated_add_modulate", 1, 3, 3072, 1, F32)
    assert_as_good_as_torch(op, inputs, formula)


@pytest.mark.usefixtures("kernels")
def test_equal_vectors_give_the_bits_of_one():
    """Nothing else changes at the boundary."""
    op, _, (x, y, gate, scale, shift) = case("gated_add_modulate", 2, 9, 48, 4)
    one = [a[:, 0] for a in (gate, scale, shift)]
    two = [a[:, None].expand(-1, 2, -1) for a in one]
    torch.testing.assert_close(op(x, y, *two), op.func(x, y, *one), rtol=0, atol=0)


def test_e4m3_rows(triton):
    x, y, gate, scale, shift = case("gated_add_modulate", 2, 9, 96, 4)[2]
    weight, bias = normal(96), normal(96)
    for made, name, inputs in [
        (modulate_fp8(x, scale, shift, boundary=4), "modulate", [x, scale, shift]),
        (gated_add_modulate_fp8(x, y, gate, scale, shift, boundary=4)[1:], "gated_add_modulate",
         [x, y, gate, scale, shift]),
        (gated_add_norm_fp8(x, y, gate, weight, bias, boundary=4)[1:], "gated_add_norm",
         [x, y, gate, weight, bias]),
    ]:  # fmt: skip
        formula = case(name, 2, 9, 96, 4)[1]
        want = formula(*inputs)
        want = want[1] if isinstance(want, tuple) else want
        assert_rounded(*made, want)


@pytest.mark.parametrize("op, name, rest", [
    (prfl.modulate, "modulate", (1.0, 1e-6, BF16)),
    (prfl.gated_add, "gated_add", ()),
    (prfl.gated_add_norm, "gated_add_modulate", (1.0, 1e-6, F32)),
    (prfl.gated_add_norm, "gated_add_norm", (0.0, 1e-6, F32)),
])  # fmt: skip
def test_registration(op, name, rest):
    inputs = [a.requires_grad_() for a in case(name, 2, 5, 16, 2)[2]]
    opcheck(op.default, (*inputs, *rest, 2))


x = partial(torch.randn, 2, 5, 8)
REFUSED = {
    r"modulate: got boundary 6, want 0 to 5": lambda: modulate(
        x(), normal(2, 2, 8), normal(2, 2, 8), boundary=6
    ),
    r"modulate: got boundary -1, want 0 to 5": lambda: modulate(
        x(), normal(2, 2, 8), normal(2, 2, 8), boundary=-1
    ),
    r"modulate: got boundary 1, want 0 where": lambda: modulate(x(), normal(2, 8), normal(2, 8), boundary=1),
    r"modulate: got shift \[2, 8\], want \[2, 2, 8\]": lambda: modulate(x(), normal(2, 2, 8), normal(2, 8)),
    r"modulate: got scale \[2, 3, 8\], want \[2, 2, 8\]": lambda: modulate(
        x(), normal(2, 3, 8), normal(2, 3, 8)
    ),
    r"layer_norm: got boundary 1, want 0 where": lambda: prfl.modulate(
        x(), normal(8), normal(8), 0.0, 1e-6, F32, 1
    ),
    r"layer_norm: got weight \[2, 2, 8\], want \[2, 8\]": lambda: layer_norm(
        x(), normal(2, 2, 8), normal(2, 2, 8)
    ),
    r"gated_add: got gate \[2, 1, 8\], want \[2, 2, 8\]": lambda: gated_add(x(), x(), normal(2, 1, 8)),
    r"gated_add: got boundary 9, want 0 to 5": lambda: gated_add(x(), x(), normal(2, 2, 8), 9),
    r"gated_add_backward: got boundary 9, want 0 to 5": lambda: prfl.gated_add_backward(
        x(), x(), normal(2, 2, 8), F32, 9
    ),
    r"modulate_backward: got boundary 9, want 0 to 5": lambda: prfl.modulate_backward(
        x(), x(), normal(2, 2, 8), normal(2, 2, 5), 1.0, True, 9
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_boundary_that_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
