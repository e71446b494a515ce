"""The attention and FFN sublayers as single operations: values, gradients, and exactly what they keep."""

import math

import pytest
import torch
import torch.nn.functional as F
from fused import (
    assert_all_as_right,
    assert_as_good_as_torch,
    error,
    needs_triton,
    normal,
    outputs_and_gradients,
    strided,
)
from rounding import longest_sum, rounding
from torch.library import opcheck

from prfl_kernels.sublayers import ffn as ffn_sublayer
from prfl_kernels.sublayers import heads
from prfl_kernels.sublayers import self_attention as attention_sublayer
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights
from prfl_kernels.sublayers.self_attention import modulated_attention

pytestmark = pytest.mark.usefixtures("reference")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
GRID, HEADS, WIDTH, HIDDEN = (2, 2, 3), 2, 32, 72
LENGTH = math.prod(GRID)
CHAIN = 8  # norm, projection, its norm, scores, softmax, values, projection, norm
MODES = pytest.mark.parametrize("keep", ["nothing", "attention", "projections", "all"])
GATES = pytest.mark.usefixtures("gates_both_ways")


def norm(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, weight, grid, heads):
    """RMS over the width, then complex rotation by (frame, row, column), token by token."""
    n = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).unflatten(-1, (heads, -1))
    pairs = n.shape[-1] // 2
    counts = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    places = torch.cartesian_prod(*(torch.arange(m) for m in grid)).double()
    parts = zip(places.T, counts, strict=True)
    parts = [p[:, None] * 10000.0 ** (-torch.arange(m).double() / m) for p, m in parts]
    angles = torch.cat(parts, dim=1).to(x.device)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attention_formula(dtype=None, grid=GRID):
    """(x', n') in plain torch; products and attention in dtype, the rest as the stream."""

    def run(x, shift, scale, gate, *rest):
        w, low = AttentionWeights(*rest[:10]), x.dtype if x.dtype == F64 else dtype or x.dtype
        n = (norm(x) * (1 + scale[:, None]) + shift[:, None]).to(low)
        q, k, v = (F.linear(n, *(a.to(low) for a in w[i : i + 2])) for i in (0, 2, 4))
        q, k = (turned(*pair, grid, HEADS) for pair in ((q, w.norm_q.to(low)), (k, w.norm_k.to(low))))
        p = (torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        a = torch.einsum("bhls,bshd->blhd", p, v.unflatten(2, (HEADS, -1))).flatten(2)
        x = x + gate[:, None] * F.linear(a, w.o.to(low), w.o_bias.to(low))
        return (x, (norm(x) * rest[10] + rest[11]).to(low)) if len(rest) > 10 else x

    return run


def ffn_formula(dtype=None):
    def run(x, y, shift, scale, gate, w1, b1, w2, b2):
        low = x.dtype if x.dtype == F64 else dtype or x.dtype
        s = x if y is None else x + y
        n = (norm(s) * (1 + scale[:, None]) + shift[:, None]).to(low)
        g = F.gelu(F.linear(n, w1.to(low), b1.to(low)), approximate="tanh")
        return s + gate[:, None] * F.linear(g, w2.to(low), b2.to(low))

    return run


def attention_op(keep="all", dtype=None, grid=GRID):
    def run(x, shift, scale, gate, *rest):
        made = modulated_attention(
            x, shift, scale, gate, AttentionWeights(*rest[:10]), grid, HEADS, norm=rest[10:] or None,
            dtype=x.dtype if x.dtype == F64 else dtype, keep=keep,
        )  # fmt: skip
        return made[:2] if len(rest) > 10 else made[0]

    return run


def ffn_op(keep="all", dtype=None):
    def run(x, y, shift, scale, gate, *w):
        low = x.dtype if x.dtype == F64 else dtype
        return modulated_ffn(x, y, shift, scale, gate, FFNWeights(*w), dtype=low, keep=keep)

    return run


def attention_inputs(batch=2, dtype=F64, width=WIDTH, next_norm=True, length=LENGTH):
    def matrix():
        return (normal(width, width) * width**-0.5).to(dtype)

    def vector():
        return normal(width).to(dtype)

    vectors = [normal(batch, width).to(dtype) for _ in range(3)]
    weights = sum(([matrix(), vector()] for _ in range(4)), []) + [1 + 0.2 * vector() for _ in range(2)]
    after = [1 + 0.2 * vector(), vector()] if next_norm else []
    return [normal(batch, length, width).to(dtype), *vectors, *weights, *after]


def ffn_inputs(batch=2, dtype=F64, second=True, length=11):
    vectors = [normal(batch, WIDTH).to(dtype) for _ in range(3)]
    weights = [normal(HIDDEN, WIDTH) * WIDTH**-0.5, normal(HIDDEN), normal(WIDTH, HIDDEN) * HIDDEN**-0.5]
    x, y = (normal(batch, length, WIDTH).to(dtype) for _ in range(2))
    return [x, y if second else None, *vectors, *(a.to(dtype) for a in (*weights, normal(WIDTH)))]


def sublayers(dtype=F64, batch=2):
    """(operation of a mode and a dtype, formula of a dtype, inputs) of the sublayers in all their forms."""
    return {
        "attention": (attention_op, attention_formula, attention_inputs(batch, dtype, next_norm=False)),
        "attention, norm": (attention_op, attention_formula, attention_inputs(batch, dtype)),
        "ffn": (ffn_op, ffn_formula, ffn_inputs(batch, dtype, second=False)),
        "ffn, second": (ffn_op, ffn_formula, ffn_inputs(batch, dtype)),
    }


SUBLAYERS = pytest.mark.parametrize("name", sublayers(batch=1))


@GATES
@SUBLAYERS
@MODES
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients_are_those_of_the_formula(name, keep, batch):
    op, formula, inputs = sublayers(batch=batch)[name]
    got, want = outputs_and_gradients(op(keep), inputs), outputs_and_gradients(formula(), inputs)
    for a, b in zip(sum(got, []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("next_norm", [True, False])
def test_attention_of_an_earlier_call_is_taken_as_it_is(next_norm, monkeypatch):
    inputs = attention_inputs(next_norm=next_norm)
    want = outputs_and_gradients(attention_op("attention"), inputs)
    x, shift, scale, gate, *rest = inputs
    weights, how = AttentionWeights(*rest[:10]), dict(grid=GRID, num_heads=HEADS, norm=rest[10:] or None)
    x.requires_grad_()
    earlier = modulated_attention(x, shift, scale, gate, weights, keep="attention", **how).attention
    assert [a.shape for a in earlier] == [(2, LENGTH, HEADS, 16), (2, HEADS, LENGTH)]
    monkeypatch.setattr(heads, "attend", None)

    def again(x, shift, scale, gate, *rest):
        w, how["norm"] = AttentionWeights(*rest[:10]), rest[10:] or None
        made = modulated_attention(x, shift, scale, gate, w, attention=earlier, **how)
        assert made.attention is earlier
        return made[:2] if next_norm else made[0]

    got = outputs_and_gradients(again, inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@GATES
@SUBLAYERS
@MODES
@pytest.mark.parametrize("low", [F32, BF16])
def test_error_is_at_most_twice_that_of_torch(name, keep, low):
    """Parameters and stream in float32, products in `low`."""
    op, formula, inputs = sublayers(F32, 1)[name]
    assert_as_good_as_torch(op(keep, low), inputs, formula(low), chain=CHAIN)


@needs_triton
@SUBLAYERS
@pytest.mark.parametrize("keep", ["nothing", "all"])
@pytest.mark.parametrize("low", [F32, BF16])
def test_on_the_triton_kernels(triton, name, keep, low):
    op, formula, inputs = sublayers(F32, 2)[name]
    assert_as_good_as_torch(op(keep, low), inputs, formula(low), chain=CHAIN)


@GATES
@SUBLAYERS
@MODES
def test_only_the_gradients_asked_for_are_made(name, keep):
    op, _, inputs = sublayers(F32)[name]
    _, every = outputs_and_gradients(op(keep), inputs)
    for i, want in zip((i for i, a in enumerate(inputs) if a is not None), every, strict=True):
        _, (got,) = outputs_and_gradients(op(keep), inputs, wanted=[i])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def kept_bytes(op, inputs, frozen=()):
    """Bytes that autograd holds for the backward besides the inputs and the result."""
    held = [a if a is None else a.detach().requires_grad_(i not in frozen) for i, a in enumerate(inputs)]
    kept: dict[int, int] = {}

    def pack(a):
        kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        made = op(*held)
    made = made if isinstance(made, tuple) else (made,)
    known = {a.untyped_storage().data_ptr() for a in (*held, *made) if a is not None}
    return sum(n for place, n in kept.items() if place not in known)


ROWS = 2 * LENGTH * WIDTH * 2  # bytes of [B, L, C] in 16 bits
STATS = 2 * 2 * LENGTH * 4  # mean and 1/std, or 1/rms of q and k
LSE = 2 * HEADS * LENGTH * 4


@pytest.mark.parametrize(
    "keep, extra",
    [
        ("nothing", 0),
        ("attention", ROWS + LSE),
        ("projections", 4 * ROWS + LSE),
        ("all", 7 * ROWS + LSE + STATS),
        (("projections",), 3 * ROWS),
    ],
)
def test_the_attention_sublayer_keeps_what_it_says(keep, extra):
    """Beside x, x' and the parameters: two statistics (of x and of x'), and the named parts."""
    assert kept_bytes(attention_op(keep, BF16), attention_inputs(dtype=F32)) == 2 * STATS + extra


@pytest.mark.parametrize(
    "keep, extra", [("nothing", 0), ("attention", 0), ("projections", HIDDEN), ("all", HIDDEN + WIDTH)]
)
def test_the_ffn_sublayer_keeps_what_it_says(keep, extra):
    """Beside the parameters: the stream x + y in float32, its statistics, and the named parts."""
    inputs = ffn_inputs(dtype=F32)
    rows = 2 * inputs[0].shape[1]
    want = rows * 4 * WIDTH + 2 * rows * 4 + rows * 2 * extra
    assert kept_bytes(ffn_op(keep, BF16), inputs) == want
    inputs[1] = None  # without y the stream is x, which is an input
    assert kept_bytes(ffn_op(keep, BF16), inputs) == 2 * rows * 4 + rows * 2 * extra


def test_frozen_weights_keep_no_input_of_their_products():
    full = kept_bytes(attention_op("all", BF16), attention_inputs(dtype=F32))
    frozen = kept_bytes(attention_op("all", BF16), attention_inputs(dtype=F32), range(1, 16))
    assert frozen == full - ROWS
    inputs = ffn_inputs(dtype=F32)
    rows = 2 * inputs[0].shape[1]
    full, frozen = (kept_bytes(ffn_op("all", BF16), inputs, f) for f in ((), range(2, 9)))
    assert frozen == full - rows * 2 * WIDTH


@SUBLAYERS
def test_without_gradient_nothing_is_kept(name):
    op, _, inputs = sublayers(F32)[name]
    with torch.no_grad():
        assert kept_bytes(op("all"), inputs) == 0


@GATES
@SUBLAYERS
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_strides_do_not_matter_and_runs_are_bit_identical(name, keep):
    op, _, inputs = sublayers(F32)[name]
    want = outputs_and_gradients(op(keep), inputs)
    torch.testing.assert_close(outputs_and_gradients(op(keep), inputs), want, rtol=0, atol=0)
    got = outputs_and_gradients(op(keep), [a if a is None else strided(a) for a in inputs])
    exact = outputs_and_gradients(op(keep), [a if a is None else a.double() for a in inputs])
    assert_all_as_right(got, exact, want, rounding(CHAIN * longest_sum(inputs)))


@GATES
@SUBLAYERS
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_empty_batch(name, keep):
    op, _, inputs = sublayers(F32, 0)[name]
    outputs, gradients = outputs_and_gradients(op(keep), inputs)
    assert all(not o.numel() for o in outputs)
    given = [a for a in inputs if a is not None]
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, given, strict=True))


@pytest.mark.parametrize("name, keep", [
    ("attention", "nothing"), ("attention", "projections"), ("ffn", "nothing"), ("ffn", "attention"),
    ("attention, norm", "attention"), ("attention, norm", "all"),
    ("ffn, second", "projections"), ("ffn, second", "all"),
])  # fmt: skip
def test_no_graph_break(name, keep):
    op, _, inputs = sublayers(F32)[name]
    compiled = torch.compile(op(keep), fullgraph=True, backend="aot_eager")
    assert_as_good_as_torch(compiled, inputs, op(keep), chain=CHAIN)


def updates(shapes):
    """A [4, K] and B [N, 4] in float32 that require gradients, for weights of `shapes`."""
    return [normal(*s).requires_grad_() for n, k in shapes for s in ((4, k), (n, 4))]


def two_vectors(batch):
    """Shift, scale and gate of the tokens before a boundary, and of the others."""
    return [normal(batch, 2, WIDTH).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("next_norm, keep, chunk, low, boundary", [
    (True, [True] * 4, None, False, 0), (False, [False] * 4, None, False, 0),
    (True, [False] * 4, 7, True, 9), (False, [True] * 4, 7, True, 9),
])  # fmt: skip
def test_registration_of_the_attention_sublayer(keep, next_norm, chunk, low, boundary):
    inputs = [a.requires_grad_() for a in attention_inputs(1, F32, next_norm=next_norm)]
    if boundary:
        inputs[1:4] = two_vectors(1)
    inputs += [] if next_norm else [None, None]
    inputs += updates([(WIDTH, WIDTH)] * 4) if low else [None] * 8
    factors = [1.0, 0.5, 2.0, 3.0]
    settings = [None, None, list(GRID), HEADS, 1e-6, 0, BF16, factors, chunk]
    settings += [[], "", [], "", boundary, keep]
    opcheck(torch.ops.prfl.modulated_attention.default, (*inputs, *settings))


@pytest.mark.parametrize("second, keep, chunk, low, boundary", [
    (True, True, None, False, 0), (False, False, None, False, 0), (True, False, 7, True, 9),
    (False, True, 7, True, 9),
])  # fmt: skip
def test_registration_of_the_ffn_sublayer(keep, second, chunk, low, boundary):
    inputs = [a if a is None else a.requires_grad_() for a in ffn_inputs(1, F32, second)]
    if boundary:
        inputs[2:5] = two_vectors(1)
    inputs += updates([(HIDDEN, WIDTH), (WIDTH, HIDDEN)]) if low else [None] * 4
    settings = [[0.5, 2.0], 1e-6, BF16, chunk, boundary, [True, keep, keep]]
    opcheck(torch.ops.prfl.modulated_ffn.default, (*inputs, *settings))


def test_a_shard_of_tokens_turns_as_in_the_whole():
    """One query against itself: with an offset q and k turn alike, so only the angle's offset can tell."""
    inputs = attention_inputs(1)
    part = [inputs[0][:, 4:8], *inputs[1:14]]
    how = dict(grid=GRID, num_heads=HEADS, dtype=F64)
    weights = AttentionWeights(*part[4:])
    moved = modulated_attention(*part[:4], weights, offset=4, **how)[0]
    stays = modulated_attention(*part[:4], weights, offset=0, **how)[0]
    assert error(moved, stays) > 1e-4  # a shard that crosses rows is not a rigid shift


def test_an_unknown_mode_is_refused():
    x = attention_inputs(1, F32)
    for op, inputs in ((attention_op, x), (ffn_op, ffn_inputs(1, F32))):
        for keep in ("everything", ("hidden", "rest")):
            with pytest.raises(ValueError, match="got keep .*, want one of nothing, attention"):
                op(keep)(*inputs)


def test_modes_of_both_sublayers_have_the_same_names():
    assert list(attention_sublayer.KEEP) == list(ffn_sublayer.KEEP)
