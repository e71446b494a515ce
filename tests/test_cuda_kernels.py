"""The CUDA C++ kernels, run on a CPU by csrc/sim: the same sources, the same references."""

import pytest
import torch
from cuda_sim import build, missing
from fused import assert_as_good_as_torch, needs_triton, normal, outputs_and_gradients, strided, triton

from prfl_kernels import cuda_kernels, reward_pool

__all__ = ["triton"]
pytestmark = [
    needs_triton,  # the operations around the launchers are reached through its choice in the table
    pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}"),
    pytest.mark.usefixtures("triton", "kernels"),
]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="session")
def simulation(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sim"), "prfl_sim")


@pytest.fixture
def kernels(simulation, monkeypatch):
    """The launchers on the simulation, which checks every access against the tensors they are given."""
    view = cuda_kernels._view

    def watched(a):
        if a is not None and a.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
            simulation.watch(a.data_ptr(), span * a.element_size())
        return view(a)

    monkeypatch.setattr(cuda_kernels, "library", lambda: simulation)
    monkeypatch.setattr(cuda_kernels, "_view", watched)
    monkeypatch.setattr(reward_pool, "launch_backward", cuda_kernels.reward_pool_backward)
    yield simulation
    simulation.watch(0, 0)


class Pool(torch.autograd.Function):
    """reward_pool_with_lse on the CUDA kernels."""

    @staticmethod
    def forward(ctx, x, u):
        pooled, lse, scores = cuda_kernels.reward_pool_forward(x, u)
        ctx.save_for_backward(x, u, scores, lse, pooled)
        return pooled, lse

    @staticmethod
    def backward(ctx, dpooled, dlse):
        want_x, want_u = ctx.needs_input_grad
        dx, du = reward_pool._pool_backward(dpooled, dlse, *ctx.saved_tensors, want_x, want_u)
        return dx if want_x else None, du if want_u else None


def pool_inputs(batch=2, length=77, width=96, queries=3, dtype=F32):
    return [normal(batch, length, width, dtype=dtype), normal(queries, width) * width**-0.5]


POOL_SHAPES = [(2, 77, 96, 3), (1, 5, 8, 1), (1, 200, 136, 8), (1, 70, 1536, 8), (1, 35, 5120, 8)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", POOL_SHAPES)
def test_reward_pool(shape, dtype):
    assert_as_good_as_torch(Pool.apply, pool_inputs(*shape, dtype), reward_pool.reward_pool_reference)


@pytest.mark.parametrize("dtype, length", [(F32, 7 * 16 * 32 - 5), (BF16, 6 * 32 * 32 - 40)])
def test_reward_pool_reuses_its_ring(dtype, length):
    """Runs of more tiles than the ring has stages, the last run and tile shorter."""
    inputs = pool_inputs(1, length, 8, 2, dtype)
    assert_as_good_as_torch(Pool.apply, inputs, reward_pool.reward_pool_reference)


def test_reward_pool_takes_any_strides():
    x, u = pool_inputs()
    want = outputs_and_gradients(Pool.apply, [x, u])
    odd = torch.cat([x, x[..., :1]], -1)[..., :96]  # rows begin at no multiple of 16 bytes
    for other in (strided(x), x.mT.contiguous().mT, odd):
        got = outputs_and_gradients(Pool.apply, [other, u])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_reward_pool_makes_only_the_gradients_asked_for():
    inputs = pool_inputs()
    _, every = outputs_and_gradients(Pool.apply, inputs)
    for i, want in enumerate(every):
        _, (got,) = outputs_and_gradients(Pool.apply, inputs, wanted=[i])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_reward_pool_of_nothing():
    (pooled, lse), (dx, du) = outputs_and_gradients(Pool.apply, pool_inputs(batch=0))
    assert pooled.shape == (0, 3, 96) and lse.shape == (0, 3) and dx.shape == (0, 77, 96) and not du.any()


def test_large_scores_do_not_overflow():
    x, u = pool_inputs()
    outputs, gradients = outputs_and_gradients(Pool.apply, [x, u * 1e4])
    assert all(a.isfinite().all() for a in outputs + gradients)


@pytest.mark.parametrize("queries, width", [(9, 96), (3, 36), (1, 5128)])
def test_reward_pool_names_misfits(queries, width):
    with pytest.raises(ValueError, match="^reward_pool: got"):
        cuda_kernels.reward_pool_forward(*pool_inputs(1, 4, width, queries))
