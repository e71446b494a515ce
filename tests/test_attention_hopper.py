"""Attention for sm_90a in CUDA C++, run on a CPU by csrc/sim: TMA, mbarriers, WGMMA, named barriers.

Faults planted in the source have to be caught by the same checks.
"""

import pytest
import torch
from cuda_sim import build, build_faulty, missing
from fused import assert_as_good_as_torch, error, needs_triton, normal, strided
from test_attention_fp8 import exact, quantized, values_of
from test_cuda_kernels import watch

from prfl_bench.hopper_product import hopper_product
from prfl_kernels import cuda_kernels, dispatch
from prfl_kernels import extension as compiled
from prfl_kernels.attention import cuda as attention_hopper
from prfl_kernels.attention.fp8 import BLOCK_N, attention_fp8, attention_fp8_reference
from prfl_kernels.attention.op import ORDER, RECORDS, attention_with_lse
from prfl_kernels.attention.reference import forward as reference_forward

pytestmark = [
    needs_triton,
    pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}"),
]
BF16 = torch.bfloat16
SCALE = 128**-0.5
KEYS = 176  # of a block where there are more than SHORT, as in csrc/cuda/attention_hopper.cu
SHORT = 1024


@pytest.fixture(autouse=True)
def kernels(monkeypatch, fresh_memory_is_nan):
    """The launchers on the simulation; memory that they do not write is NaN."""
    watched = watch(monkeypatch, build())
    yield watched
    watched.load_early(False)
    watched.use_multiprocessors(132)
    dispatch.configure("")


def qkv(batch, queries, keys, heads):
    return [normal(batch, n, heads, 128, dtype=BF16).cpu() for n in (queries, keys, keys)]


def forward(q, k, v):
    return attention_hopper.forward(q, k, v, SCALE)


def check(q, k, v):
    """out and lse err at most twice as much as plain torch in bfloat16."""
    exact_out, exact_lse = reference_forward(q.double(), k.double(), v.double(), SCALE)
    plain_out, plain_lse = reference_forward(q, k, v, SCALE)
    out, lse = forward(q, k, v)
    assert out.dtype == BF16 and lse.dtype == torch.float32
    assert error(out, exact_out) <= 2 * error(plain_out, exact_out) + 2**-9
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse) + 2**-20
    return out, lse


# Lengths that no tile divides, one block and more blocks than the ring has slots, one query, one key. Two
# tiles of queries and more than 32 are clusters; of an odd number the last block has nothing to do.
SHAPES = [
    (1, 1, 1, 1),
    (1, 70, 7 * KEYS - 1, 1),
    (1, 130, 6 * KEYS, 2),
    (1, 33 * 128 - 60, 20, 1),
]
# (shape, multiprocessors) of cross-attention, where a block computes several tiles of queries: keys of one
# block and of several, which stay in shared memory for a head or go through the ring anew; two blocks of
# a cluster, several clusters with unequal shares, blocks on their own.
CROSS = [
    ((2, 130, 1, 2), 2),
    ((1, 300, 64, 2), 1),
    ((1, 257, 88, 3), 2),
    ((2, 200, 256, 2), 4),
    ((1, 500, 257, 3), 4),
    ((2, 300, 257, 1), 1),
    ((1, 400, 512, 2), 2),
    ((2, 270, 512, 1), 4),
    ((1, 250, SHORT, 2), 2),
]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(kernels, shape, early):
    kernels.load_early(early)
    check(*qkv(*shape))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shape, multiprocessors", CROSS)
def test_many_tiles_of_queries_a_block(kernels, shape, multiprocessors, early):
    kernels.load_early(early)
    kernels.use_multiprocessors(multiprocessors)
    check(*qkv(*shape))
    (blocks, _, threads, _, cluster), *_ = kernels.launches
    assert blocks <= multiprocessors and threads == 384 and multiprocessors % cluster == 0


def test_bits_do_not_depend_on_the_number_of_multiprocessors(kernels):
    inputs, found = qkv(1, 500, 257, 2), []
    for multiprocessors in (2, 6, 132):
        kernels.use_multiprocessors(multiprocessors)
        found.append(forward(*inputs))
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))


def test_keys_that_fit_into_shared_memory_are_read_once_a_head(kernels):
    """... by a block or cluster that has all of the head's queries; more keys are read for every tile."""
    kernels.use_multiprocessors(2)
    for keys, times in ((257, 1), (512, 2)):
        q, k, v = qkv(1, 500, keys, 2)
        forward(q, k, v)
        assert [kernels.traffic[name][0] for name in "kv"] == [times * k.nbytes, times * v.nbytes]


