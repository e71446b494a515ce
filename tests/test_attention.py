"""attention() by our own implementations and torch's: values, gradients, repeated keys, registration."""

import math
from functools import partial

import pytest
import torch
from attention_cases import BF16, CPU, formula, literal, qkv
from fused import assert_all_as_right, assert_as_good_as_torch, error, needs_triton, outputs_and_gradients
from rounding import assert_as_right, longest_sum, rounding
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prfl_kernels import dispatch
from prfl_kernels.attention.op import RECORDS, attention, attention_with_lse


@pytest.fixture(autouse=True)
def default_table():
    yield
    dispatch.configure("")


# The reference and torch's own


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("dim", [16, 128])
def test_values_and_gradients_are_those_of_the_formula(name, dim):
    torch.manual_seed(0)
    inputs = [a.cpu() for a in qkv(dim=dim)]
    dispatch.configure(f"attention={name}")
    assert_as_good_as_torch(attention_with_lse, inputs, formula)


def test_gradcheck_in_float64():
    torch.manual_seed(1)
    inputs = [a.cpu().double().requires_grad_() for a in qkv(1, 3, 4, 2, 8)]
    assert torch.autograd.gradcheck(attention_with_lse, inputs)


# Our own kernels behind the operation


@needs_triton
@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (torch.float32, (2, 37, 61, 2, 64)),
        (BF16, (2, 131, 150, 2, 64)),
        (BF16, (1, 70, 257, 1, 128)),
        (torch.float16, (1, 150, 40, 1, 32)),
        (torch.float32, (1, 5, 3, 2, 16)),
    ],
)
def test_triton_is_as_good_as_torch(triton, dtype, sizes):
    torch.manual_seed(2)
    assert_as_good_as_torch(attention_with_lse, qkv(*sizes, dtype=dtype))


@needs_triton
@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_triton_gradients_alone(triton, wanted):
    torch.manual_seed(3)
    inputs = qkv(1, 40, 35, 1)
    whole = outputs_and_gradients(attention, inputs)[1]
    alone = outputs_and_gradients(attention, inputs, wanted)[1]
    assert all(torch.equal(whole[i], a) for i, a in zip(wanted, alone, strict=True))


@needs_triton
@pytest.mark.parametrize("name", ["triton", "reference", "sdpa", CPU])
@pytest.mark.parametrize("repeats", [1, 3])
def test_opcheck_and_fullgraph(name, repeats):
    if torch.cuda.is_available() and name == "sdpa":
        pytest.skip("torch's flash attention on a GPU has no float32")
    dispatch.configure(f"attention={name}")
    torch.manual_seed(4)
    inputs = [a.requires_grad_() for a in qkv(1, 9, 7, 2, 16)]
    torch.library.opcheck(torch.ops.prfl.attention.default, (*inputs, 0.25, name, repeats))
    run = partial(attention, repeats=repeats)
    eager = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    made = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    exact = [a.detach().double().requires_grad_() for a in inputs]
    exact = torch.autograd.grad(literal(repeats)(*exact)[0].square().sum(), exact)
    for a, want, b in zip(made, exact, eager, strict=True):
        assert_as_right(a, want, b, rounding(longest_sum(inputs)))


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_empty_and_no_keys(name):
    dispatch.configure(f"attention={name}")
    for sizes in ((0, 3, 4), (2, 0, 4)):
        inputs = qkv(*sizes, 2, 16)
        (out,), gradients = outputs_and_gradients(attention, inputs)
        assert out.shape == inputs[0].shape and not any(g.any() for g in gradients)
    with pytest.raises(ValueError, match="attention: got no keys, want at least one"):
        attention(*qkv(1, 3, 0, 1, 16))


