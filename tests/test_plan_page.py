"""`prfl plan --html` and --picture: memory over a step, with the paper's settings beside it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from helpers import one_line, tiny_config, write_adapter, write_run

from prfl_engine import cli
from prfl_engine.config import Config, read_config
from prfl_engine.planner import page
from prfl_engine.planner.command import Options, layout, predict, subject_of
from prfl_engine.planner.machine import MACHINES
from prfl_engine.planner.official import PRFL, SETTINGS, official, settings
from prfl_engine.planner.picture import STANDING

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Parsed(HTMLParser):
    """Whether all elements that a browser does not close are closed, and what is fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag == "line"

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop() == tag


def test_the_page_holds_all_of_a_prediction(tmp_path):
    path = str(write_run(tmp_path, train={"accumulate": 4}))
    options = Options(gpus=4, price=2.0)
    found, other = predict(path, (), options), official(path, (), options)
    text = page.html(found, other)
    parsed = Parsed(text)
    assert not parsed.open and not parsed.fetched  # nothing is fetched
    for phase in found.memory.phases:
        assert f"<td>{phase.name}</td>" in text
    for category, how, _ in found.known():
        assert f"<td>{category}</td>" in text and f"<td>{how}</td>" in text
    assert text.count("<svg") == 2 and "prefers-color-scheme:dark" in text and "price each" in text
    heights = [float(y) for y in re.findall(r"[0-9.]+,([0-9.]+)", text.split("<svg", 2)[1])]
    peak = 100 * (1 - found.memory.peak.bytes / (1.05 * max(found.limit, other.memory.peak.bytes)))
    assert min(heights) == pytest.approx(peak, abs=0.01)


def test_what_seconds_are_predicted_from_is_said(tmp_path):
    """Pieces of tokens by assumed rates, and steps that a cache skips as if they were made."""
    path = str(write_run(tmp_path, eval={"every": 0}))
    given = ("model.chunk=8", "rollout.cache=0.1")
    plain, found = (predict(path, overrides, Options()) for overrides in ((), given))
    assert plain.basis == plain.gpu.basis
    said = [" ".join(found.text().split()), page.html(found, found), found.values()["basis"]]
    for words in ("tiles of 128 x 256", "rollout.cache: as if no step were skipped"):
        assert all(words in text for text in said)


def test_the_picture_begins_with_all_that_stands(tmp_path):
    path = str(write_run(tmp_path, train={"accumulate": 2, "ema": 0.9}, eval={"every": 0}))
    given = ("parallel.resident=true", "rollout.cuda_graph=true", "loss.anchor=0.1")
    found = predict(path, given, Options(gpus=2))
    there = {e.category for p in found.memory.phases if p.name == "checkpoint" for e in p.entries}
    assert {"resident weights", "frozen start"} < there - {"one whole weight"} <= set(STANDING)


def test_the_papers_settings_take_the_place_of_ours(tmp_path):
    path = str(write_run(tmp_path, rollout={"mode": "persistent", "samples": 4}, lora={"rank": 4},
                         model={"weights_dtype": "bfloat16"}))  # fmt: skip
    other = official(path, ("optim.offload=all",), Options(gpus=8))
    c = other.subject.config
    assert (c.rollout.mode, c.rollout.samples, c.lora.rank, c.optim.offload) == ("fresh", 1, 0, "none")
    assert (c.model.weights_dtype, c.model.recompute, other.shards.sequence) == ("float32", "full", 1)
    assert c.train.accumulate == 8  # two heads: a GPU for every sample


def test_files_are_written_where_they_can_be(tmp_path, capsys):
    path = str(write_run(tmp_path, eval={"every": 0}))
    names = tmp_path / "plan.html", tmp_path / "plan.png"
    assert cli.main(["plan", path, "--html", str(names[0]), "--picture", str(names[1])]) == 0
    assert names[0].read_text().startswith("<!doctype html>")
    assert names[1].read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for given, message in (
        (["--html", str(tmp_path / "plan.txt")], "a name that ends with .html"),
        (["--picture", str(tmp_path / "none/plan.png")], "a name in a folder that is here"),
    ):
        assert cli.main(["plan", path, *given]) == 2
        assert message in one_line(capsys)


