"""Attention for sm_90a in CUDA C++, run on a CPU by csrc/sim: TMA, mbarriers, WGMMA, named barriers.

Faults planted in the source have to be caught by the same checks.
"""

import ctypes
import subprocess
from types import SimpleNamespace

import pytest
import torch
from cuda_sim import CSRC, compiler, missing
from cuda_sim import simulation as simulated
from fused import assert_as_good_as_torch, error, needs_triton, normal, strided
from test_fp8 import exact, quantized, values_of

from prfl_kernels import attention_hopper, compiled, cuda_kernels, table
from prfl_kernels.attention import attention_with_lse
from prfl_kernels.attention_backends import BACKENDS, ORDER, absence, reference_forward
from prfl_kernels.attention_fp8 import BLOCK_N, attention_fp8_reference

pytestmark = [
    needs_triton,
    pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}"),
]
BF16 = torch.bfloat16
SCALE = 128**-0.5
KEYS, SLOTS = 176, 4  # of a block, and of the ring: as in csrc/cuda/attention_formats.h


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The launchers on the simulation; memory that they do not write is NaN."""
    simulation = simulated()
    monkeypatch.setattr(cuda_kernels, "library", lambda: simulation)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield simulation
    torch.use_deterministic_algorithms(False)
    simulation.eager(False)


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
    (2, 130, 2 * KEYS, 2),
    (1, 257, KEYS - 1, 1),
    (1, 70, (SLOTS + 2) * KEYS + 9, 1),
    (1, 140, SLOTS * KEYS + 9, 1),
    (1, 33 * 128 - 60, 20, 1),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(kernels, shape, eager):
    kernels.eager(eager)
    check(*qkv(*shape))


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


def test_large_scores():
    q, k, v = qkv(1, 64, 2 * KEYS, 1)
    out, lse = check(60 * q, 60 * k, v)
    assert out.isfinite().all() and lse.isfinite().all()


def test_what_does_not_fit_is_named():
    q, k, v = qkv(1, 3, 4, 1)
    with pytest.raises(ValueError, match="attention: got head dim 64, want 128 for cuda"):
        forward(*(a[..., :64] for a in (q, k, v)))
    with pytest.raises(ValueError, match="attention: got torch.float16, want bfloat16 for cuda"):
        forward(*(a.half() for a in (q, k, v)))


def test_a_launch_that_cannot_be_has_its_numbers(kernels):
    q, k, v = (cuda_kernels._view(a) for a in qkv(1, 3, 4, 1))
    odd = (k[0], k[1], 512, 129, 128)  # rows 258 bytes apart
    message = "attention_hopper: cuTensorMapEncodeTiled got k of sizes 1 4 1 128, strides 512 129 128"
    with pytest.raises(RuntimeError, match=message):
        kernels.attention_hopper(q, odd, v, q, q, 1, 3, 4, 1, SCALE, 0)


# -- behind the dispatcher


def test_the_backend_is_forward_here_and_backward_in_triton(monkeypatch):
    """Gradients come from (q, k, v, out, lse): on this forward's as good as torch's own."""
    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"]._replace(device=None, capabilities=(0, 99)))
    monkeypatch.setattr(compiled, "absence", lambda part, device: None)
    monkeypatch.setitem(table._overrides, "attention", "cuda")
    assert_as_good_as_torch(attention_with_lse, qkv(1, 70, 200, 1))


def test_it_is_no_default_and_says_why_it_is_absent(monkeypatch):
    assert "cuda" not in ORDER
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert absence("cuda", "cuda", BF16) == "needs capability 9.0, got 10.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(compiled, "absence", lambda part, device: f"is not built: {part} {device}")
    assert absence("cuda", "cuda", BF16) == "is not built: cuda cuda"
    monkeypatch.setattr(compiled, "absence", lambda part, device: None)
    assert absence("cuda", "cuda", BF16) is None
    assert absence("cuda", "cuda", torch.float16) == "has no float16"
    assert absence("cuda", "cpu", BF16) == "needs a cuda device"


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


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 130, 200, 2), (1, 100, 9 * BLOCK_N + 5, 1)])
def test_fp8_errs_as_the_reference(kernels, shape, eager):
    kernels.eager(eager)
    q8, q_scale, k8, k_scale, v8, v_scale = arguments = fp8_inputs(*shape)
    q, k = q8.double() * q_scale.double()[..., None], k8.double() * k_scale.double()[..., None]
    want, want_lse, _, _ = exact(q, k, values_of(v8, v_scale, shape[2]), SCALE)
    low, low_lse = attention_fp8_reference(*arguments, SCALE)
    out, lse = attention_hopper.launch_forward_fp8(*arguments, SCALE)
    assert error(out, want) <= 1.1 * error(low.bfloat16(), want)
    assert (lse - want_lse).abs().max() <= 2 * (low_lse - want_lse).abs().max() + 2**-20


# -- faults


FAULTS = {  # what is changed in the source
    "the producer waits for the wrong phase": ("ring.phase ^ 1", "ring.phase"),
    "values are not waited for": ("    mbarrier_wait(&s.full[v_slot], ring.phase);\n", ""),
    "scores are read before they are there": ("    mma_wait<1>();\n", ""),
    "values are given back while in use": ("    mma_wait<0>();\n    if (lane", "    if (lane"),
    "one key too many": (">= valid", "> valid"),
    "too many bytes are announced": ("&s.loaded, kConsumers", "&s.loaded, 2 * kConsumers"),
    "a block takes its partner's tiles for its own": ("lane < ranks", "lane < 1"),
    "a block ends before its partner": ("  cluster_wait();\n#else", "#else"),
}
RUN = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT bool run(const int64_t (*t)[5], const int64_t* n, float scale) {
  using namespace prfl::cuda;
  const auto at = [](const int64_t (&a)[5], int64_t length) {
    return Sequence{reinterpret_cast<void*>(a[0]), length, {a[2], a[3], a[4]}};
  };
  void *out = reinterpret_cast<void*>(t[3][0]), *lse = reinterpret_cast<void*>(t[4][0]);
  try {
    const Sequence q = at(t[0], n[1]), k = at(t[1], n[2]), v = at(t[2], n[2]);
    attention_hopper(q, k, v, out, static_cast<float*>(lse), n[0], n[3], scale, nullptr);
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}
"""


