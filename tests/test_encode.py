"""`prfl encode`: data that trains, what is left out, going on after a stop, several processes."""

import json
import shutil
import weakref
from pathlib import Path

import encoder_cases as cases
import numpy as np
import pytest
import torch
from helpers import one_line, tiny_config, write_run
from PIL import Image
from training_runs import run, values

from prfl_engine.cli import main
from prfl_engine.data import Reader, read_lists, read_text
from prfl_engine.encode.encoders import ImageEncoder, TextEncoder, VideoVAE
from prfl_engine.media.video import read_clip

for package in ("diffusers", "transformers"):
    pytest.importorskip(package)

SIZE = ("--size", "32x48,48x32", "--frames", "9", "--negative", "blurry", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return cases.write_diffusers(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """clips.csv of two videos, one of them upright, and an image."""
    folder = tmp_path_factory.mktemp("clips")
    cases.write_clip(folder / "wide.mp4", 11)
    cases.write_clip(folder / "tall.mp4", 9, 64, 48)
    Image.new("RGB", (60, 40), (200, 30, 90)).save(folder / "still.png")
    (folder / "clips.csv").write_text(
        "video,image,prompt,long_prompt,label,scene\n"
        "wide.mp4,,a cat runs,a cat runs on grass,good,1\n"
        'tall.mp4,,"a   red boat",,poor,2\n'
        ",still.png,a storm,,1,3\n"
    )
    return folder


def encode(source, models, out, *options, code=0):
    assert main(["encode", str(source), "--models", str(models), "--out", str(out), *SIZE, *options]) == code


@pytest.fixture(scope="module")
def data(models, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "t2v"
    encode(clips / "clips.csv", models, out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and "ranks" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def metas(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in read_lists([str(folder / "all.list")], "list")]


def test_samples_are_what_the_encoders_make_of_rows(data, models, clips):
    wide, tall, still = metas(data)
    assert [m["label"] for m in (wide, tall, still)] == ["good", "poor", 1]
    assert [m["scene"] for m in (wide, tall, still)] == ["1", "2", "3"]
    assert (wide["long_caption"], tall["short_caption"]) == ("a cat runs on grass", "a red boat")
    reader, rng = Reader(tiny_config()), np.random.default_rng(0)
    batches = [reader.read(path, rng) for path in read_lists([str(data / "all.list")], "list")]
    assert [tuple(b.latent.shape[1:]) for b in batches] == [(3, 4, 6), (3, 6, 4), (1, 4, 6)]
    frames = read_clip(clips / "wide.mp4", 16, 9, lambda *_: (32, 48)).permute(3, 0, 1, 2)[None]
    vae = VideoVAE(models)
    mode = vae.model.encode(frames / 127.5 - 1).latent_dist.mode()
    c = vae.model.config
    statistics = (torch.tensor(a).view(16, 1, 1, 1) for a in (c.latents_mean, c.latents_std))
    mean, std = statistics
    assert (batches[0].latent - (mode[0] - mean) / std).abs().max() < 1e-5
    (want,) = TextEncoder(models)(["a red boat"])
    # Alone, without the padding of its batch; bfloat16 rounds sums of another order otherwise.
    assert batches[1].text.shape == want.shape == (4, 12)
    assert (batches[1].text - want).abs().max() < 0.05
    assert read_text(data / "null.npy", tiny_config()).shape == (1, 12)
    assert read_text(data / "negative.npy", tiny_config()).shape == (2, 12)


def test_the_data_trains_and_is_scored(data, tmp_path, capsys):
    config = write_run(tmp_path, train={"steps": 1})
    both = f"data.val=[{data / 'all.list'}]", f"data.train=[{data / 'all.list'}]"
    null = f"data.null_text={data / 'null.npy'}"
    run("train", config, *both, null)
    (step,) = values(tmp_path / "run").values()
    assert step and np.isfinite(list(step.values())).all()
    run("train-reward", config, *both, "data.label=label", f"train.out={tmp_path / 'scorer'}")
    capsys.readouterr()
    run("score", config, str(data / "all.list"), "--draws", "1")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_i2v_has_first_frames(models, clips, tmp_path):
    """The VAE is causal, so the first latent frame of a condition is that of its video; a row's own image
    takes the place of the first frame."""
    rows = [{"video": "wide.mp4", "prompt": "a cat"}, {"video": "wide.mp4", "prompt": "a boat"}]
    rows[1]["image"] = "still.png"
    rows.append({"image": "still.png", "prompt": "a storm"})
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("wide.mp4", "still.png"):
        shutil.copy(clips / name, tmp_path)
    encode(tmp_path / "rows.jsonl", models, tmp_path / "out", "--i2v", code=3)
    reader, rng = Reader(tiny_config("i2v")), np.random.default_rng(0)
    video, image = (reader.read(p, rng) for p in read_lists([str(tmp_path / "out/all.list")], "list"))
    assert torch.equal(video.latent, image.latent)
    assert (video.condition[4:, 0] - video.latent[:, 0]).abs().max() < 1e-6
    assert not torch.equal(video.condition[4:, 1:], video.latent[:, 1:])
    red = torch.tensor([200, 30, 90]).view(1, 3, 1, 1, 1) / 255
    gray = torch.full((1, 3, 8, 32, 48), 0.5)
    want = VideoVAE(models).encode(torch.cat([red.expand(-1, -1, 1, 32, 48), gray], 2))[0]
    assert (image.condition[4:] - want).abs().max() < 1e-5
    want = ImageEncoder(models)(red[:, :, 0].expand(-1, -1, 32, 48))[0]
    assert (image.clip - want).abs().max() < 1e-4
    assert not torch.equal(video.clip, image.clip)
    encode(tmp_path / "rows.jsonl", models, tmp_path / "a14b", "--i2v", "--no-clip", code=3)
    reader = Reader(tiny_config("i2v-a14b"))
    without = reader.read(read_lists([str(tmp_path / "a14b/all.list")], "list")[1], rng)
    assert without.clip is None and torch.equal(without.condition, image.condition)
    assert not list((tmp_path / "a14b").glob("latents/*.clip.npy"))


def test_the_vae_of_ti2v_encodes_what_ti2v_reads(clips, tmp_path, capsys):
    models = cases.write_ti2v(tmp_path / "models")
    (tmp_path / "rows.csv").write_text(f"video,prompt\n{clips / 'wide.mp4'},a cat\n")
    size = ("--size", "32x64")
    encode(tmp_path / "rows.csv", models, tmp_path / "out", *size)
    reader = Reader(tiny_config("ti2v", in_dim=48, out_dim=48), first_frame=True)
    (path,) = read_lists([str(tmp_path / "out/all.list")], "list")
    batch = reader.read(path, np.random.default_rng(0))
    assert batch.latent.shape == (48, 3, 2, 4)
    frames = read_clip(clips / "wide.mp4", 16, 9, lambda *_: (32, 64)).permute(3, 0, 1, 2)[None] / 255
    vae = VideoVAE(models)
    assert (batch.latent - vae.encode(frames)[0]).abs().max() < 1e-5
    assert (batch.condition - vae.encode(frames[:, :, :1])[0]).abs().max() < 1e-5  # it is causal
    for options, needle in (
        (["--size", "32x48"], "--size: got '32x48', want 480p, 720p, or heights and widths such as"),
        ([*size, "--i2v"], "--i2v: got True, want none with Wan2.2's VAE: TI2V takes the first frame of the"),
    ):
        capsys.readouterr()
        encode(tmp_path / "rows.csv", models, tmp_path / "none", *options, code=2)
        assert needle in one_line(capsys) and not (tmp_path / "none").exists()


def test_what_cannot_be_encoded_is_left_out_and_named(models, clips, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes((clips / "wide.mp4").read_bytes()[:600])
    cases.write_clip(tmp_path / "short.mp4", 8)
    shutil.copy(clips / "wide.mp4", tmp_path)
    lines = [
        "video,prompt,label", "wide.mp4,a cat,1", "broken.mp4,a cat,1", "short.mp4,a cat,0", "wide.mp4,,1",
        "gone.mp4,a cat,1", "wide.mp4,a boat,maybe", "wide.mp4,a cat,0", "wide.mp4", ",a cat,1",
    ]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    encode(tmp_path / "rows.csv", models, out, code=3)
    *left, last = capsys.readouterr().out.splitlines()
    assert last == f"{out / 'all.list'}: 1 samples, 8 rows left out"
    reasons = {line.split(", line ")[1].split(": ", 1)[0]: line.split(": ", 2)[2] for line in left}
    assert "not a readable video" in reasons["3"]
    assert reasons["4"] == "frames at 16 a second: got 8, want 9 (--min-frames)"
    assert reasons["5"] == "no prompt"
    assert "gone.mp4: no such file" in reasons["6"]
    assert reasons["7"] == "label: got 'maybe', want 0, 1, good, poor or null"
    assert reasons["8"] == f"says what {tmp_path / 'rows.csv'}, line 2 says"
    assert "number of columns" in reasons["9"]
    assert reasons["10"] == "got no video and no image"
    # A shorter one is taken if so asked, as 4n + 1 frames.
    encode(tmp_path / "rows.csv", models, tmp_path / "more", "--min-frames", "5", code=3)
    found = [np.load(tmp_path / "more/meta" / m["vae_latent_path"]) for m in metas(tmp_path / "more")]
    assert [array.shape[2] for array in found] == [3, 2]
    (tmp_path / "rows.csv").write_text("\n".join([lines[0], *lines[2:5]]))
    capsys.readouterr()
    encode(tmp_path / "rows.csv", models, tmp_path / "none", code=1)
    assert "no sample: all 3 rows were left out" in one_line(capsys)


def test_a_stopped_run_goes_on(data, models, clips, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "out", []
    encoded = VideoVAE.encode

    def stop(self, video):
        calls.append(video)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encoded(self, video)

    monkeypatch.setattr(VideoVAE, "encode", stop)
    encode(clips / "clips.csv", models, out, code=130)
    assert not (out / "all.list").exists() and len(list((out / "latents").iterdir())) == 1
    encode(clips / "clips.csv", models, out)
    assert len(calls) == 4 and files(out) == files(data)
    encode(clips / "clips.csv", models, out)
    assert len(calls) == 4  # all is there
    (out / "latents" / f"{metas(out)[1]['vae_latent_path'].split('/')[-1]}").unlink()
    encode(clips / "clips.csv", models, out)
    assert len(calls) == 5 and files(out) == files(data)
    capsys.readouterr()
    encode(clips / "clips.csv", models, out, "--frames", "5", code=2)
    assert "was made with frames 9, got 5, want it or another folder" in one_line(capsys)
    assert files(out) == files(data)


def test_another_label_or_prompt_costs_no_video(models, clips, tmp_path, monkeypatch):
    for name in ("wide.mp4", "tall.mp4", "still.png", "clips.csv"):
        shutil.copy(clips / name, tmp_path)
    encode(tmp_path / "clips.csv", models, tmp_path / "out")
    monkeypatch.setattr(VideoVAE, "__init__", None)
    table = (tmp_path / "clips.csv").read_text().replace("poor", "good").replace("storm", "blue storm")
    (tmp_path / "clips.csv").write_text(table)
    encode(tmp_path / "clips.csv", models, tmp_path / "out")
    assert [m["label"] for m in metas(tmp_path / "out")] == ["good", "good", 1]
    assert metas(tmp_path / "out")[2]["short_caption"] == "a blue storm"


def test_processes_share_the_rows(data, models, clips, tmp_path, monkeypatch, capsys):
    """One after another here; the list is that of one process, whichever of them ends last."""
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (out / "all.list").exists()
        monkeypatch.setenv("RANK", rank)
        encode(clips / "clips.csv", models, out)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("process 1 of 2: 1 samples, 0 rows left out")
    assert last == f"{out / 'all.list'}: 3 samples, 0 rows left out"
    got, want = files(out), files(data)
    assert got.keys() == want.keys()
    assert [n for n in got if got[n] != want[n] and "text/" not in n and n != "negative.npy"] == []
    for name in (n for n in got if n.startswith("text/")):  # of other batches
        np.testing.assert_allclose(np.load(out / name), np.load(data / name), atol=0.05)


def test_under_torchrun_the_exit_code_ends_no_other_process(models, clips, tmp_path, monkeypatch):
    shutil.copy(clips / "wide.mp4", tmp_path)
    (tmp_path / "rows.csv").write_text("video,prompt\nwide.mp4,a cat\nwide.mp4,\n")
    encode(tmp_path / "rows.csv", models, tmp_path / "out", code=3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    encode(tmp_path / "rows.csv", models, tmp_path / "out")


def test_float16_is_stored_where_it_can_be(models, clips, tmp_path, monkeypatch, capsys):
    half = tmp_path / "half"
    encode(clips / "clips.csv", models, half, "--store", "float16")
    paths = [half / "meta" / m[key] for m in metas(half) for key in m if key.endswith("_path")]
    assert {np.load(path).dtype for path in paths} == {np.dtype("float16")}
    monkeypatch.setattr(VideoVAE, "encode", lambda self, video: torch.full((1, 16, 1, 2, 2), 7e4))
    encode(clips / "clips.csv", models, tmp_path / "inf", "--store", "float16", code=1)
    assert "want finite numbers in torch.float16" in capsys.readouterr().err


def test_mistakes_are_one_line(models, clips, tmp_path, capsys):
    table, out = clips / "clips.csv", tmp_path / "out"

    def refused(*needles, source=table, models=models, options=()):
        capsys.readouterr()
        encode(source, models, out, *options, code=2)
        line = one_line(capsys)
        assert all(needle in line for needle in needles), line
        assert not out.exists()

    refused("--frames: got 8, want", options=["--frames", "8"])
    refused("--min-frames: got 13, want at most 9", options=["--min-frames", "13"])
    refused("--fps: got '0', want", options=["--fps", "0"])
    refused("--size: got '480', want 480p", options=["--size", "480"])
    refused("--size: got '40x48', want", "multiples of 16", options=["--size", "40x48"])
    refused("has no VAE, want vae/ of diffusers or Wan2.1_VAE.pth", models=tmp_path)
    refused("no such file, want a folder, or a table", source=tmp_path / "none.csv")
    refused("got no videos or images", source=tmp_path)
    (tmp_path / "odd.csv").write_text("clip,text\na.mp4,a\n")
    refused("odd.csv: columns: got ['clip', 'text'], want one of video", source=tmp_path / "odd.csv")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    encode(table, models, out, code=2)
    assert "want a new or empty folder" in capsys.readouterr().err


def test_one_encoder_is_in_memory_at_a_time(models, clips, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(f"video,prompt\n{clips / 'wide.mp4'},a cat\n")
    alive, made = weakref.WeakSet(), []
    for kind in (TextEncoder, ImageEncoder, VideoVAE):

        def counted(self, *arguments, init=kind.__init__):
            assert not alive
            init(self, *arguments)
            alive.add(self.model)
            made.append(type(self))

        monkeypatch.setattr(kind, "__init__", counted)
    encode(tmp_path / "rows.csv", models, tmp_path / "out", "--i2v")
    assert made == [TextEncoder, ImageEncoder, VideoVAE]
