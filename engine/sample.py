"""Sampling videos from a trained generator."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prfl_engine import chain
from prfl_engine.best_of import best_of, check_choice, judge
from prfl_engine.build import load_generator, make_frozen_reward, pick_device
from prfl_engine.checks import check_reward_storage
from prfl_engine.config import Config, SampleConfig
from prfl_engine.data import (
    CLIP_KEYS,
    CONDITION_KEYS,
    LATENT_KEYS,
    TEXT_KEY,
    Reader,
    counted,
    fixed_batches,
    read_lists,
    read_meta,
)
from prfl_engine.errors import UserError, check
from prfl_engine.files import atomic_folder
from prfl_engine.guidance import guidance_of, step_forwards
from prfl_engine.inputs import check_new
from prfl_engine.metrics import note, progress
from prfl_engine.model import lora
from prfl_engine.objectives import chain_velocity, fixed, whole_schedule
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.validation import finite

LIST = "samples.list"
"""The meta JSONs of the samples of a folder, in order."""


def sample(
    config: Config,
    out: str | Path,
    count: int = 1,
    step: int | None = None,
    keep: bool = False,
    finish: int = 1,
) -> list[Path]:
    """Sample the prompts of data.val with the generator of model.path, and the adapter of lora.path if there
    is one, with eval.rollout_lora in addition to that of rollout.lora; returns the files written.

    The noise of sample i follows from sample.seed and i alone. With `count` above 1 the best `finish` of the
    samples of sample.seed, sample.seed + 1, ... by the reward model of reward.path, judged after `step`
    denoising steps, the best first; the others are not finished. `out` must not exist yet. Every sample is
    written as latents .npy [1, 16, T, h, w] float32 with a meta JSON, in the layout of the training data, all
    of them listed in samples.list, and as .mp4 and .webp where sample.codec can decode it. `keep` copies what
    a sample was made from to the folder. TrainingError, and nothing written, for one that is not finite.
    """
    out, s, r = check_new(out, "--out"), config.sample, config.rollout
    check_choice(count, step, r.steps, finish)
    if config.model.path is None:
        raise UserError("model.path: got null, want the folder of a generator")
    if count > 1:
        if config.reward.path is None:
            raise UserError("reward.path: got null, want the folder of a reward model (--best-of)")
        config.reward.check_one("with --best-of")
        check_reward_storage(config)
    alone = config.model.boundary is None and r.sigma_range != (0, 1)
    want = "[0, 1], or both experts (model.boundary): one alone makes no sample"
    check(not alone, "rollout.sigma_range", list(r.sigma_range), want)
    device = pick_device(config)
    paths = read_lists(config.data.val, "data.val")
    paths = [paths[i % len(paths)] for i in range(s.count)]
    model = load_generator(config, device)
    if config.eval.rollout_lora:
        lora.lend(model, r.lora)
    reward = make_frozen_reward(config, model, device) if count > 1 else None
    guidance = guidance_of(config, s.guidance, s.guidance, model, "sample.guidance")
    schedule = whole_schedule(r)
    latents: list[Tensor] = []
    chosen: list[dict] = []
    reader, size = Reader(model.config, first_frame=config.data.first_frame), config.eval.batch_size
    batches = fixed_batches(reader, paths, size, device)
    with torch.no_grad(), lora.lent(model):
        for first, batch in counted(progress(batches, "sampling", -(-len(paths) // size))):
            noises = (noise_like(batch.latent, Purpose.SAMPLE, s.seed + n, first) for n in range(count))
            noises = map(partial(fixed, model, batch), noises)
            velocity = chain_velocity(model, batch, guidance)
            if reward is None:
                made = chain.sample(velocity, schedule, next(noises))[None]
                chosen += [{"seed": s.seed}] * len(batch.latent)
            else:
                score = judge(reward, schedule, batch, step)
                made, kept, logits = best_of(velocity, schedule, noises, step, score, finish)
                finite("the reward of a chain", logits.T, paths[first:])
                rewards = logits.double().sigmoid().T.tolist()
                chosen += [
                    {"seed": s.seed + n, "judged": {"step": step, "rewards": of}}
                    for best, of in zip(kept.T.tolist(), rewards, strict=True)
                    for n in best
                ]
            made = [fixed(model, batch, finite("sample", latent, paths[first:])).cpu() for latent in made]
            latents += [latent for of in zip(*made, strict=True) for latent in of]
    if reward is not None:
        each = step_forwards(s.guidance, config.model.boundary, schedule.timesteps)
        note(_cost(count, step, each, finish))
    metas = [
        {**reader.given(path), "source": str(path.absolute()), **of}
        for path, of in zip([path for path in paths for _ in range(finish)], chosen, strict=True)
    ]
    return write_samples(out, latents, s, metas, keep)


def _cost(count: int, step: int, each: Sequence[int], finish: int) -> str:
    """What best of `count`, `finish` of which are finished, costs with so many forwards of each step."""
    ours, all_ = count * sum(each[:step]) + finish * sum(each[step:]), count * sum(each)
    best, sample = ("best", "sample") if finish == 1 else (f"best {finish}", "prompt")
    return (
        f"{best} of {count}, judged after {step} of {len(each)} steps: {ours} forwards of the generator a "
        f"{sample}, {ours / all_:.2f} of the {all_} to finish all, and {count} of the reward model"
    )


def write_samples(
    folder: Path,
    latents: Sequence[Tensor],
    config: SampleConfig,
    metas: Sequence[dict] = (),
    keep: bool = False,
) -> list[Path]:
    """Write latents [16, T, h, w] as sample-NN.npy, with `metas` also a meta JSON of each and the list of
    these, and with a codec videos: the whole folder or nothing. `keep` copies the files that metas name, and
    the prompts. Returns the files."""
    with atomic_folder(folder) as temporary:
        if keep:
            metas = [_kept(temporary, folder.absolute(), i, meta) for i, meta in enumerate(metas)]
        files = _write(temporary, latents, config) + _describe(temporary, folder.absolute(), metas)
        return [folder / file.name for file in files]


def _kept(temporary: Path, folder: Path, i: int, meta: dict) -> dict:
    """The meta of a sample that was made from files of another folder, with copies of them in this one."""
    source = read_meta(Path(meta["source"]))
    meta = {**meta, "short_caption": source.get("short_caption")}
    del meta["source"]
    for key, end in (TEXT_KEY, "text"), (CLIP_KEYS[0], "clip"), (CONDITION_KEYS[0], "first"):
        if key in meta:
            shutil.copyfile(meta[key], temporary / f"sample-{i:02d}.{end}.npy")
            meta[key] = str(folder / f"sample-{i:02d}.{end}.npy")
    return meta


def _describe(temporary: Path, folder: Path, metas: Sequence[dict]) -> list[Path]:
    """Absolute paths: another folder that is worked in may have a sample of that name, too."""
    written = []
    for i, meta in enumerate(metas):
        written.append(temporary / f"sample-{i:02d}.json")
        meta = {LATENT_KEYS[0]: str(folder / f"sample-{i:02d}.npy"), **meta}
        written[-1].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    if metas:
        lines = [str(folder / file.name) + "\n" for file in written]
        written.append(temporary / LIST)
        written[-1].write_text("".join(lines), encoding="utf-8")
    return written


def _write(folder: Path, latents: Sequence[Tensor], config: SampleConfig) -> list[Path]:
    written = []
    for i, latent in enumerate(latents):
        written.append(folder / f"sample-{i:02d}.npy")
        np.save(written[-1], latent[None].float().numpy())
    if config.codec is not None:
        from prfl_engine.media.codec import FrameCodec
        from prfl_engine.media.video import pixels, write_animation, write_video

        codec = FrameCodec.load(config.codec)
        videos = [pixels(codec.decode(latent[None].float())[0]) for latent in latents]
        for i, video in enumerate(videos):
            written.append(folder / f"sample-{i:02d}.mp4")
            write_video(written[-1], video, fps=config.fps)
        written.append(folder / "samples.webp")
        write_animation(written[-1], videos, scale=2, fps=config.fps)
    return written
