"""The fused kernels behind reward_pool."""

import pytest
import torch
from fused import (
    assert_as_good_as_torch,
    assert_gradients_alone,
    needs_triton,
    normal,
    on_reference,
    outputs_and_gradients,
    strided,
)
from torch.library import opcheck

from prfl_kernels.reward_pool.op import merge, reward_pool, reward_pool_with_lse

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
F32, BF16 = torch.float32, torch.bfloat16


def pool_inputs(batch=2, length=77, width=96, queries=3, dtype=F32):
    return [normal(batch, length, width, dtype=dtype), normal(queries, width) * width**-0.5]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape", [(2, 77, 96, 3), (1, 5, 7, 1), (3, 16, 130, 8), (1, 200, 64, 16), (1, 65, 128, 64)]
)
def test_error_is_at_most_twice_that_of_torch(shape, dtype):
    assert_as_good_as_torch(reward_pool_with_lse, pool_inputs(*shape, dtype))


@pytest.mark.parametrize("width", [1536, 5120])
def test_widths_of_the_models(width):
    assert_as_good_as_torch(reward_pool_with_lse, pool_inputs(1, 19, width, 8, BF16))


def test_many_runs(monkeypatch):
    """Runs of several tiles, the last one shorter: 777 tokens of bfloat16 for one query."""
    from prfl_kernels.reward_pool import triton_kernels as module

    inputs = pool_inputs(1, 777, 40, 1, BF16)
    assert module._plan("forward", inputs[0], 1, 1)[0][0] > 3
    assert_as_good_as_torch(reward_pool_with_lse, inputs)


def test_large_scores_do_not_overflow():
    x, u = pool_inputs()
    outputs, gradients = outputs_and_gradients(reward_pool_with_lse, [x, u * 1e4])
    assert all(a.isfinite().all() for a in outputs + gradients)
    # Scores of thousands: one token takes all the weight.
    best = (x.double() @ u.double().T).argmax(1)  # [B, N]
    want = torch.stack([x[b, best[b]] for b in range(len(x))])
    torch.testing.assert_close(outputs[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [(77, 0), (20, 57), (1, 30, 46)])
def test_merged_shards_are_the_whole(sizes):
    """Forward and gradients: what sequence-parallel ranks exchange loses nothing."""

    def sharded(x, u):
        parts = [reward_pool_with_lse(s, u) for s in x.split(sizes, 1) if s.shape[1]]
        if 0 in sizes:  # a rank without tokens
            parts.append((torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], float("-inf"))))
        return merge(*(torch.stack(a) for a in zip(*parts, strict=True)))

    inputs = pool_inputs()
    assert_as_good_as_torch(sharded, inputs, on_reference(reward_pool_with_lse))


def test_strides_do_not_matter():
    x, u = pool_inputs()
    want = outputs_and_gradients(reward_pool, [x, u])
    for other in ([strided(x), strided(u)], [x.mT.contiguous().mT, u.mT.contiguous().mT]):
        torch.testing.assert_close(outputs_and_gradients(reward_pool, other), want, rtol=0, atol=0)


def test_empty_batch():
    (out,), (dx, du) = outputs_and_gradients(reward_pool, pool_inputs(batch=0))
    assert out.shape == (0, 3, 96) and dx.shape == (0, 77, 96) and not du.any()


@pytest.mark.parametrize("x, u", [((2, 0, 8), (1, 8)), ((2, 3, 8), (1, 7)), ((2, 3, 8), (65, 8))])
def test_misfits_are_named(x, u):
    with pytest.raises(ValueError, match="^reward_pool: got"):
        reward_pool(normal(*x), normal(*u))


def test_only_the_gradients_asked_for_are_made():
    assert_gradients_alone(reward_pool, pool_inputs())


def test_runs_are_bit_identical():
    inputs = pool_inputs()
    first, second = (outputs_and_gradients(reward_pool, inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_registration():
    opcheck(torch.ops.prfl.reward_pool.default, tuple(a.requires_grad_() for a in pool_inputs(1, 5, 16)))


def test_no_graph_break():
    inputs = pool_inputs(1, 9, 32)
    compiled = torch.compile(reward_pool, fullgraph=True, backend="aot_eager")
    got, want = outputs_and_gradients(compiled, inputs), outputs_and_gradients(reward_pool, inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
