"""The CUDA C++ kernels, run on a CPU by csrc/sim: the same sources, the same references."""

import math

import boundary_cases
import pytest
import torch
from cuda_sim import Watched, build, missing
from e4m3 import assert_rounded
from fused import (
    assert_all_as_right,
    assert_as_good_as_torch,
    assert_gradients_alone,
    assert_of_nothing,
    assert_transposed_gradients,
    needs_triton,
    normal,
    on_reference,
    outputs_and_gradients,
    strided,
)
from rounding import assert_as_right, longest_sum, rounding
from test_add_norm import NAMES, row_inputs
from test_qk_norm_rope import GRID, rope, rope_inputs
from test_reward_pool import pool_inputs

from prfl_bench import formulas
from prfl_engine.flow import make_schedule
from prfl_kernels import cuda_kernels, dispatch, solver_step
from prfl_kernels.norm import modulate, modulate_fp8
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.reward_pool import cuda as pool_cuda
from prfl_kernels.reward_pool import op as reward_pool
from prfl_kernels.reward_pool.op import reward_pool_with_lse

pytestmark = [
    needs_triton,  # the operations around the launchers are reached through its choice in the table
    pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}"),
    pytest.mark.usefixtures("triton", "kernels"),
]
F32, BF16 = torch.float32, torch.bfloat16


def watch(monkeypatch, module):
    watched, view = Watched(module), cuda_kernels._view

    def given(a):
        watched.give(a)
        return view(a)

    monkeypatch.setattr(cuda_kernels, "library", lambda: watched)
    monkeypatch.setattr(cuda_kernels, "_view", given)
    return watched


@pytest.fixture
def kernels(monkeypatch):
    """The launchers on the simulation, which checks every access against the tensors they are given."""
    watched = watch(monkeypatch, build())
    for op, records in dispatch.OPERATIONS.items():
        if {"triton", "cuda"} <= set(records) and not op.startswith("attention"):
            # in the place of the Triton kernels, which run without a GPU too
            own = records["cuda"]
            twin = records["triton"]._replace(forward=own.forward, backward=own.backward)
            monkeypatch.setitem(records, "triton", twin)
    return watched


POOL_SHAPES = [(2, 77, 96, 3), (1, 5, 8, 1), (1, 200, 136, 8), (1, 70, 1536, 8), (1, 35, 5120, 8)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", POOL_SHAPES)
def test_reward_pool(shape, dtype):
    assert_as_good_as_torch(reward_pool_with_lse, pool_inputs(*shape, dtype), formulas.reward_pool_with_lse)


@pytest.mark.parametrize("dtype, length", [(F32, 7 * 16 * 32 - 5), (BF16, 6 * 32 * 32 - 40)])
def test_reward_pool_reuses_its_ring(dtype, length):
    """Runs of more tiles than the ring has stages, the last run and tile shorter."""
    inputs = pool_inputs(1, length, 8, 2, dtype)
    assert_as_good_as_torch(reward_pool_with_lse, inputs, formulas.reward_pool_with_lse)


def test_reward_pool_takes_any_strides():
    x, u = pool_inputs()
    want = outputs_and_gradients(reward_pool_with_lse, [x, u])
    odd = torch.cat([x, x[..., :1]], -1)[..., :96]  # rows begin at no multiple of 16 bytes
    for other in (strided(x), x.mT.contiguous().mT, odd):
        got = outputs_and_gradients(reward_pool_with_lse, [other, u])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_reward_pool_makes_only_the_gradients_asked_for():
    assert_gradients_alone(reward_pool_with_lse, pool_inputs())


def test_reward_pool_of_nothing():
    (pooled, lse), (dx, du) = outputs_and_gradients(reward_pool_with_lse, pool_inputs(batch=0))
    assert pooled.shape == (0, 3, 96) and lse.shape == (0, 3) and dx.shape == (0, 77, 96) and not du.any()


def test_large_scores_do_not_overflow():
    x, u = pool_inputs()
    outputs, gradients = outputs_and_gradients(reward_pool_with_lse, [x, u * 1e4])
    assert all(a.isfinite().all() for a in outputs + gradients)


@pytest.mark.parametrize("queries, width", [(9, 96), (3, 36), (1, 5128)])
def test_reward_pool_names_misfits(queries, width):
    with pytest.raises(ValueError, match="^reward_pool: got"):
        reward_pool.forward(pool_cuda.forward, *pool_inputs(1, 4, width, queries))


ALL = pytest.mark.parametrize("name", NAMES)


@ALL
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 7), (3, 5, 130)])
@pytest.mark.parametrize("stream, branch", [(F32, F32), (F32, BF16), (BF16, BF16)])
def test_add_norm(name, shape, stream, branch):
    assert_as_good_as_torch(*row_inputs(name, *shape, stream, branch))


