"""The demo end to end at a tiny size, its statistics, and best of N on what it leaves behind."""

import base64
import html
import io
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prfl_bench import (
    best_of,
    methods_on_demo,
    pairs_on_demo,
    rgb_on_demo,
    samples_quality,
    steps_on_demo,
)
from prfl_engine import cli
from prfl_engine.demo import data, lights
from prfl_engine.demo.compare import jerk, paired_p, spread, unsteadiness
from prfl_engine.demo.data import DemoSpec
from prfl_engine.demo.motion import blind, motion, motions
from prfl_engine.demo.report import curves
from prfl_engine.demo.run import Settings, demo
from prfl_engine.metrics import MetricsWriter

SMALL = DemoSpec(lights=24, windows=14, held_out=14, size=16)
TINY = Settings(short=2, pretrain=2, reward=2, prfl=1, seeds=4, data=SMALL)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a tiny demo, and what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return folder, demo(folder, TINY)


def numbers_in(value):
    """All numbers of a JSON document."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, int | float):
        yield abs(value)


def test_every_number_of_the_page_is_in_the_json(done):
    report = json.loads((done[0] / "report.json").read_text())
    page = (done[0] / "report.html").read_text()
    text = re.sub(r"<(style|script|noscript)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    known = {f"{n:.{digits}f}" for n in numbers_in(report) for digits in (2, 3, 4)} | {"0.5"}
    known |= {f"{n:.2g}" for n in numbers_in(report)}
    known |= set(re.findall(r"\d+\.\d+", report["machine"]["processor"]))
    shown = re.findall(r"\d+\.\d+(?:e-\d+)?", text)
    assert len(shown) > 60 and not set(shown) - known


def test_demo_writes_its_report_and_goes_on_where_it_stopped(done, tmp_path, capsys, monkeypatch):
    folder, first = done
    report = json.loads((folder / "report.json").read_text())
    page = (folder / "report.html").read_text()
    assert set(report["models"]) == {"before", "control", "PRFL"}
    for name, found in report["models"].items():
        assert 0 < found["reward"] < 1 and found["distance"] >= 0
        assert f"{found['reward']:.3f}" in page, name
        assert f"{found['acceleration']:.2f}" in page and f"{found['speed']:.2f}" in page, name
    pairs = "PRFL against before", "PRFL against control", "control against before"
    assert tuple(report["tests"]) == pairs
    for test in report["tests"].values():
        assert test["blind"]["of"] == 4 and f"{test['blind']['preferred']} of 4" in page
    assert len(report["reward_accuracy"]) == 3
    for found in report["reward_accuracy"].values():
        for judge in found["learned"], found["hand-made"]:
            assert set(judge["by_timestep"]) == {"201", "400", "600", "800", "1000"}
            low = [judge["by_timestep"][t] for t in ("201", "400", "600")]
            assert judge["low"] == pytest.approx(np.mean(low)) and judge["by_kind"]
    new = report["reward_accuracy"]["breaks it has never seen"]
    assert all(judge["by_timestep"]["1000"] == 0.5 for judge in new.values())  # noise is all there is
    assert "By the mean of t ≤ 600 the learned model is" in page
    assert html.escape(report["result"]) in page and report["command"] == "demo()"
    player = re.search(r'<script type="application/json">(.*?)</script>', page)
    facts = json.loads(player.group(1))
    assert facts["names"] == ["drawn, steady", "before", "control", "PRFL"] and facts["frames"] == 13
    sheets = re.findall(r'<img hidden alt="" src="data:image/webp;base64,([^"]*)"', page)
    assert facts["prompts"] == report["captions"] and len(sheets) == len(report["captions"])
    assert Image.open(io.BytesIO(base64.b64decode(sheets[0]))).size == (13 * 16, 4 * 16)
    assert page.count("image/png") == 4 and 'alt="frames" src="data:image/webp' in page
    pools = [path.parent.parent.name for path in folder.glob("*/*/pool.safetensors")]
    assert pools == ["prfl"]  # it trains by chains that persist, the control without a reward
    weights = {p: p.stat().st_mtime_ns for p in folder.glob("*/checkpoint-*/*.safetensors")}
    again = demo(folder, TINY)
    assert weights == {p: p.stat().st_mtime_ns for p in weights}  # nothing was trained again
    assert again["models"] == first["models"]
    capsys.readouterr()
    words = "--counts", "2", "--judge-at", "3", "9", "--prompts", "2", "--out", str(tmp_path / "best.json")
    best_of.main([str(folder), *words])
    assert "gate: best of 2 at step 3 keeps the same chains, error 0.0e+00" in capsys.readouterr().out
    rows = json.loads((tmp_path / "best.json").read_text())["rows"]
    assert [(r["judged"], r["forwards"]) for r in rows] == [
        ("all finished", 20), (3, 23), (9, 29), ("all finished", 40),
    ]  # fmt: skip
    assert all(0 < r["reward"] < 1 and r["distance"] >= 0 for r in rows)

    monkeypatch.setattr(samples_quality, "PILOT", 1)
    monkeypatch.setattr(rgb_on_demo, "ROUNDS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    words = "--modes", "PRFL", "first:last", "--steps", "2", "--learn", "2", "--count", "2"
    rgb_on_demo.main([str(folder), *words, "--out", str(tmp_path / "rgb.json")])
    assert "gate: RGB ReFL, all frames, float64" in capsys.readouterr().out
    found = json.loads((tmp_path / "rgb.json").read_text())
    assert set(found["accuracy"]) == {"all", "first"} and set(found["runs"]) == {"PRFL", "first:last"}
    assert found["runs"]["PRFL"]["end"] != found["before"] != found["runs"]["first:last"]["end"]
    assert found["runs"]["first:last"]["end"] != found["runs"]["PRFL"]["end"]

    ways = "plain", "leash 1", "guided 2", "4 seeds, highest"
    words = "--only", *ways, "--steps", "2", "--seeds", "0", "--count", "2"
    methods_on_demo.main([str(folder), *words, "--out", str(tmp_path / "methods.json")])
    found = json.loads((tmp_path / "methods.json").read_text())
    assert set(found["before"]) == {"not guided", "guided"} and tuple(found["runs"]) == ways
    ends = [(run["end"]["reward"], run["end"]["jerk"]) for (run,) in found["runs"].values()]
    assert len(set(ends)) == len(ways)

    capsys.readouterr()
    words = "--steps", "2", "--rounds", "1", "--out", str(tmp_path / "steps.json")
    steps_on_demo.main([str(folder), *words])
    found = json.loads((tmp_path / "steps.json").read_text())["seconds"]
    want = [f"{stage}, {way}" for stage, (_, ways) in steps_on_demo.STAGES.items() for way in ways]
    assert [*found] == want
    assert all(seconds > 0 for of in found.values() for seconds in of)
    assert capsys.readouterr().out.count("gate: reward, ") == 4
    monkeypatch.setitem(steps_on_demo.GATE, "bfloat16", 1e-9)
    with pytest.raises(SystemExit, match="gate failed"):
        steps_on_demo.main([str(folder), *words])

    pairs_on_demo.main([str(folder), "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "pairs.json")])
    found = json.loads((tmp_path / "pairs.json").read_text())
    losses = [run["loss"] for (run,) in found["runs"].values()]
    assert tuple(found["runs"]) == tuple(pairs_on_demo.WAYS) and len(set(losses)) == len(losses)
    for (run,) in found["runs"].values():
        assert all(0 <= share <= 1 for of in run["held_out"].values() for share in of.values())


def test_the_stages_by_hand(done, tmp_path, monkeypatch):
    """The commands of docs/demo.md, as they stand there but for numbers of steps and the size of the data."""
    page = (Path(__file__).parents[1] / "docs/demo.md").read_text()
    commands = re.findall(r"^    (python -m|prfl) (.*)", page, re.MULTILINE)
    assert len(commands) == 9
    written = {int(n) for n in re.findall(r"checkpoint-(\d+)", page)}
    whole = Settings()
    assert written == {whole.short, whole.pretrain, whole.reward, whole.prfl}
    monkeypatch.chdir(tmp_path)
    build = data.build

    def small(out, seed, spec):
        return build(out, seed, replace(TINY.data, development=spec.development))

    monkeypatch.setattr(data, "build", small)
    for program, words in commands:
        for steps, tiny in (whole.short, 2), (whole.pretrain, 2), (whole.reward, 2), (whole.prfl, 1):
            words = words.replace(f"checkpoint-{steps}", f"checkpoint-{tiny}")
        name, *rest = shlex.split(words.replace("runs/demo", str(done[0])))
        if program == "prfl":
            assert cli.main([name, *rest]) == 0, words
        else:
            assert name == "prfl_engine.demo.data"
            data.main(rest)
    assert Path("runs/hand/samples/sample-00.mp4").is_file()
    a, b = (np.load(of / "data/latents/train-00003-jumps.npy") for of in (done[0], Path("runs/hand")))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["short", "pretrain", "reward", "prfl", "seeds"])
def test_settings_without_a_step_or_a_seed_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: got 0, want at least 1$"):
        Settings(**{name: 0})


def test_the_curves_of_the_report_are_what_the_trainings_logged(tmp_path):
    logged = ("pretrain", "sft_loss"), ("reward", "loss"), ("prfl", "reward")
    for n, (folder, key) in enumerate(logged):
        values = {5: {f"train/{key}": n + 0.5}, 8: {"eval/other": 1.0}, 10: {f"train/{key}": n + 0.25}}
        with MetricsWriter(tmp_path / folder, tensorboard=False) as metrics:
            for step, found in values.items():
                metrics.log(step, found)
    assert [*curves(tmp_path).values()] == [{5: n + 0.5, 10: n + 0.25} for n in range(3)]


def test_jerk_is_zero_for_uniform_motion():
    ramp = torch.linspace(0, 1, 9).view(1, 1, 9, 1, 1).expand(1, 3, 9, 4, 4)
    assert jerk(ramp).item() == pytest.approx(0, abs=1e-6)
    assert jerk(ramp.flip(2) ** 2).item() == pytest.approx(2 / 64, rel=1e-3)


def test_unsteadiness_does_not_grow_with_the_amount_of_motion():
    noise = torch.rand(1, 3, 400, 4, 4)
    assert unsteadiness(noise).item() == pytest.approx(unsteadiness(0.1 * noise).item(), rel=1e-5)
    assert unsteadiness(noise).item() > 1.4
    assert unsteadiness(torch.linspace(0, 1, 9).view(1, 1, 9, 1, 1)).item() == pytest.approx(0, abs=1e-5)


def test_paired_p():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(64)
    noise -= noise.mean()
    assert paired_p(noise + 1.0) < 1e-4
    assert paired_p(noise) > 0.9
    # All 2^3 sign patterns of three equal differences: two of eight are as extreme.
    assert paired_p(np.ones(3)) == pytest.approx(0.25, abs=0.01)


def test_spread():
    assert spread([0, 1, 2, 3, 4, 5], 3) == [0, 2, 4]
    assert spread([0, 1], 4) == [0, 0, 1, 1]


def drawn(seed, break_it=None, part=1.0):
    """A light's video [3, 13, 32, 32], of which `part` of the break is done."""
    rng = np.random.default_rng(seed)
    light = lights.Light.draw(rng)
    track = lights.track(rng, light, 13, 32)
    at, seen = lights.steady(track, np.arange(13)), lights.constant(13)
    if break_it is not None:
        broken, seen = break_it(rng, track, 13, 32)
        at = at + part * (broken - at)
    return torch.from_numpy(lights.render(np.full((32, 32, 3), 0.3), light, at, seen))


