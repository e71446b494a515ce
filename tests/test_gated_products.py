"""Gradients under a gate: of long samples by sample, of short ones by token."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import error, normal, outputs_and_gradients
from rounding import assert_as_right, longest_sum, rounding
from test_sublayers import attention_formula, attention_inputs, attention_op, ffn_formula, ffn_inputs, ffn_op

from prfl_kernels.sublayers import products
from prfl_kernels.sublayers.products import SHORT, GatedProducts, GatedTokens, LowRank, gated_products

pytestmark = pytest.mark.usefixtures("reference")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
BATCH, LENGTH, ROWS, COLUMNS, RANK = 3, 7, 5, 6, 2
SCALE = 0.5
WAYS = {"by token": SHORT, "by sample": 0}
UPDATES = pytest.mark.parametrize("update", [False, True])
BOUNDARIES = pytest.mark.parametrize("boundary", [None, 0, 3, LENGTH])  # None: one gate


def leaves(update, boundary, length=LENGTH, rows=ROWS, columns=COLUMNS, dtype=F64):
    """a, the gate, W, b and, with an update, A and B; of the dtype of parameters."""
    gate = (BATCH, rows) if boundary is None else (BATCH, 2, rows)
    shapes = dict(a=(BATCH, length, columns), gate=gate, w=(rows, columns), w_bias=(rows,))
    shapes |= dict(w_down=(RANK, columns), w_up=(rows, RANK)) if update else {}
    return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}


def by_autograd(given, d, boundary, dtype):
    """The gradients of gate * (a W^T + b) with products in dtype, by the names of `leaves`."""
    held = {name: x.detach().requires_grad_() for name, x in given.items()}
    a, gate, w, bias, *update = (x.to(dtype) if name != "gate" else x for name, x in held.items())
    y = F.linear(a, w, bias)
    if update:
        y = y + SCALE * (a @ update[0].mT) @ update[1].mT
    if boundary is not None:
        gate = gate.repeat_interleave(torch.tensor([boundary, a.shape[1] - boundary]), 1)
    total = y * (gate if gate.dim() == 3 else gate[:, None])
    return dict(zip(held, torch.autograd.grad(total, list(held.values()), d.to(total)), strict=True))


def by_products(given, d, boundary, dtype, wants=(True, True, True), chunk=None):
    """The same by gated_products, `chunk` tokens at a time."""
    a, gate, w, bias, *update = given.values()
    low = LowRank(*update, SCALE) if update else None
    made = gated_products(a.shape[1], gate, boundary or 0, w, bias, low, dtype, *wants)
    d, a, parts = d.to(dtype), a.to(dtype), []
    for start in range(0, a.shape[1], chunk or a.shape[1]):
        at = slice(start, min(start + (chunk or a.shape[1]), a.shape[1]))
        parts.append(made.input_gradient(d[:, at], at))
        made.add(d[:, at], a[:, at], at)
    return {"a": torch.cat(parts, 1), **made.gradients("w")}


def asked(wants):
    """The names of the gradients that are wanted."""
    groups = ("w", "w_bias"), ("gate",), ("w_down", "w_up")
    return {name for group, want in zip(groups, wants, strict=True) if want for name in group}


@UPDATES
@BOUNDARIES
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_both_ways_give_what_autograd_gives(update, boundary, chunk, monkeypatch):
    given, d = leaves(update, boundary), normal(BATCH, LENGTH, ROWS, dtype=F64)
    want = by_autograd(given, d, boundary, F64)
    for wants in product([False, True], [False, True], [False, True] if update else [False]):
        found = {}
        for way, short in WAYS.items():
            monkeypatch.setattr(products, "SHORT", short)
            found[way] = by_products(given, d, boundary, F64, wants, chunk)
            assert found[way].keys() == {"a"} | asked(wants)
            for name, got in found[way].items():
                assert got.shape == want[name].shape and error(got, want[name]) < 1e-13, (way, wants, name)
        tokens, samples = found.values()
        assert all(error(got, samples[name]) < 1e-13 for name, got in tokens.items())


@UPDATES
@pytest.mark.parametrize("boundary, chunk", [(None, None), (None, 16), (17, None), (17, 16)])
@pytest.mark.parametrize("way", WAYS)
def test_in_bfloat16_they_err_at_most_twice_as_much_as_torch(way, update, boundary, chunk, monkeypatch):
    monkeypatch.setattr(products, "SHORT", WAYS[way])
    given, d = leaves(update, boundary, 40, 48, 32, F32), normal(BATCH, 40, 48)
    exact = by_autograd({k: x.double() for k, x in given.items()}, d.double(), boundary, F64)
    peer, floor = by_autograd(given, d, boundary, BF16), rounding(2 * longest_sum(given.values()))
    got = by_products(given, d, boundary, BF16, (True, True, update), chunk)
    assert got.keys() == exact.keys() and got["a"].dtype == BF16
    for name, x in got.items():
        assert name == "a" or x.dtype == F32
        assert_as_right(x, exact[name], peer[name], floor, name)


@pytest.mark.parametrize("length, kind", [(1, GatedTokens), (SHORT, GatedTokens), (SHORT + 1, GatedProducts)])
def test_samples_up_to_the_threshold_go_by_token(length, kind):
    a, gate, w, bias = leaves(False, 0).values()
    for own in (gate, gate[:, 0]):
        assert type(gated_products(length, own, 0, w, bias, None, F64, True, True, False)) is kind


@pytest.mark.parametrize("grid", [(4, 4, 4), (1, 5, 13)])
@pytest.mark.parametrize("name", ["attention", "ffn"])
def test_sublayers_on_either_side_of_the_threshold_are_those_of_the_formula(name, grid):
    """Samples of 64 and of 65 tokens."""
    length = grid[0] * grid[1] * grid[2]
    if name == "ffn":
        op, formula, inputs = ffn_op(), ffn_formula(), ffn_inputs(length=length)
    else:
        op, formula = attention_op(grid=grid), attention_formula(grid=grid)
        inputs = attention_inputs(length=length)
    got, want = outputs_and_gradients(op, inputs), outputs_and_gradients(formula, inputs)
    for a, b in zip(sum(got, []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12
