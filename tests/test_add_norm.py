"""The fused kernels behind modulate and gated_add."""

import pytest
import torch
from e4m3 import assert_rounded
from fused import (
    assert_as_good_as_torch,
    assert_gradients_alone,
    assert_of_nothing,
    needs_triton,
    normal,
    outputs_and_gradients,
    strided,
)
from torch.library import opcheck

from prfl_kernels import rows
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate, modulate_fp8

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
F32, BF16 = torch.float32, torch.bfloat16


def row_inputs(name, batch, length, width, residual=F32, update=F32):
    x, y = normal(batch, length, width, dtype=residual), normal(batch, length, width, dtype=update)
    gate, scale, shift = (normal(batch, width) for _ in range(3))
    weight, bias = normal(width), normal(width)
    return {
        "modulate": (modulate, [x, scale, shift]),
        "layer_norm": (layer_norm, [x, weight, bias]),
        "gated_add": (gated_add, [x, y, gate]),
        "gated_add without gate": (gated_add, [x, y, None]),
        "gated_add_modulate": (gated_add_modulate, [x, y, gate, scale, shift]),
        "gated_add_modulate without gate": (gated_add_modulate, [x, y, None, scale, shift]),
        "gated_add_norm": (gated_add_norm, [x, y, gate, weight, bias]),
        "gated_add_norm without gate": (gated_add_norm, [x, y, None, weight, bias]),
    }[name]


NAMES = (
    "modulate", "layer_norm", "gated_add", "gated_add without gate", "gated_add_modulate",
    "gated_add_modulate without gate", "gated_add_norm", "gated_add_norm without gate",
)  # fmt: skip
ALL = pytest.mark.parametrize("name", NAMES)


@ALL
@pytest.mark.parametrize("shape, residual, update", [
    ((2, 7, 96), F32, F32), ((2, 7, 96), F32, BF16), ((2, 7, 96), BF16, BF16), ((1, 1, 7), F32, BF16),
    ((3, 5, 130), BF16, BF16),
])  # fmt: skip
def test_error_is_at_most_twice_that_of_torch(name, shape, residual, update):
    assert_as_good_as_torch(*row_inputs(name, *shape, residual, update))


@ALL
@pytest.mark.parametrize("width", [1536, 5120])
def test_widths_of_the_models(name, width):
    assert_as_good_as_torch(*row_inputs(name, 1, 3, width, F32, BF16))


def test_more_tokens_than_programs(monkeypatch):
    """Runs of several tokens, the last one shorter: L = 23 in 4 runs of 6 for each of two samples."""
    monkeypatch.setattr(rows, "RUNS", 9)
    for name in NAMES:
        assert_as_good_as_torch(*row_inputs(name, 2, 23, 40))


@ALL
def test_strides_do_not_matter(name):
    op, inputs = row_inputs(name, 2, 5, 48)
    want = outputs_and_gradients(op, inputs)
    got = outputs_and_gradients(op, [a if a is None else strided(a) for a in inputs])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    last = [a if a is None or a.dim() < 2 else a.mT.contiguous().mT for a in inputs]
    torch.testing.assert_close(outputs_and_gradients(op, last), want, rtol=0, atol=0)


@ALL
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_input(name, batch, length):
    assert_of_nothing(*row_inputs(name, batch, length, 24), (batch, length, 24))


@ALL
def test_only_the_gradients_asked_for_are_made(name):
    assert_gradients_alone(*row_inputs(name, 2, 4, 32))


def test_nothing_is_kept_for_a_frozen_gate():
    """Without d gate the output of the sublayer is not saved."""
    _, (x, y, gate, scale, shift) = row_inputs("gated_add_modulate", 1, 5, 32)
    x.requires_grad_(), y.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        gated_add_modulate(x, y, gate, scale, shift)
    assert not any(a is y or a.data_ptr() == y.data_ptr() for a in kept)


@ALL
def test_runs_are_bit_identical(name):
    op, inputs = row_inputs(name, 2, 5, 32)
    first, second = (outputs_and_gradients(op, inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("op, name, rest", [
    (torch.ops.prfl.modulate, "modulate", (1.0, 1e-6, BF16)),
    (torch.ops.prfl.modulate, "layer_norm", (0.0, 1e-6, F32)),
    (torch.ops.prfl.gated_add, "gated_add", ()),
    (torch.ops.prfl.gated_add, "gated_add without gate", ()),
    (torch.ops.prfl.gated_add_norm, "gated_add_modulate", (1.0, 1e-6, F32)),
    (torch.ops.prfl.gated_add_norm, "gated_add_norm without gate", (0.0, 1e-6, BF16)),
])  # fmt: skip
def test_registration(op, name, rest):
    _, inputs = row_inputs(name, 2, 5, 16)
    opcheck(op.default, (*(a if a is None else a.requires_grad_() for a in inputs), *rest))


@ALL
def test_no_graph_break(name):
    op, inputs = row_inputs(name, 2, 5, 16)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, want = outputs_and_gradients(compiled, inputs), outputs_and_gradients(op, inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_fp8_rows_use_the_whole_range():
    x, scale, shift = row_inputs("modulate", 2, 9, 96)[1]
    x[0, 3], scale[1], shift[1] = 0.0, -1.0, 0.0  # sample 1 is zero everywhere: its scales are 1
    want = modulate(x.double(), scale.double(), shift.double())
    assert not want[1].any()
    assert_rounded(*modulate_fp8(x, scale, shift), want)
