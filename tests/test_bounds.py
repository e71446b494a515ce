"""No field of a configuration takes a value that cannot be right, whatever its section."""

import math
import typing
from dataclasses import fields

import pytest

from prfl_engine import bounds
from prfl_engine.config import Config, load_config
from prfl_engine.config_file import from_dict
from prfl_engine.errors import UserError
from prfl_engine.model.wan import WanConfig

NONSENSE = (math.nan, math.inf, -math.inf, 1e39, -1, 2**200, -(2**200), "", "a\0b", "a" * 5000, [], {}, [[]],
            [math.nan], [math.nan, math.nan], [-1, 2], [""], {"a": 1}, True)  # fmt: skip
FREE = ("loss.target", "sample.guidance")
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
    lists = ("data.train", "data.lose", "data.val", "data.val_lose")
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
    "chain.window=all", "eval.timesteps=5", "train.seed=9223372036854775807", "optim.lr=0", "model.host=0",
    "train.wandb=2024-01-01", "rollout.steps=1000",
])  # fmt: skip
def test_values_that_are_right(item):
    load_config(None, [item])


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
    "out_dim": (0, 2**62), "ffn_dim": (-1, None), "text_dim": (0, None),
}  # fmt: skip


def test_hyper_parameters_of_a_transformer(tmp_path):
    assert BAD.keys() == bounds.hints(WanConfig).keys()
    for field, values in BAD.items():
        for value in values:
            with pytest.raises(UserError, match="^c.json: (dim|" + field + "): got"):
                WanConfig.from_values({field: value}, "c.json")
