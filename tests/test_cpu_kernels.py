"""The C++ kernels for the CPU, in every instruction set that runs here, against plain torch."""

import os
from functools import partial

import pytest
import torch
from cpu_cases import (
    BF16,
    EPS,
    F32,
    GRID,
    HEADS,
    NAMES,
    all_cases,
    gelu_case,
    pool_case,
    rms_case,
    rope_case,
    row_case,
)
from fused import assert_as_good_as_torch, normal, outputs_and_gradients, strided

from prfl_kernels import bias_gelu, extension
from prfl_kernels.norm import cpu as norm_cpu
from prfl_kernels.norm import op as norm
from prfl_kernels.qk_norm_rope import cpu as rope_cpu
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.reward_pool import cpu as pool_cpu
from prfl_kernels.reward_pool import op as reward_pool

if why := extension.absence("cpu", "cpu"):
    pytest.skip(f"prfl_kernels._C {why}", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.fixture(params=extension.isas())
def isa(request):
    extension.use_isa(request.param)
    yield
    extension.use_isa(os.environ.get("PRFL_CPU_ISA", ""))


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
        kernel, reference, inputs = rms_case(*shape, dtype=dtype)
        assert_as_good_as_torch(kernel, inputs, reference)


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
@pytest.mark.parametrize("shape, bias", [((2, 37, 96), True), ((1, 3, 7), False), ((4, 3, 131), True)])
def test_bias_gelu_errs_at_most_twice_as_much_as_torch(shape, bias, dtype):
    kernel, reference, (h, b) = gelu_case(*shape, dtype=dtype, bias=bias)
    assert_as_good_as_torch(kernel, [h * 4, b], reference)


@pytest.mark.usefixtures("isa")
def test_gelu_far_from_zero():
    h = torch.tensor([[[-1e4, -90.0, -20.0, -5.0, 0.0, 5.0, 20.0, 90.0, 1e4]]])
    kernel, _, _ = gelu_case(1, 1, 9)
    (g,), (dh,) = outputs_and_gradients(kernel, [h, None])
    assert (g[h <= -20].abs() < 1e-30).all() and (g[h >= 20] == h[h >= 20]).all()
    assert dh.isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("types", [{}, {"residual": F32, "update": BF16}])
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
        out, _, rstd = qk_norm_rope.forward(
            rope_cpu.forward, y[:, part], None, weight, None, grid, 2, EPS, 0
        )
        dout = d[:, part].unflatten(2, (2, -1))
        dy = qk_norm_rope.backward(
            rope_cpu.backward, dout, None, y[:, part], None, weight, None, rstd, grid, 2, 0, False
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
    weights = normal(96), normal(96)
    out, _, _ = qk_norm_rope.forward(rope_cpu.forward, q, k, *weights, GRID, HEADS, EPS, 0)
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
    pooled, lse, scores = reward_pool.forward(pool_cpu.forward, x, u)
    backward = partial(reward_pool.backward, pool_cpu.backward)
    whole = backward(pooled, lse, x, u, scores, lse, True, True)
    dx, none = backward(pooled, lse, x, u, scores, lse, True, False)
    assert none is None and torch.equal(dx, whole[0])
    none, du = backward(pooled, lse, x, u, scores, lse, False, True)
    assert none is None and torch.equal(du, whole[1])
    dg, h, bias = normal(1, 3, 8), normal(1, 3, 8), normal(8)
    assert bias_gelu.backward(bias_gelu.cpu_backward, dg, h, bias, False)[2] is None
    assert norm.forward(norm_cpu.forward, h, None, None, bias, bias, 0.0, EPS, F32)[0] is None


@pytest.mark.usefixtures("isa")
def test_bfloat16_is_rounded_to_the_nearest():
    """Ties to even, infinities and NaN kept: as torch rounds."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([x, torch.randn(1000)])[None, None]
    y = torch.zeros_like(x)
    out = norm.forward(norm_cpu.forward, y.bfloat16(), x, None, None, None, 0.0, 0.0, None)[0]
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_misfits_are_named():
    x, weight = normal(1, 2, 8), normal(8)
    with pytest.raises(ValueError, match="got torch.float64.*want float32 or bfloat16"):
        norm.forward(norm_cpu.forward, x.double(), None, None, weight, weight, 0.0, EPS, F32)
    with pytest.raises(ValueError, match="got torch.float8_e4m3fn"):
        norm.forward(norm_cpu.forward, x, None, None, weight, weight, 0.0, EPS, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="^qk_norm_rope: got fp8"):
        qk_norm_rope.forward(rope_cpu.forward, x, None, weight, None, None, 1, EPS, 0, True)
    with pytest.raises(ValueError, match="got instruction set 'sse9', want one of generic"):
        extension.use_isa("sse9")
    with pytest.raises(ValueError, match="got compiled part 'tpu', want one of cpu, cuda"):
        extension.absence("tpu", "cpu")
