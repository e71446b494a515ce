"""How well things move in a video, by OpenCV's optical flow, and which of two videos moves better.

Nothing here was trained, nor is anything trained on it: it sees decoded pixels alone.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from torch import Tensor

from prfl_engine.errors import UserError, check
from prfl_engine.media.video import pixels

ZOOM = 3  # of the frames, before the flow is computed
BLUR = 1.5  # pixels of the video, the Gaussian's standard deviation: the edges of a codec's blocks go
STILL = 1e-3  # mean change of levels, of 1, that hardly counts as motion


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


def flow_error(video: Tensor) -> float:
    """The part of the change from frame to frame that the motion before does not foretell.

    From every frame and the one before it optical flow (DIS, Kroeger et al. 2016) is computed. The frame
    moved on along it is what steady motion would show next. The error is the mean absolute difference of that
    to the next frame, over the mean absolute difference of the next frame to this one, both added up over the
    video. Steady motion is near 0, motion without a rule near 1 and above, and a still video, whose change is
    none, is 1.

    Args:
        video: [3, F >= 3, H, W] in [0, 1].
    """
    good = video.ndim == 4 and video.shape[0] == 3 and video.shape[1] >= 3
    check(good, "video", list(video.shape), "[3, F >= 3, H, W]")
    cv2 = opencv()
    frames = [_prepared(frame) for frame in pixels(video.cpu()).numpy()]
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    missed = change = STILL
    for i in range(1, len(frames) - 1):
        back = solver.calc(gray[i], gray[i - 1], None)  # [H, W, 2]: where a pixel was
        foretold = _moved(frames[i], _moved(back, back))
        missed += _difference(foretold, frames[i + 1])
        change += _difference(frames[i], frames[i + 1])
    return missed / change


def flow_errors(videos: Tensor) -> np.ndarray:
    """`flow_error` of each of videos [B, 3, F, H, W], float64 [B], on one thread."""
    cv2 = opencv()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return np.array([flow_error(video) for video in videos])
    finally:
        cv2.setNumThreads(threads)


def blind(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict:
    """In how many of the pairs the second video moves better, by their flow errors.

    Each pair is shown to the judge in an order drawn at random, so a judge that always says left would be at
    one half. Of equal errors the left one is taken.
    """
    pairs = np.stack([first, second], 1)
    swapped = np.random.default_rng(seed).integers(0, 2, len(pairs))
    shown = np.where(swapped[:, None] == 1, pairs[:, ::-1], pairs)
    chosen = shown.argmin(1)
    preferred = int((chosen != swapped).sum())
    return {"preferred": preferred, "of": len(pairs), "share": preferred / len(pairs)}


def _prepared(frame: np.ndarray) -> np.ndarray:
    """The frame [H, W, 3] enlarged and blurred."""
    cv2 = opencv()
    large = cv2.resize(frame, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(large, (0, 0), BLUR * ZOOM)


def _moved(image: np.ndarray, back: np.ndarray) -> np.ndarray:
    """At every pixel the value of the image at the place that `back` points to."""
    cv2 = opencv()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    where = x + back[..., 0], y + back[..., 1]
    return cv2.remap(image, *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of levels, of 1."""
    return float(opencv().absdiff(a, b).mean()) / 255
