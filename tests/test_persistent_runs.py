"""Runs with chains that persist: to the bit, with the other settings, refusals, pools in checkpoints."""

import json
import math
import shutil

import pytest
import torch
from helpers import SHAPE, one_line, tiny_config, write_data, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import assert_equal, content, interrupt, run, unchecked, values

from prfl_engine import flow
from prfl_engine import train as train_module
from prfl_engine.config import LossConfig
from prfl_engine.rollout.persistent import Persistent
from prfl_engine.rollout.pool import FILE, Pool
from prfl_engine.train import due

RUN = {"mode": "persistent", "steps": 5}


@pytest.mark.parametrize("how", [
    {}, {"rollout.pool": 4, "rollout.pool_place": "host", "chain.window": 2},
    {"rollout.samples": 2, "rollout.stride": 2, "rollout.range": "[1,3]", "loss.sft_every": 2},
], ids=str)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_bit(how, tmp_path, monkeypatch):
    config = write_run(
        tmp_path, train={"steps": 5, "save_every": 3, "accumulate": 2, "ema": 0.9}, rollout=RUN,
        data={"text_dropout": 0.3},
    )  # fmt: skip
    calls = 4 * 2 * how.get("rollout.samples", 1)
    how = [f"{k}={v}" for k, v in how.items()] + ["rollout.probe_every=1", "rollout.max_drift=1e-3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, f"train.out={whole}", *how)
    with monkeypatch.context() as patch:
        interrupt(patch, Persistent, "_grade", calls + 1)  # in the fifth step
        run("train", config, f"train.out={cut}", *how, code=130)
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-3"]
    run("train", config, f"train.out={cut}", *how, "train.resume=true")
    for name in ("checkpoint-3", "checkpoint-5"):
        assert_equal(content(cut / name), content(whole / name))
        said = [safe_open(out / name / FILE, "pt").metadata() for out in (cut, whole)]
        assert said[0] == said[1]
    assert values(cut) == values(whole)
    for name in ("age", "drift", "renewed"):
        assert max(v.get(f"train/chain_{name}", 0) for v in values(whole).values()) > 0, name


def test_with_a_range_of_one_step_the_modes_are_one_to_the_bit(tmp_path):
    """Every chain is new then, from the noise that a fresh rollout has."""
    config = write_run(tmp_path, train={"steps": 3, "accumulate": 2}, rollout={"steps": 4, "range": [1, 1]})
    out = {mode: tmp_path / mode for mode in ("fresh", "persistent")}
    for mode, folder in out.items():
        run("train", config, f"train.out={folder}", f"rollout.mode={mode}")
    found, want = (content(out[mode] / "checkpoint-3") for mode in ("persistent", "fresh"))
    found.pop(FILE)
    assert_equal(found, want)


def poisoned(monkeypatch, call):
    """The states that a pool gives at its call-th call are not finite, in all fields."""
    get, calls = Pool.get, []

    def given(self, chain):
        calls.append(chain)
        states = get(self, chain)
        if len(calls) != call:
            return states
        return [flow.SolverState(*(torch.full_like(a, math.nan) for a in s)) for s in states]

    monkeypatch.setattr(Pool, "get", given)
    return calls


def test_a_run_survives_a_chain_that_goes_bad(tmp_path, monkeypatch, capsys):
    """Its update is skipped, the chain is dropped and counted, and no weight notices."""
    config = write_run(tmp_path, rollout=RUN | {"max_drift": 1e3}, train={"steps": 6})
    calls = poisoned(monkeypatch, 4)  # in step 3; of two slots this is the second, whose chain is of step 1
    run("train", config)
    lines = capsys.readouterr().err
    assert "no update" in lines and "dropped" in lines
    found = values(tmp_path / "run")
    assert [math.isnan(found[step]["train/grad_norm"]) for step in range(3, 7)] == [False, True, False, False]
    assert [found[step]["train/chain_dropped"] for step in range(4, 7)] == [0, 0, 1]
    assert calls[1] is calls[3] and calls[5] is not calls[3]


def test_what_present_weights_make_from_noise_is_no_fault_of_the_pool(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 5})
    poisoned(monkeypatch, 2)  # a new chain
    capsys.readouterr()
    run("train", config, code=1)
    assert "step 1: the norm of the gradient is nan" in capsys.readouterr().err


