"""The C++ kernels for the CPU, in every instruction set that runs here, against plain torch."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from formulas import (
    gated_add_reference,
    norm_reference,
    reward_pool_reference,
    rms_norm_reference,
    rope_reference,
)
from fused import assert_as_good_as_torch, normal, outputs_and_gradients, strided

from prfl_kernels import compiled

if why := compiled.absence("cpu", "cpu"):
    pytest.skip(f"prfl_kernels._C {why}", allow_module_level=True)

from prfl_kernels import cpu_kernels as cpu

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
EPS = 1e-6
GRID, HEADS = (3, 5, 7), 3


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    compiled.use_isa()


@pytest.fixture(params=compiled.isas())
def isa(request):
    compiled.use_isa(request.param)


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        outputs, ctx.gradients = run(*inputs)
        return outputs

    @staticmethod
    def backward(ctx, *directions):
        return None, *ctx.gradients(*directions)


def op(run):
    """A differentiable function of run: inputs -> (outputs, directions -> gradients)."""
    return lambda *inputs: _Op.apply(run, *inputs)


def modulated(base, dtype):
    def run(x, scale, shift):
        _, n, _, stats = cpu.add_norm_forward(x, None, None, scale, shift, base, EPS, dtype)

        def gradients(dn):
            back = cpu.add_norm_backward(dn, None, x, None, None, scale, stats, base, True, None)
            return back[0], *back[3:]

        return n, gradients

    return op(run)


def added(x, y, gate):
    total = cpu.add_norm_forward(x, y, gate, None, None, 0.0, 0.0, None)[0]

    def gradients(d):
        _, dy, dgate, _, _ = cpu.add_norm_backward(None, d, None, y, gate, None, None, 0.0, False, y.dtype)
        return d, dy, dgate

    return total, gradients


def added_and_normed(base, dtype):
    def run(x, y, gate, scale, shift):
        total, n, _, stats = cpu.add_norm_forward(x, y, gate, scale, shift, base, EPS, dtype)

        def gradients(dsum, dn):
            return cpu.add_norm_backward(dn, dsum, total, y, gate, scale, stats, base, True, y.dtype)

        return (total, n), gradients

    return op(run)


def row_case(name, batch, length, width, stream=F32, branch=F32, parameters=F32):
    """(kernel, reference, inputs)"""
    x, y = normal(batch, length, width, dtype=stream), normal(batch, length, width, dtype=branch)
    gate, scale, shift = (normal(batch, width, dtype=parameters) for _ in range(3))
    weight, bias = normal(width, dtype=parameters), normal(width, dtype=parameters)

    def normed(base):
        # The reference in float64 gives float64.
        return lambda x, a, b: norm_reference(x, a, b, base, EPS, x.dtype if x.dtype == F64 else branch)

    def both(base):
        def run(x, y, gate, a, b):
            total = gated_add_reference(x, y, gate)
            return total, normed(base)(total, a, b)

        return run

    return {
        "modulate": (modulated(1.0, branch), normed(1.0), [x, scale, shift]),
        "layer_norm": (modulated(0.0, branch), normed(0.0), [x, weight, bias]),
        "add": (op(added), gated_add_reference, [x, y, None]),
        "gated_add": (op(added), gated_add_reference, [x, y, gate]),
        "add_norm": (added_and_normed(0.0, branch), both(0.0), [x, y, None, weight, bias]),
        "gated_add_modulate": (added_and_normed(1.0, branch), both(1.0), [x, y, gate, scale, shift]),
    }[name]


NAMES = ("modulate", "layer_norm", "add", "gated_add", "add_norm", "gated_add_modulate")


def rope_case(batch=2, grid=GRID, heads=HEADS, head_dim=32, dtype=F32, offset=0, length=None):
    def run(q, k, weight_q, weight_k):
        rest = (grid, heads)
        out, _, rstd = cpu.qk_norm_rope_forward(q, k, weight_q, weight_k, *rest, EPS, offset)

        def gradients(dq, dk):
            dq, dk, dweight = cpu.qk_norm_rope_backward(
                dq, dk, q, k, weight_q, weight_k, rstd, *rest, offset, True
            )
            return dq, dk, *dweight

        return tuple(out), gradients

    def reference(q, k, weight_q, weight_k):
        pairs = ((q, weight_q), (k, weight_k))
        return tuple(rope_reference(a, w, grid, heads, EPS, offset).to(a.dtype) for a, w in pairs)

    shape = (batch, length or math.prod(grid) - offset, heads * head_dim)
    weights = [normal(heads * head_dim, dtype=dtype) for _ in range(2)]
    return op(run), reference, [*(normal(*shape, dtype=dtype) for _ in range(2)), *weights]


def rms_norm(x, weight):
    (out, _), _, rstd = cpu.qk_norm_rope_forward(x, None, weight, None, None, 1, EPS, 0)

    def gradients(d):
        dx, _, dweight = cpu.qk_norm_rope_backward(d, None, x, None, weight, None, rstd, None, 1, 0, True)
        return dx, dweight[0]

    return out.flatten(2), gradients


def pool(x, u):
    pooled, lse, scores = cpu.reward_pool_forward(x, u)

    def gradients(dpooled, dlse):
        delta = (pooled * dpooled).sum(-1) - dlse
        return cpu.reward_pool_backward(dpooled, delta, x, u, scores, lse, True, True)

    return (pooled, lse), gradients


def pool_case(batch=2, length=77, width=96, queries=3, dtype=F32):
    inputs = [normal(batch, length, width, dtype=dtype), normal(queries, width) * width**-0.5]
    return op(pool), reward_pool_reference, inputs


def gelu(h, bias):
    def gradients(d):
        dh, g, dbias = cpu.bias_gelu_backward(d, h, bias, bias is not None)
        torch.testing.assert_close(g, out, rtol=0, atol=0)
        return dh, dbias

    out = cpu.bias_gelu_forward(h, bias)
    return out, gradients


def gelu_reference(h, bias):
    wide = h.to(torch.promote_types(h.dtype, F32))
    return F.gelu(wide if bias is None else wide + bias, approximate="tanh").to(h.dtype)


def gelu_case(*shape, dtype=F32, bias=True):
    return op(gelu), gelu_reference, [normal(*shape, dtype=dtype), normal(shape[-1]) if bias else None]


def all_cases(**dtypes):
    """One case of every kernel, long enough for several runs of tokens."""
    for name in NAMES:
        yield row_case(name, 2, 71, 40, **dtypes)
    dtype = dtypes.get("branch", F32)
    yield rope_case(dtype=dtype)
    rms_inputs = [normal(2, 71, 40, dtype=dtype), normal(40)]
    yield op(rms_norm), lambda x, w: rms_norm_reference(x, w, EPS), rms_inputs
    yield pool_case(2, 1801, 40, 3, dtype)
    yield gelu_case(2, 71, 40, dtype=dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("types", [(F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16), (BF16, F32, F32)])
def test_add_norm_errs_at_most_twice_as_much_as_torch(name, types):
    for shape in ((2, 37, 96), (5, 1, 7), (3, 5, 131), (1, 2, 1536)):
        kernel, reference, inputs = row_case(name, *shape, *types)
        assert_as_good_as_torch(kernel, inputs, reference)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads, head_dim", [(3, 32), (2, 128), (3, 12), (1, 70)])
def test_qk_norm_rope_errs_at_most_twice_as_much_as_torch(heads, head_dim, dtype):
    kernel, reference, inputs = rope_case(heads=heads, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_torch(kernel, inputs, reference)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm_errs_at_most_twice_as_much_as_torch(dtype):
    for shape in ((2, 37, 96), (1, 1, 7), (2, 3, 1536)):
        inputs = [normal(*shape, dtype=dtype), normal(shape[-1])]
        assert_as_good_as_torch(op(rms_norm), inputs, lambda x, w: rms_norm_reference(x, w, EPS))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape", [(2, 77, 96, 3), (1, 5, 7, 1), (3, 16, 131, 8), (1, 2000, 64, 16), (1, 65, 300, 33)]
)
def test_reward_pool_errs_at_most_twice_as_much_as_torch(shape, dtype):
    kernel, reference, inputs = pool_case(*shape, dtype=dtype)
    assert_as_good_as_torch(kernel, inputs, reference)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape, bias", [((2, 37, 96), True), ((3, 7), False), ((2, 2, 3, 131), True)])
def test_bias_gelu_errs_at_most_twice_as_much_as_torch(shape, bias, dtype):
    kernel, reference, (h, b) = gelu_case(*shape, dtype=dtype, bias=bias)
    assert_as_good_as_torch(kernel, [h * 4, b], reference)


@pytest.mark.usefixtures("isa")
def test_gelu_far_from_zero():
    h = torch.tensor([[-1e4, -90.0, -20.0, -5.0, 0.0, 5.0, 20.0, 90.0, 1e4]])
    (g,), (dh,) = outputs_and_gradients(lambda h: op(gelu)(h, None), [h])
    assert (g[h <= -20].abs() < 1e-30).all() and (g[h >= 20] == h[h >= 20]).all()
    assert dh.isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("types", [{}, {"stream": F32, "branch": BF16}])
def test_results_do_not_depend_on_the_threads(types):
    threads = torch.get_num_threads()
    for kernel, _, inputs in all_cases(**types):
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(outputs_and_gradients(kernel, inputs))
        torch.set_num_threads(threads)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_loops_run_on_the_threads_of_torch():
    """A second pool of threads would fight torch's for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    a = torch.randn(300, 300)
    (a @ a).exp()  # torch's threads are up
    (torch.randn(1 << 20) + 1).sum()
    before = len(os.listdir("/proc/self/task"))
    for kernel, _, inputs in all_cases():
        outputs_and_gradients(kernel, inputs)
    assert len(os.listdir("/proc/self/task")) == before
    torch.set_num_threads(threads)
    assert Path(torch.__file__).parent in Path(compiled.extension().openmp_runtime()).parents


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("width, dtype", [(2080, F32), (2080, BF16), (2082, F32)])
def test_rows_are_the_same_where_results_are_written_around_the_caches(width, dtype):
    """Above 16 MiB a result is; of 2,082 values a row is not aligned and takes the ordinary way."""
    length = 2**24 // (width * dtype.itemsize) + 8
    first = slice(0, 36)
    kernel, _, (x, y, *rest) = row_case("gated_add_modulate", 1, length, width, dtype, dtype)
    d = normal(1, length, width, dtype=dtype)
    results = []
    for part in (slice(None), first):
        xy = [a[:, part].detach().requires_grad_() for a in (x, y)]
        outputs = kernel(*xy, *rest)
        results.append(
            [*outputs, *torch.autograd.grad(outputs, xy, [torch.ones_like(d[:, part]), d[:, part]])]
        )
    torch.testing.assert_close([a[:, first] for a in results[0]], results[1], rtol=0, atol=0)

    weight, grid = normal(width), (1, 1, length)
    for part in (slice(None), first):
        out, _, rstd = cpu.qk_norm_rope_forward(y[:, part], None, weight, None, grid, 2, EPS, 0)
        dy = cpu.qk_norm_rope_backward(
            d[:, part].unflatten(2, (2, -1)), None, y[:, part], None, weight, None, rstd, grid, 2, 0, False
        )[0]
        results.append([out[0].flatten(2), dy])
    torch.testing.assert_close([a[:, first] for a in results[2]], results[3], rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter():
    for kernel, _, inputs in all_cases():
        want = outputs_and_gradients(kernel, inputs)
        got = outputs_and_gradients(kernel, [a if a is None else strided(a) for a in inputs])
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        last = [a if a is None or a.dim() < 2 else a.mT.contiguous().mT for a in inputs]
        torch.testing.assert_close(outputs_and_gradients(kernel, last), want, rtol=0, atol=0)


def test_a_gradient_with_transposed_heads():
    kernel, _, inputs = rope_case()
    inputs = [a.requires_grad_() for a in inputs]
    direction = normal(2, HEADS, 105, 32).transpose(1, 2)
    q, k = kernel(*inputs)
    got = torch.autograd.grad([q, k], inputs, [direction, direction], retain_graph=True)
    want = torch.autograd.grad([q, k], inputs, [direction.contiguous()] * 2)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("offset, length", [(0, 40), (40, 30), (104, 1)])
def test_a_shard_is_a_slice_of_the_whole(offset, length):
    kernel, _, inputs = rope_case()
    part = slice(offset, offset + length)
    shard = rope_case(offset=offset)[0](*(a[:, part] for a in inputs[:2]), *inputs[2:])
    torch.testing.assert_close(shard, tuple(a[:, part] for a in kernel(*inputs)), rtol=0, atol=0)


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_input(batch, length):
    cases = [row_case(name, batch, length, 24) for name in NAMES]
    cases += [rope_case(batch, length=5) if batch == 0 else None, gelu_case(batch, length, 24)]
    cases += [pool_case(batch, length, 24)] if batch == 0 else []
    for kernel, _, inputs in filter(None, cases):
        outputs, gradients = outputs_and_gradients(kernel, inputs)
        given = [a for a in inputs if a is not None]
        assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, given, strict=True))
        assert not any(o.isnan().any() for o in outputs)
    q = k = normal(2, 0, 96)
    out, _, _ = cpu.qk_norm_rope_forward(q, k, normal(96), normal(96), GRID, HEADS, EPS, 0)
    assert out[0].shape == (2, 0, HEADS, 32)


