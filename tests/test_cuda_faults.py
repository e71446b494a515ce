"""Faults planted into the CUDA kernels: the simulation has to notice every one."""

import pytest
import torch
from cuda_sim import build, build_faulty, missing
from fused import error, normal
from test_cuda_kernels import watch

from prfl_kernels import solver_step
from prfl_kernels.qk_norm_rope import cuda as rope_cuda
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.reward_pool import cuda as pool_cuda
from prfl_kernels.reward_pool import op as reward_pool

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}")


def rms():
    x, weight = normal(1, 3, 600), normal(600)
    out = qk_norm_rope.forward(rope_cuda.forward, x, None, weight, None, None, 1, 1e-6, 0)[0][0].flatten(2)
    return error(out, torch.nn.functional.rms_norm(x.double(), (600,), weight.double(), 1e-6))


def rms_backward():
    x, dn, weight, rstd = normal(1, 3, 600), normal(1, 3, 600), normal(600), torch.ones(1, 1, 3)
    run = rope_cuda.backward
    dx = qk_norm_rope.backward(run, dn, None, x, None, weight, None, rstd, None, 1, 0, False)[0]
    g = (dn * weight).double()
    return error(dx, g - x * (g * x).mean(-1, keepdim=True))


def pool(tokens=200 * 32, width=512):
    x, u = normal(1, tokens, width), normal(2, width) / 20
    pooled, *_ = reward_pool.forward(pool_cuda.forward, x, u)
    x, u = x.double(), u.double()
    return error(pooled, (x @ u.T).softmax(1).transpose(1, 2) @ x)


def wide_pool():
    return pool(20, 1536)


def pool_backward():
    x, u, scores = normal(1, 40, 64), normal(2, 64), normal(1, 40, 2)
    lse, delta, dpooled = normal(1, 2), normal(1, 2), normal(1, 2, 64)
    inputs = dpooled, delta, x, u, scores, lse
    dx, _ = reward_pool.backward(pool_cuda.backward, *inputs, True, True)
    p = (scores - lse).exp()
    ds = p * (x @ dpooled[0].T - delta)
    return error(dx, p.double() @ dpooled[0].double() + ds.double() @ u.double())


def solver():
    state, columns = [normal(1, 640) for _ in range(5)], normal(1, 9)
    _, _, m_t = solver_step.forward(solver_step.cuda, *state, columns)
    return error(m_t, state[0].double() - columns[0, 0] * state[4].double())


# (what is wrong, run, source, file, text, replacement, message; none where only the numbers tell)
FAULTS = [
    ("no barrier", rms, "qk_norm_rope", "reduce.h", "  __syncthreads();\n", "", None),
    ("divergent barrier", rms, "qk_norm_rope", "reduce.h", "  __syncthreads();\n",
     "  if (warp_id() == 0) __syncthreads();\n  else\n    __syncthreads();\n", "divergent __syncthreads"),
    ("half a warp", rms, "qk_norm_rope", "reduce.h", "values[i] = over_warp(values[i], join);",
     "values[i] = lane < 16 ? over_warp(values[i], join) : 0.0f;", "deadlock|two collectives"),
    ("misaligned", rms, "qk_norm_rope", "ptx/vector.h", "    return load8(row + first);",
     "    return load8(row + first + 1);", "a misaligned access"),
    ("one token too many", rms_backward, "qk_norm_rope", "qk_norm_rope.cu",
     "if (!kAhead) fetch(a, columns, b, l, q, k);", "if (!kAhead) fetch(a, columns, b, l + 1, q, k);",
     "a read outside every array"),
    ("too few bytes expected", pool, "reward_pool", "pool_tiles.h", "mbarrier_expect(bar, n * bytes)",
     "mbarrier_expect(bar, n * bytes - 16)", "deadlock"),
    ("no wait for a copy", pool, "reward_pool", "pool_tiles.h",
     "    mbarrier_wait(&shared->full[tile % kStages], tile / kStages % 2);\n", "",
     "more arrivals than the mbarrier expects"),
    ("no wait for the cluster", pool, "reward_pool", "reward_pool.cu",
     "    cluster_wait();\n    if (const int pair", "    if (const int pair",
     "without a wait|a block that has ended"),
    ("no wait for a store", pool_backward, "reward_pool", "reward_pool.cu", "  bulk_wait_read<0>();\n", "",
     "bulk stores"),
    ("too many threads", solver, "solver_step", "solver_step.cu", "dim3(kThreads)}", "dim3(2048)}",
     "bad number of threads"),
    ("shared memory not asked for", wide_pool, "reward_pool", "launch.h", "if (s.shared > 48 << 10)",
     "if (false)", "too much shared memory"),
]  # fmt: skip


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_a_planted_fault_is_noticed(fault, tmp_path, monkeypatch):
    _, run, source, file, old, new, message = fault
    watch(monkeypatch, build_faulty(tmp_path, f"cuda/{source}.cu", file, old, new))
    if message is None:
        wrong = run()
        assert not wrong < 1e-3
    else:
        with pytest.raises(RuntimeError, match=f"cusim: .*({message})"):
            run()


@pytest.mark.parametrize("run", [rms, rms_backward, pool, wide_pool, pool_backward, solver])
def test_without_a_fault_the_same_runs_are_right(run, monkeypatch):
    watch(monkeypatch, build())
    assert run() < 1e-5
