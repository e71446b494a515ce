"""How well things move in a video, by OpenCV's optical flow, and which of two videos moves better.

Nothing here was trained, nor is anything trained on it: it sees decoded pixels alone.
"""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from prfl_engine.errors import UserError, check
from prfl_engine.media.video import pixels

ZOOM = 3  # of the frames, before the flow is computed
BLUR = 1.5  # pixels of the video, the Gaussian's standard deviation: the fine detail of a codec goes
SLOW = 0.5  # of the speed that is wanted: less is hardly motion


def opencv() -> ModuleType:
    """The package cv2. UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "cv2: not found, want OpenCV for the demo's measure of motion: "
            "pip install --no-deps opencv-python-headless"
        ) from None
    return cv2


def motion(video: Tensor) -> tuple[float, float]:
    """(acceleration, speed) of what moves in a video, in pixels a frame squared and pixels a frame.

    At every frame OpenCV's optical flow (DIS, Kroeger et al. 2016) gives where a pixel goes, f, and where
    it came from, b. The acceleration is |f + b|, nothing in even motion, and the speed (|f| + |b|) / 2;
    both are means over the frames, and over pixels by how much these change.

    Args:
        video: [3, F >= 3, H, W] in [0, 1].
    """
    good = video.ndim == 4 and video.shape[0] == 3 and video.shape[1] >= 3
    check(good, "video", list(video.shape), "[3, F >= 3, H, W]")
    cv2 = opencv()
    gray = [_prepared(frame) for frame in pixels(video.cpu()).numpy()]
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found = []
    for before, frame, after in zip(gray, gray[1:], gray[2:], strict=False):
        back, ahead = (solver.calc(frame, other, None) / ZOOM for other in (before, after))  # [H, W, 2]
        weight = cv2.absdiff(frame, before).astype(float) + cv2.absdiff(frame, after)
        weight /= max(weight.sum(), 1.0)
        length = (np.linalg.norm(ahead, axis=-1) + np.linalg.norm(back, axis=-1)) / 2
        found.append([(weight * np.linalg.norm(ahead + back, axis=-1)).sum(), (weight * length).sum()])
    return tuple(np.mean(found, 0).tolist())


def motions(videos: Tensor) -> Tensor:
    """`motion` of each of videos [B, 3, F, H, W], float64 [2, B]: OpenCV has one thread for each of as many
    videos at a time as torch has threads."""
    cv2 = opencv()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.tensor(list(pool.map(motion, videos)), dtype=torch.float64).T
    finally:
        cv2.setNumThreads(threads)


def _prepared(frame: np.ndarray) -> np.ndarray:
    """The frame [H, W, 3], enlarged, blurred and gray."""
    cv2 = opencv()
    large = cv2.resize(frame, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    return cv2.cvtColor(cv2.GaussianBlur(large, (0, 0), BLUR * ZOOM), cv2.COLOR_RGB2GRAY)


def blind(first: Tensor, second: Tensor, wanted: Tensor, seed: int = 0) -> dict:
    """In how many of n pairs the second video moves better, by `motions` [2, n] of the first and of the
    second ones.

    The better one has the smaller acceleration, if it moves at all: one that is less than half as fast as
    `wanted` [n] loses. Each pair is shown to the judge in an order drawn at random, so a judge that always
    says left would be at one half. Of equals the left one is taken.
    """
    pairs = np.stack([np.where(s >= SLOW * wanted, a, np.inf) for a, s in (first, second)], 1)
    swapped = np.random.default_rng(seed).integers(0, 2, len(pairs))
    shown = np.where(swapped[:, None] == 1, pairs[:, ::-1], pairs)
    chosen = shown.argmin(1)
    preferred = int((chosen != swapped).sum())
    return {"preferred": preferred, "of": len(pairs), "share": preferred / len(pairs)}
