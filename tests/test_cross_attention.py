"""The cross-attention sublayer as one operation: values, gradients, and exactly what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from fused import (
    assert_all_as_right,
    assert_as_good_as_torch,
    error,
    laid_out,
    normal,
    outputs_and_gradients,
    strided,
)
from helpers import randomize
from rounding import longest_sum, rounding
from test_sublayers import kept_bytes
from torch.library import opcheck

from prfl_engine.model.layers import IMAGE_TOKENS, CrossAttention, Linear
from prfl_kernels import dispatch
from prfl_kernels.sublayers.cross_attention import KEEP, UPDATED, ImageWeights, cross_attention
from prfl_kernels.sublayers.products import AttentionWeights, LowRank

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
LENGTH, TEXT, PICTURE, HEADS, WIDTH = 13, 7, 5, 2, 32
CHAIN = 6  # projection, its norm, scores, softmax, values, projection
MODES = pytest.mark.parametrize("keep", list(KEEP))
IMAGE = pytest.mark.parametrize("image", [False, True])


@pytest.fixture(autouse=True)
def reference():
    dispatch.configure("reference")
    yield
    dispatch.configure("")


def inputs_of(image, batch=2, dtype=F64, length=LENGTH):
    def linear():
        return [normal(WIDTH, WIDTH) * WIDTH**-0.5, normal(WIDTH)]

    weights = sum((linear() for _ in range(4)), []) + [1 + 0.2 * normal(WIDTH) for _ in range(2)]
    if image:
        weights += [*linear(), *linear(), 1 + 0.2 * normal(WIDTH)]
    context = normal(batch, TEXT + PICTURE * image, WIDTH)
    return [a.to(dtype) for a in (normal(batch, length, WIDTH), context, *weights)]


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def formula(dtype=None, repeats=1):
    """By the letter, the last token of the text laid out as often as it counts."""

    def run(x, context, *rest):
        context = laid_out(context, repeats)
        low = x.dtype if x.dtype == F64 else dtype or x.dtype
        x, context, *rest = (a.to(low) for a in (x, context, *rest))
        w = AttentionWeights(*rest[:10])
        q, first, total = rms(F.linear(x, w.q, w.q_bias), w.norm_q), PICTURE * (len(rest) > 10), 0
        parts = [(context[:, first:], *w[2:6], w.norm_k)]
        if first:
            parts.append((context[:, :first], *rest[10:]))
        for tokens, wk, bk, wv, bv, norm in parts:
            k, v = rms(F.linear(tokens, wk, bk), norm), F.linear(tokens, wv, bv)
            q_, k, v = (a.unflatten(2, (HEADS, -1)) for a in (q, k, v))
            p = (torch.einsum("blhd,bshd->bhls", q_, k) * q_.shape[-1] ** -0.5).softmax(-1)
            total = total + torch.einsum("bhls,bshd->blhd", p, v).flatten(2)
        return F.linear(total, w.o, w.o_bias)

    return run


def operation(keep="all", dtype=None, repeats=1):
    def run(x, context, *rest):
        image = ImageWeights(*rest[10:]) if len(rest) > 10 else None
        return cross_attention(
            x, context, AttentionWeights(*rest[:10]), HEADS, image, PICTURE if image else 0,
            dtype=x.dtype if x.dtype == F64 else dtype, keep=keep, repeats=repeats,
        )  # fmt: skip

    return run


@IMAGE
@MODES
@pytest.mark.parametrize("batch, repeats", [(1, 1), (3, 1), (2, 2), (1, 435)])
def test_values_and_gradients_are_those_of_the_formula(image, keep, batch, repeats):
    inputs = inputs_of(image, batch)
    runs = operation(keep, repeats=repeats), formula(repeats=repeats)
    got, want = (outputs_and_gradients(f, inputs) for f in runs)
    for a, b in zip(sum(got, []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12


@IMAGE
@MODES
@pytest.mark.parametrize("low", [F32, BF16])
@pytest.mark.parametrize("repeats", [1, 30])
def test_error_is_at_most_twice_that_of_torch(image, keep, low, repeats):
    # Errors of 13 tokens are too few to compare.
    run, plain = operation(keep, low, repeats), formula(low, repeats)
    assert_as_good_as_torch(run, inputs_of(image, 2, F32, 101), plain, chain=CHAIN)


@IMAGE
@MODES
def test_only_the_gradients_asked_for_are_made(image, keep):
    inputs = inputs_of(image)
    _, every = outputs_and_gradients(operation(keep), inputs)
    for i, want in enumerate(every):
        _, (got,) = outputs_and_gradients(operation(keep), inputs, wanted=[i])
        assert error(got, want) < 1e-12


KEYS = 2 * 2 * TEXT * WIDTH * 2  # of the text, and values
ROWS, LSE, RMS = 2 * LENGTH * WIDTH * 2, 2 * HEADS * LENGTH * 4, 2 * LENGTH * 4


@pytest.mark.parametrize(
    "keep, image, extra",
    [
        ("nothing", True, 0),
        ("attention", False, ROWS + LSE),
        ("attention", True, 2 * (ROWS + LSE)),
        ("projections", False, 2 * ROWS + LSE + KEYS),
        (("projections",), True, ROWS + KEYS * (TEXT + PICTURE) // TEXT),
        ("all", False, 3 * ROWS + LSE + KEYS + RMS),
        (("queries",), True, ROWS + RMS),
    ],
)
def test_it_keeps_what_it_says(keep, image, extra):
    assert kept_bytes(operation(keep, BF16), inputs_of(image, dtype=F32)) == extra


def test_without_gradient_nothing_is_kept():
    with torch.no_grad():
        assert kept_bytes(operation("all"), inputs_of(True, dtype=F32)) == 0


@IMAGE
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_strides_do_not_matter_and_runs_are_bit_identical(image, keep):
    inputs = inputs_of(image, dtype=F32)
    want = outputs_and_gradients(operation(keep), inputs)
    torch.testing.assert_close(outputs_and_gradients(operation(keep), inputs), want, rtol=0, atol=0)
    got = outputs_and_gradients(operation(keep), [strided(a) for a in inputs])
    exact = outputs_and_gradients(operation(keep), [a.double() for a in inputs])
    assert_all_as_right(got, exact, want, rounding(CHAIN * longest_sum(inputs)))


@IMAGE
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_empty_batch(image, keep):
    inputs = inputs_of(image, 0, F32)
    outputs, gradients = outputs_and_gradients(operation(keep), inputs)
    assert all(not o.numel() for o in outputs)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, inputs, strict=True))


PLACES = {"q": 2, "k": 4, "v": 6, "o": 8, "k_img": 12, "v_img": 14}  # of the weights among the inputs


def with_updates(image, names):
    """(inputs, A and B of the named weights; the operation; the formula with the updates in the weights)."""
    inputs = inputs_of(image)
    updates = sum(([normal(3, WIDTH).double(), 0.3 * normal(WIDTH, 3).double()] for _ in names), [])
    own, scales = len(inputs), [0.5 + i for i in range(len(names))]

    def low(parts):
        return {k: LowRank(*parts[2 * i : 2 * i + 2], scales[i]) for i, k in enumerate(names)}

    def run(keep="all", dtype=F64):
        def fused(x, context, *rest):
            weights, picture = rest[: own - 2], PICTURE * image
            images = ImageWeights(*weights[10:]) if image else None
            return cross_attention(
                x, context, AttentionWeights(*weights[:10]), HEADS, images, picture, dtype=dtype, keep=keep,
                repeats=4, low=low(rest[own - 2 :]),
            )  # fmt: skip

        return fused

    def whole(*given):
        held = list(given[:own])
        for name, a in low(given[own:]).items():
            held[PLACES[name]] = held[PLACES[name]] + a.scale * a.up @ a.down
        return formula(repeats=4)(*held)

    return [*inputs, *updates], run, whole


@IMAGE
@MODES
@pytest.mark.parametrize("names", [("q",), ("v", "k"), UPDATED])
def test_low_rank_updates_give_what_they_give_in_the_weights(image, keep, names):
    names = [name for name in names if image or "img" not in name]
    inputs, run, whole = with_updates(image, names)
    got, want = (outputs_and_gradients(f, inputs) for f in (run(keep), whole))
    for a, b in zip(sum(got, []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12
    own = len(inputs) - 2 * len(names)
    for wanted in ([*range(own, len(inputs))], [0, own], [1]):  # the weights frozen
        _, alone = outputs_and_gradients(run(keep), inputs, wanted=wanted)
        for i, a in zip(wanted, alone, strict=True):
            assert error(a, got[1][i]) < 1e-12


def test_updates_keep_nothing_more():
    inputs, run, _ = with_updates(True, UPDATED)
    held, frozen = [a.float() for a in inputs], range(2, len(inputs) - 2 * len(UPDATED))
    plain = kept_bytes(operation("all", BF16), held[: frozen.stop], frozen)
    assert kept_bytes(run("all", BF16), held, frozen) == plain


@IMAGE
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_no_graph_break(image, keep):
    inputs, run = inputs_of(image, dtype=F32), operation(keep, repeats=4)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_as_good_as_torch(compiled, inputs, run, chain=CHAIN)


@IMAGE
@pytest.mark.parametrize("keep", [True, False])
def test_registration(image, keep):
    inputs = [a.requires_grad_() for a in inputs_of(image, 1, F32)]
    updates = [normal(2, WIDTH).requires_grad_(), normal(WIDTH, 2).requires_grad_()] + [None] * 10
    rest = () if image else (None,) * 5
    settings = (PICTURE * image, HEADS, 1e-6, BF16, 4, [0.5] * 6, [keep] * 3)
    opcheck(torch.ops.prfl.cross_attention.default, (*inputs, *rest, *updates, *settings))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="got keep 'everything', want one of nothing, attention"):
        operation("everything")(*inputs_of(False))
    x, context, *weights = inputs_of(False)
    with pytest.raises(ValueError, match="got 5 image tokens without their weights, want both"):
        cross_attention(x, context, AttentionWeights(*weights), HEADS, image_tokens=5)
    with pytest.raises(ValueError, match="got 0 repeats of the last key, want at least 1"):
        operation(repeats=0)(*inputs_of(False))
    update = LowRank(normal(2, WIDTH), normal(WIDTH, 2), 1.0)
    with pytest.raises(ValueError, match=r"got low-rank updates of \['w1'\], want some of q, k, v, o, k_img"):
        cross_attention(x, context, AttentionWeights(*weights), HEADS, low={"w1": update})
    with pytest.raises(ValueError, match="got low-rank updates of k_img or v_img without their weights"):
        cross_attention(x, context, AttentionWeights(*weights), HEADS, low={"v_img": update})


@IMAGE
@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize("repeats", [1, 9])
def test_the_layer_computes_the_same_with_and_without_gradient(image, low, repeats):
    """One operation with gradient, layer by layer without."""
    layer = randomize(CrossAttention(WIDTH, HEADS, 1e-6, image))
    for m in layer.modules():
        if isinstance(m, Linear):
            m.compute_dtype = low
    x, context = torch.randn(2, LENGTH, WIDTH).to(low), torch.randn(2, IMAGE_TOKENS * image + TEXT, WIDTH)
    with torch.no_grad():
        want = layer(x, context, repeats)
    got = layer(x, context, repeats)
    assert got.grad_fn.name().startswith("prfl_cross_attention")
    assert torch.equal(got, want)


def test_another_class_makes_the_layers_run_one_by_one():
    layer = randomize(CrossAttention(WIDTH, HEADS, 1e-6, False))

    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, context = torch.randn(1, LENGTH, WIDTH), torch.randn(1, TEXT, WIDTH)
    before = layer(x, context, 3)
    replaced = Adapted(WIDTH, WIDTH)
    replaced.load_state_dict(layer.o.state_dict())
    layer.o = replaced
    assert not layer.fused
    torch.testing.assert_close(layer(x, context, 3), before + 1)
    layer.o = Linear(WIDTH, WIDTH)
    assert layer.fused
    layer.o.register_parameter("lora_a", torch.nn.Parameter(torch.zeros(1)))
    assert not layer.fused


def test_attention_inside_makes_no_call_of_torchs_dispatcher():
    """Two calls cost 12 % of the CPU time of a forward with 24 tokens."""
    inputs = [a.requires_grad_() for a in inputs_of(True, dtype=F32)]
    w, image = AttentionWeights(*inputs[2:12]), ImageWeights(*inputs[12:])
    with torch.autograd.profiler.profile() as profile:
        cross_attention(*inputs[:2], w, HEADS, image, PICTURE).sum().backward()
    called = {event.name for event in profile.function_events if event.name.startswith("prfl::")}
    assert called == {"prfl::cross_attention", "prfl::cross_attention_backward"}
