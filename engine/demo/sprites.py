"""Sprites that move: a ball, box or diamond on a path that its first position and three words decide.

    glides      in a straight line at 1/16 of the width a frame, back from the walls
    bounces     falls from rest, and back from the floor without loss, drifting to one side
    circles     clockwise (right) or anticlockwise (left), from the top of the circle on

So the first frame and the prompt say all of a steady motion. A break changes when the sprite is where on its
path, where it is beside it, or whether it is seen; the first frame stays as it is. HELD_OUT are breaks that no
training sample has.
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
    *(("glides", way) for way in WAYS),
    *((move, way) for move in ("bounces", "circles") for way in ("right", "left")),
)
RADIUS = 5 / 32  # of all lengths here: of the width of the frame
OUTLINE = 1.1  # pixels
INK = 0.04
AHEAD = 3  # paths go on for so many times the frames of a video

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


def path(rng: np.random.Generator, sprite: Sprite, frames: int, size: int) -> Floats:
    """Steady positions (x, y) in pixels, [AHEAD * frames, 2], from a random first one."""
    (low, high), unit, t = walls(size), size / 32, np.arange(AHEAD * frames)
    x, y = WAYS[sprite.way]
    if sprite.move == "glides":
        return reflect(rng.uniform(low, high, 2) + 2 * unit * t[:, None] * np.array([x, y]), size)
    if sprite.move == "bounces":
        across = reflect(rng.uniform(low, high) + 1.2 * unit * t * x, size)
        height = high - rng.uniform(low, low + 6 * unit)
        phase = np.mod(t / np.sqrt(2 * height / (0.6 * unit)) + 1, 2) - 1  # 0: at the top, -1 and 1: at the floor
        return np.stack([across, high - height * (1 - phase**2)], 1)
    radius = 7 * unit
    centre = rng.uniform(low + radius, high - radius, 2)
    angle = -np.pi / 2 + 0.35 * t * x
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


# ---- breaks: (rng, path, frames, size) -> positions [frames, 2], and whether it is seen [frames]


def _at(path: Floats, times: Floats) -> Floats:
    """Positions on the path at times in frames, those before the first mirrored."""
    index, steps = np.abs(times), np.arange(len(path))
    return np.stack([np.interp(index, steps, path[:, k]) for k in (0, 1)], 1)


def shuffled(rng, path, frames, size):
    """Its positions in random order."""
    return path[np.concatenate([[0], 1 + rng.permutation(frames - 1)])], np.ones(frames)


def jumps(rng, path, frames, size):
    """Twice it is at once four to six frames ahead or back."""
    times = np.arange(frames)
    for start in rng.choice(np.arange(2, frames - 1), 2, replace=False):
        times[start:] += rng.choice([-6, -5, -4, 4, 5, 6])
    return _at(path, times), np.ones(frames)


def shakes(rng, path, frames, size):
    """Every frame is beside the path, by its own offset."""
    away = rng.choice([-1, 1], (frames, 2)) * rng.uniform(1.5, 4, (frames, 2)) * size / 32
    away[0] = 0
    return path[:frames] + away, np.ones(frames)


def stutters(rng, path, frames, size):
    """Seven frames of ten repeat the position before."""
    times = np.arange(frames)
    for i in range(1, frames):
        if rng.random() < 0.7:
            times[i] = times[i - 1]
    return _at(path, times), np.ones(frames)


def vanishes(rng, path, frames, size):
    """It is not seen for three to six frames."""
    seen, start = np.ones(frames), rng.integers(2, frames // 2)
    seen[start : start + rng.integers(3, 7)] = 0
    return path[:frames], seen


def turns(rng, path, frames, size):
    """In mid-air it goes back the way it came, and on again."""
    times = np.arange(frames)
    first = rng.integers(2, frames // 2)
    second = first + rng.integers(2, 5)
    back = np.where(times < second, 2 * first - times, 2 * (first - second) + times)
    return _at(path, np.where(times < first, times, back)), np.ones(frames)


def surges(rng, path, frames, size):
    """From one frame on it is 2.6 times as fast, or a fifth."""
    times, start = np.arange(frames), rng.integers(3, frames - 4)
    changed = start + (times - start) * rng.choice([2.6, 0.2])
    return _at(path, np.where(times < start, times, changed)), np.ones(frames)


def swerves(rng, path, frames, size):
    """From one frame on its path is turned by 45 to 125 degrees."""
    start, angle = rng.integers(3, frames - 4), rng.uniform(0.8, 2.2) * rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    found = path[:frames].copy()
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
