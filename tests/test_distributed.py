"""`prfl train` under torchrun is the run of one process: metrics, checkpoints, resuming, refusals."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import run_cases as cases
import torch
import torch.distributed as dist
import training_runs
from helpers import SHAPE, move_data, tiny_config, write_adapter, write_run
from ranks import Ranks
from test_expert_pair import HIGH_ALONE, written
from training_runs import assert_equal, content, flip, killed

from prfl_engine import checksums, cli, restarts
from prfl_engine.metrics import read_metrics
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.experts import HIGH, LOW

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ranks():
    made = Ranks(2, ("run_cases", "prfl_engine.train", "prfl_engine.train_reward"), group=False)
    yield made
    made.close()


@pytest.fixture
def run(ranks, capfd):
    def run(
        config: Path,
        *overrides: str,
        processes: int = 2,
        torchrun: bool = True,
        ok: bool = True,
        command: str = "train",
        patch: Callable | None = None,
    ) -> list[str]:
        """What `prfl COMMAND` prints on every process; without torchrun one process, which is no rank."""
        if not torchrun:
            code = cli.main([command, str(config), *overrides])
            found = [(code, "".join(capfd.readouterr()))]
        else:
            found = ranks(cases.command, processes, cases.free_port(), patch, command, config, *overrides)
        for code, said in found[:processes]:
            assert (code == 0) == ok and "Traceback" not in said, said
        return [said for _, said in found[:processes]]

    return run


def values(folder: Path) -> list[dict[str, float]]:
    """What is no time of the machine."""
    records = [record["values"] for record in read_metrics(folder)]
    return [values for values in records if not any(name.startswith("perf/") for name in values)]


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": {"steps": 5}, "chain": {"window": 3}, "loss": {"anchor": 0.5}},
        {"rollout": {"steps": 5, "seeds": 2, "seeds_keep": "both", "samples": 2},
         "parallel": {"sequence": 2}},
        {"rollout": {"steps": 5, "cache": 0.3, "max_drift": 9, "seeds": 2, "lora": "adapter"},
         "parallel": {"resident": True}},
        {"rollout": {"steps": 5, "one_index": 2, "lora": "adapter"}, "parallel": {"replicate": 2}},
        {"rollout": {"steps": 5, "mode": "persistent", "pool": 8}},
        {"rollout": {"steps": 5, "mode": "persistent", "pool": 4}, "parallel": {"sequence": 2}},
    ],
    ids=["shards", "sequence", "resident", "copies", "persistent", "persistent sequence"],
)
def test_two_processes_train_as_one(run, tmp_path, settings):
    """The same losses, rewards and norms, since the samples of a step are the same. Two pools of chains that
    persist are drawn otherwise than one."""
    if "replicate" in settings.get("parallel", {}):
        again = {"name": "again", "path": str(tmp_path / "reward"), "form": "log"}
        settings = settings | {"reward": {"draws": 2, "more": [again]}}
    validation = {"samples": 3, "batch_size": 1, "videos": 3}
    if "lora" in settings["rollout"]:
        adapter = write_adapter(tmp_path / "adapter", tiny_config())
        settings = settings | {"rollout": settings["rollout"] | {"lora": str(adapter), "max_drift": 9}}
        validation["rollout_lora"] = "replicate" in settings["parallel"]
    steps = 3 if settings["rollout"].get("mode") == "persistent" else 2  # a chain goes on in the third
    validation["every"] = steps
    shared = {"train": {"accumulate": 2, "steps": steps, "ema": 0.5}, "eval": validation}
    config = write_run(tmp_path, samples=8, **shared, **settings)
    said = run(config, f"train.out={tmp_path}/two", patch=cases.told_validation)
    # Twice, before the first step and after the last: a rank has one sample and makes one more batch.
    batches = 6 if "sequence" in settings.get("parallel", {}) else 4
    assert [out.count("evaluated 1") for out in said] == [batches] * 2
    two = values(tmp_path / "two")
    assert (tmp_path / f"two/checkpoint-{steps}/shards.json").is_file()
    for perf in training_runs.values(tmp_path / "two", "perf/").values():
        least, mean, step = (perf[f"perf/{name}"] for name in ("exposed_s_least", "exposed_s", "step_s"))
        assert 0 < least <= mean < step and perf["perf/graded_exposed_s"] < perf["perf/graded_s"]
    if settings["rollout"].get("pool") == 8:
        assert all(v is not None for step in two for v in step.values())
        return
    alone = "parallel.sequence=1", "parallel.replicate=1", "parallel.resident=false"
    run(config, f"train.out={tmp_path}/one", *alone, processes=1, torchrun=False)
    one = values(tmp_path / "one")
    assert [step.keys() for step in one] == [step.keys() for step in two]
    for i in range(3):
        place = f"samples/step-{steps}/sample-0{i}.npy"
        want, got = (np.load(tmp_path / name / place) for name in ("one", "two"))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * abs(want).max())
    names = {path.relative_to(tmp_path / "one/best") for path in (tmp_path / "one/best").rglob("*")}
    assert names == {path.relative_to(tmp_path / "two/best") for path in (tmp_path / "two/best").rglob("*")}
    for part in ("best", "best/ema"):
        want, got = (load_transformer(tmp_path / name / part).state_dict() for name in ("one", "two"))
        for name, a in want.items():
            torch.testing.assert_close(got[name], a, rtol=0, atol=2e-3, msg=name)
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("given, held, resumed_on, half", [
    (["rollout.samples=2", "chain.window=2", "rollout.seeds=2", "rollout.seeds_step=4"], {HIGH, LOW}, 2, 1),
    (["lora.rank=2", "loss.anchor=0.5", "parallel.resident=true", "parallel.replicate=2", "rollout.seeds=2"],
     {HIGH, LOW}, 1, 1),
    ([HIGH_ALONE, "rollout.mode=persistent", "parallel.sequence=2"], {HIGH}, 2, 2),
], ids=["whole", "updates", "one trained"])  # fmt: skip
def test_two_experts_train_as_in_one_process(run, tmp_path, given, held, resumed_on, half):
    """Metrics, validations, what `best` samples; and a run that is killed after half of its steps and
    resumed, to the bit on as many processes."""
    steps = 2 * half
    train = {"accumulate": 2, "steps": steps, "save_every": half, "keep": 9, "ema": 0.5}
    config = written(tmp_path, samples=8, train=train, eval={"every": 2, "samples": 3, "batch_size": 1})
    run(config, *given, f"train.out={tmp_path}/two")
    killed(tmp_path / "two", half, tmp_path / "cut")
    rest = "train.resume=true", f"train.out={tmp_path}/cut"
    alone = "parallel.sequence=1", "parallel.replicate=1", "parallel.resident=false"
    run(config, *given, *rest, *(alone if resumed_on == 1 else ()), processes=resumed_on)
    run(config, *given, *alone, f"train.out={tmp_path}/one", processes=1, torchrun=False)
    two = values(tmp_path / "two")
    for other in values(tmp_path / "one"), values(tmp_path / "cut"):
        assert [found.keys() for found in other] == [found.keys() for found in two]
        for a, b in zip(other, two, strict=True):
            assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    if resumed_on == 2:
        last = f"checkpoint-{steps}"
        assert_equal(content(tmp_path / "cut" / last), content(tmp_path / "two" / last))
    made = []
    for name in ("one", "two"):
        best = tmp_path / name / "best"
        assert {path.name for path in best.iterdir()} >= held | {"ema"}
        assert (HIGH in held, LOW in held) == tuple((best / "ema" / part).is_dir() for part in (HIGH, LOW))
        trained = [f"lora.path={best}"] if "lora.rank=2" in given else [f"model.path={best}"]
        if LOW not in held:
            trained = [f"model.path={best / HIGH}", f"model.low={tmp_path / 'pair' / LOW}"]
        out = tmp_path / "samples" / name
        run(config, *trained, "--out", str(out), command="sample", processes=1, torchrun=False)
        made.append(np.load(out / "sample-00.npy"))
    np.testing.assert_allclose(*made, rtol=0, atol=2e-3 * abs(made[0]).max())
    whole = tmp_path / f"two/checkpoint-{steps}"
    for part in sorted(held):
        out = tmp_path / "converted" / part
        out.parent.mkdir(exist_ok=True)
        assert cli.main(["convert", str(whole / part), "--out", str(out), "--to", to_of(given)]) == 0
    assert cli.main(["convert", str(whole), "--out", str(tmp_path / "x"), "--to", to_of(given)]) == 2


def to_of(given: list[str]) -> str:
    """The layout of what is trained."""
    return "peft" if "lora.rank=2" in given else "native"


def test_a_sharded_run_resumes_on_another_number_of_processes(run, tmp_path):
    """4 steps on 2 processes are 2 on 2, a kill, then 2 on 1 under torchrun (to rounding), of LoRA. Not so
    where a bit of any file has flipped, which one of the two sees."""
    config = write_run(
        tmp_path, samples=8, train={"accumulate": 2, "steps": 4, "save_every": 2, "keep": 9},
        lora={"rank": 2}, loss={"anchor": 0.5},
    )  # fmt: skip
    run(config, f"train.out={tmp_path}/whole")
    killed(tmp_path / "whole", 2, tmp_path / "parts")
    run(config, f"train.out={tmp_path}/parts", "train.resume=true", processes=1)
    for a, b in zip(values(tmp_path / "whole"), values(tmp_path / "parts"), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    alone = {"processes": 1, "torchrun": False}
    (out,) = run(config, f"train.out={tmp_path}/parts", "train.resume=true", ok=False, **alone)
    assert "got a sharded checkpoint, want torchrun (any number of processes)" in out
    last = tmp_path / "whole/checkpoint-4"
    names = sorted(path.name for path in last.iterdir() if path.name != checksums.FILE)
    shards = ["shard-00000.safetensors", "shard-00001.safetensors", "shards.json"]
    assert names == ["run.json", *shards, "training_state.pt"]
    for name in names:
        content = (last / name).read_bytes()
        flip(last / name)
        told = run(config, f"train.out={tmp_path}/whole", "train.resume=true", "train.steps=5", ok=False)
        assert all(f"{last}/{name}: its checksum is " in line for line in told), told
        assert all(line.endswith("; checkpoint-2 is the last good checkpoint\n") for line in told), told
        (last / name).write_bytes(content)


def test_the_first_process_plans_for_all(run, tmp_path):
    """auto:GB: a part is recomputed, and the run is the one that recomputes nothing."""
    config = write_run(tmp_path, samples=8, train={"accumulate": 2, "steps": 2}, data={"batch_size": 2})
    run(config, f"train.out={tmp_path}/plain")
    for out in run(config, "model.recompute=auto:1e-6", ok=False, patch=cases.two_kinds):
        least = re.search(r"model.recompute: got auto:1e-06, want at least auto:([\d.]+): the lean", out)[1]
    given = f"model.recompute=auto:{least}", f"train.out={tmp_path}/auto"
    first, second = run(config, *given, patch=cases.two_kinds)
    assert "; of all lists the fastest" in first and "2 x none" not in first and "recompute" not in second
    for a, b in zip(values(tmp_path / "plain"), values(tmp_path / "auto"), strict=True):
        assert b == pytest.approx(a, rel=1e-5)


def test_what_waits_for_the_next_record_and_pools_of_chains_resume(run, tmp_path):
    """Of the loss of step 1, which the record of step 4 has, the mean of the ranks is kept. A pool that is
    missing on one rank ends all."""
    train = {"accumulate": 2, "steps": 4, "save_every": 2, "keep": 9, "log_every": 4}
    rollout = {"steps": 5, "mode": "persistent", "pool": 8}
    config = write_run(tmp_path, samples=8, train=train, loss={"sft_every": 4}, rollout=rollout)
    run(config, f"train.out={tmp_path}/whole")
    run(config, f"train.out={tmp_path}/parts", "train.steps=2")
    (tmp_path / "parts/checkpoint-2/pool-1.safetensors").rename(tmp_path / "pool-1.safetensors")
    sums = (tmp_path / "parts/checkpoint-2" / checksums.FILE).rename(tmp_path / checksums.FILE)
    more = f"train.out={tmp_path}/parts", "train.resume=true"
    for out in run(config, *more, ok=False):
        assert out.splitlines()[-1].endswith(
            "checkpoint-2/pool-1.safetensors: does not go with the pool of rank 0, want one checkpoint's"
        )
    (tmp_path / "pool-1.safetensors").rename(tmp_path / "parts/checkpoint-2/pool-1.safetensors")
    sums.rename(tmp_path / "parts/checkpoint-2" / checksums.FILE)
    run(config, *more)
    assert training_runs.values(tmp_path / "parts") == training_runs.values(tmp_path / "whole")
    assert "train/sft_loss" in training_runs.values(tmp_path / "whole")[4]


def test_a_reward_model_trains_on_two_processes(run, tmp_path):
    """As on one, with updates of its transformer, and goes on from its checkpoint."""
    train = {"accumulate": 2, "steps": 2, "ema": 0.5}
    config = write_run(tmp_path, samples=8, train=train, eval={"every": 2}, lora={"rank": 2})
    for processes, name in ((2, "two"), (1, "one")):
        launch = {"processes": processes, "torchrun": processes > 1}
        run(config, f"train.out={tmp_path}/{name}", command="train-reward", **launch)
    for a, b in zip(values(tmp_path / "one"), values(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    one, two = (tmp_path / name / "best" for name in ("one", "two"))
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(two) for p in two.rglob("*")}
    resumed = "train.resume=true", "train.steps=3"
    run(config, f"train.out={tmp_path}/two", *resumed, processes=2, command="train-reward")
    assert len(values(tmp_path / "two")) == len(values(tmp_path / "one")) + 2


def test_mistakes_end_all_processes_with_a_line(run, tmp_path):
    config = write_run(tmp_path, samples=8, train={"accumulate": 2})
    for out in run(config, "train.accumulate=3", ok=False):
        assert "train.accumulate: got 3, want a multiple of 2" in out
    for out in run(config, "loss.anchor=1", "loss.anchor_place=host", ok=False):
        assert "loss.anchor_place: got 'host', want device with several processes" in out
    both = "model.path=null", "model.preset=tiny-t2v", "model.boundary=0.875", "lora.rank=2"
    for out in run(config, *both, "model.idle=host", ok=False):
        assert "model.idle: got 'host', want device with several processes" in out
    few = "data.batch_size=3", "rollout.mode=persistent", "rollout.steps=5"
    for out in run(config, *few, ok=False):
        assert "data.train: got 8 samples, want a multiple of data.batch_size = 3" in out
    broken = tmp_path / "data/latent-5.npy"
    broken.write_bytes(b"")
    for out in run(config, "train.steps=9", f"train.out={tmp_path}/broken", ok=False):
        assert "latent-5.npy" in out
    np.save(tmp_path / "val/latent-1.npy", np.full((1, *SHAPE), 3e38, np.float32))
    for out in run(config, "eval.every=1", f"train.out={tmp_path}/infinite", ok=False):
        assert f"prfl: sft_loss: got inf on {tmp_path}/val/1.json, want a finite number" in out


def test_a_checkpoint_is_written_while_steps_go_on(run, tmp_path):
    """And holds what the run held when it was due: the run resumed from it ends as the one that waited."""
    train = {"accumulate": 2, "steps": 4, "save_every": 2, "keep": 1, "ema": 0.5}
    config = write_run(tmp_path, samples=8, train=train, eval={"every": 3}, optim={"rounding": "stochastic"})
    waits = run(config, f"train.out={tmp_path}/waits", "parallel.save_async=false")
    goes_on = run(config, f"train.out={tmp_path}/goes_on", patch=cases.slow_save)
    assert all("Error" not in out for out in waits + goes_on)
    run(config, f"train.out={tmp_path}/parts", "train.steps=2")
    run(config, f"train.out={tmp_path}/parts", "train.resume=true")
    want = content(tmp_path / "waits/checkpoint-4")
    for name in ("goes_on", "parts"):
        assert [path.name for path in (tmp_path / name).glob("*checkpoint-*")] == ["checkpoint-4"]
        assert_equal(content(tmp_path / name / "checkpoint-4"), want)
        assert training_runs.values(tmp_path / name) == training_runs.values(tmp_path / "waits")


def test_a_checkpoint_that_fails_in_the_background_ends_all_processes(run, tmp_path):
    config = write_run(tmp_path, samples=8, train={"accumulate": 2, "steps": 99, "save_every": 1})
    first, second = run(config, patch=cases.full_disk, ok=False)
    full = "No space left on device"
    assert first.splitlines()[-1].startswith("prfl: rank 1: [Errno 28] ") and full in first
    assert "prfl: cannot write: " in second and second.endswith("there is no checkpoint yet\n")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == []


def test_a_broken_sample_is_left_out_on_all_ranks_alike(run, tmp_path):
    """Also where one of two ranks that share its tokens could read it. A resumed run is equal to the bit."""
    train = {"accumulate": 2, "steps": 6, "save_every": 2}
    config = write_run(tmp_path, samples=6, train=train, data={"skip_broken": 2})
    (tmp_path / "data/latent-4.npy").write_bytes(b"")
    settings = "parallel.sequence=2", "loss.weight=0"
    run(config, f"train.out={tmp_path}/whole", *settings, patch=cases.unreadable_here)
    run(config, f"train.out={tmp_path}/parts", *settings, "train.steps=4", patch=cases.unreadable_here)
    data = move_data(tmp_path / "data", tmp_path / "moved")
    moved = *settings, f"data.train=[{data}/all.list]", f"data.null_text={data}/null.npy"
    run(config, f"train.out={tmp_path}/parts", *moved, "train.resume=true")  # now it could be read
    want = content(tmp_path / "whole/checkpoint-6")
    assert set(want["training_state.pt"]["broken"]) == {3, 4}
    assert_equal(content(tmp_path / "parts/checkpoint-6"), want)
    lines = [json.loads(line) for line in (tmp_path / "parts/broken.jsonl").read_text().splitlines()]
    assert sorted(Path(line["sample"]).stem for line in lines) == ["3", "4"]
    assert any("latent-4.npy" in line["reason"] for line in lines)
    settings = f"train.out={tmp_path}/one", "data.skip_broken=1", *moved[2:]
    for out in run(config, *settings, patch=cases.unreadable_here, ok=False):
        assert "data.skip_broken: got 1, want more to go on" in out


def test_a_signal_to_one_process_while_models_load_stops_all(run, tmp_path):
    config = write_run(tmp_path, samples=8, train={"accumulate": 2})
    for out in run(config, patch=cases.signalled_while_loading):
        assert "prfl: SIGTERM: stopped; nothing to save" in out
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_ends_the_others_and_nothing_is_lost(tmp_path, monkeypatch):
    """Two trials of scripts/kill_ranks.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from kill_ranks import trials

    assert [result for result in trials(tmp_path, 2, size=2, steps=2, seed=2) if not result.ok] == []
    said = [path.read_text() for path in tmp_path.glob("trial-*.log.*")]
    assert len(said) >= 4 and not any("Traceback" in text for text in said)