def test_what_does_not_fit_is_named():
    q, k, v = qkv(1, 3, 4, 2, 16)
    for wrong, message in (
        ((q[0], k, v), r"got q \[3, 2, 16\], want \[B, Lq, H, D\]"),
        ((q, k, v[:, :3]), r"got v \[1, 3, 2, 16\], want \[1, 4, 2, 16\]"),
        ((q, k[..., :8], v), r"got k \[1, 4, 2, 8\], want \[1, 4, 2, 16\]"),
        ((q, k.half(), v), "got k torch.float16, want torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*wrong)
    with pytest.raises(ValueError, match="^attention: got 0 repeats of the last key, want at least 1$"):
        attention(q, k, v, repeats=0)


# A last key that counts several times, as often as it is laid out for whoever knows no better

REPEATED = ["reference", pytest.param("triton", marks=needs_triton), CPU, "sdpa"]


def floor(name, inputs, repeats):
    """torch's own gets the last key laid out and sums up that many equal terms."""
    terms = inputs[1].shape[1] + repeats - 1 if name == "sdpa" else 0
    return max(rounding(longest_sum(inputs)), rounding(terms, alike=True))


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("keys", [1, 61, 64])
@pytest.mark.parametrize("repeats", [2, 435])
def test_a_repeated_key_is_that_many_keys(name, keys, repeats):
    """One key, blocks with a rest, whole blocks: values, and gradients of out and lse."""
    if torch.cuda.is_available() and name == "sdpa":
        pytest.skip("torch's flash attention on a GPU has no float32")
    dispatch.configure(f"attention={name}")
    torch.manual_seed(7)
    inputs = qkv(2, 37, keys, 2, 16)
    got = outputs_and_gradients(partial(attention_with_lse, repeats=repeats), inputs)
    exact = outputs_and_gradients(literal(repeats), [a.double() for a in inputs])
    plain = outputs_and_gradients(literal(repeats), inputs)
    assert_all_as_right(got, exact, plain, floor(name, inputs, repeats))


@pytest.mark.parametrize("name", REPEATED)
def test_once_is_the_ordinary_attention_to_the_bit(name):
    dispatch.configure(f"attention={name}")
    inputs = [a.to(BF16) for a in qkv(1, 37, 20, 2, 16)]
    want = outputs_and_gradients(attention_with_lse, inputs)
    got = outputs_and_gradients(partial(attention_with_lse, repeats=1), inputs)
    assert all(torch.equal(a, b) for a, b in zip(sum(got, []), sum(want, []), strict=True))


@needs_triton
@pytest.mark.parametrize(
    "dtype, sizes",
    [(BF16, (1, 150, 128, 2, 64)), (BF16, (1, 70, 257, 1, 128)), (torch.float16, (1, 33, 40, 1, 32))],
)
def test_triton_with_a_repeated_key_is_as_good_as_torch_with_all_of_them(triton, dtype, sizes):
    torch.manual_seed(8)
    run = partial(attention_with_lse, repeats=385)
    assert_as_good_as_torch(run, qkv(*sizes, dtype=dtype), literal(385, by_torch))


def by_torch(q, k, v):
    """Torch's own kernel, which sums up delta from the rounded output as ours does."""
    name = "reference" if q.dtype == torch.float64 else "sdpa"
    return torch.ops.prfl.attention(q, k, v, q.shape[-1] ** -0.5, name)


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_key_with_large_scores(name):
    """The repeats join the score before the maximum is taken: nothing overflows where exp would, and a key
    that has all of the weight has log(repeats) in lse."""
    if torch.cuda.is_available() and name == "sdpa":
        pytest.skip("torch's flash attention on a GPU has no float32")
    dispatch.configure(f"attention={name}")
    torch.manual_seed(9)
    q, k, v = qkv(1, 40, 70, 1, 64)
    k[:, -1] = 3 * q[0, 0, 0]  # the most of the first query, by far
    inputs = [256 * q, 128 * k, v]
    run = partial(attention_with_lse, repeats=1000)
    (out, lse), gradients = outputs_and_gradients(run, inputs)
    assert all(a.isfinite().all() for a in (out, lse, *gradients))
    assert error(out[0, 0, 0], v[0, -1, 0]) <= floor(name, inputs, 1000)
    inputs = qkv(1, 40, 1, 1, 64)
    more = run(*inputs)[1] - attention_with_lse(*inputs)[1]
    assert error(more, torch.full_like(more, math.log(1000))) <= floor(name, inputs, 1000)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
def test_selective_checkpointing_computes_attention_once(name, monkeypatch):
    """A policy that keeps the operation keeps out and lse, whichever back end computes them."""
    calls, backend = [], RECORDS[name]

    def counted(*arguments):
        calls.append(name)
        return backend.forward(*arguments)

    dispatch.configure(f"attention={name}")
    monkeypatch.setitem(RECORDS, name, backend._replace(forward=counted))

    def policy(context, op, *args, **kwargs):
        keep = op is torch.ops.prfl.attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(5)
    inputs = [a.requires_grad_() for a in qkv(1, 9, 7, 2, 16)]

    def branch(q, k, v):
        return attention(q.sin(), k, v).sin()

    plain = torch.autograd.grad(branch(*inputs).sum(), inputs)
    calls.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(branch, *inputs, use_reentrant=False, context_fn=contexts)
    made = torch.autograd.grad(out.sum(), inputs)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))
