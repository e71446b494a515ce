"""The attention and FFN sublayers with low-rank updates of their weights, and a few tokens at a time."""

import pytest
import torch
from fused import error, normal, outputs_and_gradients
from test_sublayers import (
    BF16,
    F32,
    F64,
    GATES,
    GRID,
    HEADS,
    HIDDEN,
    LENGTH,
    MODES,
    WIDTH,
    attention_formula,
    attention_inputs,
    ffn_formula,
    ffn_inputs,
    kept_bytes,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from prfl_engine.memory.live_bytes import LiveBytes
from prfl_kernels import dispatch, extension
from prfl_kernels.jit import REGISTERED
from prfl_kernels.sublayers import heads
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights, LowRank
from prfl_kernels.sublayers.self_attention import modulated_attention

pytestmark = pytest.mark.usefixtures("reference")
RANK = 3
SCALES = {"q": 0.5, "k": 2.0, "v": 1.0, "o": 1.5, "w1": 0.5, "w2": 2.0}
SHAPES = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {"w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN)}
SUBLAYERS = {"attention": "qkvo", "ffn": ("w1", "w2")}
CHUNKS = pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
SUBLAYER = pytest.mark.parametrize("name", SUBLAYERS)


def own_inputs(name, batch=2, dtype=F64):
    return attention_inputs(batch, dtype) if name == "attention" else ffn_inputs(batch, dtype)


def updates(names, dtype=F64):
    """A and B of the named weights, one after the other."""
    made = (normal(*s) * 0.3 for n in names for s in ((RANK, SHAPES[n][1]), (SHAPES[n][0], RANK)))
    return [a.to(dtype) for a in made]


def operation(name, updated, keep="all", chunk=None, dtype=None, attention=None):
    """The sublayer as a function of its own inputs and the updates of the weights `updated`."""

    def run(*inputs):
        own = len(inputs) - 2 * len(updated)
        low = {n: LowRank(*p, SCALES[n]) for n, p in zip(updated, pairwise(inputs[own:]), strict=True)}
        how = dict(keep=keep, low=low, chunk=chunk, dtype=inputs[0].dtype if dtype is None else dtype)
        if name == "ffn":
            return modulated_ffn(*inputs[:5], FFNWeights(*inputs[5:own]), **how)
        weights = AttentionWeights(*inputs[4:14])
        made = modulated_attention(
            *inputs[:4], weights, GRID, HEADS, norm=inputs[14:own], attention=attention, **how
        )
        return made[:2]

    return run


def pairwise(tensors):
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def formula(name, updated):
    """The same with the updates added to the weights."""
    run = attention_formula() if name == "attention" else ffn_formula()
    order = AttentionWeights._fields if name == "attention" else FFNWeights._fields
    first = 4 if name == "attention" else 5

    def whole(*inputs):
        own = len(inputs) - 2 * len(updated)
        held = list(inputs[:own])
        for n, (down, up) in zip(updated, pairwise(inputs[own:]), strict=True):
            held[first + order.index(n)] = held[first + order.index(n)] + SCALES[n] * up @ down
        return run(*held)

    return whole


@GATES
@SUBLAYER
@MODES
@CHUNKS
@pytest.mark.parametrize("which", ["none", "all", "some"])
def test_values_and_all_gradients_are_those_of_the_formula(name, keep, chunk, which):
    names = {"none": (), "all": tuple(SUBLAYERS[name]), "some": (SUBLAYERS[name][-1],)}[which]
    inputs = [*own_inputs(name), *updates(names)]
    got = outputs_and_gradients(operation(name, names, keep, chunk), inputs)
    want = outputs_and_gradients(formula(name, names), inputs)
    for a, b in zip(sum(got, []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12


@GATES
@SUBLAYER
@MODES
@pytest.mark.parametrize("chunk", [None, 7])
def test_updates_alone_are_trained_with_the_same_gradients(name, keep, chunk):
    names = tuple(SUBLAYERS[name])
    inputs = [*own_inputs(name), *updates(names)]
    run, last = operation(name, names, keep, chunk), len(inputs)
    wanted = [0, *range(last - 2 * len(names), last)]
    _, every = outputs_and_gradients(run, inputs)
    _, got = outputs_and_gradients(run, inputs, wanted=wanted)
    for i, a in zip(wanted, got, strict=True):
        assert error(a, every[i]) < 1e-13


@GATES
@SUBLAYER
@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_error_is_that_of_bfloat16_in_chunks_too(name, keep):
    """Against the formula in float64: no more than a few roundings of 8 bits."""
    names = tuple(SUBLAYERS[name])
    inputs = [a.to(F32) for a in (*own_inputs(name), *updates(names))]
    want = outputs_and_gradients(formula(name, names), [a.double() for a in inputs])
    for chunk in (None, 7):
        got = outputs_and_gradients(operation(name, names, keep, chunk, BF16), inputs)
        for a, b in zip(sum(got, []), sum(want, []), strict=True):
            assert error(a.double(), b) < 0.03


def test_attention_of_an_earlier_call_serves_with_updates_and_chunks(monkeypatch):
    names = tuple("qkvo")
    inputs = [*own_inputs("attention"), *updates(names)]
    want = outputs_and_gradients(operation("attention", names, "attention"), inputs)
    inputs[0].requires_grad_()
    low = {n: LowRank(*p, SCALES[n]) for n, p in zip(names, pairwise(inputs[16:]), strict=True)}
    earlier = modulated_attention(
        *inputs[:4], AttentionWeights(*inputs[4:14]), GRID, HEADS, keep="attention", low=low, chunk=7
    ).attention
    monkeypatch.setattr(heads, "attend", None)
    again = operation("attention", names, "attention", 7, attention=tuple(a.detach() for a in earlier))
    for a, b in zip(sum(outputs_and_gradients(again, inputs), []), sum(want, []), strict=True):
        assert error(a, b) < 1e-12


class Products(TorchDispatchMode):
    """FLOPs of the matrix products, those inside the operations too."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = REGISTERED.get(func.name()) if func.namespace == "prfl" else None
        with self if inside is not None else FlopCounterMode(display=False) as counter:
            out = (inside or func)(*args, **(kwargs or {}))
        if inside is None:
            self.flops += counter.get_total_flops()
        return out


@GATES
@SUBLAYER
def test_a_frozen_weight_costs_no_gradient_of_its_own(name):
    """Updates of rank r add products of L r N and L r K each, where the gradient of W takes L N K."""
    names = tuple(SUBLAYERS[name])
    inputs = [*own_inputs(name), *updates(names)]
    flops = {}
    for case, wanted in (("x", [0]), ("updates", [0, *range(len(inputs) - 2 * len(names), len(inputs))])):
        with Products() as counted:
            outputs_and_gradients(operation(name, names), inputs, wanted=wanted)
        flops[case] = counted.flops
    rows = 2 * inputs[0].shape[1]
    small = sum(2 * rows * RANK * (n + 2 * k) for n, k in (SHAPES[n] for n in names))
    small += 2 * rows * RANK * WIDTH  # d B again, under the gate
    assert flops["updates"] == flops["x"] + small


def test_what_is_kept_for_updates():
    """n where A or B of q, k or v is trained, like W; an update of o needs nothing that is not there."""
    rows = 2 * LENGTH * WIDTH * 2
    inputs = own_inputs("attention", dtype=F32)
    base = kept_bytes(operation("attention", (), dtype=BF16), inputs, range(1, 16))
    for names, extra in ((("q",), rows), (("o",), 0)):
        held = [*inputs, *updates(names, F32)]
        assert kept_bytes(operation("attention", names, dtype=BF16), held, range(1, 16)) == base + extra


def peak(name, keep, chunk):
    """Most bytes over the input, of the forward and of forward and backward, in 16-bit values a token."""
    width, hidden, grid = 64, 256, (16, 8, 16)
    length = 2048
    x = torch.randn(1, length, width, requires_grad=True)
    vectors = [torch.randn(1, width) for _ in range(3)]
    with LiveBytes() as live:
        if name == "ffn":
            w = (torch.randn(s) for s in ((hidden, width), hidden, (width, hidden), width))
            w = FFNWeights(*w)
            out = modulated_ffn(x, None, *vectors, w, keep=keep, chunk=chunk, dtype=BF16)
        else:
            w = [torch.randn(s) for s in ((width, width), width) * 4 + (width, width)]
            out = modulated_attention(
                x, *vectors, AttentionWeights(*w), grid, 2, keep=keep, chunk=chunk, dtype=BF16
            ).x
        forward = live.peak
        out.backward(torch.ones_like(out))
    return forward / (length * 2), live.peak / (length * 2)


@pytest.mark.parametrize("name, less", [("ffn", (4, 6)), ("attention", (1.5, 1.3))])
def test_chunks_bound_what_is_made_on_the_way(name, less):
    """Weights frozen, nothing kept: an FFN four times as wide as the stream; q, k and v whole."""
    dispatch.configure("reference,attention=sdpa")
    whole, parts = (peak(name, "nothing", chunk) for chunk in (None, 128))
    assert parts[0] < whole[0] / less[0] and parts[1] < whole[1] / less[1]


@pytest.mark.parametrize("keep, before", [("nothing", 0), ("attention", 0), ("projections", 2)])
def test_with_chunks_attention_decides_the_peak_of_its_sublayer(keep, before):
    """The most that lives, in 16-bit rows of a token: x' (2), n' (1) and their gradients (3), and q, k, v, a
    and their gradients (8); besides them q and k before the norm, if kept, and no zeros for what is kept."""
    length, width, peaks = 2**15, 256, {}
    for chunk in (None, 256):
        with torch.device("meta"), extension.dry_run():
            dispatch.configure("cpu")
            x = torch.empty(1, length, width, requires_grad=True)
            vectors = [torch.empty(1, width) for _ in range(3)]
            w = [torch.empty(s, dtype=BF16) for s in ((width, width), width) * 4 + (width, width)]
            norm = torch.empty(width), torch.empty(width)
            with LiveBytes() as live:
                live.add([x, *w])
                base = live.now
                made = modulated_attention(
                    x, *vectors, AttentionWeights(*w), (32, 32, 32), 2,
                    norm=norm, keep=keep, chunk=chunk, dtype=BF16,
                )  # fmt: skip
                outputs = made[:2]
                del made
                torch.autograd.backward(outputs, [torch.ones_like(a) for a in outputs])
            peaks[chunk] = (live.peak - base) / (length * width * 2)
    assert 14 + before <= peaks[256] < 14.4 + before
    assert peaks[None] > peaks[256] + 1.9


def test_a_result_that_is_not_used_has_the_gradient_zero():
    """x' alone, or n' alone."""
    inputs = own_inputs("attention")
    for i in (0, 1):
        got = outputs_and_gradients(lambda *a, i=i: operation("attention", ())(*a)[i], inputs, range(14))
        want = outputs_and_gradients(lambda *a, i=i: formula("attention", ())(*a)[i], inputs, range(14))
        for a, b in zip(sum(got, []), sum(want, []), strict=True):
            assert error(a, b) < 1e-12


@SUBLAYER
def test_what_cannot_be_is_refused(name):
    inputs = [*own_inputs(name), *updates(("q",) if name == "ffn" else ("w1",))]
    names = ("q",) if name == "ffn" else ("w1",)
    with pytest.raises(ValueError, match="got low-rank updates of .*, want some of"):
        operation(name, names)(*inputs)
    with pytest.raises(ValueError, match="chunk: got 0, want"):
        operation(name, (), chunk=0)(*own_inputs(name))
