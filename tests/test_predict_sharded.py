"""`prfl plan` against real runs on several processes: FSDP2, HSDP and cut sequences over gloo."""

import os

import plan_ranks
import pytest
import ranks
from plan_runs import configuration, with_experts
from run_cases import free_port

from prfl_engine.config import load_config
from prfl_engine.planner.predict import memory
from prfl_engine.planner.sharded import Shards
from prfl_engine.planner.subject import find
from prfl_kernels import extension

built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")
FIRST = int(os.environ.get("PRFL_PLAN_FIRST", 0))
RUNS = int(os.environ.get("PRFL_PLAN_SHARDED_RUNS", 1))  # docs/planner.md has the result of more
SIZES = 2, 4


@pytest.fixture(scope="module")
def worlds():
    made = {}

    def of(size: int) -> ranks.Ranks:
        if size not in made:
            made[size] = ranks.Ranks(size, ("plan_ranks", "prfl_engine.train"), group=False)
        return made[size]

    yield of
    for world in made.values():
        world.close()


@built
@pytest.mark.parametrize("seed", range(FIRST, FIRST + RUNS))
def test_no_rank_has_more_bytes_than_predicted(seed, worlds, tmp_path):
    """The largest phase is at most 5 % below the prediction, and at most 0.5 % above."""
    size = SIZES[seed % len(SIZES)]
    compare(configuration(tmp_path, seed, size), seed, size, worlds)


@built
@pytest.mark.parametrize("seed, more", [
    (0, {"rollout": {"sigma_range": [0.8, 1.0], "range": [1, 1]}}),
    (2, {"lora": {"rank": 4}, "parallel": {"resident": True, "sequence": 1}}),
], ids=["one trained", "updates of both"])  # fmt: skip
def test_two_experts(seed, more, worlds, tmp_path):
    """Resident weights are of one at a time. Two groups of ranks may ask both in flow matching."""
    compare(with_experts(tmp_path, seed, 2, **more), seed, 2, worlds)


def compare(path, seed, size, worlds):
    c = load_config(path)
    p, reduce = c.parallel, 4 if c.optim.grad_dtype == "float32" else None
    shards = Shards(size, p.replicate, p.sequence, p.resident, reduce)
    subject = find(c, str(path), on_cpu=True, readers=size // p.sequence)
    found = memory(c, subject.setup, None, shards)
    real = [max(each) for each in zip(*worlds(size)(plan_ranks.run, path, size, free_port()), strict=True)]
    told = {phase.name: phase.bytes for phase in found.phases}
    training = max(told[n] for n in told if n.startswith(("rollout", "graded", "reward", "flow")))
    parts = training, told["optimizer"], told.get("validation", 0)
    for name, want, got in zip(("training", "optimizer", "validation"), parts, real, strict=True):
        print(f"seed {seed} {name} {want} {got} {want / max(1, got) - 1:+.4f}")
    assert 0.995 * max(real) <= max(parts) <= 1.05 * max(real)