def test_a_run_that_torchrun_starts_anew_goes_on_by_itself(tmp_path):
    """Without train.resume. The folder of another run is refused by every start."""
    config = write_run(tmp_path, train={"steps": 4, "save_every": 1, "keep": 9}, loss={"weight": 0})
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"
    made = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests/die_once.py"), "train", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert list(training_runs.values(tmp_path / "run")) == [1, 2, 3, 4]


def test_only_the_run_of_this_call_of_torchrun_goes_on(tmp_path, monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarts.note_run(tmp_path)
    assert not restarts.restarted(tmp_path)  # the store is not torchrun's
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not restarts.restarted(tmp_path)
    restarts.note_run(tmp_path)
    assert restarts.restarted(tmp_path) and not restarts.restarted(tmp_path / "other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarts.restarted(tmp_path)


@pytest.mark.parametrize("replicate", [1, 2])
def test_the_official_cycle_of_groups_is_that_of_batches(run, tmp_path, replicate):
    """Two updates, clipping after every backward and the average: two processes with micro-batches of one
    sample are one process with micro-batches of two."""
    config = write_run(
        tmp_path, samples=1, data={"text_dropout": 0.0}, rollout={"steps": 5}, optim={"clip": 0.05},
        train={"compat": "official", "steps": 3, "ema": 0.5}, model={"latent_dtype": "float32"},
    )  # fmt: skip
    listed = tmp_path / "data/all.list"
    listed.write_text(4 * listed.read_text())  # one sample, so that its place in the order is all one
    run(config, f"train.out={tmp_path}/two", "train.accumulate=4", f"parallel.replicate={replicate}")
    batches = "train.accumulate=2", "data.batch_size=2"
    run(config, f"train.out={tmp_path}/one", *batches, processes=1, torchrun=False)
    want, got = (values(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(want, got, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


@pytest.mark.parametrize("pool, sequence", [("mean", 2), ("max", 1)])
def test_two_processes_pool_as_one(run, tmp_path, pool, sequence):
    """Reward training with several layers and a pooling without weights, whose tokens may be cut."""
    fields = {"pool": pool, "blocks": 2, "feature_layer": [1, 2]}
    config = training_runs.reward_run(tmp_path, "ce", reward=fields, train={"steps": 2, "accumulate": 2})
    cut = f"parallel.sequence={sequence}"
    run(config, f"train.out={tmp_path}/two", "eval.every=2", cut, command="train-reward")
    run(config, f"train.out={tmp_path}/one", "eval.every=2", command="train-reward", torchrun=False)
    for a, b in zip(values(tmp_path / "one"), values(tmp_path / "two"), strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name
