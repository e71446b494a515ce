"""`prfl train` under torchrun is the run of one process: metrics, checkpoints, resuming, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_run

from prfl_engine.metrics import read_metrics


def run(config: Path, *overrides: str, processes: int = 1, ok: bool = True) -> str:
    """The output of `prfl train`, under torchrun for more than one process."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "prfl_engine.cli", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [*command, str(config), *overrides], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (made.returncode == 0) == ok, made.stdout + made.stderr
    return made.stdout + made.stderr


def values(folder: Path) -> list[dict[str, float]]:
    return [record["values"] for record in read_metrics(folder)]


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": {"steps": 5}},
        {"rollout": {"steps": 5}, "parallel": {"sequence": 2}},
        {"rollout": {"steps": 5}, "parallel": {"resident": True}, "chain": {"window": 1}},
        {"rollout": {"steps": 5, "mode": "persistent", "pool": 8}},
    ],
    ids=["shards", "sequence", "resident", "persistent"],
)
def test_two_processes_train_as_one(tmp_path, settings):
    """The same losses, rewards and norms, since the samples of a step are the same. Chains that persist
    are drawn otherwise."""
    shared = {"train": {"accumulate": 2, "steps": 3}, "eval": {"every": 0}}
    config = write_run(tmp_path, samples=8, **shared, **settings)
    run(config, f"train.out={tmp_path}/two", processes=2)
    two = values(tmp_path / "two")
    assert (tmp_path / "two/checkpoint-3/shards.json").is_file()
    if "mode" in settings["rollout"]:
        assert all(v is not None for step in two for v in step.values())
        return
    run(config, f"train.out={tmp_path}/one", "parallel.sequence=1")
    one = values(tmp_path / "one")
    assert [step.keys() for step in one] == [step.keys() for step in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name
