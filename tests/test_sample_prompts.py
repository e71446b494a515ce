"""`prfl sample` from prompts in words, and samples as videos of Wan's VAE."""

import json
import os

import encoder_cases as cases
import numpy as np
import pytest
import torch
from helpers import one_line, tiny_config, tiny_model, write_run
from PIL import Image
from training_runs import run

from prfl_engine.encode.encoders import TextEncoder, VideoVAE
from prfl_engine.media.video import read_video
from prfl_engine.model.checkpoint import save_transformer

for package in ("diffusers", "transformers"):
    pytest.importorskip(package)

SIZE = ("--size", "32x48", "--frames", "5")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return str(cases.write_diffusers(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module", params=["t2v", "i2v", "i2v-a14b"])
def kind(request):
    return request.param


def load(path):
    return torch.from_numpy(np.load(path))


def test_prompts_become_videos(kind, models, tmp_path, capsys):
    """What is sampled is what a data set of these prompts gives; the folder is one that can be scored."""
    config, out = write_run(tmp_path, kind), tmp_path / "samples"
    words = ["--prompt", "a red  cat", "--prompt", "a boat", "--text-encoder", models, *SIZE, "--vae", models]
    words += ["--guidance", "3", "--negative", "blurry"]
    if kind != "t2v":
        Image.new("RGB", (60, 40), (200, 30, 90)).save(tmp_path / "first.png")
        words += ["--image", str(tmp_path / "first.png")]
        words += ["--image-encoder", models] if kind == "i2v" else []
    run("sample", config, *words, "--out", str(out))
    ends = ["json", "mp4", "npy", "text.npy"]
    ends += ["clip.npy"] * (kind == "i2v") + ["first.npy"] * (kind != "t2v")
    names = [f"sample-{i:02d}.{end}" for i in range(2) for end in ends]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "samples.list"])
    meta = json.loads((out / "sample-00.json").read_text())
    assert meta["short_caption"] == "a red  cat" and "source" not in meta
    latent = load(out / "sample-00.npy")
    assert latent.shape == (1, 16, 2, 4, 6)
    assert torch.equal(load(out / "sample-00.text.npy")[0], TextEncoder(models)(["a red cat"])[0].float())
    video = read_video(out / "sample-01.mp4")
    decoded = VideoVAE(models).decode(load(out / "sample-01.npy"))[0].permute(1, 2, 3, 0) * 255
    assert video.shape == decoded.shape == (5, 32, 48, 3)
    difference = (video.float() - decoded).mean(-1)  # of the mean color: yuv420p blurs the others
    assert difference.abs().mean() < 12

    np.save(tmp_path / "negative.npy", TextEncoder(models)(["blurry"])[0][None].float().numpy())
    again = (f"data.val=[{out / 'samples.list'}]", f"data.negative_text={tmp_path / 'negative.npy'}")
    run("sample", config, *again, "sample.guidance=3", "--out", str(tmp_path / "again"))
    assert torch.equal(load(tmp_path / "again/sample-00.npy"), latent)
    capsys.readouterr()
    run("score", config, str(out), "--draws", "1")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_negative_prompt_can_be_words_alone(models, tmp_path):
    config = write_run(tmp_path)
    words = ["--guidance", "3", "--text-encoder", models, "--negative", "a storm", "sample.count=1"]
    run("sample", config, *words, "--out", str(tmp_path / "samples"))
    np.save(tmp_path / "negative.npy", TextEncoder(models)(["a storm"])[0][None].float().numpy())
    words = ["--guidance", "3", f"data.negative_text={tmp_path / 'negative.npy'}", "sample.count=1"]
    run("sample", config, *words, "--out", str(tmp_path / "again"))
    assert torch.equal(load(tmp_path / "samples/sample-00.npy"), load(tmp_path / "again/sample-00.npy"))
    assert json.loads((tmp_path / "samples/sample-00.json").read_text())["source"]


def test_mistakes_are_one_line(models, tmp_path, capsys):
    config = write_run(tmp_path)

    def refused(needle, *words):
        capsys.readouterr()
        run("sample", config, *words, "--out", str(tmp_path / "samples"), code=2)
        assert needle in one_line(capsys)
        assert not os.path.exists(tmp_path / "samples")

    prompt = ("--prompt", "a cat", "--text-encoder", models, *SIZE)
    refused("--negative: got 'blurry', want --guidance S", *prompt, "--negative", "blurry")
    refused("--text-encoder: got", "--text-encoder", models)
    refused("--prompt: got ('a cat',), want --text-encoder DIR", "--prompt", "a cat")
    refused("--size: got '32x48', want --prompt TEXT", "--size", "32x48")
    refused("--size: got '480p', want one", *prompt, "--size", "480p")
    for frames in ("6", "0"):
        refused(f"--frames: got {frames}, want 1, 5, 9", *prompt, "--frames", frames)
    refused("has no VAE", "--vae", str(tmp_path))
    refused("has no text encoder", *prompt, "--text-encoder", str(tmp_path))
    refused("--image: got", *prompt, "--image", str(tmp_path / "a.png"))
    refused("--image-encoder: got", *prompt, "--image-encoder", models)
    refused("sample.codec: got 'a.json', want null with --vae", "--vae", models, "sample.codec=a.json")
    (tmp_path / "policy/config.json").write_text(
        (tmp_path / "policy/config.json").read_text().replace('"text_dim": 12', '"text_dim": 16')
    )
    refused("--text-encoder: width: got 12, want 16, the generator's", *prompt)


