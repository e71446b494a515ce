"""`prfl plan --html` and --picture: memory over a step, with the paper's settings beside it."""

import re
from html.parser import HTMLParser

import pytest
from helpers import one_line, write_run

from prfl_engine import cli
from prfl_engine.planner import page
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.official import official
from prfl_engine.planner.picture import STANDING


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
