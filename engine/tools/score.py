"""`prfl score`: rank latents, samples or videos by a reward model.

Every sample meets the same noise: draw d of a latent shape is one tensor for all samples and timesteps. So
differences between scores come from the samples, and, rounding apart, no score depends on another sample.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine.bounds import check_path
from prfl_engine.build import make_frozen_reward, pick_device
from prfl_engine.checks import check_reward_storage
from prfl_engine.config import Config, load_config
from prfl_engine.data import LATENT_KEYS, REWARD_TEXT_KEYS, TEXT_KEY, Reader, by_shape, read_lists
from prfl_engine.errors import UserError, check, one_line
from prfl_engine.files import write_whole
from prfl_engine.inputs import check_file, check_new_file
from prfl_engine.media import VIDEOS
from prfl_engine.metrics import decimal, note, progress
from prfl_engine.model.reward_files import find_reward
from prfl_engine.model.sources import read_config
from prfl_engine.objectives import noisy_rewards
from prfl_engine.parallel import World
from prfl_engine.sample import LIST
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.tools.score_videos import Videos
from prfl_engine.validation import HeldOut

TEXT_SUFFIX = ".text.npy"
WIDTH = 100
"""Most characters of a line of the table."""


@dataclass(frozen=True)
class Scored:
    """A sample and its score."""

    rank: int  # from 1, by score
    score: float  # mean reward (sigmoid of the logit) over timesteps and draws
    spread: float | None  # standard deviation over draws of the mean over timesteps; None of one draw
    by_timestep: dict[float, float]  # mean reward over draws
    file: str  # the meta JSON, the latent or the video; of a video with several prompts see Encoded.files


@dataclass(frozen=True)
class Options:
    """What the command line says besides the configuration."""

    timesteps: tuple[float, ...] | None = None  # None: those of eval.timesteps below 1000
    draws: int = 4
    text: str | None = None  # text of latents in folders that have none of their own

    def __post_init__(self):
        check(self.draws >= 1, "--draws", self.draws, "a whole number from 1 on")
        for t in self.timesteps or ():
            check(0 <= t < 1000, "--timesteps", t, "numbers from 0 to below 1000, where all is noise")
        repeated = len(set(self.timesteps or ())) < len(self.timesteps or ())
        check(not repeated, "--timesteps", list(self.timesteps or ()), "each of them once")


@dataclass(frozen=True)
class ScoreReader(Reader):
    """Reads samples for a reward model: of a meta JSON with its text for reward models, and latents without
    one, NAME.npy with the text NAME.text.npy or else `text`."""

    text: str | None = None

    def meta(self, path: Path) -> dict:
        if path.suffix != ".npy":
            return super().meta(path)
        own = text_of(path)
        return {LATENT_KEYS[0]: str(path.absolute()), TEXT_KEY: str(own) if own.exists() else self.text}

    def text_keys(self, meta: dict, long: bool) -> tuple[str, ...]:
        return REWARD_TEXT_KEYS


def text_of(latent: Path) -> Path:
    """The file of a latent's own text, NAME.text.npy for NAME.npy."""
    return latent.with_suffix(TEXT_SUFFIX).absolute()


def settings(model: str, overrides: Sequence[str]) -> Config:
    """The configuration of a YAML file, or the defaults with the reward model of a folder."""
    if not Path(model).is_dir():
        config = load_config(model, overrides)
        if config.reward.path is None:
            raise UserError("reward.path: got null, want the folder of a reward model")
        return config
    config = load_config(None, overrides)
    if config.reward.path is not None:
        raise UserError(f"reward.path: got {config.reward.path}, want none besides the folder {model}")
    return replace(config, reward=replace(config.reward, path=model))


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths of samples, overrides SECTION.FIELD=VALUE) of the words of a command line."""
    is_override = [bool(re.match(r"[a-z_]+(\.[a-z_]+)+=", word)) for word in words]
    split = {k: [w for w, o in zip(words, is_override, strict=True) if o == k] for k in (False, True)}
    for path in split[False]:
        check_path(path, "samples")
    return split[False], split[True]


def find_samples(names: Sequence[str]) -> list[Path]:
    """The samples of .list files, of folders and of single .npy latents, in order.

    Of a folder that `prfl sample` has written those of its samples.list; of another one all latents NAME.npy.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += _of_folder(path)
        elif path.suffix == ".npy":
            found.append(check_file(path, "a latent"))
        else:
            _refuse_videos([path])
            found += read_lists([name], "samples")
    return found


def _of_folder(folder: Path) -> list[Path]:
    if (folder / LIST).exists():
        return read_lists([str(folder / LIST)], "samples")
    files = sorted(folder.iterdir())
    found = [f for f in files if f.suffix == ".npy" and not f.name.endswith(TEXT_SUFFIX)]
    if not found:
        _refuse_videos(files)
        raise UserError(f"{folder}: got no latents, want {LIST} or files NAME.npy")
    return found