def test_a_generator_without_clip_takes_no_image_encoder(models, tmp_path, capsys):
    words = ["--prompt", "a cat", "--text-encoder", models, *SIZE, "--out", str(tmp_path / "samples")]
    words += ["--image", "a.png", "--vae", models, "--image-encoder", models]
    run("sample", write_run(tmp_path, "i2v-a14b"), *words, code=2)
    assert "--image-encoder: got" in (line := one_line(capsys)) and "takes no CLIP features" in line


@pytest.fixture
def ti2v(tmp_path):
    """(the folder of a generator, that of its encoders)."""
    save_transformer(tiny_model(tiny_config("ti2v", in_dim=48, out_dim=48)), tmp_path / "wide")
    return str(tmp_path / "wide"), str(cases.write_ti2v(tmp_path / "models"))


@pytest.mark.parametrize("image", [False, True])
def test_a_ti2v_generator_makes_videos_of_words_and_of_a_first_frame(image, ti2v, tmp_path):
    path, encoders = ti2v
    words = ["--prompt", "a cat", "--text-encoder", encoders, "--size", "32x64", "--frames", "5"]
    words += ["--vae", encoders]
    config, out = write_run(tmp_path), tmp_path / "samples"
    if image:
        Image.new("RGB", (60, 40), (200, 30, 90)).save(tmp_path / "first.png")
        words += ["--image", str(tmp_path / "first.png")]
    run("sample", config, *words, f"model.path={path}", "sample.count=1", "--out", str(out))
    latent = load(out / "sample-00.npy")
    assert latent.shape == (1, 48, 2, 2, 4) and read_video(out / "sample-00.mp4").shape == (5, 32, 64, 3)
    red = torch.tensor([200, 30, 90]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 64) / 255
    distance = (latent[:, :, :1] - VideoVAE(encoders).encode(red)).abs().max()
    assert (distance < 1e-5) == image
    again = (f"data.val=[{out / 'samples.list'}]", f"data.first_frame={str(image).lower()}")
    run("sample", config, *again, f"model.path={path}", "sample.count=1", "--out", str(tmp_path / "again"))
    assert torch.equal(load(tmp_path / "again/sample-00.npy"), latent)


def test_what_does_not_fit_a_ti2v_generator_is_one_line(ti2v, models, tmp_path, capsys):
    path, encoders = ti2v
    config = write_run(tmp_path)
    prompt, size = ["--prompt", "a cat", "--text-encoder", encoders], ["--size", "32x64"]
    image = ["--image", "a.png", "--vae", encoders]
    for words, needle in (
        ([*prompt, *SIZE], "--size: got '32x48', want 480p, 720p"),
        ([*prompt, *size, "data.first_frame=true"], "--image: got None, want one: data.first_frame is true"),
        ([*prompt, *size, "--image", "a.png"], "--vae: got None, want one"),
        ([*prompt, *size, *image], "a.png: no such file"),
        ([*prompt, *size, *image, "--image-encoder", models], "takes no CLIP features"),
        ([*prompt, *size, "--vae", models], "--vae: latent channels: got 16, want 48, the generator's"),
    ):
        capsys.readouterr()
        run("sample", config, *words, f"model.path={path}", "--out", str(tmp_path / "samples"), code=2)
        assert needle in one_line(capsys) and not (tmp_path / "samples").exists()


def test_an_i2v_generator_needs_a_first_frame(models, tmp_path, capsys):
    config = write_run(tmp_path, "i2v")
    words = ["--prompt", "a cat", "--text-encoder", models, *SIZE, "--out", str(tmp_path / "samples")]
    image = str(tmp_path / "a.png")
    for more, needle in (
        ([], "--image: got None, want one: the generator needs a first frame"),
        (["--image", image], "--image-encoder: got None, want one"),
        (["--image", image, "--image-encoder", models], "--vae: got None, want one"),
        (["--image", image, "--image-encoder", models, "--vae", models], "a.png: no such file"),
    ):
        capsys.readouterr()
        run("sample", config, *words, *more, code=2)
        assert needle in one_line(capsys)
