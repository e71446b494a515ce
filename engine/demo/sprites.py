"""Sprites that move: a ball, box or diamond on a track through the middle of the frame, in the way that two
words name.

    glides      in a straight line at 1/16 of the width a frame, and back from the walls
    bounces     falls from rest, and back from the floor without loss
    circles     clockwise (right) or anticlockwise (left) around the middle

So the first frame and the prompt say all of a steady motion. A break changes when the sprite is where on its
track, or whether it is seen; the first frame stays as it is. A still frame of a break looks like any other.
HELD_OUT are breaks that no training sample has; one of them leaves the track.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLORS = {
    "red": (0.9, 0.12, 0.1), "yellow": (0.98, 0.85, 0.1), "blue": (0.1, 0.3, 0.95),
    "white": (0.97, 0.97, 0.97), "green": (0.1, 0.7, 0.2),
}  # fmt: skip
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
MOVES = (
    *(("glides", way) for way in WAYS), ("bounces", "down"), ("circles", "right"), ("circles", "left"),
)  # fmt: skip
RADIUS = 5 / 32  # of all lengths here: of the width of the frame
OUTLINE = 1.1  # pixels
INK = 0.04  # of the outline, in all colors

_SHAPES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    # Distances in pixels outside a shape of radius r, negative inside, at offsets x and y from its centre.
    "ball": lambda x, y, r: np.hypot(x, y) - r,
    "box": lambda x, y, r: np.maximum(x, y) - 0.88 * r,
    "diamond": lambda x, y, r: 0.75 * (x + y - 1.3 * r),
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True)
class Sprite:
    """What moves, and how."""

    color: str
    shape: str
    move: str
    way: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Sprite":
        """A random one."""
        move, way = MOVES[rng.integers(len(MOVES))]
        return cls(list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))], move, way)

    def caption(self) -> str:
        """In four words."""
        return f"{self.color} {self.shape} {self.move} {self.way}"


def walls(size: int) -> tuple[float, float]:
    """The lowest and the highest coordinate, in pixels, of the centre of a sprite in a square frame."""
    margin = RADIUS * size + 0.5
    return margin, size - margin


def reflect(x: Floats, size: int) -> Floats:
    """Coordinates folded back at the walls."""
    low, high = walls(size)
    y = np.mod(x - low, 2 * (high - low))
    return low + np.minimum(y, 2 * (high - low) - y)


def track(rng: np.random.Generator, sprite: Sprite, frames: int, size: int) -> Floats:
    """Steady positions (x, y) in pixels, [3 * frames, 2]: of the frames before the video, of the video from a
    random first position on, and of those after it."""
    (low, high), unit, t = walls(size), size / 32, np.arange(-frames, 2 * frames)
    x, y = WAYS[sprite.way]
    middle = np.full(len(t), size / 2)
    if sprite.move == "glides":
        along = reflect(rng.uniform(low, high) + 2 * unit * t * (x + y), size)
        return np.stack([along, middle] if x else [middle, along], 1)
    if sprite.move == "bounces":
        height = high - rng.uniform(low, low + 6 * unit)
        fall = np.sqrt(2 * height / (0.6 * unit))  # frames from rest to the floor
        phase = np.mod(t / fall + 1, 2) - 1  # 0 at the top, -1 and 1 at the floor
        return np.stack([middle, high - height * (1 - phase**2)], 1)
    angle = rng.uniform(0, 2 * np.pi) + 0.35 * t * x
    return size / 2 + 7.5 * unit * np.stack([np.cos(angle), np.sin(angle)], 1)


def steady(track: Floats, times: Floats) -> Floats:
    """Positions [F, 2] on a track at times [F] in frames of the video, from -n to 2n of its n."""
    index, steps = times + len(track) // 3, np.arange(len(track))
    return np.stack([np.interp(index, steps, track[:, k]) for k in (0, 1)], 1)


# ---- breaks: (rng, track, frames) -> positions [frames, 2], and whether the sprite is seen [frames]


def shuffled(rng, track, frames):
    """Its positions in random order."""
    times = np.concatenate([[0], 1 + rng.permutation(frames - 1)])
    return steady(track, times), np.ones(frames)


def jumps(rng, track, frames):
    """Twice it is at once four to six frames ahead or back."""
    times = np.arange(frames)
    for start in rng.choice(np.arange(2, frames - 1), 2, replace=False):
        times[start:] += rng.choice([-6, -5, -4, 4, 5, 6])
    return steady(track, times), np.ones(frames)


def shakes(rng, track, frames):
    """In every frame it is one and a half to three and a half frames ahead or back."""
    away = rng.choice([-1, 1], frames) * rng.uniform(1.5, 3.5, frames)
    away[0] = 0
    return steady(track, np.arange(frames) + away), np.ones(frames)


def stutters(rng, track, frames):
    """Seven frames of ten repeat the position before."""
    times = np.arange(frames)
    for i in range(1, frames):
        if rng.random() < 0.7:
            times[i] = times[i - 1]
    return steady(track, times), np.ones(frames)


def vanishes(rng, track, frames):
    """It is not seen for three to six frames."""
    seen, start = np.ones(frames), rng.integers(2, frames // 2)
    seen[start : start + rng.integers(3, 7)] = 0
    return steady(track, np.arange(frames)), seen


def turns(rng, track, frames):
    """In mid-air it goes back the way it came, and on again."""
    times = np.arange(frames)
    first = rng.integers(2, frames // 2)
    second = first + rng.integers(2, 5)
    back = np.where(times < second, 2 * first - times, 2 * (first - second) + times)
    return steady(track, np.where(times < first, times, back)), np.ones(frames)


def surges(rng, track, frames):
    """From one frame on it is 2.6 times as fast, or a fifth."""
    times, start = np.arange(frames), rng.integers(3, frames - 4)
    changed = start + (times - start) * rng.choice([2.6, 0.2])
    return steady(track, np.where(times < start, times, changed)), np.ones(frames)


def swerves(rng, track, frames):
    """From one frame on its way is turned by 45 to 125 degrees."""
    start, angle = rng.integers(3, frames - 4), rng.uniform(0.8, 2.2) * rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    found = steady(track, np.arange(frames))
    found[start:] = found[start] + (found[start:] - found[start]) @ turn
    return found, np.ones(frames)


BREAKS = (shuffled, jumps, shakes, stutters, vanishes, turns)
HELD_OUT = (surges, swerves)


def render(backdrop: Floats, sprite: Sprite, positions: Floats, seen: Floats) -> NDArray[np.float32]:
    """Frames [3, F, S, S] in [0, 1]: the sprite at positions [F, 2] over the backdrop [S, S, 3]."""
    size = len(backdrop)
    pixel, positions = np.arange(size) + 0.5, reflect(positions, size)
    x = np.abs(pixel[None, None, :] - positions[:, 0, None, None])
    y = np.abs(pixel[None, :, None] - positions[:, 1, None, None])
    outside = _SHAPES[sprite.shape](x, y, RADIUS * size)
    whole, inner = (
        (np.clip(0.5 - d, 0, 1) * seen[:, None, None])[..., None] for d in (outside, outside + OUTLINE)
    )
    frames = backdrop * (1 - whole) + INK * (whole - inner) + np.array(COLORS[sprite.color]) * inner
    return frames.transpose(3, 0, 1, 2).astype(np.float32)