@pytest.fixture(scope="module")
def cusim(tmp_path_factory):
    target = tmp_path_factory.mktemp("cusim") / "cusim.o"
    subprocess.run([*compiler(CSRC / "sim"), "-c", CSRC / "sim/cusim.cpp", "-o", target], check=True)
    return target


def changed_library(folder, cusim, old, new):
    """The kernel with `old` replaced by `new`, as a library with the function run."""
    text = (CSRC / "cuda/attention_hopper.cu").read_text()
    assert old in text
    source, library = folder / "changed.cpp", folder / "changed.so"
    source.write_text(text.replace(old, new) + RUN)
    command = [*compiler(CSRC, CSRC / "cuda", CSRC / "sim"), "-O1"]
    subprocess.run([*command, "-shared", source, cusim, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def runs_right(library):
    """Whether the library's attention runs and is as good as torch's, with loads late and early."""

    def attention_hopper(*arguments):
        views, sizes, scale = arguments[:5], arguments[5:9], arguments[9]
        rows = [(*view, *[0] * (5 - len(view))) for view in views]
        flat = (ctypes.c_int64 * 25)(*sum(rows, ()))
        if not library.run(flat, (ctypes.c_int64 * 4)(*sizes), ctypes.c_float(scale)):
            raise RuntimeError("the simulation has found a fault")

    cuda_kernels.library = lambda: SimpleNamespace(attention_hopper=attention_hopper)
    for eager in (0, 1):
        library.cusim_eager(eager)
        try:
            check(*qkv(1, 130, SLOTS * KEYS + 9, 1))
        except (RuntimeError, AssertionError):
            return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, tmp_path, cusim):
    assert not runs_right(changed_library(tmp_path, cusim, *FAULTS[fault]))


def test_without_a_fault_nothing_is_caught(tmp_path, cusim):
    assert runs_right(changed_library(tmp_path, cusim, "", ""))
