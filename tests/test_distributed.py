"""`prfl train` under torchrun is the run of one process: metrics, checkpoints, resuming, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_run

from prfl_engine.metrics import read_metrics
from prfl_engine.model.checkpoint import load_transformer


def run(
    config: Path,
    *overrides: str,
    processes: int = 1,
    torchrun: bool = False,
    ok: bool = True,
    command: str = "train",
) -> str:
    """The output of `prfl COMMAND`, under torchrun for more than one process."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch = launch if torchrun or processes > 1 else []
    made = subprocess.run(
        [sys.executable, *launch, "-m", "prfl_engine.cli", command, str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (made.returncode == 0) == ok, made.stdout + made.stderr
    return made.stdout + made.stderr


def values(folder: Path) -> list[dict[str, float]]:
    return [record["values"] for record in read_metrics(folder)]


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": {"steps": 5}, "chain": {"window": 3}},
        {"rollout": {"steps": 5}, "parallel": {"sequence": 2}},
        {"rollout": {"steps": 5, "cache": 0.3, "max_drift": 9}, "parallel": {"resident": True}},
        {"rollout": {"steps": 5, "mode": "persistent", "pool": 8}},
    ],
    ids=["shards", "sequence", "resident", "persistent"],
)
def test_two_processes_train_as_one(tmp_path, settings):
    """The same losses, rewards and norms, since the samples of a step are the same. Chains that persist
    are drawn otherwise."""
    shared = {"train": {"accumulate": 2, "steps": 3, "ema": 0.5}, "eval": {"every": 3}}
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
    names = {path.relative_to(tmp_path / "one/best") for path in (tmp_path / "one/best").rglob("*")}
    assert names == {path.relative_to(tmp_path / "two/best") for path in (tmp_path / "two/best").rglob("*")}
    for part in ("best", "best/ema"):
        want, got = (load_transformer(tmp_path / run / part).state_dict() for run in ("one", "two"))
        for name, a in want.items():
            torch.testing.assert_close(got[name], a, rtol=0, atol=2e-3, msg=name)
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name


def test_a_sharded_run_resumes_on_another_number_of_processes(tmp_path):
    """4 steps on 2 processes are 2 on 2, then 2 on 1 under torchrun (to rounding), and a LoRA run too."""
    config = write_run(
        tmp_path, samples=8, train={"accumulate": 2, "steps": 4, "save_every": 2, "keep": 9}, lora={"rank": 2}
    )
    run(config, f"train.out={tmp_path}/whole", processes=2)
    run(config, f"train.out={tmp_path}/parts", "train.steps=2", processes=2)
    run(config, f"train.out={tmp_path}/parts", "train.resume=true", processes=1, torchrun=True)
    for a, b in zip(values(tmp_path / "whole"), values(tmp_path / "parts"), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    out = run(config, f"train.out={tmp_path}/parts", "train.resume=true", ok=False)
    assert "got a sharded checkpoint, want torchrun (any number of processes)" in out


def test_a_reward_model_trains_on_two_processes(tmp_path):
    """As on one, with updates of its transformer, and goes on from its checkpoint."""
    train = {"accumulate": 2, "steps": 2, "ema": 0.5}
    config = write_run(tmp_path, samples=8, train=train, eval={"every": 2}, lora={"rank": 2})
    for processes, name in ((2, "two"), (1, "one")):
        run(config, f"train.out={tmp_path}/{name}", processes=processes, command="train-reward")
    for a, b in zip(values(tmp_path / "one"), values(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    one, two = (tmp_path / name / "best" for name in ("one", "two"))
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(two) for p in two.rglob("*")}
    resumed = "train.resume=true", "train.steps=3"
    run(config, f"train.out={tmp_path}/two", *resumed, processes=2, command="train-reward")
    assert len(values(tmp_path / "two")) == len(values(tmp_path / "one")) + 2


def test_mistakes_end_all_processes_with_a_line(tmp_path):
    config = write_run(tmp_path, samples=8, train={"accumulate": 2})
    out = run(config, "train.accumulate=3", processes=2, ok=False)
    assert "train.accumulate: got 3, want a multiple of 2" in out and "Traceback" not in own(out)
    broken = tmp_path / "data/latent-5.npy"
    broken.write_bytes(b"")
    out = run(config, "train.steps=9", f"train.out={tmp_path}/broken", processes=2, ok=False)
    assert "latent-5.npy" in out and "Traceback" not in own(out)


def own(output: str) -> str:
    """The output without what torchrun adds when a process has failed."""
    return output.partition("torch/distributed/elastic")[0]
