"""No field of a configuration takes a value that cannot be right, and a run bears all that it takes."""

import argparse
import itertools
import math
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import one_line, write_run

from prfl_engine import bounds
from prfl_engine.cli import main
from prfl_engine.config import Config, load_config
from prfl_engine.config_file import from_dict
from prfl_engine.errors import UserError
from prfl_engine.model.wan import WanConfig
from prfl_engine.paths import a_path
from prfl_engine.planner import plan

NONSENSE = (
    math.nan, math.inf, -math.inf, 1e39, -1, 2**200, -(2**200), "", " ", "\t\u3000", "a\0b", "a" * 5000, [],
    {}, [[]], [math.nan], [math.nan, math.nan], [-1, 2], [""], [" "], {"a": 1}, True,
)  # fmt: skip
FREE = ("loss.target", "rollout.guidance", "chain.guidance", "eval.guidance", "sample.guidance")
"""Numbers that may be negative."""


def fields_of_all_sections():
    for section, kind in bounds.hints(Config).items():
        for field, hint in bounds.hints(kind).items():
            yield pytest.param(section, field, hint, id=f"{section}.{field}")


def legal(section, field, hint, value) -> bool:
    """Whether a value of NONSENSE is right there."""
    if value is True:
        return hint is bool or bool in typing.get_args(hint)
    if isinstance(value, int) and value == -1:
        return f"{section}.{field}" in FREE
    lists = ("data.train", "data.lose", "data.val", "data.val_lose", "reward.timesteps", "reward.more",
             "rollout.sigmas")  # fmt: skip
    return value == [] and f"{section}.{field}" in lists


@pytest.mark.parametrize("section, field, hint", [*fields_of_all_sections()])
def test_nonsense_is_refused_by_every_field(section, field, hint):
    for value in NONSENSE:
        if legal(section, field, hint, value):
            continue
        if value == {} and field == "recompute":
            continue  # the policy that keeps nothing
        with pytest.raises(UserError, match=rf"^{section}\.{field}[.:]") as caught:
            from_dict(Config, {section: {field: value}}, "")
        assert str(caught.value).isprintable() and "want" in str(caught.value), value


def test_sections_are_checked_however_they_are_built():
    for section, kind in bounds.hints(Config).items():
        for field in fields(kind):
            with pytest.raises(UserError, match=rf"^{section}\.{field.name}: "):
                kind(**{field.name: object()})


@pytest.mark.parametrize("item, field", [
    ("train.device=mps", "train.device"), ("train.device=meta", "train.device"),
    ("train.device=cpu:3", "train.device"), ("train.device=cuda:-1", "train.device"),
    ("train.device=cuda:100", "train.device"), ("optim.betas=[0.9, 1.0]", "optim.betas"),
    ("optim.eps=0", "optim.eps"), ("optim.lr=1e400", "optim.lr"), ("train.steps=3000000000", "train.steps"),
    ("train.steps=" + "9" * 5000, "train.steps"), ("lora.rank=1099511627776", "lora.rank"),
    ("train.seed=9223372036854775808", "train.seed"), ("data.num_workers=100000", "data.num_workers"),
    ("train.out=" + "a" * 256, "train.out"), ('train.out="a\\0b"', "train.out"),
    ('train.out="\\uD800"', "train.out"), ("train.x\x1b[31m\n=1", r"train\.x\\x1b\[31m\\n: unknown"),
])  # fmt: skip
def test_values_that_were_found_late(item, field):
    with pytest.raises(UserError, match=f"^{field}") as caught:
        load_config(None, [item])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("item", [
    "train.device=cuda:1", "train.device=cpu", "rollout.shift=1e9", "sample.guidance=-2", "loss.target=-1",
    "chain.window=all", "eval.timesteps=5", "train.seed=9223372036854775807", "optim.lr=0",
    "optim.weight_decay=10", "train.wandb=2024-01-01", "rollout.steps=1000",
])  # fmt: skip
def test_values_that_are_right(item):
    load_config(None, [item])


def within(hint, kind):
    """The bounds of a field's numbers of that kind, those in lists included."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated and args[0] is kind:
        yield from (bound for bound in args[1:] if isinstance(bound, bounds.Within))
    else:
        for part in args:
            yield from within(part, kind)


def bare(hint) -> bool:
    """Whether a field takes a float that has no bounds."""
    if typing.get_origin(hint) is typing.Annotated and typing.get_args(hint)[0] is float:
        return not list(within(hint, float))
    return hint is float or any(map(bare, typing.get_args(hint)))


def numbers(kind):
    """(section.field, low, high) in YAML of every number in a configuration."""
    for section, field, hint in (p.values for p in fields_of_all_sections()):
        lists = typing.get_origin(hint) is tuple
        for low, high in dict.fromkeys((b.low, b.high) for b in within(hint, kind)):
            yield f"{section}.{field}", *(f"[{end}, {end}]" if lists else f"{end}" for end in (low, high))


def test_floats_are_bounded_so_that_their_squares_are_finite():
    assert not any(bare(hint) for _, _, hint in (p.values for p in fields_of_all_sections()))
    for name, *ends in numbers(float):
        assert all(float(end.strip("[]").split(",")[0]) ** 2 < 3.4e38 for end in ends), name


CALLS = {
    "model.host": ("train", "model.recompute=auto:1", "loss.weight=0"),
    "lora.alpha": ("train", "lora.rank=2"), "train.stop_anchor": ("train", "loss.anchor=1"),
    "reward.dropout": ("train-reward", "reward.path=null"),
    "reward.ce_weight": ("train-reward", "reward.path=null", "reward.loss=bt", "data.lose={}/data/all.list"),
    "rollout.max_drift": ("train", "rollout.cache=0.1"),
    "optim.lr_head": ("train-reward", "reward.path=null", "optim.weight_decay=0"),
    "optim.weight_decay": ("train", "optim.lr_head=0"), "eval.timesteps": ("train", "eval.every=1"),
    "optim.lr": ("train", "optim.weight_decay=1"), "data.text_dropout": ("train", "loss.weight=0"),
    "sample.guidance": ("sample", "data.negative_text={}/data/null.npy", "sample.count=1"),
    **{f"{part}.guidance": ("train", "data.negative_text={}/data/null.npy", "eval.every=1", "train.steps=1")
       for part in ("rollout", "chain", "eval")},
}  # fmt: skip
"""The command that a number is used in, and what it is used with."""
LONG = ("data.num_workers", "reward.num_queries", "rollout.steps", "rollout.samples", "rollout.seeds",
        "train.steps", "train.accumulate", "eval.samples", "sample.count")  # fmt: skip
"""Numbers that are work: as large as they may be they are a run that a test cannot wait for."""
REFUSED = ("lora.rank", "reward.draws", "reward.blocks", "reward.num_heads", "reward.feature_layer",
           "rollout.pool", "rollout.stride", "rollout.one_index", "rollout.seeds_step",
           "parallel.replicate", "parallel.sequence")  # fmt: skip
"""Numbers that the model bounds too, or another setting, or the number of processes."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_run(folder, eval={"videos": 0})


