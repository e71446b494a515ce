"""The sizes that videos are scaled and cropped to, and their numbers of frames."""

import math
import re
from collections.abc import Sequence

from prfl_engine.errors import check

Size = tuple[int, int]
"""(height, width) in pixels."""

PRESETS: dict[int, dict[str, tuple[Size, ...]]] = {
    16: {
        "480p": ((480, 832), (832, 480), (544, 720), (720, 544), (624, 624)),
        "720p": ((720, 1280), (1280, 720), (832, 1088), (1088, 832), (960, 960)),
    },
    32: {
        "480p": ((480, 832), (832, 480), (544, 736), (736, 544), (640, 640)),
        "720p": ((704, 1280), (1280, 704), (832, 1088), (1088, 832), (960, 960)),
    },
}
"""Buckets of about the area of 480 x 832 and 720 x 1280 pixels, by aspect ratio, for tokens of so many pixels
a side."""


def parse_sizes(text: str, token: int = 16) -> tuple[Size, ...]:
    """The buckets that "480p", "720p" or "704x1280,1280x704" (heights x widths) names, of whole tokens."""
    if text in PRESETS[token]:
        return PRESETS[token][text]
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", part.strip()) for part in text.split(",")]
    want = f"480p, 720p, or heights and widths such as 704x1280,1280x704, multiples of {token}"
    check(all(found), "--size", text, want)
    sizes = tuple((int(m[1]), int(m[2])) for m in found)
    check(all(n and n % token == 0 for size in sizes for n in size), "--size", text, want)
    return sizes


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is the nearest one, by its logarithm; the first of equal ones."""
    return min(sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))


def whole_frames(count: int) -> int:
    """The largest 4n + 1 up to a number of frames from 1 on: what latent frames stand for."""
    return (count - 1) // 4 * 4 + 1
