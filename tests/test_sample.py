"""Sampling by the command line."""

import json

import numpy as np
import pytest
import torch
from helpers import SHAPE, one_line, relative, tiny_config, write_run
from safetensors.torch import load_file, save_file
from training_runs import run

from prfl_engine.data import Reader, read_lists


def test_sample_writes_latents_in_the_layout_of_the_data(tmp_path, capsys):
    config, out = write_run(tmp_path), tmp_path / "samples"
    run("sample", config, "sample.count=4", "--out", str(out))
    names = [f"sample-{i:02d}.npy" for i in range(4)]
    metas = [f"sample-{i:02d}.json" for i in range(4)]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, *metas, "samples.list"])
    assert capsys.readouterr().out.split() == [str(out / n) for n in (*names, *metas, "samples.list")]
    latents = [np.load(out / n) for n in names]
    assert all(a.shape == (1, *SHAPE) and a.dtype == np.float32 for a in latents)
    assert not np.array_equal(latents[0], latents[3])  # prompt 0 again, from other noise
    again = tmp_path / "again"
    run("sample", config, "sample.count=4", "--out", str(again))
    assert all(np.array_equal(np.load(again / n), a) for n, a in zip(names, latents, strict=True))


@pytest.mark.parametrize("model_type", ["t2v", "i2v", "i2v-a14b"])
def test_samples_are_data_that_can_be_scored(model_type, tmp_path, capsys, monkeypatch):
    """With the text and the first frame that they were sampled with, from any working directory."""
    config, out = write_run(tmp_path, model_type), tmp_path / "samples"
    run("sample", config, "--out", str(out))
    reader = Reader(tiny_config(model_type))
    rng = np.random.default_rng(0)
    for i, path in enumerate(read_lists([str(out / "samples.list")], "samples")):
        got, source = reader.read(path, rng), reader.read(tmp_path / f"val/{i}.json", rng)
        assert torch.equal(got.latent, torch.from_numpy(np.load(out / f"sample-{i:02d}.npy"))[0])
        assert torch.equal(got.text, source.text)
        assert model_type == "t2v" or torch.equal(got.condition, source.condition)
        assert json.loads(path.read_text())["source"] == str(tmp_path / f"val/{i}.json")
    monkeypatch.chdir(tmp_path / "val")
    capsys.readouterr()
    run("score", config, "../samples", "--draws", "1")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split("/")[-1] for line in lines) == ["sample-00.json", "sample-01.json"]


def test_guidance(tmp_path):
    """Guidance against the prompt itself is none; against another text it moves the sample."""
    config = write_run(tmp_path)
    val = tmp_path / "val"
    same = [f"data.negative_text={val / 'short-0.npy'}", "sample.count=1"]
    other = [f"data.negative_text={val / 'null.npy'}", "sample.count=1"]
    runs = {
        "plain": same,
        "same": [*same, "sample.guidance=5"],
        "other": [*other, "sample.guidance=5"],
    }
    found = {}
    for name, overrides in runs.items():
        run("sample", config, *overrides, "--out", str(tmp_path / name))
        found[name] = torch.from_numpy(np.load(tmp_path / name / "sample-00.npy"))
    assert relative(found["same"], found["plain"]) < 1e-5
    assert relative(found["other"], found["plain"]) > 1e-3


def test_overrides_may_stand_behind_options(tmp_path):
    config, out = write_run(tmp_path), tmp_path / "samples"
    run("sample", config, "--out", str(out), "sample.count=1")
    assert [p.name for p in out.glob("*.npy")] == ["sample-00.npy"]


def test_sample_refuses_an_existing_folder(tmp_path, capsys):
    config = write_run(tmp_path)
    (tmp_path / "samples").mkdir()
    run("sample", config, "--out", str(tmp_path / "samples"), code=2)
    assert str(tmp_path / "samples") in one_line(capsys)
    assert list((tmp_path / "samples").iterdir()) == []


def test_a_sample_does_not_depend_on_its_batch(tmp_path):
    """Its noise is its own; sums of another batch round differently."""
    config = write_run(tmp_path)
    for size in (1, 2, 4):
        run("sample", config, "sample.count=3", f"eval.batch_size={size}", "--out", str(tmp_path / str(size)))
    for i in range(3):
        one, *others = (np.load(tmp_path / f"{size}/sample-{i:02d}.npy") for size in (1, 2, 4))
        for other in others:
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


def test_a_sample_that_is_not_finite_is_not_written(tmp_path, capsys):
    config = write_run(tmp_path)
    weights = tmp_path / "policy/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"head.head.bias": torch.full_like(state["head.head.bias"], 3e38)}, weights)
    run("sample", config, "--out", str(tmp_path / "samples"), code=1)
    assert f"sample: got nan on {tmp_path / 'val/0.json'}" in one_line(capsys)
    assert not (tmp_path / "samples").exists()
