"""Attention in C++ for the CPU, in every instruction set that runs here, against plain torch."""

import os
from functools import partial

import pytest
import torch
from fused import (
    assert_as_good_as_torch,
    error,
    laid_out,
    normal,
    on_reference,
    outputs_and_gradients,
    strided,
)
from rounding import rounding

from prfl_kernels import dispatch, extension, processor
from prfl_kernels.attention.op import attention, attention_with_lse

if why := extension.absence("cpu", "cpu"):
    pytest.skip(f"prfl_kernels._C {why}", allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16
BLOCKS = (1, 300, 530, 2, 32)  # three blocks of keys and of queries, both with a rest


@pytest.fixture(autouse=True)
def kernels(fresh_memory_is_nan):
    """attention on the C++ kernels."""
    dispatch.configure("attention=cpu")
    yield
    dispatch.configure("")


@pytest.fixture(params=extension.isas())
def isa(request):
    extension.use_isa(request.param)
    yield
    extension.use_isa(os.environ.get("PRFL_CPU_ISA", ""))


def qkv(batch=2, queries=37, keys=61, heads=2, dim=64, dtype=F32):
    return [normal(batch, n, heads, dim, dtype=dtype).cpu() for n in (queries, keys, keys)]


SIZES = {
    "short": (2, 37, 61, 2, 64),
    "blocks": BLOCKS,
    "cross": (1, 150, 20, 3, 128),
    "one query": (1, 1, 50, 2, 32),
    "one key": (1, 50, 1, 2, 16),
    "no whole vectors": (3, 33, 31, 1, 80),
    "odd head dim": (1, 9, 7, 2, 33),
    "largest head dim": (1, 40, 45, 1, 256),
    "smallest": (1, 1, 1, 1, 1),
}


# Torch's own kernel, which sums up delta from the rounded output as ours does; in float64 the formula.
by_torch = on_reference(attention_with_lse, "attention=sdpa")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_as_good_as_torchs(isa, size, dtype):
    """out, lse, dq, dk, dv, with gradients of both results."""
    assert_as_good_as_torch(attention_with_lse, qkv(*SIZES[size], dtype=dtype), by_torch)


# At the ends of units of 16 and 24 keys, of blocks of 240 and 256, and of panels of 8, 16 and 32 queries.
ENDS = [  # (queries, keys, dim)
    (33, 2, 5), (64, 15, 17), (7, 16, 33), (128, 17, 8), (9, 23, 1), (31, 24, 130), (17, 25, 40), (63, 48, 3),
    (65, 239, 16), (32, 240, 7), (129, 241, 34), (16, 255, 9), (8, 256, 66), (127, 257, 31),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_heads_of_any_length_keep_to_their_memory(isa, dtype):
    """What a block reads or writes past its own is of the next head or operand."""
    for queries, keys, dim in ENDS:
        inputs = qkv(1, queries, keys, 3, dim, dtype)
        assert_as_good_as_torch(attention_with_lse, inputs, by_torch)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", ["short", "blocks", "cross", "odd head dim", (1, 40, 480, 1, 32)])
@pytest.mark.parametrize("repeats, scaled", [(2, 1), (435, 1), (435, 64)])
def test_a_last_key_that_counts_more_is_as_good_as_torch_with_that_many(isa, size, dtype, repeats, scaled):
    """480 keys are two whole blocks of AVX2; scaled: scores of hundreds."""
    q, k, v = qkv(*SIZES.get(size, size), dtype=dtype)

    def literally(q, k, v):
        return by_torch(q, laid_out(k, repeats), laid_out(v, repeats))

    assert_as_good_as_torch(partial(attention_with_lse, repeats=repeats), [scaled * q, k, v], literally)


@pytest.mark.parametrize("repeats", [1, 2, 435])
def test_a_single_key(isa, repeats):
    """A text of padding alone. dq and dk are those of lse, and the rounding of two sums that are equal."""
    inputs = qkv(2, 50, 1, 2, 16)
    run = partial(attention_with_lse, repeats=repeats)
    assert torch.equal(run(*inputs)[0], inputs[2].expand(-1, 50, -1, -1))
    assert_as_good_as_torch(run, inputs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_without_lse_and_alone(isa, dtype):
    inputs = qkv(*BLOCKS, dtype=dtype)
    assert_as_good_as_torch(attention, inputs)
    whole = outputs_and_gradients(attention, inputs)[1]
    for wanted in ([0], [1], [0, 2]):
        alone = outputs_and_gradients(attention, inputs, wanted)[1]
        assert all(torch.equal(whole[i], a) for i, a in zip(wanted, alone, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides(isa, dtype):
    """Slices of a packed q, k, v, gaps, an odd offset, broadcast samples; other layouts are copied."""
    packed = normal(2, 70, 3, 2, 32, dtype=dtype).cpu()
    inputs = list(packed.unbind(2))
    dense = [a.contiguous() for a in inputs]
    layouts = [
        inputs,
        [strided(a) for a in dense],
        [torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape) for a in dense],
        [a.mT.contiguous().mT for a in dense],
    ]
    want = sum(outputs_and_gradients(attention_with_lse, dense), [])
    for layout in layouts:
        got = sum(outputs_and_gradients(attention_with_lse, layout), [])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    q, k, v = dense
    broadcast = attention(q, k[:1].expand_as(k), v[:1].expand_as(v))
    assert torch.equal(broadcast[:1], attention(q[:1], k[:1], v[:1]))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_bits_on_any_number_of_threads(isa, heads, dtype):
    """One head: blocks of keys wait for each other with their part of dq."""
    inputs, before = qkv(1, 600, 900, heads, 32, dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4, 4, 4, 4):
            torch.set_num_threads(threads)
            found.append(sum(outputs_and_gradients(attention_with_lse, inputs), []))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_many_samples_have_the_bits_of_each_alone(isa, dtype):
    """They are worked on some at a time, here in four groups, the last of them smaller."""
    inputs = [strided(a) for a in qkv(37, 19, 11, 4, 32, dtype)]
    directions = normal(37, 19, 4, 32, dtype=dtype).cpu(), normal(37, 4, 19).cpu()

    def run(at):
        given = [a[at].detach().requires_grad_() for a in inputs]
        outputs = attention_with_lse(*given)
        return [*outputs, *torch.autograd.grad(outputs, given, [d[at] for d in directions])]

    together = run(slice(None))
    for i in (0, 9, 10, 36):
        at = slice(i, i + 1)
        for found, want in zip(together, run(at), strict=True):
            assert torch.equal(found[at], want)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_scores(isa, dtype):
    """Scores of several thousand, of both signs and on a common offset, that exp would overflow on."""
    q, k, v = qkv(1, 40, 300, 2, 64, dtype)
    assert_as_good_as_torch(attention_with_lse, [q * 64, k * 32, v], by_torch)
    (out, lse), _ = outputs_and_gradients(attention_with_lse, [q.abs() * 64, -k.abs() * 64, v])
    assert out.isfinite().all() and (lse < -1000).all()


def test_a_query_on_one_key_returns_its_value(isa):
    q, k, v = qkv(1, 20, 1, 1, 64)
    out, lse = attention_with_lse(q, k, v)
    assert torch.equal(out, v.expand_as(out))
    assert error(lse[0, 0], (q[0, :, 0].double() @ k[0, 0, 0].double()) / 8) <= rounding(64)


def test_nan_stays_nan(isa):
    """In the rows that it reaches and no other."""
    q, k, v = qkv(1, 40, 300, 1, 32)
    q[0, 7] = float("nan")
    (out, lse), (dq, dk, _) = outputs_and_gradients(attention_with_lse, [q, k, v])
    assert out[0, 7].isnan().all() and lse[0, 0, 7].isnan() and dq[0, 7].isnan().all()
    assert dk.isnan().all()
    assert not any(a.isnan().any() for a in (out[0, 8:], lse[0, 0, 8:], dq[0, 8:]))


# The choice


def test_head_dims_and_dtypes_that_it_refuses():
    wide = qkv(1, 3, 4, 1, 257)
    with pytest.raises(ValueError, match="^kernels: attention got cpu on cpu: it has no head dim 257$"):
        attention(*wide)
    with pytest.raises(ValueError, match="it has no float16$"):
        attention(*qkv(1, 3, 4, 1, 16, torch.float16))
    dispatch.configure("")
    assert dispatch.implementation("attention", wide[0]) == "sdpa"
    assert dispatch.default("attention", "cpu", F32, 257) == ("sdpa", {"cpu": "has no head dim 257"})
    assert_as_good_as_torch(attention, wide)


def test_it_is_the_default_and_doctor_says_so(monkeypatch):
    monkeypatch.setattr(processor, "amx_absence", lambda: "the processor has no AMX")
    dispatch.configure("")
    for dtype in (F32, BF16):
        assert dispatch.default("attention", "cpu", dtype, 128) == ("cpu", {})
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    if not torch.cuda.is_available():
        assert row[1] == "cpu" and "for head dims up to 256" in row[2]
    assert dispatch.absence("attention", "cpu", "cuda") == "needs a cpu device"


def test_without_the_extension_torchs_own_runs(monkeypatch):
    monkeypatch.setattr(processor, "amx_absence", lambda: "the processor has no AMX")
    dispatch.configure("")
    monkeypatch.setattr(extension, "_load", lambda: (None, "is not built: no compiler"))
    assert dispatch.default("attention", "cpu", BF16) == ("sdpa", {"cpu": "is not built: no compiler"})
    dispatch.configure("attention=cpu")
    with pytest.raises(ValueError, match="attention got cpu on cpu: it is not built: no compiler"):
        dispatch.check("cpu")
