"""`prfl score`: what is ranked, under which noise, and what it prints."""

import csv
import json
import unicodedata

import numpy as np
import pytest
import torch
from helpers import SHAPE, one_line, tiny_config, tiny_reward, write_data

from prfl_engine.batch import Batch
from prfl_engine.cli import main
from prfl_engine.model.checkpoint import save_reward
from prfl_engine.model.layers import Linear
from prfl_engine.objectives import noisy_reward
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.tools import score

FLOAT32 = ["train.device=cpu", "model.compute_dtype=float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, five samples of a list, and three latents without meta JSONs."""
    folder, config = tmp_path_factory.mktemp("score"), tiny_config()
    save_reward(tiny_reward(config), folder / "reward", 0)
    write_data(folder / "data", config, 5)
    (folder / "plain").mkdir()
    for i in range(3):
        for kind, name in (("latent", f"{'abc'[i]}.npy"), ("short", f"{'abc'[i]}.text.npy")):
            (folder / "plain" / name).write_bytes((folder / f"data/{kind}-{i}.npy").read_bytes())
    return folder


def scores(folder, capsys, *words):
    """{file: what is said of it} and the whole JSON of a call."""
    capsys.readouterr()
    assert main(["score", str(folder / "reward"), *map(str, words), "--json", *FLOAT32]) == 0
    found = json.loads(capsys.readouterr().out)
    return {s["file"]: s for s in found["samples"]}, found


def test_a_score_is_the_mean_reward_under_noise_that_all_share(folder, capsys):
    words = "--timesteps", 200, 400.5, "--draws", 3, "eval.seed=7", "eval.batch_size=2"
    found, whole = scores(folder, capsys, folder / "data/all.list", *words)
    assert [s["rank"] for s in whole["samples"]] == [1, 2, 3, 4, 5]
    assert (whole["seed"], whole["draws"]) == (7, 3)
    values = [s["score"] for s in whole["samples"]]
    assert values == sorted(values, reverse=True) and len(set(values)) == 5
    model = tiny_reward().freeze()
    for i in range(5):
        latent, text = (
            torch.from_numpy(np.load(folder / f"data/{n}-{i}.npy")) for n in ("latent", "short")
        )
        want = torch.empty(3, 2, dtype=torch.float64)
        for draw in range(3):
            noise = noise_like(latent, Purpose.SCORE, 7, draw)  # of no other sample than the first
            for j, t in enumerate((200, 400.5)):
                logit = noisy_reward(model, Batch(latent, text), noise, torch.tensor([t / 1000]))
                want[draw, j] = logit.double().sigmoid().item()
        got = found[str(folder / f"data/{i}.json")]
        assert got["score"] == pytest.approx(want.mean().item(), rel=1e-5)
        assert got["spread"] == pytest.approx(want.mean(1).std().item(), rel=1e-3)
        assert list(got["by_timestep"]) == ["200", "400.5"]
        assert list(got["by_timestep"].values()) == pytest.approx(want.mean(0).tolist(), rel=1e-5)


def test_timesteps_that_are_near_have_scores_of_their_own(folder, capsys):
    t = 500, 500.0004, 500.002
    found, _ = scores(folder, capsys, folder / "data/all.list", "--timesteps", *t, "--draws", 1)
    for sample in found.values():
        assert list(sample["by_timestep"]) == ["500", "500.0004", "500.002"]
        assert sample["score"] == pytest.approx(sum(sample["by_timestep"].values()) / 3, abs=1e-7)


def test_folders_of_latents_score_like_the_lists_that_name_them(folder, capsys):
    listed, _ = scores(folder, capsys, folder / "data/all.list", "--draws", 1)
    plain, _ = scores(folder, capsys, folder / "plain", "--draws", 1)
    assert list(plain) == sorted(plain, key=lambda name: plain[name]["rank"])
    for i, name in enumerate("abc"):
        got, want = plain[str(folder / f"plain/{name}.npy")], listed[str(folder / f"data/{i}.json")]
        assert got["score"] == pytest.approx(want["score"], rel=1e-5)
        assert got["spread"] is None
    both, _ = scores(folder, capsys, folder / "plain/b.npy", folder / "data/all.list", "--draws", 1)
    assert len(both) == 6


def test_a_stored_reward_model_scores_by_the_stored_values(folder, capsys, tmp_path):
    """On the host to the bit; in e4m3 as a model whose matrices have the rounded values."""
    model = tiny_reward(tiny_config())
    for p in (m.weight for b in model.transformer.blocks for m in b.modules() if isinstance(m, Linear)):
        scale = p.data.abs().amax(1, keepdim=True) / 448
        p.data = (p.data / scale).to(torch.float8_e4m3fn).float() * scale
    save_reward(model, tmp_path / "reward", 0)
    words = folder / "data/all.list", "--draws", 1
    plain, rounded = (scores(where, capsys, *words)[0] for where in (folder, tmp_path))
    assert scores(folder, capsys, *words, "reward.place=host")[0] == plain
    assert scores(folder, capsys, *words, "reward.weights=e4m3")[0] == rounded != plain


def test_a_text_for_latents_without_one(folder, capsys, tmp_path):
    (tmp_path / "x.npy").write_bytes((folder / "plain/a.npy").read_bytes())
    text = folder / "plain/a.text.npy"
    got, _ = scores(folder, capsys, tmp_path, "--text", text, "--draws", 1)
    want, _ = scores(folder, capsys, folder / "plain", "--draws", 1)
    assert got[str(tmp_path / "x.npy")]["score"] == pytest.approx(want[str(folder / "plain/a.npy")]["score"])
    refuse(folder, capsys, [tmp_path], "x.npy: got no text, want x.text.npy beside it or --text FILE")
    refuse(folder, capsys, [folder / "plain", "--text", text], "--text: got", "every sample has a text")


def test_a_configuration_ranks_its_held_out_data(folder, capsys, tmp_path):
    config, out = tmp_path / "c.yaml", tmp_path / "scores.csv"
    config.write_text(
        f"model: {{compute_dtype: float32, recompute: auto:40}}\n"
        f"reward: {{path: {folder / 'reward'}}}\ntrain: {{device: cpu}}\n"
        f"data: {{val: {folder / 'data/all.list'}}}\neval: {{timesteps: [300, 1000]}}\n"
    )
    assert main(["score", str(config), "--out", str(out), "--draws", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "spread", "file"]
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["rank", "score", "spread", "t300", "file"]  # 1000 is noise alone
    assert [line.split()[1] for line in lines[1:]] == [f"{float(r['score']):.4f}" for r in rows]
    assert all(r["t300"] == r["score"] for r in rows)
    assert main(["score", str(config), "--out", str(out)]) == 2  # it is there
    assert "--out" in one_line(capsys)


def test_a_line_has_at_most_100_columns():
    for name in ("short.npy", "/a/" * 60 + "end.npy", "動画" * 60 + ".npy", "x\n" * 80):
        made = score.Scored(12, 0.5, None, {200.0: 0.5}, name)
        line = score.table([made])[1]
        assert sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) <= 100
        assert line.endswith(score.one_line(name)[-9:]) and "\n" not in line


def test_equal_scores_keep_their_order():
    found = score.ranked(torch.tensor([[[0.5, 0.7, 0.5]]]), [200], ["a", "b", "c"])
    assert [s.file for s in found] == ["b", "a", "c"]


def refuse(folder, capsys, words, *needles, code=2, model="reward"):
    capsys.readouterr()
    assert main(["score", str(folder / model), *FLOAT32, *map(str, words)]) == code
    line = one_line(capsys)
    for needle in needles:
        assert needle in line, line


def test_mistakes_are_one_line(folder, capsys, tmp_path):
    data = folder / "data/all.list"
    refuse(folder, capsys, [data, "--draws", "0"], "--draws: got 0, want")
    refuse(folder, capsys, [data, "--timesteps", "1000"], "--timesteps: got 1000.0, want", "noise")
    refuse(folder, capsys, [data, "--timesteps", "200", "200"], "--timesteps: got [200.0, 200.0]")
    refuse(folder, capsys, [data, f"reward.path={folder}"], "reward.path: got")
    refuse(folder, capsys, [data, "reward.draws=2"], "reward.draws: got 2, want 1 in prfl score")
    refuse(folder, capsys, [data, "reward.place=host", "model.compile=true"], "model.compile: got True, want")
    refuse(folder, capsys, [], "data.val: got no file")
    refuse(folder, capsys, [folder / "no.list"], "no.list: no such file")
    refuse(folder, capsys, [data, "--out", tmp_path / "no/such.csv"], "--out", "is no folder")
    refuse(folder, capsys, [data], "no.yaml", model="no.yaml")
    refuse(folder, capsys, [data], "config.json", model="data")
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "clips.list").write_text("clip.mp4\n")
    for path in (tmp_path, tmp_path / "clip.mp4", tmp_path / "clips.list"):
        refuse(folder, capsys, [path], "clip.mp4: is a video, want --models DIR, which encodes it")
    (tmp_path / "clip.mp4").unlink()
    refuse(folder, capsys, [tmp_path], "got no latents, want samples.list or files NAME.npy")
    np.save(tmp_path / "odd.npy", np.zeros((1, 16, 1, 3, 4), np.float32))
    text = folder / "plain/a.text.npy"
    refuse(folder, capsys, [tmp_path, "--text", text], "odd.npy: latent is [16, 1, 3, 4], want")
    np.save(tmp_path / "odd.npy", np.full((1, *SHAPE), 3e38, np.float32))
    refuse(folder, capsys, [tmp_path, "--text", text], "reward at t = 201, draw 0: got", "odd.npy", code=1)


def test_an_image_to_video_model_wants_whole_samples(tmp_path, capsys):
    config = tiny_config("i2v")
    save_reward(tiny_reward(config), tmp_path / "reward", 0)
    data = write_data(tmp_path / "data", config, 2)
    assert len(scores(tmp_path, capsys, data, "--draws", 1)[0]) == 2
    refuse(tmp_path, capsys, [tmp_path / "data/latent-0.npy"], "first frame", "want a .list")


def test_samples_of_several_shapes_are_noted(tmp_path, capsys, folder):
    data = write_data(tmp_path / "data", tiny_config(), 2, shapes=(SHAPE, (16, 1, 2, 4)))
    assert main(["score", str(folder / "reward"), str(data), "--draws", "1", *FLOAT32]) == 0
    assert "2 latent shapes: samples of different shapes meet different noise" in capsys.readouterr().err
