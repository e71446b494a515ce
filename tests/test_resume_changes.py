"""What a resumed run may change and what it may not; broken states. What is refused changes nothing."""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import one_line, tiny_config, write_data, write_run
from safetensors.torch import load_file, save_file
from training_runs import NAME, STATE, reward_run, run, unchecked, values

from prfl_engine import train as train_module
from prfl_engine.config import Config, OptimConfig
from prfl_engine.optim import optimizer as optim
from prfl_engine.optim import updates
from prfl_engine.resume import KIND, RUN

MORE = ["train.resume=true", "train.steps=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, without checksums, and copies of its data that tests may ask for."""
    folder = tmp_path_factory.mktemp("finished")
    run("train", write_run(folder, train={"ema": 0.9}))
    unchecked(folder)
    write_data(folder / "other", tiny_config(), 4, seed=9)
    shutil.copytree(folder / "policy", folder / "policy2")
    weights = load_file(folder / "policy" / NAME)
    save_file({k: v + 1 for k, v in weights.items()}, folder / "policy2" / NAME)
    return folder


def everything(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def refused(folder, capsys, *overrides):
    """The line of a run that is refused and has changed nothing."""
    before = everything(folder)
    capsys.readouterr()
    run("train", folder / "config.yaml", *overrides, code=2)
    assert everything(folder) == before
    return one_line(capsys)


def test_every_field_is_of_one_kind():
    assert set(KIND) == {f"{section}.{name}" for section, part in asdict(Config()).items() for name in part}


FIXED = {
    "train.seed=1": "got 1, want 0",
    "train.accumulate=2": "got 2, want 1",
    "data.batch_size=2": "got 2, want 1",
    "data.label=blur_quality": "got 'blur_quality', want 'motion_quality'",
    "model.path={}/policy2": "policy2', want '{}/policy'",
    "model.path=null": "got None, want",
    "reward.path={}/nowhere": "nowhere', want",
    "data.train=[{}/val/all.list]": "val/all.list'], want ['{}/data/all.list'] as in {}/run/checkpoint-2",
    "data.train=[{}/other/all.list]": "other/all.list'], want",
    "data.null_text={}/other/null.npy": "other/null.npy', want",
    "lora.rank=2": "got 2, want 0",
    "model.weights_dtype=bfloat16": "got 'bfloat16', want 'float32'",
}


@pytest.mark.parametrize("override", FIXED)
def test_what_may_not_change_is_refused_by_name(override, finished, capsys):
    line = refused(finished, capsys, *MORE, "optim.lr=0.7", override.format(finished))
    assert line.startswith(f"prfl: {override.partition('=')[0]}: got ")
    assert FIXED[override].replace("{}", str(finished)) in line


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_what_may_change_takes_effect_and_is_printed(weights, tmp_path, capsys):
    config = write_run(tmp_path, model={"weights_dtype": weights}, optim={"lr": 1e-3})
    run("train", config)
    capsys.readouterr()
    changed = {"lr": 1e-5, "weight_decay": 0.0, "betas": [0.5, 0.6], "eps": 1e-6, "clip": 0.5}
    run("train", config, *MORE, *(f"optim.{k}={v}" for k, v in changed.items()), "train.save_every=1")
    said = capsys.readouterr().out.splitlines()
    assert "prfl: optim.lr: 0.001 -> 1e-05" in said and "prfl: train.steps: 2 -> 3" in said
    assert "prfl: optim.betas: [0.9, 0.999] -> [0.5, 0.6]" in said and len(said) == 8
    assert values(tmp_path / "run")[3]["train/lr"] == 1e-5
    state = torch.load(tmp_path / "run/checkpoint-3" / STATE, weights_only=True)
    group = state["optimizer"]["param_groups"][0]
    assert group["base_lr"] == group["lr"] == 1e-5 and list(group["betas"]) == [0.5, 0.6]
    assert group["weight_decay"] == 0 and group["eps"] == 1e-6
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert {k: written["optim"][k] for k in changed} == changed
    stored = json.loads((tmp_path / "run/checkpoint-3" / RUN).read_text())["config"]
    assert stored == written | {"train": stored["train"]}


@pytest.mark.parametrize("how", [
    {"name": "adamw8bit"}, {"offload": "all"}, {"in_backward": True, "clip": None},
], ids=str)  # fmt: skip
def test_every_optimizer_keeps_its_own_settings(how):
    if "name" in how:
        pytest.importorskip("torchao", reason="torchao is not installed")
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    old = optim.make_optimizer([(first, 1.0)], OptimConfig(**how))
    first(torch.ones(64)).sum().backward()
    optim.update(old, None)
    want = {"betas": (0.1, 0.2), "weight_decay": 0.3, "eps": 0.4}
    new = optim.make_optimizer([(second, 0.5)], OptimConfig(**want, **how))
    optim.load_state(new, old.state_dict())
    group = new.param_groups[0]
    assert {k: group[k] for k in (*want, "base_lr")} == want | {"base_lr": 0.5}
    assert group["updates"] == 1 and new.state[second.weight]["step"] == 1


def test_lists_and_data_may_move(finished, tmp_path, capsys):
    """The whole folder, the list alone; not to other samples of the same names."""
    shutil.copytree(finished, tmp_path / "here")
    for path in [*(tmp_path / "here").glob("*/*.json"), *(tmp_path / "here").glob("*/*.list"),
                 tmp_path / "here/config.yaml"]:  # fmt: skip
        path.write_text(path.read_text().replace(str(finished), str(tmp_path / "here")))
    run("train", tmp_path / "here/config.yaml", *MORE)
    moved = f"data.train: ['{finished}/data/all.list'] -> ['{tmp_path}/here/data/all.list']"
    assert moved in capsys.readouterr().out
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "data/all.list", tmp_path / "new.list")
    moved = [f"train.out={tmp_path}/run", f"data.train=[{tmp_path}/new.list]"]
    run("train", finished / "config.yaml", *MORE, *moved)


def test_other_scores_do_not_count_for_best(tmp_path, capsys):
    config = write_run(tmp_path, optim={"lr": 0.0, "weight_decay": 0.0}, eval={"every": 2})
    run("train", config)
    best = tmp_path / "run/best/score.json"
    before = json.loads(best.read_text())
    run("train", config, *MORE, "eval.timesteps=[800]")
    assert "earlier scores no longer count" in capsys.readouterr().out
    assert json.loads(best.read_text())["step"] == 3 and before["step"] < 3


def test_reward_training_with_another_loser_is_refused(tmp_path, capsys):
    config = reward_run(tmp_path, "bt")
    run("train-reward", config)
    capsys.readouterr()
    run("train-reward", config, *MORE, f"data.lose=[{tmp_path}/mixed/all.list]", code=2)
    assert "data.lose: got" in one_line(capsys)


def test_a_checkpoint_of_before_is_compared_with_the_configuration_beside_it(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run/checkpoint-2" / RUN).unlink()
    more = [*MORE, f"train.out={tmp_path}/run"]
    run("train", finished / "config.yaml", *more, "train.seed=5", code=2)
    assert "has no run.json: compared with" in (err := capsys.readouterr().err) and "train.seed: got 5" in err
    (tmp_path / "run/checkpoint-2" / RUN).write_text('{"config": 1}')
    run("train", finished / "config.yaml", *more, code=2)
    assert f"{RUN}: got no configuration" in capsys.readouterr().err
    (tmp_path / "run/checkpoint-2" / RUN).unlink()
    for make, needle in ((os.mkfifo, "is a pipe"), (lambda p: p.symlink_to(p), "Too many levels")):
        make(tmp_path / "run/checkpoint-2" / RUN)
        run("train", finished / "config.yaml", *more, code=2)
        assert f"{RUN}: {needle}" in one_line(capsys)
        (tmp_path / "run/checkpoint-2" / RUN).unlink()
    (tmp_path / "run/config.yaml").unlink()
    run("train", finished / "config.yaml", *more, code=2)
    assert "what the run was is unknown" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path, capsys):
    config = write_run(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("rum", "empty"):
        line = refused(tmp_path, capsys, "train.resume=true", f"train.out={tmp_path}/{name}")
        assert "holds no checkpoint to resume" in line
    assert not (tmp_path / "rum").exists()
    run("train", config, "train.resume=auto", "train.steps=1")
    assert f"prfl: {tmp_path}/run holds no checkpoint: starting at step 0" in capsys.readouterr().err
    run("train", config, "train.resume=auto", "train.steps=2")
    assert "starting" not in capsys.readouterr().err and list(values(tmp_path / "run")) == [1, 2]


def test_folders_that_cannot_be_one(finished, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name in ("loop", "file", "file/x", "a\\0b", "n" * 300):
        assert "train.out: " in refused(finished, capsys, f'train.out="{tmp_path}/{name}"')


BAD = {"deep": "[" * 99_999 + "\n", "folder": None, "half": '{"step": 1}\n'}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_broken_metrics(content, finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    assert str(path) in refused(finished, capsys, *MORE, f"train.out={tmp_path}/run")


# The state beside the weights.


def moments(change):
    def broken(state):
        for entry in state["optimizer"]["state"].values():
            change(entry)

    return broken


def last(name, value):
    """The last number of every such tensor."""
    return moments(lambda entry: entry[name].view(-1)[-1:].fill_(value))


def put(*keys):
    """A change of one entry: its keys, then its value."""
    *path, last, value = keys

    def broken(state):
        for key in path:
            state = state[key]
        state[last] = value

    return broken


BROKEN = {
    "moments": (moments(lambda e: e.update(exp_avg=torch.zeros(3))), "parameter 0: exp_avg: got float32 [3]"),
    "dtype": (moments(lambda e: e.update(exp_avg_sq=e["exp_avg_sq"].double())), "exp_avg_sq: got float64"),
    "expanded": (moments(lambda e: e.update(exp_avg=torch.zeros(()).expand(e["exp_avg"].shape))), "strides"),
    "no moment": (moments(lambda e: e.pop("exp_avg")), "parameter 0: got a dict of exp_avg_sq, step, want"),
    "count": (moments(lambda e: e.update(step="1")), "parameter 0: step: got str"),
    "not a number": (last("exp_avg", math.nan), "exp_avg: holds NaN or infinity"),
    "infinite": (last("exp_avg_sq", math.inf), "exp_avg_sq: holds NaN or infinity"),
    "negative square": (last("exp_avg_sq", -1), "exp_avg_sq: holds -1, want no negative numbers"),
    "negative count": (last("step", -3), "step: holds -3, want"),
    "a parameter more": (put("optimizer", "state", 99, {}), "parameter 99"),
    "list": (put("optimizer", []), "optimizer: want a dict"),
    "groups": (put("optimizer", "param_groups", [1]), "groups of [None] parameters"),
    "step text": (put("step", "2"), "step: got '2', want 2"),
    "step negative": (put("step", -1), "step: got -1, want 2"),
    "step huge": (put("step", 10**9), "want 2 as its folder's name has it"),
    "best": (put("best", math.nan), "best: got nan"),
    "random": (put("rng", torch.zeros(5056)), "rng: got float32"),
    "random size": (put("rng", torch.zeros(3, dtype=torch.uint8)), "rng: got uint8 [3]"),
    "random bits": (put("rng", torch.full((5056,), 255, dtype=torch.uint8)), "does not fit"),
    "best infinite": (put("best", math.inf), "best: got inf"),
    "unlogged": (put("unlogged", {"a": 1}), "unlogged: a: want"),
    "unlogged name": (put("unlogged", {1: torch.zeros(())}), "unlogged: 1: want a name"),
    "half": (None, "not a safe state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_named_with_its_entry(name, finished, tmp_path, capsys):
    change, needle = BROKEN[name]
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoint-2" / STATE
    if change is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    before = everything(tmp_path)
    run("train", finished / "config.yaml", *MORE, f"train.out={tmp_path}/run", code=2)
    line = one_line(capsys)
    assert str(path) in line and needle in line, line
    assert everything(tmp_path) == before


BLOCKS = {
    "shape": lambda s: s[0]["blocks"][0].update(exp_avg=torch.zeros(3)),
    "no block": lambda s: s[0].update(blocks=[]),
    "another block": lambda s: s[0]["blocks"].append({}),
    "text": lambda s: s[0]["blocks"][0].update(exp_avg="x"),
    "not a number": lambda s: s[0]["blocks"][0]["exp_avg"][-1:].fill_(math.nan),
    "no list": lambda s: s[0].update(blocks={}),
    "expanded": lambda s: s[0]["blocks"][0].update(exp_avg=torch.zeros(()).expand(64)),
    "step": lambda s: s[0].update(step=1),
    "no state": lambda s: s.pop(0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_broken_blocks_are_refused_and_change_nothing(name):
    optimizer = optim.make_optimizer([(torch.nn.Linear(8, 8).bfloat16(), 1.0)], OptimConfig())
    saved = torch.optim.Optimizer.state_dict(optimizer)
    saved = {"state": {k: dict(v, blocks=[dict(b) for b in v["blocks"]]) for k, v in saved["state"].items()},
             "param_groups": saved["param_groups"]}  # fmt: skip
    BLOCKS[name](saved["state"])
    with pytest.raises(ValueError, match="parameter 0"):
        optim.load_state(optimizer, saved)
    saved["state"], saved["param_groups"][0]["updates"] = optimizer.state_dict()["state"], -1
    with pytest.raises(ValueError, match="group 0: updates: got -1"):
        optim.load_state(optimizer, saved)


def test_averaged_weights_that_are_not_there(tmp_path, capsys):
    config = write_run(tmp_path)
    run("train", config)
    assert "train.ema: got 0.5, want 0: " in refused(tmp_path, capsys, *MORE, "train.ema=0.5")
    assert config.exists()


# Numbers that are not finite.


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, monkeypatch):
    config = write_run(tmp_path)
    run("train", config)
    capsys.readouterr()
    monkeypatch.setattr(updates, "lr_factor", lambda *args: 1e41)  # of a learning rate of 1e-3
    for how, needle in {"train.save_every=1": "is not finite after the update",
                        "train.save_every=9": "the weights were not finite"}.items():  # fmt: skip
        run("train", config, "train.resume=true", "train.steps=4", how, code=1)
        line = one_line(capsys)
        assert needle in line and f"{tmp_path}/run/checkpoint-2 is the last good checkpoint" in line
        assert "patch_embedding.weight" in line
        assert [p.name for p in (tmp_path / "run").glob("*check*")] == ["checkpoint-2"]
    out = tmp_path / "new"
    run("train", config, f"train.out={out}", "train.save_every=1", code=1)
    assert "there is no checkpoint yet" in one_line(capsys) and not list(out.glob("*checkpoint*"))


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoint-2" / NAME
    weights = load_file(path)
    weights["head.head.bias"][0] = math.inf
    save_file(weights, path)
    line = refused(finished, capsys, *MORE, f"train.out={tmp_path}/run")
    assert f"checkpoint-2/{NAME}: head.head.bias holds NaN or infinity" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_gradient_that_is_not_finite_names_the_sample(workers, tmp_path, capsys, monkeypatch):
    config = write_run(tmp_path, data={"num_workers": workers, "text_dropout": 0.0})
    text = np.load(tmp_path / "data/short-1.npy")
    for value, code in ((np.nan, 2), (3e38, 1)):  # refused when it is read; finite, but it overflows
        for name in ("short-1", "long-1"):
            np.save(tmp_path / f"data/{name}.npy", np.full_like(text, value))
        out = tmp_path / str(code)
        run("train", config, "train.steps=4", "train.save_every=1", f"train.out={out}", code=code)
        line = one_line(capsys)
        assert "1.json" in line or "-1.npy" in line
        assert code == 2 or "the norm of the gradient is nan" in line
    monkeypatch.setattr(train_module, "read_lists", lambda *args: [tmp_path / "data/0.json"])
    loss = train_module.sft_loss
    monkeypatch.setattr(train_module, "sft_loss", lambda *args: math.nan * loss(*args))
    run("train", config, f"train.out={tmp_path}/two", code=1)
    line = one_line(capsys)
    assert f"samples: {tmp_path}/data/0.json; there is no checkpoint yet" in line


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)], ids=range(3))
def test_what_stands_in_the_place_of_a_file_of_the_run(name, make, tmp_path, capsys):
    config = write_run(tmp_path)
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    run("train", config, "train.resume=auto", code=2)
    assert f"/run/{name}: " in one_line(capsys) and os.listdir(tmp_path / "run") == [name]
