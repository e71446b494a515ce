"""`prfl plan --search`: its rows, what it tries, and what it says."""

import html
import json
import shlex
from dataclasses import replace

import pytest
from helpers import write_run

from prfl_engine import cli
from prfl_engine.config import load_config
from prfl_engine.errors import UserError
from prfl_engine.planner import choices, pareto
from prfl_engine.planner.command import Options, predict, subject_of
from prfl_engine.planner.page import front
from prfl_engine.planner.report import Prediction

OPTIMIZERS = choices.OPTIMIZERS


@pytest.fixture
def few(monkeypatch):
    """Only few settings, so that a search is quick."""
    monkeypatch.setattr(choices, "POLICIES", choices.POLICIES[1:4:2])
    monkeypatch.setattr(choices, "OPTIMIZERS", choices.OPTIMIZERS[:1])
    monkeypatch.setattr(choices, "SAMPLES", (1,))
    monkeypatch.setattr(choices, "CHUNK", 16)


def test_rows_pasted_behind_the_configuration_are_predicted_alike(tmp_path, few):
    path = str(write_run(tmp_path, eval={"every": 0}))
    found = pareto.search(path, (), Options(gpus=2, budget=2.0, price=2.0))
    overrides, row = found.rows[-1]
    again = predict(path, overrides, Options(gpus=row.times.gpus, budget=2.0, price=2.0))
    assert again.values() == row.values() and row.fits
    assert "rollout.mode=persistent" in overrides  # nothing else takes less time
    seconds = [r.times.per_sample for _, r in found.rows]
    assert seconds == sorted(seconds, reverse=True) and found.tried > len(found.rows)
    text = found.text()
    assert all(len(line) <= 100 for line in text.splitlines()) and "price each" in text
    assert f"the smallest machine that works: {found.rows[0][1].times.gpus} x h100-80" in text
    for overrides, row in found.rows:  # as a shell reads them
        start = text.index(f"# {row.times.gpus} GPUs")
        block = text[start:].split("\n\n")[0].split("\n# ")[0].partition("\n")[2]
        assert tuple(shlex.split(block.replace("\\\n", " "))) == overrides
    told = found.values()
    s = pareto.Search(path, (), Options(gpus=2))
    buys = list(pareto._neighbours(s, max(s.candidates(2), key=lambda c: c.seconds)))
    assert buys and all(n.seconds < 0 or n.bytes < 0 for n in buys)
    assert told["smallest"]["gpus"] == found.rows[0][1].times.gpus
    assert [r["price"] for r in told["rows"]] == [pytest.approx(s * r["gpus"] / 1800) for s, r in zip(
        seconds, told["rows"], strict=True)]  # fmt: skip


def test_the_page_of_a_search_has_all_rows_and_the_picture_of_the_last(tmp_path, few, capsys, monkeypatch):
    path, page = str(write_run(tmp_path, eval={"every": 0})), tmp_path / "page.html"
    given = ["plan", path, "--search", "--gpus", "2", "--nodes", "2", "--budget", "2", "--no-cache"]
    search, made = pareto.search, {}
    monkeypatch.setattr(pareto, "search", lambda *given: made.setdefault(given, search(*given)))
    assert cli.main([*given, "--html", str(page)]) == 0
    printed, text = capsys.readouterr().out, page.read_text()
    ((asked, found),) = made.items()
    assert asked[2] == Options(gpus=2, nodes=2, budget=2.0)
    for overrides, row in found.rows:
        assert f"<td class=n>{row.times.per_sample:.3g}</td>" in text
        assert all(html.escape(line) in text for line in pareto.pasted(overrides))
    last = found.rows[-1][1]
    assert all(f"<td>{html.escape(n.change)}</td>" in text for n in found.neighbours)
    assert f"{last.memory.peak.bytes / 1e9:.1f} GB" in text and text.count("<svg") == 2
    assert "settings tried" in printed and f"{last.shards.size} x h100-80" in text


def test_lines_have_what_the_search_was_given(tmp_path, few):
    path, given = str(write_run(tmp_path, eval={"every": 0})), ("model.recompute=full",)
    found = pareto.search(path, given, Options(gpus=1, budget=2.0))
    (overrides, row), text = found.rows[0], found.text()
    line = text[text.index("# 1 GPUs") :].split("\n\n")[0].partition("\n")[2]
    pasted = tuple(shlex.split(line.replace("\\\n", " ")))
    assert pasted == (*given, *overrides) and found.values()["given"] == list(given)
    assert predict(path, pasted, Options(budget=2.0)).values() == row.values()
    assert "after `prfl train CONFIG`" in text
    assert "after `prfl train-reward CONFIG`" in replace(found, command="train-reward").text()


def test_a_search_tries_no_more_gpus_than_it_may(tmp_path, few, capsys):
    path = str(write_run(tmp_path, eval={"every": 0}, parallel={"sequence": 2}))
    given = ["plan", path, "--search", "--gpus", "1", "--budget", "2", "--json"]
    assert cli.main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in told["rows"]] == [1]
    assert pareto.Search(path, (), Options(gpus=6)).counts == [1, 2, 4, 6]
    assert pareto.Search(path, (), Options()).counts[-1] == pareto.MOST