def several(break_it=None, part=1.0):
    return motions(torch.stack([drawn(seed, break_it, part) for seed in range(10)]))


MOVED = lights.shakes, lights.shuffled, lights.jumps, lights.stutters, lights.turns


@pytest.mark.parametrize("break_it", MOVED, ids=lambda f: f.__name__)
def test_the_judge_prefers_steady_motion_to_its_broken_twin(break_it):
    steady = several()
    assert blind(several(break_it), steady, steady[1])["preferred"] >= 9


def test_the_judge_prefers_what_shakes_less():
    half, whole, wanted = several(lights.shakes, 0.5), several(lights.shakes), several()[1]
    assert blind(whole, half, wanted)["preferred"] >= 9


def test_motion_is_measured_in_pixels():
    acceleration, speed = several()
    assert acceleration.mean() < 1 and 1 < speed.mean() < 2.5  # 2 pixels a frame, less where a light turns
    assert several(lights.shakes)[0].mean() > 4


def test_the_judge_does_not_take_what_hardly_moves():
    still = drawn(0)[:, :1].expand(-1, 13, -1, -1)
    assert motion(still) == (0, 0)
    shaking, still = (torch.tensor([[a], [s]]).double() for a, s in (motion(drawn(0, lights.shakes)), (0, 0)))
    assert blind(shaking, still, torch.tensor([1.5]))["preferred"] == 0


def test_a_blind_judge_is_not_told_the_order():
    wanted = torch.ones(64)
    worse, better = (torch.stack([a, wanted]) for a in (torch.linspace(1, 2, 64), torch.linspace(0, 0.9, 64)))
    assert blind(worse, better, wanted) == {"preferred": 64, "of": 64, "share": 1.0}
    assert blind(better, worse, wanted)["preferred"] == 0
    assert 20 < blind(worse, worse, wanted)["preferred"] < 44  # always the left one: chance


def test_a_missing_opencv_is_one_line_and_comes_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"^cv2: not found.*pip install --no-deps") as caught:
        demo(tmp_path / "demo", TINY)
    assert "\n" not in str(caught.value) and not (tmp_path / "demo").exists()
