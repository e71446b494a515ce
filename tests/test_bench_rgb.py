"""RGB ReFL beside PRFL: the gradient through the decoder, its gates, and what is counted."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import relative, tiny_model

from prfl_bench import bench_rgb_refl as bench
from prfl_bench import rgb
from prfl_bench.rgb import FrameReward, PixelJudge, graded_pixels, vae_decoder
from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.objectives import bind
from prfl_kernels import dispatch

TINY = (
    "--width", "32", "--ffn", "48", "--heads", "2", "--blocks", "2", "--steps", "4", "--index", "1",
    "--size", "32", "32", "--repeat", "1", "--kernels", "reference",
)  # fmt: skip


@pytest.fixture(autouse=True)
def choice():
    yield
    dispatch.configure("")


@pytest.fixture(scope="module")
def vae():
    kind = pytest.importorskip("diffusers").AutoencoderKLWan
    torch.manual_seed(0)
    return kind(base_dim=4, z_dim=16).eval().requires_grad_(False)


def test_the_decoder_takes_latents_as_they_are_in_data(vae):
    g = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 5, 16, 16, generator=g)
    raw = vae.encode(2 * video - 1).latent_dist.mode()
    mean, std = (torch.tensor(a).view(-1, 1, 1, 1) for a in (vae.config.latents_mean, vae.config.latents_std))
    want = (vae.decode(raw).sample + 1) / 2
    assert relative(vae_decoder(vae)((raw - mean) / std), want) < 1e-6
    first = vae_decoder(vae)(((raw - mean) / std)[:, :, :1])
    assert relative(first, want[:, :, :1]) < 1e-5  # the decoder is causal


def test_pixels_judge_the_latent_that_the_step_predicts():
    g = torch.Generator().manual_seed(0)
    model, text = tiny_model(), torch.randn(2, 4, 12, generator=g)
    noise = torch.randn(2, 16, 2, 4, 4, generator=g)
    batch, schedule = Batch(noise, text), flow.make_schedule("unipc", 4, 1.0)
    seen = []
    judge = PixelJudge(lambda z: z, lambda v: seen.append(v) or v.mean((1, 2, 3, 4)), "first")
    index = torch.tensor([1, 3])
    logit = graded_pixels(model, judge, schedule, batch, noise, index)
    assert logit.requires_grad and seen[0].shape == (2, 16, 1, 4, 4)
    velocity = bind(model, batch)
    state = chain.rollout(velocity, schedule, noise, index)
    with torch.no_grad():
        v = velocity(state.x, schedule.timesteps[index], torch.arange(2))
    want = state.x - schedule.sigmas[index].float().view(-1, 1, 1, 1, 1) * v
    assert relative(seen[0], want[:, :, :1]) < 1e-6
    end = chain.sample(velocity, schedule, noise)
    assert relative(seen[0][1], end[1, :, :1]) < 1e-6  # what the last step predicts is the sample


def test_frames_and_how_they_change_reach_the_reward():
    torch.manual_seed(0)
    network, video = FrameReward(), torch.rand(2, 3, 5, 16, 16, requires_grad=True)
    logit = network(video)
    assert logit.shape == (2,) and network(video[:, :, :1]).shape == (2,)
    (gradient,) = torch.autograd.grad(logit.sum(), video)
    assert (gradient.abs().amax((0, 1, 3, 4)) > 0).all()
    assert not torch.allclose(network(video.flip(2)), logit)


def test_the_reward_of_the_documentation(vae):
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=16, projection_dim=8,
    )  # fmt: skip
    names = {"clip": transformers.CLIPVisionModelWithProjection(config), "head": torch.nn.Linear(8, 1)}
    names |= {"vae": vae, "__name__": "page"}
    exec(code, names)
    latent = torch.randn(2, 16, 2, 4, 4, requires_grad=True)
    logit = names["judge"](latent)
    logit.sum().backward()
    assert logit.shape == (2,) and (latent.grad.abs().amax((1, 3, 4)) > 0).all()


def test_rows_are_gated_and_grow_with_the_frames(capsys, tmp_path):
    bench.main([*TINY, "--frames", "5", "1", "--out", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "central difference" in line]) == 4
    assert len([line for line in lines if line.startswith("gate: reference, recompute full")]) == 1
    content = json.loads((tmp_path / "out.json").read_text())
    assert torch.backends.cpu.get_cpu_capability() in content["machine"]
    found = {(r["frames"], r["reward"], r["place"]): r for r in content["rows"]}
    assert len(found) == 10
    grown = {how: found[5, how, "last"]["bytes"] / found[1, how, "last"]["bytes"] for how in ("all", "first")}
    assert grown["all"] > 2 > 1.2 > grown["first"]
    assert all(sum(r["seconds"].values()) == pytest.approx(r["step"]) for r in content["rows"])
    shown = [line for line in lines if "RGB ReFL, all frames, last step" in line and "gate" not in line]
    assert len(shown) == 2


def test_a_gradient_that_is_not_the_differences_gets_no_time(monkeypatch, capsys):
    predicted = rgb.predicted

    def detached(velocity, schedule, state, index):
        x = predicted(velocity, schedule, state, index)
        return 0.5 * x + 0.5 * x.detach()

    monkeypatch.setattr(bench, "predicted", detached)
    with pytest.raises(SystemExit, match="gate failed, want 1e-05"):
        bench.main([*TINY, "--frames", "1"])
    assert "MiB" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("--frames", "4"), r"--frames: got \[4\], want numbers 1 \+ 4 k"),
        (("--size", "24", "32"), r"--size: got \[24, 32\], want multiples of 16"),
        (("--index", "3"), "--index: got 3, want 0 to 2"),
    ],
)
def test_sizes_that_do_not_go_are_refused(words, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *words])