WITH = [
    {"lora.rank": 2}, {"rollout.cache": 0.3, "rollout.range": "[2,3]", "rollout.max_drift": 1},
    {"chain.window": "all", "chain.detach_input": "true"}, {"loss.alternate": "true", "train.steps": 8},
    {"optim.in_backward": "true", "optim.clip": "null", "loss.sft_weight": 0}, {"model.recompute": "full"},
]  # fmt: skip


@pytest.mark.parametrize("how", WITH, ids=str)
def test_it_goes_with_the_other_settings(how, tmp_path):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 6})
    run("train", config, *(f"{k}={v}" for k, v in how.items()), "eval.every=6")
    found = [v for v in values(tmp_path / "run").values() if "train/reward" in v]
    assert max(v["train/chain_age"] for v in found) > 0 and all(0 < v["train/reward"] < 1 for v in found)
    assert all(("train/rollout_drift" in v) == ("rollout.cache" in how) for v in found)


REFUSED = {
    "rollout.pool=3": "rollout.pool: got 3, want a multiple of 2 = data.batch_size * train.accumulate",
    "rollout.stride=5": "rollout.stride: got 5, want at most 4, the steps of rollout.range",
    "rollout.mode=fresh rollout.pool=4": "rollout.pool: got 4, want null with rollout.mode fresh",
    "rollout.mode=fresh rollout.stride=2": "rollout.stride: got 2, want 1 with rollout.mode fresh",
    "rollout.mode=fresh rollout.pool_place=host": "rollout.pool_place: got 'host', want device with",
    "rollout.one_index=1": "rollout.one_index: got 1, want 0 with rollout.mode persistent",
    "loss.sft_every=2 loss.alternate=true": "loss.sft_every: got 2, want 1 with loss.alternate",
    "loss.sft_every=2 loss.weight=0": "loss.sft_every: got 2, want 1, or positive loss.weight and",
    "loss.sft_every=2 loss.sft_weight=0": "loss.sft_every: got 2, want 1, or positive loss.weight and",
    "loss.sft_every=2 optim.in_backward=true optim.clip=null": "loss.alternate: got False, want true or",
}


def test_what_does_not_go_is_refused_by_name(tmp_path, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"accumulate": 1}, data={"batch_size": 2})
    for given, line in REFUSED.items():
        run("train", config, *given.split(), code=2)
        assert line in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_latents_of_several_shapes_need_batches_of_one(tmp_path, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 6})
    write_data(tmp_path / "data", tiny_config(), 4, [SHAPE, (16, 1, 4, 6)])
    run("train", config, "data.batch_size=2", code=2)
    assert "data.train: got latents of 2 shapes, want one with rollout.mode persistent" in one_line(capsys)
    run("train", config)
    chains = load_file(tmp_path / "run/checkpoint-6" / FILE)
    assert len({chains[f"{slot}.0.x"].shape for slot in (0, 1)}) == 2


# Resuming with other settings, and broken files.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run("train", write_run(folder, rollout=RUN, train={"steps": 3}))
    return unchecked(folder)