def test_every_group_of_settings_is_tried(tmp_path):
    path = str(write_run(tmp_path, lora={"rank": 4}, rollout={"mode": "persistent", "stride": 2, "pool": 8}))
    s = pareto.Search(path, (), Options(gpus=2))
    tried = {item for option in s.choices(2).candidates() for item in choices.whole(option)}
    for item in (
        "parallel.sequence=2", "parallel.replicate=1", "lora.rank=0", "lora.rank=4", "model.chunk=8192",
        "rollout.mode=fresh", "rollout.samples=4", "optim.offload=all", "optim.name=adamw8bit",
        "parallel.resident=true", "model.weights_dtype=bfloat16", *choices.POLICIES,
    ):  # fmt: skip
        assert item in tried, item
    first = next(iter(s.choices(2).candidates()))
    changed = {item.partition("=")[0] for item in s.choices(2).minimal(choices.whole(first))}
    assert changed <= {"parallel.sequence", "parallel.replicate", "parallel.resident", "train.accumulate",
                       "model.recompute"}  # fmt: skip


@pytest.mark.parametrize("gpus, sections", [
    (1, {}), (1, {"lora": {"rank": 4, "base": "e4m3"}}),
    (1, {"rollout": {"mode": "persistent", "pool": 8, "stride": 2}}), (2, {"lora": {"rank": 4}}),
], ids=["full", "e4m3", "persistent", "two"])  # fmt: skip
def test_a_change_is_all_that_makes_a_row_its_neighbour(gpus, sections, tmp_path, few, monkeypatch):
    """Also where one option of a group sets what another one leaves alone."""
    path = str(write_run(tmp_path, eval={"every": 0}, **sections))
    s, made = pareto.Search(path, ("model.recompute=full", "model.chunk=16"), Options(gpus=gpus)), []
    settings, candidate = s.choices(gpus).settings, s.candidate
    every = {str((c.option[1], c.option[4])): c for c in s.candidates(gpus)}
    assert len(every) > 2
    monkeypatch.setattr(s, "candidate", lambda *args: made.append(candidate(*args)) or made[-1])
    for best in every.values():
        monkeypatch.setattr(s, "bytes", lambda c, best=best: c is best)  # so that all are worth a line
        made.clear()
        changes = [n.change.split() for n in pareto._neighbours(s, best)]
        row = s.choices(gpus).minimal(choices.whole(best.option))
        assert changes and all(changes)
        assert [settings.of((*row, *change)) for change in changes] == [c.config for c in made]


def test_what_an_override_sets_is_not_changed(tmp_path):
    path = str(write_run(tmp_path))
    given = "lora.rank=0", "model.recompute=full", "parallel.sequence=2"
    s = pareto.Search(path, given, Options(gpus=2))
    tried = {item for option in s.choices(2).candidates() for item in choices.whole(option)}
    for item in tried:
        assert item in given or item.partition("=")[0] not in ("lora.rank", "model.recompute"), item
    assert "parallel.sequence=2" in tried and "parallel.sequence=1" not in tried


def test_reward_training_is_searched_too(tmp_path, few):
    path = str(write_run(tmp_path, eval={"every": 0}, reward={"path": None}))
    found = pareto.search(path, (), Options(gpus=2, budget=2.0, train_reward=True))
    assert found.rows[0][1].times.trained and "rollout" not in " ".join(found.rows[-1][0])


STORED = {"lora": {"rank": 4, "base": "e4m3", "base_place": "host"}, "reward": {"place": "host"}}


def test_weights_that_wait_elsewhere_are_no_hindrance(tmp_path, few):
    """With several GPUs, and with all weights trained, settings are tried without."""
    path = str(write_run(tmp_path, eval={"every": 0}, loss={"anchor_every": 5}, **STORED))
    s = pareto.Search(path, ("model.recompute=full", "model.chunk=16"), Options(gpus=2))
    one, two = (list(s.candidates(gpus)) for gpus in (1, 2))
    assert not s.left.keys() & {"lora.base", "lora.base_place", "reward.weights", "reward.place"}
    for found in one, two:
        assert {c.config.lora.rank for c in found} == {0, 4}
        assert all(c.config.lora.rank or not c.config.lora.storage.apart for c in found)
    assert any(c.config.lora.storage.apart for c in one)
    assert not any(c.config.lora.storage.apart or c.config.reward.storage.apart for c in two)


DEVICE, HOST, MIXED = ("device", "device"), ("host", "host"), ("host", "device")
NO_REWARD = {"reward": {"path": None}, "loss": {"weight": 0.0}}


