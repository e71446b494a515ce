"""What the demo measures: samples of several generators, and the reward model beside hand-made features."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from prfl_engine import chain
from prfl_engine.build import pick_device, set_up
from prfl_engine.config import Config
from prfl_engine.data import Reader, counted, fixed_batches, read_lists, read_meta
from prfl_engine.demo.baseline import handmade_margins
from prfl_engine.demo.data import DemoData
from prfl_engine.demo.motion import blind, motions
from prfl_engine.guidance import guidance_of
from prfl_engine.media.codec import FrameCodec
from prfl_engine.metrics import progress
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.model.sources import read_config
from prfl_engine.objectives import chain_velocity, fixed, noisy_rewards, whole_schedule
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.validation import told_right

BATCH = 16
HELD_OUT = {
    "breaks it was trained on": "val",
    "breaks it has never seen": "new",
    "windows of real video": "real",
}
"""What the reward model is measured on: the names of the lists NAME_win and NAME_lose."""
HANDMADE = 5000  # training pairs of the hand-made comparison, at equal distances in the list
T = TypeVar("T")


@torch.no_grad()
def measure(
    config: Config, codec_path: Path, prompts: Path, models: dict[str, Path], seeds: int
) -> tuple[dict[str, dict], dict]:
    """({name: what was measured on samples of the model}, the same of held-out video), every model from the
    same held-out prompts, first frames and seeds. Samples are guided by sample.guidance.

    "acceleration" and "speed" are those of demo.motion; "reward" is the mean over eval.scored of the reward
    of the noised sample; "distance" is |log(U / U_clean)|, U the unsteadiness of a decoded video and
    U_clean that of steady motion from the same first frame.
    """
    device, e, r = pick_device(config), config.eval, config.reward
    scored = [i for i, t in enumerate(e.timesteps) if t in e.scored]
    codec = FrameCodec.load(codec_path)
    score = load_reward(r.path, **r.pooling, dtype=torch.float32, device=device).freeze()
    schedule = whole_schedule(config.rollout)
    paths = spread(read_lists([str(prompts)], prompts.name), seeds)
    captions = [read_meta(p)["short_caption"] for p in paths]
    found: dict[str, dict] = {}
    for name, path in progress(models.items(), "sampling", len(models)):
        model = set_up(load_transformer(path, torch.float32, device), config.model).eval()
        truth, latents, rewards = [], [], []
        s, reader = config.sample, Reader(model.config, first_frame=config.data.first_frame)
        guidance = guidance_of(config, s.guidance, s.guidance, model, "sample.guidance")
        for first, batch in counted(fixed_batches(reader, paths, BATCH, device)):
            noise = noise_like(batch.latent, Purpose.DEMO_SAMPLE, e.seed, first)
            noise = fixed(model, batch, noise)
            latent = chain.sample(chain_velocity(model, batch, guidance), schedule, noise)
            noise = noise_like(batch.latent, Purpose.DEMO_SCORE, e.seed, first)
            logits = noisy_rewards(score, batch._replace(latent=latent), noise, e.timesteps)
            rewards.append(torch.sigmoid(logits))
            latents.append(latent)
            truth.append(batch.latent)
        video = torch.cat([codec.decode(z.cpu()) for z in latents])
        real = torch.cat([codec.decode(z.cpu()) for z in truth])
        rewards = torch.cat(rewards).cpu()
        acceleration, speed = motions(video)
        found[name] = {
            "video": video,
            "acceleration": acceleration,
            "speed": speed,
            "reward": rewards[:, scored].mean(1),
            "reward_by_timestep": rewards.mean(0),
            "distance": (unsteadiness(video).log() - unsteadiness(real).log()).abs(),
            "unsteadiness": unsteadiness(video),
            "jerk": jerk(video),
        }
    acceleration, speed = motions(real)
    clean = {"acceleration": acceleration, "speed": speed}
    clean |= {"unsteadiness": unsteadiness(real), "jerk": jerk(real)}
    return found, clean | {"captions": captions, "video": real}


def compare(found: dict[str, dict], real: dict, timesteps: Sequence[float]) -> dict:
    """Means of what `measure` found of before, control and PRFL at these timesteps of the reward, and tests
    of their differences."""
    keys = ("acceleration", "speed", "reward", "distance", "unsteadiness", "jerk")

    def moved(f: dict) -> Tensor:
        return torch.stack([f["acceleration"], f["speed"]])

    def summary(name: str) -> dict:
        f = found[name]
        by_t = dict(zip(map(str, timesteps), f["reward_by_timestep"].tolist(), strict=True))
        return {key: f[key].mean().item() for key in keys} | {"reward_by_timestep": by_t}

    tests = {}
    for name, other in ("PRFL", "before"), ("PRFL", "control"), ("control", "before"):
        gain = found[name]["reward"] - found[other]["reward"]
        closer = found[other]["distance"] - found[name]["distance"]
        tests[f"{name} against {other}"] = {
            "blind": blind(moved(found[other]), moved(found[name]), real["speed"]),
            "reward_gain": gain.mean().item(),
            "reward_p": paired_p(gain.numpy()),
            "distance_gain": closer.mean().item(),
            "distance_p": paired_p(closer.numpy()),
        }
    return {
        "models": {name: summary(name) for name in found},
        "tests": tests,
        "clean": {k: real[k].mean().item() for k in ("acceleration", "speed", "unsteadiness", "jerk")},
        "captions": real["captions"],
        "per_seed": {
            name: {key: f[key].tolist() for key in ("acceleration", "speed", "reward", "distance")}
            for name, f in found.items()
        },
        "videos": {"drawn, steady": real["video"]} | {name: f["video"] for name, f in found.items()},
    }


def spread(paths: Sequence[T], count: int) -> list[T]:
    """`count` paths at equal distances."""
    return [paths[i * len(paths) // count] for i in range(count)]


def jerk(video: Tensor) -> Tensor:
    """Mean absolute second difference in time [B] of videos [B, 3, F, H, W], levels in [0, 1]."""
    return video.diff(n=2, dim=2).abs().flatten(1).mean(1)


def unsteadiness(video: Tensor) -> Tensor:
    """Jerk over the mean absolute first difference [B]: how broken the motion is, however much of it
    there is. Frames in random order have 1.5 and more, a steady pan about 1."""
    return jerk(video) / video.diff(dim=2).abs().flatten(1).mean(1)


def paired_p(difference: np.ndarray, draws: int = 100_000) -> float:
    """Two-sided p of a paired permutation test: the signs of the differences at random."""
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (draws, len(difference)), dtype=np.int8) * 2 - 1
    null = np.abs(signs @ difference)
    return (1 + int((null >= abs(difference.sum()) - 1e-12).sum())) / (draws + 1)


@torch.no_grad()
def accuracies(config: Config, data: DemoData, model: Path) -> dict:
    """How often the reward model, and the linear comparison of hand-made features, give the steady one of a
    held-out pair the higher score under one noise, on all of HELD_OUT: by timestep, and by kind of break
    the mean of t <= 600. The comparison is fit to HANDMADE of the reward model's pairs."""
    device, e = pick_device(config), config.eval
    reader = Reader(read_config(config.model.path), config.data.label, first_frame=config.data.first_frame)
    score = load_reward(model, **config.reward.pooling, dtype=torch.float32, device=device).freeze()

    def whole(name: str, most: int | None = None) -> tuple[list[Path], Tensor]:
        path = getattr(data, name)
        paths = read_lists([str(path)], path.name)
        paths = spread(paths, min(len(paths), most or len(paths)))
        return paths, next(fixed_batches(reader, paths, len(paths), torch.device("cpu"))).latent

    def logits(paths: list[Path]) -> Tensor:
        found = []
        for first, batch in counted(fixed_batches(reader, paths, 4 * BATCH, device)):
            noise = noise_like(batch.latent, Purpose.DEMO_SCORE, e.seed, first)
            found.append(noisy_rewards(score, batch, noise, e.timesteps).cpu())
        return torch.cat(found)

    train = [whole(f"reward_{side}", HANDMADE)[1] for side in ("win", "lose")]
    held_out = {name: [whole(f"{key}_{side}") for side in ("win", "lose")] for name, key in HELD_OUT.items()}
    pairs = [(win[1], lose[1]) for win, lose in held_out.values()]
    hand = handmade_margins(*train, pairs, e.timesteps, e.seed)
    found = {}
    for (name, ((win, _), (lose, _))), by_hand in zip(held_out.items(), hand, strict=True):
        kinds = [read_meta(path)["corruption"] for path in lose]
        margins = {"learned": logits(win) - logits(lose), "hand-made": by_hand}
        found[name] = {judge: _right(margin, kinds, e.timesteps) for judge, margin in margins.items()}
    return found


def _right(margin: Tensor, kinds: Sequence[str], timesteps: Sequence[float]) -> dict:
    """Accuracies by margins [N, n] of pairs of these kinds at n timesteps."""
    right = told_right(margin)
    low = right[:, [i for i, t in enumerate(timesteps) if t <= 600]].mean(1)
    by_kind = {}
    for kind in sorted(set(kinds)):
        by_kind[kind] = low[torch.tensor([k == kind for k in kinds])].mean().item()
    by_t = dict(zip(map(str, timesteps), right.mean(0).tolist(), strict=True))
    return {"by_timestep": by_t, "low": low.mean().item(), "by_kind": by_kind}
