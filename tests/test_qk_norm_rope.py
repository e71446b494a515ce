"""The fused kernels behind qk_norm_rope and rms_norm."""

import math

import pytest
import torch
from e4m3 import assert_rounded
from fused import (
    assert_as_good_as_torch,
    assert_gradients_alone,
    assert_of_nothing,
    assert_transposed_gradients,
    needs_triton,
    normal,
    outputs_and_gradients,
    strided,
)
from torch.library import opcheck

from prfl_kernels.qk_norm_rope.op import qk_norm_rope, qk_norm_rope_fp8, rms_norm

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
F32, BF16 = torch.float32, torch.bfloat16
GRID = (2, 3, 4)
SMALL = (2, 1, 3)


def rope_inputs(batch=2, grid=GRID, heads=3, head_dim=32, dtype=F32, length=None):
    q, k = (normal(batch, length or math.prod(grid), heads * head_dim, dtype=dtype) for _ in range(2))
    return [q, k, normal(heads * head_dim), normal(heads * head_dim)]


def rope(grid=GRID, heads=3, offset=0):
    return lambda q, k, weight_q, weight_k: qk_norm_rope(
        q, k, weight_q, weight_k, grid, heads, 1e-6, offset
    )


@pytest.mark.parametrize(
    "heads, head_dim, dtype",
    [(3, 32, F32), (3, 32, BF16), (2, 64, BF16), (1, 128, F32), (1, 128, BF16), (3, 12, F32)],
)
def test_error_is_at_most_twice_that_of_torch(heads, head_dim, dtype):
    inputs = rope_inputs(heads=heads, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_torch(rope(heads=heads), inputs)


@pytest.mark.parametrize("heads", [12, 40])
def test_widths_of_the_models(heads):
    grid = (1, 2, 2)
    inputs = rope_inputs(1, grid, heads, 128, BF16)
    assert_as_good_as_torch(rope(grid, heads), inputs)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 7), (2, 3, 1536)])
def test_rms_norm(shape, dtype):
    assert_as_good_as_torch(rms_norm, [normal(*shape, dtype=dtype), normal(shape[-1])])


@pytest.mark.parametrize("offset, length", [(0, 12), (12, 9), (23, 1)])
def test_a_shard_is_a_slice_of_the_whole(offset, length):
    inputs = rope_inputs()
    whole = rope()(*inputs)
    part = slice(offset, offset + length)
    shard = rope(offset=offset)(*(a[:, part] for a in inputs[:2]), *inputs[2:])
    torch.testing.assert_close(shard, tuple(a[:, part] for a in whole), rtol=0, atol=0)


def test_angles_stay_exact_far_into_a_sequence():
    grid = (1000, 1, 1)
    assert_as_good_as_torch(rope(grid, 1, 980), rope_inputs(1, grid, 1, length=20))


def test_slices_of_one_projection():
    op, (q, k, weight_q, weight_k) = rope(SMALL), rope_inputs(grid=SMALL)
    both = torch.cat([q, k, torch.full_like(q, float("nan"))], dim=-1)
    slices = [both[..., :96], both[..., 96:192], weight_q, weight_k]
    want = outputs_and_gradients(op, [q, k, weight_q, weight_k])
    torch.testing.assert_close(outputs_and_gradients(op, slices), want, rtol=0, atol=0)


def test_strides_do_not_matter():
    op, inputs = rope(SMALL), rope_inputs(grid=SMALL)
    want = outputs_and_gradients(op, inputs)
    got = outputs_and_gradients(op, [strided(a) if a.dim() > 1 else a for a in inputs])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    transposed = [a.mT.contiguous().mT for a in inputs[:2]] + inputs[2:]
    torch.testing.assert_close(outputs_and_gradients(op, transposed), want, rtol=0, atol=0)


def test_a_gradient_with_transposed_heads():
    assert_transposed_gradients(rope(SMALL), rope_inputs(grid=SMALL), (2, 3, math.prod(SMALL), 32))


@pytest.mark.parametrize("batch, length", [(0, 4), (2, 0)])
def test_empty_input(batch, length):
    inputs = [normal(batch, length, 96) for _ in range(2)] + [normal(96), normal(96)]
    assert_of_nothing(rope(), inputs, (batch, length, 3, 32))
    (out,), _ = outputs_and_gradients(rms_norm, inputs[1:3])
    assert out.shape == (batch, length, 96)


def test_only_the_gradients_asked_for_are_made():
    assert_gradients_alone(rope(SMALL), rope_inputs(grid=SMALL))


def test_runs_are_bit_identical():
    inputs = rope_inputs(grid=SMALL)
    first, second = (outputs_and_gradients(rope(SMALL), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_registration():
    inputs = [a.requires_grad_() for a in rope_inputs(grid=(1, 2, 3))]
    opcheck(torch.ops.prfl.qk_norm_rope.default, (*inputs, [1, 2, 3], 3, 1e-6, 0))
    opcheck(torch.ops.prfl.rms_norm.default, (inputs[0], inputs[2], 1e-6))
    plain = [a.detach() for a in inputs]
    opcheck(torch.ops.prfl.qk_norm_rope_fp8.default, (*plain, [1, 2, 3], 3, 1e-6, 0))


@pytest.mark.parametrize("name", ["qk_norm_rope", "rms_norm"])
def test_no_graph_break(name):
    inputs = rope_inputs(grid=(1, 2, 3))
    op, inputs = (rope((1, 2, 3)), inputs) if name == "qk_norm_rope" else (rms_norm, inputs[1:3])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, want = outputs_and_gradients(compiled, inputs), outputs_and_gradients(op, inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_fp8_heads_use_the_whole_range():
    inputs = rope_inputs()
    q, k, scale_q, scale_k = qk_norm_rope_fp8(*inputs, GRID, 3)
    exact = rope()(*(a.double() for a in inputs))
    for got, scale, want in ((q, scale_q, exact[0]), (k, scale_k, exact[1])):
        assert_rounded(got, scale, want)