@pytest.mark.parametrize("sections, given, places", [
    ({}, (), {DEVICE, HOST}), ({"lora": {"rank": 4, "base_place": "host"}}, (), {DEVICE, HOST, MIXED}),
    ({}, ("reward.place=device",), {DEVICE, MIXED}),
    ({}, ("lora.base_place=host", "lora.rank=4"), {MIXED, HOST}), (NO_REWARD, (), {DEVICE, MIXED}),
], ids=["device", "host in the file", "reward fixed", "base fixed", "no reward"])  # fmt: skip
def test_where_frozen_weights_of_adapters_may_wait(sections, given, places, tmp_path, few):
    """On one GPU as configured, on the device, and on the host; never twice the same."""
    path = str(write_run(tmp_path, eval={"every": 0}, **sections))
    s = pareto.Search(path, ("model.recompute=full", "model.chunk=16", *given), Options(gpus=1))
    found = [c.config for c in s.candidates(1)]
    assert {(c.lora.base_place, c.reward.place) for c in found if c.lora.rank} == places
    assert all(c not in found[:i] for i, c in enumerate(found))


@pytest.mark.parametrize("sections", [
    {"lora": {"rank": 4, "base_place": "host"}},
    {"optim": {"in_backward": True, "clip": None}, "loss": {"alternate": True}},
], ids=["host", "in_backward"])  # fmt: skip
def test_candidates_are_predicted_by_what_they_have(sections, tmp_path, few, monkeypatch):
    """Not by what is known of another candidate."""
    monkeypatch.setattr(choices, "OPTIMIZERS", OPTIMIZERS[2:4])
    path, options = str(write_run(tmp_path, eval={"every": 0}, **sections)), Options(gpus=1)
    found = list(pareto.Search(path, ("model.recompute=full", "model.chunk=16"), options).candidates(1))
    assert len(found) > 2
    for c in found:
        assert c.setup == subject_of(c.config, path, 1, options).setup
        assert c.setup.reward.storage == c.config.reward.storage


def test_what_is_not_predicted_in_full_is_counted(tmp_path, few, monkeypatch):
    """By itself: it has not been refused."""
    path, full = str(write_run(tmp_path, eval={"every": 0})), pareto.Search.full
    given = "model.recompute=full", "model.chunk=16", "rollout.mode=fresh"
    most = 1  # GPUs on which nothing fits that seemed to

    def less(self, c: pareto.Candidate) -> Prediction:
        found = full(self, c)
        return found if c.shards.size > most else replace(found, limit=0.0)

    monkeypatch.setattr(pareto.Search, "full", less)
    monkeypatch.setattr(pareto.Search, "bytes", lambda *args, **named: 0)
    monkeypatch.setattr(pareto, "AHEAD", 1)
    found = pareto.search(path, given, Options(gpus=2))
    count = len(list(pareto.Search(path, given, Options(gpus=2)).candidates(1))) - 1
    assert [row.times.gpus for _, row in found.rows] == [2] and count > 0
    assert "--search" not in {each.field for each in found.left_out}
    line = f"on 1 GPUs {count} settings were not predicted in full: 1 that seemed to fit did not"
    assert line in found.text() and line in "".join(front(found))
    assert found.values()["given_up"] == [{"gpus": 1, "count": count}]
    most = 2
    with pytest.raises(UserError, match=f"nothing of .* on 2 GPUs; {line}; on 2 GPUs "):
        pareto.search(path, given, Options(gpus=2))


def test_what_is_left_out_is_said_by_name(tmp_path, few):
    """What the command sets stays, so that nothing of two GPUs and no full fine-tuning can be tried."""
    path = str(write_run(tmp_path, eval={"every": 0}, **STORED))
    found = pareto.search(path, ("lora.base_place=host",), Options(gpus=2, budget=2.0))
    assert [row.times.gpus for _, row in found.rows] == [1]
    left = {each.field: each for each in found.left_out}
    assert left["lora.base_place"].gpus == [1, 2] and left["lora.base_place"].count > 2
    text = " ".join(found.text().split())
    assert "by lora.base_place on 1, 2 GPUs, such as: got 'host', want device with lora.rank 0" in text
    assert {each["field"] for each in found.values()["left_out"]} == left.keys()
    with pytest.raises(UserError, match="nothing of 0 settings fits .*left out: .* by lora.base_place on 1"):
        pareto.search(path, ("lora.rank=0", "lora.base_place=host"), Options(gpus=1))


def test_nothing_fits(tmp_path, few):
    path = str(write_run(tmp_path))
    with pytest.raises(UserError, match="--search: nothing of [0-9]+ settings fits 0.1 GB on 2 GPUs"):
        pareto.search(path, (), Options(gpus=2, budget=0.1))


def test_a_search_starts_from_what_compat_sets(tmp_path):
    path = str(write_run(tmp_path, train={"compat": "official", "accumulate": 2}))
    base = pareto.Search(path, (), Options(gpus=2)).choices(2).settings.base
    assert base == load_config(path)
    assert (base.loss.split, base.model.latent_dtype, base.rollout.one_index) == (True, "bfloat16", "turn")


def test_policies_are_tried_in_place_of_auto_with_a_host_limit(tmp_path):
    path = str(write_run(tmp_path, model={"recompute": "auto:40", "host": 100.0}))
    s = pareto.Search(path, (), Options(gpus=1))
    kinds = {repr(c.config.model.recompute) for c in s.candidates(1)}
    assert len(kinds) == len(choices.POLICIES)
    one = next(iter(s.choices(1).candidates()))
    assert "model.host=null" in s.choices(1).minimal(choices.whole(one))