def _refuse_videos(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix.lower() in (*VIDEOS, ".webp"):
            raise UserError(f"{path}: is a video, want --models DIR, which encodes it, or latents as .npy")


def _check_texts(paths: Sequence[Path], text: str | None, image: bool) -> None:
    bare = [path for path in paths if path.suffix == ".npy"]
    if bare and image:
        raise UserError(f"{bare[0]}: the reward model needs a first frame too, want a .list of meta JSONs")
    without = [path for path in bare if not text_of(path).exists()]
    if without and text is None:
        want = f"{text_of(without[0]).name} beside it or --text FILE"
        raise UserError(f"{without[0]}: got no text, want {want}")
    if text is not None:
        check_file(text, "a text embedding")
        if not without:
            raise UserError(f"--text: got {text}, but every sample has a text of its own, want none")


def check_score(config: Config, paths: Sequence[Path], options: Options) -> None:
    """UserError for mistakes in the configuration, in the files of the reward model's pooling and MLP, and in
    the samples `paths`, as far as they show before weights are loaded."""
    config.reward.check_one("in prfl score")
    check_reward_storage(config)
    r = config.reward
    reader = make_reader(config, options)
    find_reward(Path(r.path), **r.heads, **r.pooling)
    _refuse_videos(paths)
    _check_texts(paths, options.text, reader.config.image)
    by_shape(reader, paths)


def make_reader(config: Config, options: Options) -> ScoreReader:
    """What reads samples for the reward model of reward.path."""
    model = read_config(config.reward.path)
    return ScoreReader(model, first_frame=config.data.first_frame, text=options.text)


@torch.no_grad()
def score(config: Config, paths: Sequence[Path], options: Options) -> list[Scored]:
    """The samples `paths`, best first, equal ones in their order, by the reward model of reward.path.

    The noise of draw d follows from eval.seed, d and the latent's shape alone. UserError for a sample that
    does not fit the model; TrainingError for a reward that is not finite.
    """
    reader = make_reader(config, options)
    shapes = by_shape(reader, paths)
    if len(shapes) > 1:
        note(f"{len(shapes)} latent shapes: samples of different shapes meet different noise")
    device = pick_device(config)
    model = make_frozen_reward(config, None, device)
    timesteps = options.timesteps or config.eval.scored

    def name(t: float, draw: int) -> str:
        return f"reward at t = {decimal(t)}, draw {draw}"

    samples, size = HeldOut([list(paths)], World()), config.eval.batch_size
    batches = samples.batches(reader, size, device)
    for _, (batch,) in progress(batches, "scoring", -(-len(paths) // size)):
        for draw in range(options.draws):
            noise = common_noise(batch.latent, config.eval.seed, draw)
            logits = noisy_rewards(model, batch, noise, timesteps)
            for t, logit in zip(timesteps, logits.T, strict=True):
                samples.put(name(t, draw), logit)
    found = samples.all()
    logits = [[found[name(t, draw), 0] for t in timesteps] for draw in range(options.draws)]
    return ranked(torch.stack([torch.stack(of) for of in logits]).sigmoid(), timesteps, paths)


def common_noise(latent: Tensor, seed: int, draw: int) -> Tensor:
    """Noise of the shape of `latent` [B, ...], the same in every row."""
    return noise_like(latent[:1], Purpose.SCORE, seed, draw).expand_as(latent)


def ranked(rewards: Tensor, timesteps: Sequence[float], paths: Sequence[Path]) -> list[Scored]:
    """Samples by their mean of rewards [draws, timesteps, samples]."""
    each = rewards.mean(1)
    means, by_t = each.mean(0), rewards.mean(0)
    spread = each.std(0).tolist() if len(each) > 1 else [None] * len(paths)
    order = means.sort(descending=True, stable=True).indices.tolist()
    return [
        Scored(
            rank, means[i].item(), spread[i], dict(zip(timesteps, by_t[:, i].tolist(), strict=True)),
            str(paths[i]),
        )
        for rank, i in enumerate(order, 1)
    ]  # fmt: skip


def table(scored: Sequence[Scored]) -> list[str]:
    """Lines of rank, score, spread and file, at most WIDTH columns; a long file name loses its start."""
    lines = [f"{'rank':>6}  {'score':>7}  {'spread':>7}  file"]
    for s in scored:
        spread = "-" if s.spread is None else f"{s.spread:.4f}"
        start = f"{s.rank:>6}  {s.score:7.4f}  {spread:>7}  "
        lines.append(start + _end(one_line(s.file), WIDTH - len(start)))
    return lines


def _end(text: str, width: int) -> str:
    """The end of a text, at most `width` columns; wide characters take two."""
    taken = 0
    for i in range(len(text) - 1, -1, -1):
        taken += 2 if unicodedata.east_asian_width(text[i]) in "WF" else 1
        if taken > width - (i > 0):
            return "…" + text[i + 1 :]
    return text


def as_csv(scored: Sequence[Scored]) -> str:
    """The same with a column of every timestep, numbers in full."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["rank", "score", "spread", *(f"t{decimal(t)}" for t in scored[0].by_timestep), "file"])
    for s in scored:
        spread = "" if s.spread is None else s.spread
        writer.writerow([s.rank, s.score, spread, *s.by_timestep.values(), one_line(s.file)])
    return file.getvalue()


def as_values(config: Config, scored: Sequence[Scored], draws: int) -> dict:
    """The same as JSON takes it."""
    samples = [asdict(s) | {"by_timestep": {decimal(t): v for t, v in s.by_timestep.items()}} for s in scored]
    return {"reward": config.reward.path, "seed": config.eval.seed, "draws": draws, "samples": samples}


def run(
    model: str, words: Sequence[str], options: Options, out: str | None, videos: Videos
) -> tuple[Config, list[Scored], int]:
    """Score what a command line names; data.val of the configuration where it names no samples. The number
    is the exit code, not 0 where videos are left out."""
    file = None if out is None else check_new_file(out, "--out")
    names, overrides = divided(words)
    config = settings(model, overrides)
    latents, sources = videos.divided(names)
    paths = find_samples(latents) if names else read_lists(config.data.val, "data.val")
    check_score(config, paths, options)
    with videos.samples(sources, read_config(config.reward.path), config.train.device) as encoded:
        found = score(config, [*paths, *map(Path, encoded.files)], options)
        scored = [replace(s, file=encoded.files.get(s.file, s.file)) for s in found]
    if file is not None:
        write_whole(file, as_csv(scored))
    return config, scored, encoded.code
