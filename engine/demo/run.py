"""The whole job on real video, on this machine: data, generator, reward model, PRFL, report.

Every stage writes to its own folder and is found finished there when the demo is run again.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prfl_engine import chain
from prfl_engine.build import pick_device
from prfl_engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    SampleConfig,
    TrainConfig,
)
from prfl_engine.data import Reader, counted, fixed_batches, read_lists, read_meta
from prfl_engine.demo import clips
from prfl_engine.demo.baseline import evaluate_handmade
from prfl_engine.demo.report import write_report
from prfl_engine.files import checkpoints
from prfl_engine.guidance import guidance_of
from prfl_engine.media.codec import DCTCodec
from prfl_engine.metrics import decimal, progress, read_metrics
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.model.sources import read_config
from prfl_engine.objectives import chain_velocity, noisy_rewards, whole_schedule
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.train import train
from prfl_engine.train_reward import train_reward


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. Stages are counted in optimizer steps."""

    pretrain: int = 1300
    reward: int = 1300
    prfl: int = 120
    seeds: int = 64
    """Held-out seeds on which before, control and PRFL are compared."""
    data: clips.DemoSpec = field(default_factory=clips.DemoSpec)


def demo(out: str | Path, settings: Settings | None = None, command: str = "demo()") -> dict:
    """Run what is not yet done of the demo in the folder `out`; returns the report's numbers.

    `command` is what the report says it was made by.
    """
    out, s = Path(out), settings or Settings()
    begun = time.perf_counter()
    seconds: dict[str, float] = {}

    def stage(name: str, run, *args):
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = run(*args)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
        return result

    data = stage("data", clips.build, out / "data", 0, s.data)
    base = base_config(data)
    pretrain = replace(
        base,
        model=replace(base.model, preset="tiny-t2v"),
        loss=LossConfig(weight=0),
        optim=OptimConfig(lr=8e-3, schedule="cosine", warmup=50),
        data=replace(base.data, batch_size=32),
        train=replace(base.train, out=str(out / "pretrain"), steps=s.pretrain, ema=0.99),
    )
    stage("pre-training", train, pretrain)
    generator = _last(pretrain) / "ema"

    reward = replace(
        base,
        model=replace(base.model, path=str(generator)),
        reward=replace(base.reward, path=None, train_embeddings=True),
        data=replace(
            base.data, batch_size=32, train=(str(data.reward_train),), val=(str(data.reward_val),)
        ),
        optim=OptimConfig(lr=3e-3, lr_head=3e-3, schedule="cosine", warmup=50, weight_decay=0.1),
        # More of the lower noise levels: at the upper ones there is little to see.
        rollout=replace(base.rollout, shift=0.5),
        train=replace(base.train, out=str(out / "reward"), steps=s.reward, ema=0.99),
        eval=replace(base.eval, every=max(1, s.reward // 5), batch_size=64),
    )
    stage("reward model", train_reward, reward)

    prfl = replace(
        base,
        model=replace(base.model, path=str(generator)),
        reward=replace(base.reward, path=str(_last(reward) / "ema")),
        # Ahead of fresh rollouts at equal seconds, see docs/persistent.md.
        loss=LossConfig(weight=1.0, sft_every=4),
        # Where the reward model knows something: at earlier steps its accuracy is near 0.5.
        rollout=replace(base.rollout, range=(6, 18), mode="persistent", pool=128, max_drift=10.0),
        optim=OptimConfig(lr=2e-4, warmup=5),
        data=replace(base.data, batch_size=8),
        train=replace(base.train, out=str(out / "prfl"), steps=s.prfl),
    )
    control = replace(
        prfl,
        loss=LossConfig(weight=0),
        train=replace(prfl.train, out=str(out / "control")),
    )
    stage("PRFL", train, prfl)
    stage("control (flow matching only)", train, control)

    models = {"before": generator, "control": _last(control), "PRFL": _last(prfl)}
    numbers = stage("comparison", compare, prfl, data, models, s.seeds)
    numbers["reward_accuracy"] = stage("hand-made features", accuracies, reward, data)
    numbers["seconds"] = seconds | {"all": time.perf_counter() - begun}
    numbers["settings"] = asdict(s)
    numbers["data"] = data.counts
    numbers["command"] = command
    page = stage("report", write_report, out, numbers)
    print(f"report: {page}")
    return numbers


def base_config(data: clips.DemoData) -> Config:
    """What all stages share."""
    return Config(
        model=ModelConfig(compute_dtype="float32"),
        reward=RewardConfig(blocks=4, feature_layer=4, num_heads=4),
        data=DataConfig(
            train=(str(data.sft_train),),
            val=(str(data.clean_val),),
            null_text=str(data.null_text),
            num_workers=0,
        ),
        rollout=RolloutConfig(steps=20, shift=1.0),
        train=TrainConfig(resume="auto", save_every=10**6, keep=1, log_every=5),
        eval=EvalConfig(),
        sample=SampleConfig(codec=str(data.codec)),
    )


def _last(config: Config) -> Path:
    return checkpoints(Path(config.train.out))[-1]


@torch.no_grad()
def measure(
    config: Config, codec_path: Path, clean_val: Path, models: dict[str, Path], seeds: int
) -> tuple[dict[str, dict], dict]:
    """({name: what was measured on samples of the model}, the same of held-out video), every model from the
    same held-out prompts and seeds.

    Samples are guided by sample.guidance. "reward" is the mean over eval.scored of the reward of the noised
    sample; "distance" is |log(U / U_clean)|, U the unsteadiness of a decoded video and U_clean the median
    over held-out clean windows with the same prompt.
    """
    device, e, r = pick_device(config), config.eval, config.reward
    scored = [i for i, t in enumerate(e.timesteps) if t in e.scored]
    codec = DCTCodec.load(codec_path)
    score = load_reward(r.path, **r.pooling, dtype=torch.float32, device=device).freeze()
    schedule = whole_schedule(config.rollout)
    paths = spread(read_lists([str(clean_val)], "clean_val"), seeds)
    reference = clean_medians(read_lists([str(clean_val)], "clean_val"), codec)
    captions = [read_meta(p)["short_caption"] for p in paths]
    clean, clean_jerk = torch.tensor([reference[c] for c in captions]).T
    found: dict[str, dict] = {}
    for name, path in progress(models.items(), "sampling", len(models)):
        model = load_transformer(path, torch.float32, device).eval()
        truth, latents, rewards = [], [], []
        s, reader = config.sample, Reader(model.config)
        guidance = guidance_of(config, s.guidance, s.guidance, model, "sample.guidance")
        for first, batch in counted(fixed_batches(reader, paths, 16, device)):
            noise = noise_like(batch.latent, Purpose.DEMO_SAMPLE, e.seed, first)
            latent = chain.sample(chain_velocity(model, batch, guidance), schedule, noise)
            noise = noise_like(batch.latent, Purpose.DEMO_SCORE, e.seed, first)
            logits = noisy_rewards(score, batch._replace(latent=latent), noise, e.timesteps)
            rewards.append(torch.sigmoid(logits))
            latents.append(latent)
            truth.append(batch.latent)
        video = torch.cat([codec.decode(z.cpu()) for z in latents])
        real = torch.cat([codec.decode(z.cpu()) for z in truth])
        rewards = torch.cat(rewards).cpu()
        found[name] = {
            "video": video,
            "reward": rewards[:, scored].mean(1),
            "reward_by_timestep": rewards.mean(0),
            "distance": (unsteadiness(video).log() - clean.log()).abs(),
            "unsteadiness": unsteadiness(video),
            "jerk": jerk(video),
        }
    truth = {"unsteadiness": clean.mean().item(), "jerk": clean_jerk.mean().item()}
    return found, {"clean": truth, "captions": captions, "video": real}


def compare(config: Config, data: clips.DemoData, models: dict[str, Path], seeds: int) -> dict:
    """`measure` of the models before, control and PRFL, and the tests of their differences."""
    found, real = measure(config, data.codec, data.clean_val, models, seeds)
    timesteps = config.eval.timesteps

    def summary(name: str) -> dict:
        f = found[name]
        by_t = dict(zip(map(str, timesteps), f["reward_by_timestep"].tolist(), strict=True))
        means = {key: f[key].mean().item() for key in ("reward", "distance", "unsteadiness", "jerk")}
        return means | {"reward_by_timestep": by_t}

    tests = {}
    for other in ("control", "before"):
        gain = found["PRFL"]["reward"] - found[other]["reward"]
        closer = found[other]["distance"] - found["PRFL"]["distance"]
        tests[f"PRFL against {other}"] = {
            "reward_gain": gain.mean().item(),
            "reward_p": paired_p(gain.numpy()),
            "distance_gain": closer.mean().item(),
            "distance_p": paired_p(closer.numpy()),
        }
    return {
        "models": {name: summary(name) for name in found},
        "tests": tests,
        "clean": real["clean"],
        "captions": real["captions"],
        "per_seed": {
            name: {"reward": f["reward"].tolist(), "distance": f["distance"].tolist()}
            for name, f in found.items()
        },
        "videos": {"real, held out": real["video"]} | {name: f["video"] for name, f in found.items()},
    }


def spread(paths: list[Path], count: int) -> list[Path]:
    """`count` paths at equal distances."""
    return [paths[i * len(paths) // count] for i in range(count)]


def jerk(video: Tensor) -> Tensor:
    """Mean absolute second difference in time [B] of videos [B, 3, F, H, W], levels in [0, 1]."""
    return video.diff(n=2, dim=2).abs().flatten(1).mean(1)


def unsteadiness(video: Tensor) -> Tensor:
    """Jerk over the mean absolute first difference [B]: how broken the motion is, however much of it
    there is. Frames in random order have 1.5 and more, a steady pan about 1."""
    return jerk(video) / video.diff(dim=2).abs().flatten(1).mean(1)


def clean_medians(paths: list[Path], codec: DCTCodec) -> dict[str, list[float]]:
    """Median [unsteadiness, jerk] of the clean windows of every caption, decoded like the samples."""
    found: dict[str, list[list[float]]] = {}
    for path in paths:
        meta = read_meta(path)
        video = codec.decode(torch.from_numpy(np.load(path.parent / meta["vae_latent_path"])))
        values = [unsteadiness(video).item(), jerk(video).item()]
        found.setdefault(meta["short_caption"], []).append(values)
    return {caption: np.median(values, axis=0).tolist() for caption, values in found.items()}


def paired_p(difference: np.ndarray, draws: int = 100_000) -> float:
    """Two-sided p of a paired permutation test: the signs of the differences at random."""
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (draws, len(difference)), dtype=np.int8) * 2 - 1
    null = np.abs(signs @ difference)
    return (1 + int((null >= abs(difference.sum()) - 1e-12).sum())) / (draws + 1)


def accuracies(config: Config, data: clips.DemoData) -> dict:
    """Held-out accuracy per timestep: of the trained reward model, and of hand-made features."""
    last = [r for r in read_metrics(config.train.out) if "eval/score" in r["values"]][-1]
    learned = {str(t): last["values"][f"eval/accuracy_t{decimal(t)}"] for t in config.eval.timesteps}
    reader = Reader(read_config(config.model.path), config.data.label)
    train, val = (
        next(fixed_batches(reader, read_lists([str(path)], "list"), 10**6, torch.device("cpu")))
        for path in (data.reward_train, data.reward_val)
    )
    hand = evaluate_handmade(
        train.latent, train.label, val.latent, val.label, config.eval.timesteps, config.eval.seed
    )
    return {"learned": learned, "hand-made": {str(t): a for t, a in hand.items()}}