def test_the_papers_settings_have_no_host_limit(tmp_path):
    path = str(write_run(tmp_path, model={"recompute": "auto:40", "host": 100.0}))
    c = official(path, (), Options()).subject.config
    assert (c.model.recompute, c.model.host) == ("full", None)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_has_a_plan_with_the_papers_settings(path, gpus):
    given = Options(gpus=gpus, train_reward=path.stem.startswith("reward"))
    config, _ = read_config(path, settings(str(path), (), given), gpus)
    shards = layout(config, MACHINES["h100-80"], gpus, given.train_reward)
    assert subject_of(config, str(path), gpus, given).setup.weight_dtype == torch.float32
    assert (shards.size, config.lora.rank, config.model.recompute) == (gpus, 0, "full")


OWN = {  # all that this engine has and the paper's code has not
    "persistent": {"rollout": {"mode": "persistent", "pool": 64, "pool_place": "host", "stride": 2}},
    "seeds": {"rollout": {"seeds": 4, "seeds_step": 1, "seeds_keep": "both", "samples": 2, "cache": 0.1,
                          "lora": "adapter"}, "eval": {"rollout_lora": True}},
    "guidance": {"rollout": {"guidance": 3, "guidance_at_once": True},
                 "chain": {"guidance": 3, "unconditional": "gradient", "window": 2, "detach_input": True}},
    "stored": {"lora": {"rank": 4, "base": "e4m3", "base_place": "host"},
               "reward": {"weights": "e4m3", "place": "host", "draws": 3}},
    "anchor": {"loss": {"anchor": 0.5, "anchor_place": "host", "sft_every": 2},
               "train": {"stop_anchor": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("sections", OWN.values(), ids=OWN.keys())
def test_what_the_papers_code_has_not_is_off(sections, tmp_path):
    """As it would be without these settings, in bytes and seconds."""
    negative = {"negative_text": str(tmp_path / "data/null.npy")}
    path = write_run(tmp_path, eval={"every": 0}, data=negative, rollout={"steps": 8})
    want = official(str(path), (), Options()).values()
    values = yaml.safe_load(path.read_text())
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    if "lora" in values["rollout"]:
        values["rollout"]["lora"] = str(write_adapter(tmp_path / "adapter", tiny_config()))
    if "draws" in values["reward"]:
        values["reward"]["more"] = [{"name": "again", "path": values["reward"]["path"]}]
    path.write_text(yaml.safe_dump(values))
    assert official(str(path), (), Options()).values() == want


SAME = {  # what a run is, or what costs neither bytes nor seconds of a plan
    "model": "path preset boundary low latent_dtype compile kernels",
    "lora": "alpha targets path",
    "reward": "path query_attention mlp blocks feature_layer pool num_queries num_heads dropout return_type"
              " train_embeddings loss ce_weight pairs_at_once timesteps",
    "rollout": "solver steps sigmas shift sigma_range start range whole_timesteps probe_every max_drift",
    "chain": "", "loss": "form weight target sft_weight split",
    "optim": "lr lr_head betas eps weight_decay schedule warmup horizon cycles clip clip_each clip_heads",
    "parallel": "save_async timeout",
    "train": "out compat resume device steps seed save_every keep log_every ema_each tensorboard wandb",
    "data": "train lose paired val val_lose null_text negative_text text_dropout long_caption label"
            " first_frame batch_size skip_broken num_workers keep_gb",
    "eval": "every samples batch_size timesteps guidance seed one_noise pairs videos",
    "sample": "count seed guidance codec fps",
}  # fmt: skip


@pytest.mark.parametrize("section", Config.__dataclass_fields__)
def test_every_setting_is_the_papers_or_stays(section):
    """A new field has to be put into one list or the other."""
    made = {item.partition("=")[0] for item in (*SETTINGS, *PRFL)} | {"parallel.sequence", "train.accumulate"}
    own = {name.partition(".")[2] for name in made if name.startswith(f"{section}.")}
    fields, same = Config.__dataclass_fields__[section].default_factory.__dataclass_fields__, SAME[section]
    assert sorted([*own, *same.split()]) == sorted(fields)
