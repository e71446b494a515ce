"""`prfl score` of videos: as their latents by `prfl encode` are scored, and what is left out or refused."""

import json
import shutil
from pathlib import Path

import encoder_cases as cases
import numpy as np
import pytest
from helpers import one_line, tiny_config, tiny_reward
from PIL import Image

from prfl_engine.cli import main
from prfl_engine.encode.encoders import VideoVAE
from prfl_engine.model.checkpoint import save_reward

for package in ("diffusers", "transformers"):
    pytest.importorskip(package)

SIZE = ("--size", "32x48,48x32", "--frames", "9")
SCORE = ("--draws", "1", "--json", "train.device=cpu", "model.compute_dtype=float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoders, reward models, and a folder of two videos and an image with their prompts."""
    folder = tmp_path_factory.mktemp("videos")
    cases.write_diffusers(folder / "models")
    for kind in ("t2v", "i2v"):
        config = tiny_config(kind)
        save_reward(tiny_reward(config), folder / kind, 0)
    cases.write_clip(folder / "clips/wide.mp4", 11)
    cases.write_clip(folder / "clips/tall.mp4", 9, 64, 48)
    Image.new("RGB", (60, 40), (200, 30, 90)).save(folder / "clips/still.png")
    for name, prompt in ("wide", "a cat runs"), ("tall", "a red boat"), ("still", "a storm"):
        (folder / f"clips/{name}.txt").write_text(prompt)
    return folder


def scores(made, capsys, *words, kind="t2v", code=0):
    """{file: score} of a call, best first, and what it says on stderr."""
    capsys.readouterr()
    encoders = "--models", str(made / "models")
    assert main(["score", str(made / kind), *map(str, words), *SIZE, *encoders, *SCORE]) == code
    printed = capsys.readouterr()
    return {s["file"]: s["score"] for s in json.loads(printed.out)["samples"]}, printed.err


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_videos_score_as_what_is_encoded_of_them(kind, made, capsys, tmp_path):
    clips, image = made / "clips", ["--i2v"] * (kind == "i2v")
    encoding = "encode", str(clips), "--models", str(made / "models"), "--out", str(tmp_path / "data")
    assert main([*encoding, *SIZE, "--negative", "blurry", "--device", "cpu", *image]) == (3 if image else 0)
    capsys.readouterr()
    assert main(["score", str(made / kind), str(tmp_path / "data/all.list"), *SCORE]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    want = {json.loads(Path(s["file"]).read_text())["source"]: s["score"] for s in samples}
    got, said = scores(made, capsys, clips, kind=kind, code=3 if image else 0)
    assert got == pytest.approx(want) and list(got) == list(want) and len(got) == 3 - len(image)
    assert set(got) <= {str(path) for path in clips.iterdir()}
    assert ("an image alone, want a video with --i2v" in said) == bool(image)


def test_files_and_tables_and_the_prompt_of_the_command_line(made, capsys, tmp_path):
    for name in ("wide", "tall"):
        shutil.copy(made / f"clips/{name}.mp4", tmp_path)
    (tmp_path / "rows.csv").write_text("video,prompt\nwide.mp4,a cat runs\ntall.mp4,a cat runs\n")
    table, _ = scores(made, capsys, tmp_path / "rows.csv")
    files, _ = scores(made, capsys, tmp_path / "wide.mp4", tmp_path / "tall.mp4", "--prompt", "a cat runs")
    assert files == pytest.approx(table) and len(files) == 2
    own, _ = scores(made, capsys, made / "clips/tall.mp4", "--prompt", "a cat runs")
    whole, _ = scores(made, capsys, made / "clips")
    (path,) = own
    assert own[path] == pytest.approx(whole[path])  # a NAME.txt counts before --prompt
    assert own[path] != pytest.approx(files[str(tmp_path / "tall.mp4")])


def test_what_cannot_be_encoded_is_left_out_and_what_is_encoded_may_stay(made, capsys, tmp_path, monkeypatch):
    cases.write_clip(tmp_path / "short.mp4", 8)
    words = made / "clips", tmp_path / "short.mp4", "--prompt", "a cat", "--encoded", tmp_path / "kept"
    found, said = scores(made, capsys, *words, code=3)
    assert len(found) == 3
    assert "left out: " in said and "frames at 16 a second: got 8, want 9 (--min-frames)" in said
    monkeypatch.setattr(VideoVAE, "__init__", None)
    assert scores(made, capsys, *words[:1], *words[4:])[0] == found


def test_a_video_that_is_named_twice_is_scored_once(made, capsys, tmp_path, monkeypatch):
    clips = made / "clips"
    monkeypatch.chdir(made)
    got, _ = scores(made, capsys, clips, "clips/tall.mp4", clips / "tall.mp4", "--encoded", tmp_path / "kept")
    assert sorted(Path(file).name for file in got) == ["still.png", "tall.mp4", "wide.mp4"]


def test_videos_of_several_prompts_are_told_apart_where_their_samples_are_kept(made, capsys, tmp_path):
    wide, tall = (made / f"clips/{name}.mp4" for name in ("wide", "tall"))
    table = tmp_path / "t.csv"
    table.write_text(f"video,prompt\n{wide},a cat runs\n{wide},a red boat\n{tall},a storm\n")
    found, _ = scores(made, capsys, table, "--encoded", tmp_path / "kept")
    assert len(found) == 3 and str(tall) in found
    metas = [json.loads(Path(file).read_text()) for file in found if file.endswith(".json")]
    assert {meta["short_caption"] for meta in metas} == {"a cat runs", "a red boat"}


def test_mistakes_are_found_before_anything_is_encoded(made, capsys, tmp_path):
    """The encoders are not there, which loading them would say."""
    def refused(needle, *words, reward=made / "t2v"):
        capsys.readouterr()
        assert main(["score", str(reward), *map(str, words), *SIZE, *SCORE]) == 2
        assert needle in one_line(capsys)

    clips, empty = made / "clips", tmp_path / "models"
    words = clips, "--models", empty
    shutil.copytree(made / "t2v", tmp_path / "headless")
    (tmp_path / "headless/mlp_step_0.ckpt").unlink()
    refused("headless: got no mlp_step_N.ckpt", *words, reward=tmp_path / "headless")
    refused("reward.draws: got 2, want 1 in prfl score", *words, "reward.draws=2")
    np.save(tmp_path / "bare.npy", np.zeros((1, 16, 1, 4, 4), np.float32))
    refused("bare.npy: got no text", tmp_path / "bare.npy", *words)
    text = tmp_path / "text.npy"
    text.write_bytes(b"")
    refused("--text: got", *words, "--text", text)
    shutil.copytree(clips, tmp_path / "mixed")
    np.save(tmp_path / "mixed/a.npy", 1)
    refused("mixed: got a.npy and still.png, want latents or videos", tmp_path / "mixed", *words[1:])
    refused(f"--encoded: {clips}: got", clips, "--models", made / "models", "--encoded", clips)


def test_mistakes_are_one_line(made, capsys, tmp_path):
    def refused(needle, *words, kind="t2v"):
        capsys.readouterr()
        assert main(["score", str(made / kind), *map(str, words), *SCORE]) == 2
        assert needle in one_line(capsys)

    clips, models = made / "clips", ["--models", made / "models"]
    refused("--prompt: got 'a cat', want --models DIR with it", clips, "--prompt", "a cat")
    refused("--min-frames: got 5, want --models DIR with it", clips, "--min-frames", 5)
    refused("is a video, want --models DIR, which encodes it", clips)
    refused("want videos to score, or none", *models)
    refused("--frames: got 8, want", clips, *models, "--frames", 8)
    refused("gone.mp4: no such file", tmp_path / "gone.mp4", *models)
    cases.write_ti2v(tmp_path / "ti2v")
    refused("--models: latent channels: got 48, want 16, the reward", clips, "--models", tmp_path / "ti2v")
