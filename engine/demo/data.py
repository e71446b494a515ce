"""Demo data in the official format: lights over photographs, and windows of real video, as latents.

    python -m prfl_engine.demo.data DIR [--seed N] [--development]

- Every source is written twice: clean (label 1, ..._win.list) and with its motion broken (label 0, at the
  same place of ..._lose.list). Still, single frames of the two look alike, so only motion can tell them
  apart.
- The generator's list is of lights, four of five shaking, and windows of real video, every second one
  jittered; that of PRFL is of these lights. The first SHORT frames of the generator's are a list of their
  own.
- The reward model's pairs have other breaks besides. Of windows there are many, since few would be learned by
  heart; every pair of lights is listed twice, so that those of windows are three of seven.
- Held out are the photographs' and windows' frames, and of the breaks those of lights.HELD_OUT altogether. In
  development, where settings are chosen, parts of the training frames and breaks are held out in their place.
- Windows that hardly move are left out before they are corrupted, on both sides alike.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prfl_engine.demo import clips, lights
from prfl_engine.demo.beside import beside
from prfl_engine.errors import UserError, check
from prfl_engine.media.codec import FrameCodec
from prfl_engine.metrics import progress

TEXT_DIM = 64
NEGATIVE = "shakes shuffled jumps stutters vanishes turns"
MANIFEST = "demo_data.json"
VERSION = 10  # of what is built from one seed and spec
TRIES = 60  # windows of a shot that move too little before the next shot takes its turn
CLEAN_EVERY = 4  # sources of which the generator's list has the clean sample, too
SEEN = 6  # windows of which one is the generator's, too
SHORT = 7  # frames of the videos that pre-training begins with


@dataclass(frozen=True)
class DemoSpec:
    """What is built; the folder of a finished build says for which of these."""

    lights: int = 4000
    """Training sources with lights; every one gives a clean and a broken sample."""
    windows: int = 6000
    """Training windows of real video."""
    held_out: int = 200
    """Held-out sources, as many each: breaks of the training data, breaks that it does not have, windows."""
    frames: int = 13
    size: int = 32
    """Height and width in pixels."""
    min_motion: float = 0.016
    """Mean absolute difference of successive frames (of 1) below which a window is left out."""
    development: bool = False
    """Hold out others: settings are chosen on these, and on nothing of what is held out otherwise."""

    def __post_init__(self):
        for name in "lights", "windows", "held_out":
            check(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        good = 11 <= self.frames <= clips.MIN_HELD_OUT
        check(good, "frames", self.frames, f"11 to {clips.MIN_HELD_OUT}")
        check(16 <= self.size <= 72, "size", self.size, "16 to 72")


@dataclass(frozen=True)
class DemoData:
    """Paths of a finished build and its counts of samples."""

    folder: Path
    codec: Path
    null_text: Path
    negative_text: Path
    short_train: Path
    sft_train: Path
    prfl_train: Path
    reward_win: Path
    reward_lose: Path
    val_win: Path
    val_lose: Path
    new_win: Path
    new_lose: Path
    real_win: Path
    real_lose: Path
    counts: dict[str, int]
    """Samples of every list, by its name."""


class Source(NamedTuple):
    """A clean video and the same with broken motion."""

    clean: Tensor  # [3, F, H, W] in [0, 1]
    broken: Tensor
    kind: str  # of the break
    caption: str
    long: str  # a caption that says more
    facts: dict  # what else its meta JSONs say


def embed(caption: str) -> np.ndarray:
    """A fixed random vector of unit variance for every word: float32 [1, words, TEXT_DIM]."""
    words = []
    for word in caption.split():
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        words.append(np.random.default_rng(key).standard_normal(TEXT_DIM))
    return np.stack(words)[None].astype(np.float32)


def motion(video: Tensor) -> float:
    """Mean absolute difference of successive frames of a video [3, F, H, W]."""
    return video.diff(dim=1).abs().mean().item()


def draw_lights(
    rng: np.random.Generator, count: int, part: int, breaks: tuple, real: dict, spec: DemoSpec
) -> Iterator[Source]:
    """`count` sources with lights over photographs of the part (0 training, 1 held out), breaks by turns."""
    frames = clips.usable(real, part, spec.development)
    for i in range(count):
        photograph, place = clips.photograph(rng, real, frames, spec.size)
        light = lights.Light.draw(rng)
        track, times = lights.track(rng, light, spec.frames, spec.size), np.arange(spec.frames)
        break_it = breaks[i % len(breaks)]
        moved = lights.steady(track, times), lights.constant(spec.frames)
        made = moved, break_it(rng, track, spec.frames, spec.size)
        clean, broken = (torch.from_numpy(lights.render(photograph, light, *m)) for m in made)
        caption, facts = light.caption(), {"light": asdict(light)}
        yield Source(clean, broken, break_it.__name__, caption, f"{caption} over {place}", facts)


def draw_windows(
    rng: np.random.Generator, count: int, part: int, real: dict, spec: DemoSpec
) -> Iterator[Source]:
    """`count` windows of real video of the part; shots take turns, and corruptions with every round."""
    frames = clips.usable(real, part, spec.development)
    frames = {s: f for s, f in frames.items() if len(f) >= spec.frames}
    shots = list(frames)
    for i in range(count):
        turn, corrupt = i % len(shots), clips.CORRUPTIONS[i // len(shots) % len(clips.CORRUPTIONS)]
        for shot in [s for s in shots[turn:] + shots[:turn] for _ in range(TRIES)]:
            window = clips.draw(rng, shot, frames[shot], spec.frames, spec.size)
            video = clips.cut(real[clips.SHOTS[shot].clip], window, spec.size)
            moved = motion(clips.inner(video))
            if moved >= spec.min_motion:
                break
        else:
            tried = TRIES * len(shots)
            raise UserError(f"min_motion: got {spec.min_motion}, and none of {tried} windows moves so much")
        facts = {"clip": clips.SHOTS[shot].clip, "frames": window.frames, "box": window.box}
        facts |= {"pan": window.pan, "mirrored": window.mirrored, "motion": round(moved, 5)}
        clean, broken = (clips.inner(v) for v in (video, corrupt(video, rng)))
        yield Source(clean, broken, corrupt.__name__, window.caption(), window.caption(), facts)


# ---- files


def build(out_dir: str | Path, seed: int, spec: DemoSpec = DemoSpec()) -> DemoData:  # noqa: B008
    """Build the data in a new folder, or return that of a finished build of the same parameters.

    UserError for a folder that holds anything else, and where a clip is missing.
    """
    out_dir = Path(out_dir)
    check(seed >= 0, "seed", seed, "a whole number from 0")
    wanted = json.loads(json.dumps({"version": VERSION, "seed": seed, **asdict(spec)}))
    if not (out_dir / MANIFEST).is_file():
        empty = not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir()))
        check(empty, "out_dir", str(out_dir), "a new or empty folder")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as unfinished:
            folder = Path(unfinished, "data")
            threads = torch.get_num_threads()
            # Every operation is small: with two threads on a machine whose two cores had other work
            # to do, they waited for each other and the build took 500 s instead of 20.
            torch.set_num_threads(1)
            try:
                counts = _write(folder, seed, spec)
            finally:
                torch.set_num_threads(threads)
            manifest = json.dumps({"parameters": wanted, "counts": counts}, indent=1)
            (folder / MANIFEST).write_text(manifest + "\n")
            os.replace(folder, out_dir)
    found = json.loads((out_dir / MANIFEST).read_text())
    new = "a new folder: this one was built"
    same = found["parameters"].get("version") == VERSION
    check(same, "out_dir", str(out_dir), f"{new} by another version of the demo")
    differ = [k for k in wanted if found["parameters"].get(k) != wanted[k]]
    check(not differ, "out_dir", str(out_dir), f"{new} with another {' and '.join(differ)}")
    lists = {name: out_dir / f"{name}.list" for name in found["counts"]}
    return DemoData(
        folder=out_dir,
        codec=out_dir / "codec.safetensors",
        null_text=out_dir / "text/null.npy",
        negative_text=out_dir / "text/negative.npy",
        counts=found["counts"],
        **lists,
    )


class _Writer:
    """Writes sources of a build. Every part of them has random numbers of its own, so one needs no other."""

    def __init__(self, folder: Path, seed: int, spec: DemoSpec):
        self.folder, self.seed, self.spec, self.real = folder, seed, spec, clips.read_clips()
        self.unseen = lights.DEVELOPMENT if spec.development else lights.HELD_OUT
        seen = [b for b in lights.BREAKS if b not in self.unseen]
        self.breaks = tuple(b for other in seen for b in (lights.shakes, other))  # every second one shakes
        self.codec_path = folder / "codec.safetensors"

    def lights(self, stream: int, count: int, part: int, breaks: tuple) -> Iterator[Source]:
        """`draw_lights` by the stream of random numbers of this index."""
        rng = np.random.default_rng([self.seed, stream])
        return draw_lights(rng, count, part, breaks, self.real, self.spec)

    def windows(self, stream: int, count: int, part: int) -> Iterator[Source]:
        """`draw_windows`, likewise."""
        rng = np.random.default_rng([self.seed, stream])
        return draw_windows(rng, count, part, self.real, self.spec)

    def fit_codec(self) -> None:
        """Write the codec, fit to some sources of both kinds."""
        some = [*self.lights(0, 200, 0, self.breaks), *self.windows(1, 50, 0)]
        videos = [video for source in some for video in (source.clean, source.broken)]
        FrameCodec.fit(torch.stack(videos)).save(self.codec_path)

    def write(self, name: str, count: int, sources: Iterator[Source]) -> list[str]:
        """Write `count` sources; returns the names of their samples, clean and broken by turns."""
        codec, pairs = FrameCodec.load(self.codec_path), enumerate(progress(sources, name, count))
        return [
            sample
            for i, source in pairs
            for sample in _write_source(self.folder, f"{name}-{i:05d}", source, codec)
        ]


def _write_windows(folder: Path, seed: int, spec: DemoSpec) -> list[str]:
    """Write the training windows of a build that has a codec; returns the names of their samples."""
    writer = _Writer(folder, seed, spec)
    return writer.write("window", spec.windows, writer.windows(3, spec.windows, 0))


def _write(folder: Path, seed: int, spec: DemoSpec) -> dict[str, int]:
    """Everything but the manifest; returns the counts of the lists."""
    for name in "meta", "latents", "text":
        (folder / name).mkdir(parents=True)
    np.save(folder / "text/null.npy", np.zeros((1, 1, TEXT_DIM), np.float32))
    np.save(folder / "text/negative.npy", embed(NEGATIVE))
    w, n = _Writer(folder, seed, spec), spec.held_out
    w.fit_codec()
    with beside(_write_windows, folder, seed, spec) as other:  # half of the work
        train = w.write("train", spec.lights, w.lights(2, spec.lights, 0, w.breaks))
        val = w.write("val", n, w.lights(4, n, 1, w.breaks))
        new = w.write("new", n, w.lights(5, n, 1, w.unseen))
        filmed = w.write("real", n, w.windows(6, n, 1))
        windows = other()
    order = np.random.default_rng([seed, 7]).permutation
    # Of every four of these the first two are steady and shaking, the others steady and broken otherwise.
    lit = train[1::4] + train[:: 4 * CLEAN_EVERY]
    both = [s for i in range(0, len(windows), 2 * SEEN) for s in windows[i : i + 2]]
    shaken = [s for s in both if s.endswith(f"-{clips.jittered.__name__}")]
    sft = lit + shaken + both[:: 2 * CLEAN_EVERY]
    pairs = {"reward": 2 * train + windows, "val": val, "new": new, "real": filmed}
    lists = {"sft_train": [sft[i] for i in order(len(sft))], "prfl_train": [lit[i] for i in order(len(lit))]}
    lists["short_train"] = [_shorten(folder, sample) for sample in lists["sft_train"]]
    for name, samples in pairs.items():
        lists |= {f"{name}_win": samples[::2], f"{name}_lose": samples[1::2]}
    for name, samples in lists.items():
        (folder / f"{name}.list").write_text("".join(f"meta/{s}.json\n" for s in samples))
    return {name: len(samples) for name, samples in lists.items()}


def _write_source(folder: Path, source_id: str, source: Source, codec: FrameCodec) -> list[str]:
    """Write the clean and the broken sample of a source; returns their names."""
    texts = []
    for caption in source.caption, source.long:
        text = f"text/{caption.replace(' ', '-')}.npy"
        if not (folder / text).exists():  # another process may write the same at the same time
            np.save(folder / text, embed(caption))
        texts.append((caption, f"../{text}"))
    (short, short_path), (long, long_path) = texts
    samples, latents = [], codec.encode(torch.stack([source.clean, source.broken])).numpy()
    for kind, latent in zip(("clean", source.kind), latents, strict=True):
        sample, good = f"{source_id}-{kind}", int(kind == "clean")
        np.save(folder / f"latents/{sample}.npy", latent[None])
        meta = {
            "source_id": source_id,
            "short_caption": short,
            "long_caption": long,
            "vae_latent_path": f"../latents/{sample}.npy",
            "textshort_path": short_path,
            "textlong_path": long_path,
            "physics_quality": good,
            "human_quality": good,
            "corruption": kind,
            **source.facts,
        }
        (folder / f"meta/{sample}.json").write_text(json.dumps(meta, indent=1) + "\n")
        samples.append(sample)
    return samples


def _shorten(folder: Path, sample: str) -> str:
    """Write the first SHORT frames of a sample as one of its own; returns its name."""
    meta, name = json.loads((folder / f"meta/{sample}.json").read_text()), f"short-{sample}"
    np.save(folder / f"latents/{name}.npy", np.load(folder / f"latents/{sample}.npy")[:, :, :SHORT])
    meta["vae_latent_path"] = f"../latents/{name}.npy"
    (folder / f"meta/{name}.json").write_text(json.dumps(meta, indent=1) + "\n")
    return name


def main(argv: list[str] | None = None) -> None:
    """Build the data into a folder, by hand (docs/demo.md)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--development", action="store_true", help="hold out parts of the training data")
    args = parser.parse_args(argv)
    spec = DemoSpec(development=args.development)
    for name, count in build(args.folder, args.seed, spec).counts.items():
        print(f"{args.folder}/{name}.list: {count} samples")


if __name__ == "__main__":
    main()
