"""attention() behind every back end: the contract, the choice, and what the libraries' versions return."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fused import (
    assert_all_as_right,
    assert_as_good_as_torch,
    error,
    laid_out,
    needs_triton,
    normal,
    outputs_and_gradients,
)
from library_forms import FA3, FA4, install
from rounding import assert_as_right, longest_sum, rounding
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prfl_kernels import dispatch, jit, processor
from prfl_kernels.attention import libraries
from prfl_kernels.attention.op import RECORDS, attention, attention_with_lse

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def default_table():
    yield
    dispatch.configure("")
    libraries._missing.cache_clear()


def qkv(batch=2, queries=37, keys=61, heads=2, dim=64, dtype=torch.float32):
    return [normal(batch, n, heads, dim, dtype=dtype) for n in (queries, keys, keys)]


def formula(q, k, v):
    """(out, lse) as the definition says, differentiated by autograd."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    return (s.softmax(-1) @ v).transpose(1, 2), s.logsumexp(-1)


def literal(repeats, run=formula):
    """`run` with the last key and value laid out that often."""
    return lambda q, k, v: run(q, laid_out(k, repeats), laid_out(v, repeats))


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


CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or dispatch.absence("attention", "cpu", "cpu") is not None,
        reason="the C++ kernels are not built, or a GPU is tested",
    ),
)


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


# Who is chosen


def on_cuda(monkeypatch, major=9):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers.ops", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    libraries._missing.cache_clear()


def test_the_default_on_cuda_is_the_first_that_runs(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "triton", jit)
    name, passed = dispatch.default("attention", "cuda", BF16)
    assert name == "triton" and list(passed) == ["fa3", "fa3_hub", "fa4", "cudnn", "fa2"]
    assert "flash_attn_interface" in passed["fa3"] and passed["cudnn"] == "torch has no cuDNN"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert dispatch.default("attention", "cuda", BF16)[0] == "cudnn"
    install(monkeypatch, FA4["2026-08"])
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa4"
    install(monkeypatch, FA3["2025-12"])
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa3"
    assert dispatch.default("attention", "cuda", torch.float32)[0] == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    name, passed = dispatch.default("attention", "cuda", BF16)
    needs = "needs capability 9.0, got 10.0"
    assert (name, passed) == ("fa4", {"fa3": needs, "fa3_hub": needs})


def test_the_default_backward_of_the_cuda_forward_is_the_first_that_runs(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "triton", jit)
    x = SimpleNamespace(dtype=BF16, device=torch.device("cuda"), shape=(1, 9, 2, 128))
    assert dispatch.backward_of("attention", x, "cuda") == "triton"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert dispatch.backward_of("attention", x, "cuda") == "triton"  # on Hopper
    install(monkeypatch, FA3["2025-12"])
    assert dispatch.backward_of("attention", x, "cuda") == "fa3"
    assert dispatch.backward_of("attention", x) == dispatch.implementation("attention", x) == "fa3"
    others = set(RECORDS) - {"cuda", "cudnn"}
    assert all(dispatch.backward_of("attention", x, name) == name for name in others)
    dispatch.configure("attention=cuda,attention_backward=triton")
    assert dispatch.backward_of("attention", x, "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert row[1] == "cuda" and "backward by triton" in row[2]


@needs_triton
def test_without_any_backward_that_fits_the_cuda_forward_is_refused(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "INTERPRETED", False)
    monkeypatch.setattr(jit, "triton", None)
    x = SimpleNamespace(dtype=BF16, device=torch.device("cuda"), shape=(1, 9, 2, 128))
    want = "kernels: attention_backward got triton on cuda: it triton is not installed"
    with pytest.raises(ValueError, match=want):
        dispatch.backward_of("attention", x, "cuda")


@needs_triton
@pytest.mark.parametrize("forward", ["reference", "triton", CPU, "sdpa"])
@pytest.mark.parametrize("backward", ["reference", "triton", CPU, "sdpa"])
def test_any_backward_follows_any_forward(forward, backward, monkeypatch):
    """The gradients of out and lse, by the backward that was chosen and no other; and under compile."""
    if torch.cuda.is_available():
        pytest.skip("torch's flash attention on a GPU has no float32")
    seen, run = [], RECORDS[backward].backward
    watched = RECORDS[backward]._replace(backward=lambda *a: seen.append(backward) or run(*a))
    monkeypatch.setitem(RECORDS, backward, watched)
    dispatch.configure(f"attention={forward},attention_backward={backward}")
    torch.manual_seed(10)
    inputs = qkv(1, 37, 21, 2, 16)
    assert_as_good_as_torch(partial(attention_with_lse, repeats=3), inputs, literal(3))
    assert seen
    seen.clear()
    torch.compiler.reset()
    outputs_and_gradients(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs)
    assert seen


def test_a_backward_is_chosen_by_name():
    with pytest.raises(ValueError, match="^kernels: got 'cuda' for attention_backward, want one of ref"):
        dispatch.configure("attention_backward=cuda")
    q, k, v = qkv(1, 3, 4, 1, 16)
    with pytest.raises(ValueError, match="^attention: got backward 'cuda', want one of reference, "):
        torch.ops.prfl.attention(q, k, v, 0.25, "reference", 1, "cuda")
    if not torch.cuda.is_available():
        dispatch.configure("attention_backward=fa3")
        with pytest.raises(ValueError, match="attention_backward got fa3 on cpu: it needs a cuda device"):
            dispatch.check("cpu")


def test_the_default_on_the_cpu(monkeypatch):
    monkeypatch.setattr(processor, "amx_absence", lambda: "the processor has no AMX")
    why = dispatch.absence("attention", "cpu", "cpu")
    assert dispatch.default("attention", "cpu", BF16) == (("sdpa", {"cpu": why}) if why else ("cpu", {}))
    assert dispatch.default("attention", "cpu", torch.float16)[0] == "sdpa"
    assert dispatch.default("attention", "cpu", torch.float64)[0] == "reference"


def test_a_reason_is_kept_and_named(monkeypatch):
    """Broken builds and versions that do not fit, asked once."""
    on_cuda(monkeypatch)
    install(monkeypatch, {"flash_attn_interface": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="attention got fa3 on cuda: it flash_attn_interface: .*attn_func"):
        dispatch.configure("attention=fa3")
        dispatch.check("cuda")
    install(monkeypatch, FA3["2025-12"])
    dispatch.check("cuda")
    calls = []
    libraries._missing.cache_clear()
    monkeypatch.setattr(
        libraries, "import_module", lambda name: calls.append(name) or SimpleNamespace()
    )
    for _ in range(3):
        assert dispatch.absence("attention", "fa3", "cuda", BF16)
    assert calls == ["flash_attn_interface"]


def test_what_was_chosen_and_cannot_run_raises():
    if not torch.cuda.is_available():
        for name in ("fa3", "cudnn", "xformers"):
            dispatch.configure(f"attention={name}")
            with pytest.raises(ValueError, match=f"attention got {name} on cpu: it needs a cuda device"):
                attention(*qkv(1, 3, 3, 1, 16))
    dispatch.configure("attention=sdpa")
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert row[1] == "sdpa" and row[2].endswith("chosen by configuration or PRFL_KERNELS")


def test_doctor_names_every_better_one_and_why_not(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    for name in ("fa3", "fa4", "cudnn", "fa2"):
        assert f"; {name} " in row[2]