@pytest.fixture
def call(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "KINDS", {"full": plan.KINDS["full"]})
    folders = (tmp_path / str(i) for i in itertools.count())

    def call(command, *items):
        out = ["--out", str(next(folders))] if command == "sample" else [f"train.out={next(folders)}"]
        return main([command, str(tiny[1]), *(item.format(tiny[0]) for item in items), *out])

    return call


def test_a_path_of_a_script_that_cannot_be_one(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=a_path)
    assert parser.parse_args(["--out", "a/b"]).out == Path("a/b")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--out", " "])
    assert "argument --out: path: got ' ', want text that can be a path" in capsys.readouterr().err


OTHERS = ("model.boundary", "rollout.sigma_range", "rollout.sigmas")
"""A number of two generators, a range that must hold a noise level, and a list that must fall."""


@pytest.mark.parametrize("name, low, high", [n for n in numbers(float) if n[0] not in OTHERS])
def test_a_run_bears_every_float(name, low, high, call):
    command, *rest = CALLS.get(name, ("train",))
    assert call(command, *rest, f"{name}={low}") == 0
    if name != "eval.timesteps":  # noise alone: refused
        assert call(command, *rest, f"{name}={high}") == 0


def test_a_run_bears_every_whole_number(call, capsys):
    ends = {name: end for name, *end in numbers(int)}
    alone = "rollout.pool", "rollout.seeds_step"  # with another setting only
    low = [f"{name}={low}" for name, (low, _) in ends.items() if name not in alone]
    high = [f"{name}={high}" for name, (_, high) in ends.items() if name not in LONG + REFUSED]
    new = "train-reward", "reward.path=null"
    for run in [("train", *low, "reward.num_heads=auto"), (*new, *low), ("train", *high), (*new, *high)]:
        assert call(*run, "train.steps=1") == 0
    capsys.readouterr()
    for name in REFUSED:
        assert call(*new, f"{name}={ends[name][1]}") == 2
        assert name.split(".")[1].split("_")[0] in one_line(capsys)


def bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize("text, reason", [
    (bomb(), "aliases"), ("train: &a [*a]", "aliases"), ("[" * 2000 + "]" * 2000, "nested too deeply"),
    ("train: {steps: 1}\ntrain: {steps: 2}", "the key train twice"),
    ("train: !!python/object:os.system x", "tag"), ("train: !!timestamp x", "tag"), ("train: !x y", "tag"),
    ("train: {steps: 0b_}", "not YAML"), ("? [a]\n: b", "not YAML"), ("train: {? {a: b} : 3}", "not YAML"),
    ("train: " + "9" * 5000, "not YAML"), ("\"a\\nb\\e[31m\": 2", r"a\nb\x1b[31m"), ("1: 2", "1: unknown"),
    ("train: \x00", "NUL"), ("train: \x07", "not YAML"),
], ids=range(15))  # fmt: skip
def test_files_that_are_no_plain_yaml(text, reason, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.yaml")
    assert reason in str(caught.value) and str(caught.value).isprintable()


def test_a_byte_order_mark_and_aliases_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\ufefftrain: &t {steps: 3}\ndata: {train: &l [a, b], val: *l}\r\n")
    config = load_config(path)
    assert config.train.steps == 3 and config.data.val == ("a", "b")


BAD = {
    "dim": (-32, 0, 32.0, 2**62, "32", None, [32], True, 33), "num_heads": (-2, 0, 7, "2"),
    "num_layers": (10**9, -1, "2", 2.5), "eps": (math.nan, None, -1, 0, math.inf, "1e-6"),
    "patch_size": ([1, 2], [0, 2, 2], [1, -2, 2], "122", None, 5, [1, 2, 2.5]), "freq_dim": (0, 15, None),
    "text_len": (0, -1, 2**62, None), "model_type": ("x", None, 3, []), "in_dim": (0, None),
    "out_dim": (0, 2**62), "ffn_dim": (-1, None), "text_dim": (0, None), "clip": (True, 1, "x", []),
}  # fmt: skip


def test_hyper_parameters_of_a_transformer(tmp_path):
    assert BAD.keys() == bounds.hints(WanConfig).keys()
    for field, values in BAD.items():
        for value in values:
            with pytest.raises(UserError, match="^c.json: (dim|" + field + "): got"):
                WanConfig.from_values({field: value}, "c.json")