def test_any_strides_give_the_same_bits():
    q, k, v = qkv(2, 40, 200, 2)
    want = forward(q, k, v)
    k2, v2 = torch.cat([k, v], -1).chunk(2, -1)
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([k, k[..., :1]], -1)[..., :128]  # rows begin at no multiple of 16 bytes
    for inputs in ((strided(q), strided(k), strided(v)), (by_head, k2, v2), (q, odd, v)):
        assert all(torch.equal(a, b) for a, b in zip(forward(*inputs), want, strict=True))
    one_head = k[:, :, :1].expand_as(k)  # a stride of zero
    check(q, one_head, v)


def test_large_scores(kernels):
    q, k, v = qkv(1, 300, 352, 1)
    kernels.use_multiprocessors(1)
    out, lse = check(60 * q, 60 * k, v)
    assert out.isfinite().all() and lse.isfinite().all()


def test_what_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for dtype, dim, why in ((BF16, 64, "head dim 64"), (torch.float16, 128, "float16")):
        with pytest.raises(ValueError, match=f"kernels: attention got cuda on cuda: it has no {why}$"):
            dispatch.runnable("attention", "cuda", "cuda", dtype, dim)


def test_a_launch_that_cannot_be_has_its_numbers(kernels):
    q, k, v = (cuda_kernels._view(a) for a in qkv(1, 3, 4, 1))
    odd = (*k[:3], 512, 129, 128)  # rows 258 bytes apart
    message = "attention_hopper: cuTensorMapEncodeTiled got k of sizes 1 4 1 128, strides 512 129 128"
    with pytest.raises(RuntimeError, match=message):
        kernels.attention_hopper_forward(
            q=q, k=odd, v=v, out=q, lse=q, batch=1, queries=3, keys=4, heads=1, scale=SCALE, stream=0
        )


# -- behind the dispatcher


def test_the_backend_is_forward_here_and_backward_in_triton(monkeypatch):
    """Gradients come from (q, k, v, out, lse): on this forward's as good as torch's own."""
    monkeypatch.setitem(RECORDS, "cuda", RECORDS["cuda"]._replace(probe=lambda *_: None))
    seen, backward = [], RECORDS["triton"].backward
    watched = RECORDS["triton"]._replace(backward=lambda *a: seen.append("triton") or backward(*a))
    monkeypatch.setitem(RECORDS, "triton", watched)
    dispatch.configure("attention=cuda")
    assert_as_good_as_torch(attention_with_lse, qkv(1, 70, 200, 1))
    assert seen


def test_it_is_no_default_and_says_why_it_is_absent(monkeypatch):
    assert "cuda" not in ORDER
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert dispatch.absence("attention", "cuda", "cuda", BF16) == "needs capability 9.0, got 10.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(compiled, "absence", lambda part, device: f"is not built: {part} {device}")
    assert dispatch.absence("attention", "cuda", "cuda", BF16) == "is not built: cuda cuda"
    monkeypatch.setattr(compiled, "absence", lambda part, device: None)
    assert dispatch.absence("attention", "cuda", "cuda", BF16) is None
    assert dispatch.absence("attention", "cuda", "cuda", torch.float16) == "has no float16"
    assert dispatch.absence("attention", "cuda", "cpu", BF16) == "needs a cuda device"


# -- e4m3


def fp8_inputs(batch, queries, keys, heads):
    q, k, v = (a.float() for a in qkv(batch, queries, keys, heads))
    return quantized(q, k, v)


def test_fp8_is_the_reference_with_its_blocks_turned_round():
    """The reference goes from the first block of keys to the last, the kernel back."""
    q8, q_scale, k8, k_scale, v8, v_scale = arguments = fp8_inputs(1, 150, 3 * BLOCK_N, 2)

    def turned(a, dim):
        return a.unflatten(dim, (-1, BLOCK_N)).flip(dim).flatten(dim, dim + 1)

    keys = turned(k8.float(), 1).to(k8.dtype), turned(k_scale, 1)
    values = turned(v8.float(), 3).to(v8.dtype)
    want, want_lse = attention_fp8_reference(q8, q_scale, *keys, values, v_scale, SCALE)
    out, lse = attention_hopper.launch_forward_fp8(*arguments, SCALE)
    assert error(out, want) <= 1.02 * error(want.bfloat16(), want)
    assert (lse - want_lse).abs().max() <= 2**-18


def check_fp8(arguments, factor=1.1, **product):
    """out errs at most `factor` times and lse twice as much as the reference (with a `product`)."""
    q8, q_scale, k8, k_scale, v8, v_scale = arguments
    q, k = q8.double() * q_scale.double()[..., None], k8.double() * k_scale.double()[..., None]
    want, want_lse, _, _ = exact(q, k, values_of(v8, v_scale, k8.shape[1]), SCALE)
    low, low_lse = attention_fp8_reference(*arguments, SCALE, **product)
    out, lse = attention_hopper.launch_forward_fp8(*arguments, SCALE)
    assert error(out, want) <= factor * error(low.bfloat16(), want)
    assert (lse - want_lse).abs().max() <= 2 * (low_lse - want_lse).abs().max() + 2**-20


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 130, 200, 2), (1, 100, 9 * BLOCK_N + 5, 1)])
def test_fp8_errs_as_the_reference(kernels, shape, early):
    kernels.load_early(early)
    check_fp8(fp8_inputs(*shape))