@pytest.mark.usefixtures("isa")
def test_large_scores_do_not_overflow():
    kernel, _, (x, u) = pool_case()
    outputs, gradients = outputs_and_gradients(kernel, [x, u * 1e4])
    assert all(a.isfinite().all() for a in outputs + gradients)
    best = (x.double() @ u.double().T).argmax(1)  # [B, N]: one token takes all the weight
    want = torch.stack([x[b, best[b]] for b in range(len(x))])
    torch.testing.assert_close(outputs[0], want, rtol=1e-6, atol=1e-6)


def test_only_what_is_wanted_is_made():
    _, _, (x, u) = pool_case()
    pooled, lse, scores = cpu.reward_pool_forward(x, u)
    whole = cpu.reward_pool_backward(pooled, lse, x, u, scores, lse, True, True)
    dx, none = cpu.reward_pool_backward(pooled, lse, x, u, scores, lse, True, False)
    assert none is None and torch.equal(dx, whole[0])
    none, du = cpu.reward_pool_backward(pooled, lse, x, u, scores, lse, False, True)
    assert none is None and torch.equal(du, whole[1])
    dg, h, bias = normal(3, 8), normal(3, 8), normal(8)
    assert cpu.bias_gelu_backward(dg, h, bias, False)[2] is None
    assert cpu.add_norm_forward(h[None], None, None, bias, bias, 0.0, EPS, F32)[0] is None