@pytest.mark.parametrize("name", boundary_cases.NAMES)
@pytest.mark.parametrize("length, boundary", [(37, 13), (5, 5), (400, 1)])
def test_add_norm_of_two_vectors(name, length, boundary):
    """Runs of two tokens at 400, of one otherwise."""
    op, formula, inputs = boundary_cases.case(name, 1, length, 24, boundary)
    assert_as_good_as_torch(op, inputs, formula)


def test_add_norm_of_two_vectors_at_the_width_of_ti2v_5b():
    """Streams in float32 and in bfloat16 have kernels of their own."""
    op, formula, inputs = boundary_cases.case("gated_add_modulate", 1, 3, 3072, 1)
    assert_as_good_as_torch(op, inputs, formula)
    for stream in (F32, BF16):
        assert_as_good_as_torch(*row_inputs("gated_add_modulate", 1, 3, 3072, stream, BF16))


@ALL
@pytest.mark.parametrize("stream, branch", [(F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("width", [1536, 5120])
def test_add_norm_at_the_widths_of_the_models(name, width, stream, branch):
    assert_as_good_as_torch(*row_inputs(name, 1, 3, width, stream, branch))


def test_the_norm_of_a_float32_stream_in_bfloat16():
    """What the training of a block asks for: n and its gradient are narrower than x."""
    op, inputs = row_inputs("gated_add_modulate", 2, 3, 1536, F32, BF16)
    assert_as_good_as_torch(lambda *a: op(*a, 1e-6, BF16), inputs)


@ALL
def test_add_norm_in_runs_of_tokens(name):
    """L = 133 for each of 4 samples: 99 runs of at most two tokens."""
    assert_as_good_as_torch(*row_inputs(name, 4, 133, 8))


@ALL
@pytest.mark.parametrize("width", [48, 1536])
def test_add_norm_takes_any_strides(name, width):
    op, inputs = row_inputs(name, 2, 3, width)
    want = outputs_and_gradients(op, inputs)
    exact = outputs_and_gradients(on_reference(op), [a if a is None else a.double() for a in inputs])
    odd = [a if a is None else torch.cat([a, a[..., :1]], -1)[..., :width] for a in inputs]
    last = [a if a is None or a.dim() < 2 else a.mT.contiguous().mT for a in inputs]
    for other in (odd, last, [a if a is None else strided(a) for a in inputs]):
        assert_all_as_right(outputs_and_gradients(op, other), exact, want, rounding(width))


@ALL
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_add_norm_of_nothing(name, batch, length):
    assert_of_nothing(*row_inputs(name, batch, length, 24), (batch, length, 24))


@ALL
def test_add_norm_makes_only_the_gradients_asked_for(name):
    assert_gradients_alone(*row_inputs(name, 2, 9, 32))


@pytest.mark.parametrize("width", [96, 1536])
def test_fp8_rows_use_the_whole_range(width):
    x, scale, shift = row_inputs("modulate", 2, 5, width)[1]
    x[0, 3], scale[1], shift[1] = 0.0, -1.0, 0.0  # sample 1 is zero everywhere: its scales are 1
    want = modulate(x.double(), scale.double(), shift.double())
    assert not want[1].any()
    assert_rounded(*modulate_fp8(x, scale, shift), want)


def test_add_norm_names_misfits():
    for stream, branch, width in ((BF16, F32, 16), (F32, F32, 5128)):
        op, inputs = row_inputs("gated_add_norm", 1, 2, width, stream, branch)
        with pytest.raises(ValueError, match="^norm: got"):
            op(*inputs)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads, head_dim", [(3, 32), (2, 64), (1, 128), (3, 12)])
def test_qk_norm_rope(heads, head_dim, dtype):
    grid = (3, 5, 7)  # several tokens a block
    inputs = rope_inputs(grid=grid, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_torch(rope(grid, heads), inputs)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", [12, 24, 40])
def test_qk_norm_rope_at_the_widths_of_the_models(heads, dtype):
    grid = (2, 2, 3)
    assert_as_good_as_torch(rope(grid, heads), rope_inputs(1, grid, heads, 128, dtype))


def test_what_3072_columns_prefetch():
    """Runs of two tokens, as 133 samples have them: rows that are loaded ahead, and rows that are not."""
    assert_as_good_as_torch(rope((1, 1, 2), 24), rope_inputs(133, (1, 1, 2), 24, 128, BF16))
    assert_as_good_as_torch(*row_inputs("gated_add_modulate", 133, 2, 3072, F32, BF16))


def test_qk_norm_rope_in_runs_of_tokens():
    grid = (5, 9, 11)
    assert_as_good_as_torch(rope(grid, 1), rope_inputs(1, grid, 1, 8))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 7), (2, 3, 1536), (1, 2, 5120)])
def test_rms_norm(shape, dtype):
    inputs = [normal(*shape, dtype=dtype), normal(shape[-1])]
    assert_as_good_as_torch(qk_norm_rope.rms_norm, inputs)


@pytest.mark.parametrize("offset, length", [(0, 12), (12, 10), (23, 1)])
def test_a_shard_is_a_slice_of_the_whole(offset, length):
    inputs = rope_inputs()
    whole = rope()(*inputs)
    part = slice(offset, offset + length)
    shard = rope(offset=offset)(*(a[:, part] for a in inputs[:2]), *inputs[2:])
    torch.testing.assert_close(shard, tuple(a[:, part] for a in whole), rtol=0, atol=0)


def test_qk_norm_rope_takes_any_strides():
    q, k, weight_q, weight_k = inputs = rope_inputs()
    want = outputs_and_gradients(rope(), inputs)
    exact = outputs_and_gradients(on_reference(rope()), [a.double() for a in inputs])
    both = torch.cat([q, k, torch.full_like(q, float("nan"))], dim=-1)
    odd = torch.cat([q, q[..., :1]], -1)[..., :96]
    for other in ([both[..., :96], both[..., 96:192]], [odd, k], [a.mT.contiguous().mT for a in (q, k)]):
        got = outputs_and_gradients(rope(), [*other, weight_q, weight_k])
        assert_all_as_right(got, exact, want, rounding(longest_sum(inputs)))


def test_a_gradient_with_transposed_heads():
    assert_transposed_gradients(rope(), rope_inputs(), (2, 3, math.prod(GRID), 32))


@pytest.mark.parametrize("batch, length", [(0, 4), (2, 0)])
def test_qk_norm_rope_of_nothing(batch, length):
    inputs = [normal(batch, length, 96) for _ in range(2)] + [normal(96), normal(96)]
    assert_of_nothing(rope(), inputs, (batch, length, 3, 32))


@pytest.mark.parametrize("heads, head_dim, grid", [(3, 32, GRID), (12, 128, (1, 2, 2)), (2, 8, (1, 1, 3))])
def test_fp8_heads_use_the_whole_range(heads, head_dim, grid):
    inputs = rope_inputs(grid=grid, heads=heads, head_dim=head_dim)
    q, k, scale_q, scale_k = qk_norm_rope.qk_norm_rope_fp8(*inputs, grid, heads)
    exact = rope(grid, heads)(*(a.double() for a in inputs))
    for got, scale, want in ((q, scale_q, exact[0]), (k, scale_k, exact[1])):
        assert_rounded(got, scale, want)


@pytest.mark.parametrize("velocity", [F32, BF16])
@pytest.mark.parametrize("shape", [(3, 16, 2, 6, 4), (2, 5, 1, 3, 3), (1, 16, 9, 5, 5), (0, 4, 1, 1, 1)])
def test_solver_step(shape, velocity):
    """Samples at different steps, of sizes that no access divides and of more than one block."""
    state = [normal(*shape) for _ in range(4)]
    v = normal(*shape, dtype=velocity)
    columns = make_schedule("unipc", 5, 3.0).table[[0, 3, 4][: shape[0]]]
    got = solver_step.forward(solver_step.cuda, *state, v, columns.float())
    low = solver_step.forward(solver_step.reference, *state, v, columns.float())
    exact = solver_step.forward(solver_step.reference, *(a.double() for a in state), v.double(), columns)
    for ours, plain, want in zip(got, low, exact, strict=True):
        assert_as_right(ours, want, plain, rounding(6))  # a sum of at most six terms


def test_solver_step_names_misfits():
    state = [normal(2, 8) for _ in range(5)]
    for inputs in ([*state, normal(2, 8)], [*state[:4], normal(2, 7), normal(2, 9)]):
        with pytest.raises(ValueError, match="^solver_step: got"):
            solver_step.solver_step(*inputs)