def test_fp8_is_a_choice_and_no_default(monkeypatch):
    arguments = fp8_inputs(1, 9, 20, 1)
    with pytest.raises(ValueError, match="attention_fp8 got cuda on cpu: it needs a cuda device"):
        dispatch.configure("attention_fp8=cuda")
        attention_fp8(*arguments)
    monkeypatch.setattr(dispatch, "absence", lambda *_: None)
    want = attention_hopper.launch_forward_fp8(*arguments, SCALE)
    assert all(torch.equal(a, b) for a, b in zip(attention_fp8(*arguments), want, strict=True))
    dispatch.configure("")
    assert "cuda" not in dispatch._BEST["cuda"]


# -- the built extension, not the simulation


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 32760, 512, 2), (2, 20000, 257, 3)])
def test_on_a_gpu(shape, monkeypatch):
    monkeypatch.undo()
    if why := dispatch.absence("attention", "cuda", "cuda", BF16):
        pytest.skip(f"cuda {why}")
    check(*(a.cuda() for a in qkv(*shape)))
    # Its tensor cores add fewer bits than the simulation's.
    check_fp8([a.cuda() for a in fp8_inputs(*shape)], 2, product=hopper_product)


# -- faults


FAULTS = {  # what is changed in the source
    "the producer waits for the wrong phase": (
        "empty[ring.slot], ring.phase ^ 1",
        "empty[ring.slot], ring.phase",
    ),
    "values are not waited for": ("      mbarrier_wait(&s.full[v_slot], ring.phase);\n", ""),
    "scores are read before they are there": ("      mma_wait<1>();\n", ""),
    "values are given back while in use": ("      mma_wait<0>();\n      if (rel", "      if (rel"),
    "one key too many": (">= valid", "> valid"),
    "too many bytes are announced": ("mbarrier_expect(asked, kQ", "mbarrier_expect(asked, 2 * kQ"),
    "a block takes its partner's tiles for its own": (
        "releases = lane < int(cluster_size())",
        "releases = lane < 1",
    ),
    "a block ends before its partner": ("  cluster_wait();\n#else", "#else"),
    "nobody gets the last turn of the first group": ("more || group == 0", "more"),
    "the next queries come before the results are written": (
        "      mbarrier_wait(&s.written[group][ring.slot], ring.phase ^ 1);\n",
        "",
    ),
    "the next queries come before the results are read": ("      bulk_wait_read<0>();\n", ""),
    "the next queries are not waited for": (
        "    mbarrier_wait(&s.asked[group][queries.slot], queries.phase);\n",
        "",
    ),
    "the next scores are read before they are there": ("    mma_wait<1>();\n    next", "    next"),
    "results are written before they are there": (
        "    mma_wait<0>();\n    if (release) mbarrier_arrive_at(&s.empty[v_slot], lane);\n    format",
        "    if (release) mbarrier_arrive_at(&s.empty[v_slot], lane);\n    format",
    ),
    "results are divided by the next sums": (
        "    write_lse<Format>(a, done, group, softmax, inverse);\n    mma_wait<1>();\n"
        "    next.scale(scores, s, k_slot);\n    begin(next.factor);\n",
        "    mma_wait<1>();\n    next.scale(scores, s, k_slot);\n    begin(next.factor);\n"
        "    write_lse<Format>(a, done, group, softmax, inverse);\n",
    ),
    "results are added to the next ones": ("    clear();\n  }\n", "    Format::round(p, scores);\n  }\n"),
    "keys of a head stay for the next one": ("phase ^= !stays", "phase ^= 0"),
}


def runs_right():
    """Whether attention runs and is as good as torch's, with loads late and early: of keys that stay in
    shared memory and of keys that do not."""
    library = cuda_kernels.library()
    library.use_multiprocessors(2)
    for shape in ((1, 400, 257, 2), (1, 400, 570, 1)):
        inputs = qkv(*shape)
        for early in (False, True):
            library.load_early(early)
            try:
                check(*inputs)
            except (RuntimeError, AssertionError):
                return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, tmp_path, monkeypatch):
    watch(
        monkeypatch, build_faulty(tmp_path, "cuda/attention_hopper.cu", "attention_hopper.cu", *FAULTS[fault])
    )
    assert not runs_right()


def test_without_a_fault_nothing_is_caught():
    assert runs_right()
