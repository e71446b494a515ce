"""Sampling videos from a trained generator."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import DTYPES, pick_device
from prfl_engine.config import Config, SampleConfig
from prfl_engine.data import Reader, counted, fixed_batches, read_lists, read_text
from prfl_engine.errors import UserError
from prfl_engine.files import atomic_folder
from prfl_engine.inputs import check_new
from prfl_engine.metrics import progress
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.objectives import bind
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.validation import finite

LIST = "samples.list"
"""The meta JSONs of the samples of a folder, in order."""


def guided(velocity: chain.Velocity, against: chain.Velocity, scale: float) -> chain.Velocity:
    """Classifier-free guidance: against + scale * (velocity - against)."""

    def combined(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        base = against(x, t, active)
        return base + scale * (velocity(x, t, active) - base)

    return combined


def sample(config: Config, out: str | Path) -> list[Path]:
    """Sample the prompts of data.val with the generator of model.path, and the adapter of lora.path if there
    is one; returns the files written.

    The noise of sample i follows from sample.seed and i alone. `out` must not exist yet. Every sample is
    written as latents .npy [1, 16, T, h, w] float32, in the layout of the training data, and as .mp4 and
    .webp where sample.codec can decode it. TrainingError, and nothing written, for one that is not finite.
    """
    out, s = check_new(out, "--out"), config.sample
    if config.model.path is None:
        raise UserError("model.path: got null, want the folder of a generator")
    if s.guidance != 1 and config.data.negative_text is None:
        raise UserError("data.negative_text: got null, want a .npy (sample.guidance is not 1)")
    device = pick_device(config)
    paths = read_lists(config.data.val, "data.val")
    paths = [paths[i % len(paths)] for i in range(s.count)]
    model = load_transformer(config.model.path, None, device).eval()
    if config.lora.path is not None:
        lora.apply(model, config.lora.path)
    model.set_precision(DTYPES[config.model.compute_dtype], DTYPES[config.model.residual_dtype])
    if s.guidance != 1:
        negative = read_text(config.data.negative_text, model.config).to(device)
    schedule = flow.make_schedule(config.rollout.solver, config.rollout.steps, config.rollout.shift)
    latents: list[Tensor] = []
    reader, size = Reader(model.config), config.eval.batch_size
    batches = fixed_batches(reader, paths, size, device)
    with torch.no_grad():
        for first, batch in counted(progress(batches, "sampling", -(-len(paths) // size))):
            noise = noise_like(batch.latent, Purpose.SAMPLE, s.seed, first)
            velocity = bind(model, batch)
            if s.guidance != 1:
                plain: Batch = batch._replace(text=negative.expand(len(batch.text), -1, -1))
                velocity = guided(velocity, bind(model, plain), s.guidance)
            latents.extend(finite("sample", chain.sample(velocity, schedule, noise), paths[first:]).cpu())
    return write_samples(out, latents, s)


def write_samples(folder: Path, latents: Sequence[Tensor], config: SampleConfig) -> list[Path]:
    """Write latents [16, T, h, w] as sample-NN.npy and, with a codec, as videos: the whole folder or nothing.
    Returns the files."""
    with atomic_folder(folder) as temporary:
        return [folder / file.name for file in _write(temporary, latents, config)]


def _write(folder: Path, latents: Sequence[Tensor], config: SampleConfig) -> list[Path]:
    written = []
    for i, latent in enumerate(latents):
        written.append(folder / f"sample-{i:02d}.npy")
        np.save(written[-1], latent[None].float().numpy())
    if config.codec is not None:
        from prfl_engine.media.codec import DCTCodec
        from prfl_engine.media.video import pixels, write_animation, write_video

        codec = DCTCodec.load(config.codec)
        videos = [pixels(codec.decode(latent[None].float())[0]) for latent in latents]
        for i, video in enumerate(videos):
            written.append(folder / f"sample-{i:02d}.mp4")
            write_video(written[-1], video, fps=config.fps)
        written.append(folder / "samples.webp")
        write_animation(written[-1], videos, scale=2, fps=config.fps)
    return written
