"""Lights that move over a street or a room at night, in the way that two words name.

    glides      in a straight line at 1/16 of the width a frame, and back from the walls
    bounces     falls from rest, and back from the floor without loss

So the first frame and the prompt say all of a steady motion. A break changes where the light is or whether
it is seen; the first frame stays as it is. HELD_OUT are breaks that no training sample has, in development
DEVELOPMENT, which are training breaks otherwise. A light adds to what is behind it: the frame is that of a
photograph darkened to night plus its color times its brightness.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLORS = {"red": (1, 0.15, 0.1), "green": (0.15, 1, 0.25), "blue": (0.15, 0.35, 1), "white": (0.8, 0.8, 0.8)}
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
MOVES = *(("glides", way) for way in WAYS), ("bounces", "down")
RADIUS, EDGE = 0.175, 0.058  # of the light and of its soft edge; lengths here are parts of the frame's width
SHAKE = 0.17  # how far a light is off its track at most, in each direction
NIGHT = 0.55 * np.array([0.8, 0.85, 1.0])  # what is left of a photograph's red, green and blue
BRIGHT = 0.6


@dataclass(frozen=True)
class Light:
    """What moves, and how."""

    color: str
    move: str
    way: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Light":
        """A random one."""
        move, way = MOVES[rng.integers(len(MOVES))]
        return cls(list(COLORS)[rng.integers(len(COLORS))], move, way)

    def caption(self) -> str:
        """In four words."""
        return f"{self.color} light {self.move} {self.way}"


def walls(size: int) -> tuple[float, float]:
    """The lowest and the highest coordinate, in pixels, of the centre of a light in a square frame."""
    return RADIUS * size, size - RADIUS * size


def reflect(x: Floats, size: int) -> Floats:
    """Coordinates folded back at the walls."""
    low, high = walls(size)
    y = np.mod(x - low, 2 * (high - low))
    return low + np.minimum(y, 2 * (high - low) - y)


def track(rng: np.random.Generator, light: Light, frames: int, size: int) -> Floats:
    """Steady positions (x, y) in pixels, [3 * frames, 2]: of the frames before the video, of the video from a
    random first position on, and of those after it."""
    (low, high), unit, t = walls(size), size / 32, np.arange(-frames, 2 * frames)
    x, y = WAYS[light.way]
    still = np.full(len(t), rng.uniform(low, high))
    if light.move == "glides":
        along = reflect(rng.uniform(low, high) + 2 * unit * t * (x + y), size)
        return np.stack([along, still] if x else [still, along], 1)
    height = high - rng.uniform(low, low + 6 * unit)
    fall = np.sqrt(2 * height / (0.6 * unit))  # frames from rest to the floor
    phase = np.mod(t / fall + 1, 2) - 1  # 0 at the top, -1 and 1 at the floor
    return np.stack([still, high - height * (1 - phase**2)], 1)


def steady(track: Floats, times: Floats) -> Floats:
    """Positions [F, 2] on a track at times [F] in frames of the video, from -n to 2n of its n."""
    index, steps = times + len(track) // 3, np.arange(len(track))
    return np.stack([np.interp(index, steps, track[:, k]) for k in (0, 1)], 1)


# ---- breaks: (rng, track, frames, size) -> positions [frames, 2], and how bright the light's own color and
# white are there [frames, 2]


def constant(frames: int) -> Floats:
    """The brightness of a light that does not change."""
    return np.tile([1.0, 0.0], (frames, 1))


def shakes(rng, track, frames, size):
    """It is off its track in every frame, each time another way."""
    reach = rng.uniform(0.5, 1) * SHAKE * size
    off = rng.uniform(-reach, reach, (frames, 2))
    off[0] = 0
    return steady(track, np.arange(frames)) + off, constant(frames)


def shuffled(rng, track, frames, size):
    """Its positions in random order."""
    times = np.concatenate([[0], 1 + rng.permutation(frames - 1)])
    return steady(track, times), constant(frames)


def jumps(rng, track, frames, size):
    """Twice it is at once four to six frames ahead or back."""
    times = np.arange(frames)
    for start in rng.choice(np.arange(2, frames - 1), 2, replace=False):
        times[start:] += rng.choice([-6, -5, -4, 4, 5, 6])
    return steady(track, times), constant(frames)


def stutters(rng, track, frames, size):
    """Seven frames of ten repeat the position before."""
    times = np.arange(frames)
    for i in range(1, frames):
        if rng.random() < 0.7:
            times[i] = times[i - 1]
    return steady(track, times), constant(frames)


def vanishes(rng, track, frames, size):
    """It is not seen for three to six frames."""
    seen, start = constant(frames), rng.integers(2, frames // 2)
    seen[start : start + rng.integers(3, 7)] = 0
    return steady(track, np.arange(frames)), seen


def turns(rng, track, frames, size):
    """In mid-air it goes back the way it came, and on again."""
    times = np.arange(frames)
    first = rng.integers(2, frames // 2)
    second = first + rng.integers(2, 5)
    back = np.where(times < second, 2 * first - times, 2 * (first - second) + times)
    return steady(track, np.where(times < first, times, back)), constant(frames)


def flares(rng, track, frames, size):
    """From one frame on it is weaker or stronger, or whiter."""
    seen, start = constant(frames), rng.integers(1, frames - 3)
    weaker, stronger = rng.uniform(0.4, 0.75), rng.uniform(1.25, 1.8)
    whiter = rng.uniform(0.6, 1.2), rng.uniform(0.2, 0.7)
    seen[start:] = ((weaker, 0), (stronger, 0), whiter)[rng.integers(3)]
    return steady(track, np.arange(frames)), seen


def surges(rng, track, frames, size):
    """From one frame on it is 2.6 times as fast, or a fifth."""
    times, start = np.arange(frames), rng.integers(3, frames - 4)
    changed = start + (times - start) * rng.choice([2.6, 0.2])
    return steady(track, np.where(times < start, times, changed)), constant(frames)


def swerves(rng, track, frames, size):
    """From one frame on its way is turned by 45 to 125 degrees."""
    start, angle = rng.integers(3, frames - 4), rng.uniform(0.8, 2.2) * rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    found = steady(track, np.arange(frames))
    found[start:] = found[start] + (found[start:] - found[start]) @ turn
    return found, constant(frames)


BREAKS = (shuffled, jumps, stutters, vanishes, turns, flares)  # besides `shakes`, which is half of all
HELD_OUT = (surges, swerves)
DEVELOPMENT = (jumps, turns)


def render(photograph: Floats, light: Light, positions: Floats, seen: Floats) -> NDArray[np.float32]:
    """Frames [3, F, S, S] in [0, 1]: the light at positions [F, 2], so bright [F, 2],
    over the photograph [S, S, 3] at night."""
    size = len(photograph)
    pixel, positions = np.arange(size) + 0.5, reflect(positions, size)
    away = np.hypot(
        pixel[None, None, :] - positions[:, 0, None, None], pixel[None, :, None] - positions[:, 1, None, None]
    )
    brightness = BRIGHT / (1 + np.exp((away - RADIUS * size) / (EDGE * size)))
    colors = seen @ np.array([COLORS[light.color], COLORS["white"]])
    frames = NIGHT * photograph + brightness[..., None] * colors[:, None, None]
    return frames.clip(0, 1).transpose(3, 0, 1, 2).astype(np.float32)