@pytest.mark.usefixtures("isa")
def test_bfloat16_is_rounded_to_the_nearest():
    """Ties to even, infinities and NaN kept: as torch rounds."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([x, torch.randn(1000)])[None, None]
    y = torch.zeros_like(x)
    out = cpu.add_norm_forward(y.bfloat16(), x, None, None, None, 0.0, 0.0, None)[0]
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_misfits_are_named():
    x, weight = normal(1, 2, 8), normal(8)
    with pytest.raises(ValueError, match="got torch.float64.*want float32 or bfloat16"):
        cpu.add_norm_forward(x.double(), None, None, weight, weight, 0.0, EPS, F32)
    with pytest.raises(ValueError, match="got torch.float8_e4m3fn"):
        cpu.add_norm_forward(x, None, None, weight, weight, 0.0, EPS, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="^qk_norm_rope: got fp8"):
        cpu.qk_norm_rope_forward(x, None, weight, None, None, 1, EPS, 0, True)
    with pytest.raises(ValueError, match="got instruction set 'sse9', want one of generic"):
        compiled.use_isa("sse9")
    with pytest.raises(ValueError, match="got compiled part 'tpu', want one of cpu, cuda"):
        compiled.absence("tpu", "cpu")


@pytest.fixture
def loaded_again():
    """The extension is loaded as if for the first time, and so it is for the tests that follow."""
    compiled._load.cache_clear()
    yield
    compiled._load.cache_clear()


@pytest.mark.usefixtures("loaded_again")
def test_environment_forces_the_instruction_set(monkeypatch):
    monkeypatch.setenv("PRFL_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="^PRFL_CPU_ISA: got instruction set 'mmx', want one of generic"):
        compiled.extension()
    monkeypatch.setenv("PRFL_CPU_ISA", "generic")
    assert compiled.extension().active_isa() == "generic"
    assert "generic of" in compiled.report()[0][2]


def test_report_says_what_is_there_and_why_not():
    rows = {part: (state, reason) for part, state, reason in compiled.report()}
    assert rows["cpu"][0] == "yes" and compiled.isas()[-1] in rows["cpu"][1]
    assert rows["cuda"][0] == "yes" or rows["cuda"][1]
    assert compiled.absence("cpu", "cpu") is None
    assert "CPU alone" in compiled.absence("cpu", "cuda")
    assert compiled.absence("cuda", "cpu")


def test_report_names_instruction_sets_that_the_compiler_did_not_know(monkeypatch):
    monkeypatch.setattr(compiled.extension(), "isas_left_out", "")
    assert "too old" not in compiled.report()[0][2]
    monkeypatch.setattr(compiled.extension(), "isas_left_out", "avx512_bf16")
    assert "too old for avx512_bf16" in compiled.report()[0][2]


@pytest.mark.usefixtures("loaded_again")
def test_without_the_extension_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "prfl_kernels._C", None)
    assert "g++ 9" in compiled.absence("cpu", "cpu")
    assert {state for _, state, _ in compiled.report()} == {"no"}
    with pytest.raises(ValueError, match="is not built"):
        compiled.extension()


FAULTS = """
import resource, sys, torch
from prfl_kernels import compiled
if "keep" in sys.argv:
    assert compiled.keep_freed_memory()
for _ in range(16):  # glibc before 2.38 places aligned memory behind what it freed until pieces join
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)  # 64 MiB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_for_the_next_result():
    counted = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, check=True).stdout)
        for how in ([], ["keep"])
    ]
    assert counted[1] < counted[0] / 10
