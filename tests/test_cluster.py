"""What runs on clusters: every configuration loads, those of several GPUs fit them, and the Slurm script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from prfl_engine.config import ParallelConfig, load_config
from prfl_engine.errors import UserError
from prfl_engine.parallel import World, check_config, copies, nodes_of, started

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPT = ROOT / "scripts/slurm.sbatch"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load_and_fit_the_gpus_of_their_name(path, monkeypatch):
    c = load_config(path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    if (gpus := re.search(r"_(\d+)gpu$", path.stem)) is None or gpus[1] == "1":
        assert (c.parallel.replicate, c.parallel.sequence) == (None, 1)
        return
    size, p = int(gpus[1]), c.parallel
    assert copies(p, size, *nodes_of(size)) == size // 8
    assert 8 % p.sequence == 40 % p.sequence == 0  # of 14B's heads
    check_config(c, World(size=size, sequence=p.sequence, resident=p.resident, mesh=object()))


def test_weights_are_sharded_inside_nodes(monkeypatch):
    """Unless it is said otherwise, and where all nodes have as many processes."""
    assert copies(ParallelConfig(), 8, *nodes_of(8)) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert copies(ParallelConfig(), 8, *nodes_of(8)) == 2
    assert copies(ParallelConfig(replicate=1), 8, *nodes_of(8)) == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    line = "parallel.replicate: got null, want a number: 6 processes on 2 nodes are not 4 on each"
    with pytest.raises(UserError, match=line):
        copies(ParallelConfig(), 6, *nodes_of(6))


@pytest.mark.parametrize("size, sequence, accumulate", [(1, 1, 3), (4, 1, 8), (4, 2, 4)])
def test_the_last_micro_batch_of_a_step_is_known_on_every_rank(size, sequence, accumulate):
    ranks = [World(rank, size, sequence) for rank in range(0, size, sequence)]
    for step in range(2):
        for world in ranks:
            keys = range(step * accumulate + world.reader, (step + 1) * accumulate, world.readers)
            assert [world.last(key, accumulate) for key in keys] == [False] * (len(keys) - 1) + [True]


@pytest.mark.parametrize(
    "override, line",
    [
        ("train.accumulate=3", "train.accumulate: got 3, want a multiple of 2"),
        ("rollout.cuda_graph=true", "rollout.cuda_graph: got True, want false with several processes, or"),
        ("rollout.cuda_graph=true parallel.resident=true parallel.sequence=2", "rollout.cuda_graph: got"),
        ("optim.name=apex", "optim.name: got 'apex', want adamw or adamw8bit with several processes: apex"),
        ("optim.in_backward=true optim.clip=null train.accumulate=4", "train.accumulate: got 4, want 2 with"),
    ],
)
def test_what_several_processes_refuse(override, line):
    world = World(size=2, mesh=object())
    with pytest.raises(UserError) as error:
        check_config(load_config(None, ["train.accumulate=2", *override.split()]), world)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    "override, line",
    [
        ("parallel.resident=true", "prfl: parallel.resident: without torchrun this changes nothing\n"),
        ("parallel.save_async=false", ""),
    ],
)
def test_what_one_process_does_not_need_is_said(override, line, capsys):
    with started(load_config(None, [override]), torch.device("cpu")) as world:
        assert world == World()
    assert capsys.readouterr().err == line


def slurm(tmp_path: Path, steps_done: int, code: int = 0, state: str = "RUNNING") -> tuple[int, str]:
    """The script's exit code, and its Slurm commands; srun makes a checkpoint and ends with `code`."""
    config, log, out = tmp_path / "c.yaml", tmp_path / "log", tmp_path / "run"
    config.write_text(yaml.safe_dump({"train": {"out": str(out), "steps": 4}}))
    stubs = {
        "scontrol": f'echo "scontrol $*" >> {log}; echo node1; echo node2',
        "squeue": f"echo {state}",
        "srun": "export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2\n"
        f'shift 2; PYTHON={tmp_path}/train "$@"',
        "train": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $*" >> {log}; '
        f"mkdir -p {out}/checkpoint-{steps_done}; exit {code}",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    made = subprocess.run(["bash", SCRIPT, config], env=env, cwd=ROOT, capture_output=True, text=True)
    return made.returncode, log.read_text()


def test_the_slurm_script_names_ranks_and_requeues_a_stopped_run(tmp_path):
    code, log = slurm(tmp_path, steps_done=2)
    assert code == 0
    assert f"3 1 4 2 node1 -m prfl_engine.cli train {tmp_path}/c.yaml train.resume=auto\n" in log
    assert log.endswith("scontrol requeue 7\n")


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({"steps_done": 4}, 0),
        ({"steps_done": 2, "code": 2}, 2),
        ({"steps_done": 2, "state": "COMPLETING"}, 0),
    ],
    ids=["done", "refused", "cancelled"],
)
def test_the_slurm_script_leaves_other_jobs_ended(tmp_path, ends, code):
    found, log = slurm(tmp_path, **ends)
    assert found == code and "requeue" not in log