def resumed(finished, tmp_path, *overrides, code=0):
    """Another step of a copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    more = f"train.out={tmp_path / 'run'}", "train.resume=true", "train.steps=4"
    run("train", finished / "config.yaml", *more, *overrides, code=code)


@pytest.mark.parametrize("override, said", [
    ("rollout.range=late", "made with rollout.range [0, 3], now [2, 3]: all chains start anew"),
    ("rollout.pool=4", "made with rollout.pool 2, now 4: all chains start anew"),
    ("chain.window=2", "made with chain.window 1, now 2: all chains start anew"),
    ("rollout.steps=6", "made with rollout.steps 5, now 6: all chains start anew"),
    ("rollout.max_drift=1", None), ("rollout.pool_place=host", None),
])  # fmt: skip
def test_a_pool_of_other_settings_is_left_out(override, said, finished, tmp_path, capsys):
    capsys.readouterr()
    resumed(finished, tmp_path, override)
    printed = capsys.readouterr()
    assert f"prfl: {override.split('=')[0]}: " in printed.out
    assert said is None or said in printed.err
    age = values(tmp_path / "run")[4]["train/chain_age"]
    assert (age > 0) == (said is None)


def test_the_mode_may_change(finished, tmp_path, capsys):
    resumed(finished, tmp_path, "rollout.mode=fresh")
    assert not (tmp_path / "run/checkpoint-4" / FILE).exists()
    more = f"train.out={tmp_path / 'run'}", "train.resume=true", "train.steps=5"
    capsys.readouterr()
    run("train", finished / "config.yaml", *more)
    assert "checkpoint-4 holds no pool of chains: all chains start anew" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-5" / FILE).exists()


def broken(path, change):
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["pool"])
    tensors = load_file(path)
    change(said, tensors)
    save_file(tensors, path, {"pool": json.dumps(said)})


CHANGES = {
    "no numbers of a pool": lambda said, tensors: said["chains"]["0"].pop("lap"),
    "got no numbers of a pool": lambda said, tensors: said["counts"].update(drawn="3"),
    "slot 0 holds no whole chain": lambda said, tensors: tensors.pop("0.text"),
    "numbers of a pool, want": lambda said, tensors: said["counts"].update(drawn=-1),
    "slot 1 holds no whole chain": lambda said, tensors: tensors.update({"1.0.m0": torch.zeros(3)}),
    "slot 7 holds no whole chain": lambda said, tensors: said["chains"].update({"7": said["chains"]["0"]}),
    "got 'other', want the tensors of the chains": lambda said, tensors: tensors.update(other=torch.ones(1)),
    "got the chain of slot 1 in lap": lambda said, tensors: said["chains"]["1"].update(lap=7),
    "got the chain of slot 0 in lap": lambda said, tensors: said["chains"]["0"].update(index=10**6),
    "want it where the last of 2 draws left it": lambda said, tensors: said["counts"].update(drawn=2),
    "0.0.x holds NaN": lambda said, tensors: tensors["0.0.x"].fill_(math.nan),
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_broken_pool_is_refused_and_nothing_is_written(line, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    broken(finished / "run/checkpoint-3" / FILE, CHANGES[line])
    try:
        capsys.readouterr()
        resumed(finished, tmp_path, code=2)
    finally:
        shutil.copytree(tmp_path / "copy", finished, dirs_exist_ok=True)
    assert line in one_line(capsys) and not (tmp_path / "run/checkpoint-4").exists()


# Losses.


def test_flow_matching_in_one_step_of_several():
    assert [due(LossConfig(sft_every=3), s) for s in range(4)] == [
        (True, True), (False, True), (False, True), (True, True),
    ]  # fmt: skip
    assert [due(LossConfig(alternate=True), s) for s in range(2)] == [(True, False), (False, True)]
    assert due(LossConfig(weight=0), 1) == (True, False) and due(LossConfig(sft_weight=0), 0) == (False, True)


def test_the_other_steps_compute_no_flow_matching(tmp_path, monkeypatch):
    config = write_run(tmp_path, train={"steps": 5, "accumulate": 2})
    calls, loss = [], train_module.sft_loss
    monkeypatch.setattr(train_module, "sft_loss", lambda *args: calls.append(0) or loss(*args))
    run("train", config, "loss.sft_every=2")
    assert len(calls) == 6  # two micro-batches each of the steps 0, 2, 4
    assert ["train/sft_loss" in v for v in values(tmp_path / "run").values()] == [True, False] * 2 + [True]
