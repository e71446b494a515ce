"""The demo end to end at a tiny size, its statistics, and best of N on what it leaves behind."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from prfl_bench import best_of, methods_on_demo, rgb_on_demo, samples_quality
from prfl_engine.demo.baseline import evaluate_handmade
from prfl_engine.demo.clips import DemoSpec
from prfl_engine.demo.run import Settings, demo, jerk, paired_p, spread, unsteadiness

TINY = Settings(
    pretrain=2, reward=2, prfl=1, seeds=4, data=DemoSpec(train_windows=24, val_windows=16, size=(32, 32))
)


def test_demo_writes_its_report_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    first = demo(tmp_path / "demo", TINY)
    report = json.loads((tmp_path / "demo/report.json").read_text())
    page = (tmp_path / "demo/report.html").read_text()
    assert set(report["models"]) == {"before", "control", "PRFL"}
    for name, found in report["models"].items():
        assert 0 < found["reward"] < 1 and found["distance"] >= 0
        assert f"{found['reward']:.3f}" in page, name
    assert set(report["reward_accuracy"]["learned"]) == {"201", "400", "600", "800", "1000"}
    assert html.escape(report["result"]) in page and report["command"] == "demo()"
    player = re.search(r'<script type="application/json">(.*?)</script>', page)
    facts = json.loads(player.group(1))
    assert facts["names"] == ["real, held out", "before", "control", "PRFL"] and facts["frames"] == 17
    sheets = re.findall(r'src="data:image/webp;base64,([^"]*)"', page)
    assert facts["prompts"] == report["captions"] and len(sheets) == len(report["captions"])
    assert Image.open(io.BytesIO(base64.b64decode(sheets[0]))).size == (17 * 32, 4 * 32)
    assert page.count("image/png") == 4
    pools = [path.parent.parent.name for path in (tmp_path / "demo").glob("*/*/pool.safetensors")]
    assert pools == ["prfl"]  # it trains by chains that persist, the control without a reward
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").glob("*/checkpoint-*/*.safetensors")}
    again = demo(tmp_path / "demo", TINY)
    assert weights == {p: p.stat().st_mtime_ns for p in weights}  # nothing was trained again
    assert again["models"] == first["models"]
    capsys.readouterr()
    words = "--counts", "2", "--judge-at", "3", "9", "--prompts", "2", "--out", str(tmp_path / "best.json")
    best_of.main([str(tmp_path / "demo"), *words])
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
    rgb_on_demo.main([str(tmp_path / "demo"), *words, "--out", str(tmp_path / "rgb.json")])
    assert "gate: RGB ReFL, all frames, float64" in capsys.readouterr().out
    found = json.loads((tmp_path / "rgb.json").read_text())
    assert set(found["accuracy"]) == {"all", "first"} and set(found["runs"]) == {"PRFL", "first:last"}
    assert found["runs"]["PRFL"]["end"] != found["before"] != found["runs"]["first:last"]["end"]
    assert found["runs"]["first:last"]["end"] != found["runs"]["PRFL"]["end"]

    ways = "plain", "leash 1", "guided 2", "4 seeds, highest"
    words = "--only", *ways, "--steps", "2", "--seeds", "0", "--count", "2"
    methods_on_demo.main([str(tmp_path / "demo"), *words, "--out", str(tmp_path / "methods.json")])
    found = json.loads((tmp_path / "methods.json").read_text())
    assert set(found["before"]) == {"not guided", "guided"} and tuple(found["runs"]) == ways
    ends = [(run["end"]["reward"], run["end"]["jerk"]) for (run,) in found["runs"].values()]
    assert len(set(ends)) == len(ways)


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


def test_handmade_features_find_motion_at_low_noise_and_nothing_at_full_noise():
    g = torch.Generator().manual_seed(0)
    still = torch.randn(300, 16, 1, 4, 4, generator=g).expand(-1, -1, 5, -1, -1)
    label = (torch.arange(300) % 2).float()
    shaken = still + 0.8 * label.view(-1, 1, 1, 1, 1) * torch.randn(300, 16, 5, 4, 4, generator=g)
    accuracy = evaluate_handmade(shaken[:200], label[:200], shaken[200:], label[200:], (201, 1000), 0)
    assert accuracy[201] > 0.95
    assert accuracy[1000] < 0.7
