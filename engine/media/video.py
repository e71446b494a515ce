"""Video files: decode with PyAV, write mp4 and animations. A video is uint8 [F, H, W, 3], RGB."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from prfl_engine.errors import UserError, check

GAP = 4  # pixels between the cells of a grid


def pixels(video: Tensor) -> Tensor:
    """[3, F, H, W] in [0, 1], as a codec decodes it, to uint8 [F, H, W, 3]."""
    return (video.permute(1, 2, 3, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def read_video(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """All frames of a file, uint8 [F, H, W, 3].

    With size = (H, W), frames are scaled to cover it and cropped around the centre.
    """
    if size is not None:
        check(len(size) == 2 and min(size) > 0, "size", size, "(height, width), both positive")
    frames = [_scaled(frame, size) for frame, _ in _decoded(path)]
    if not frames:
        raise UserError(f"{path}: got a video without frames")
    return torch.from_numpy(np.stack(frames))


def read_clip(
    path: str | Path, fps: Fraction, count: int, size: Callable[[int, int], tuple[int, int]]
) -> Tensor:
    """The first frames of a file at `fps`, `count` or as many as it has, uint8 [F, H, W, 3].

    Frame i is frame floor(i * rate / fps) of the file, whose mean rate is `rate`: frames are repeated or left
    out, as HY-Video-PRFL's preprocessing does. size(height, width) of the file gives the (H, W) to scale and
    crop to. UserError for a file that cannot be decoded that far, or that says nothing of its rate.
    """
    frames: list[np.ndarray] = []
    for index, (frame, rate) in enumerate(_decoded(path)):
        if not index:
            if not rate:
                raise UserError(f"{path}: got no frame rate")
            target = size(*_upright(frame))
        if int(len(frames) * rate / fps) == index:
            image = _scaled(frame, target)
            while len(frames) < count and int(len(frames) * rate / fps) == index:
                frames.append(image)
        if len(frames) == count:
            break
    if not frames:
        raise UserError(f"{path}: got a video without frames")
    return torch.from_numpy(np.stack(frames))


def read_image(path: str | Path, size: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """An image as a video of one frame, uint8 [1, H, W, 3], scaled and cropped as `read_clip` does."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from None
    scaled = _scaled(VideoFrame.from_image(image), size(image.height, image.width))
    return torch.from_numpy(scaled[None].copy())


def _decoded(path: str | Path) -> Iterator[tuple[VideoFrame, Fraction | None]]:
    """The frames of a file, each with the mean rate of all."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, want a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: got no video stream, want a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(video=0):
                yield frame, stream.average_rate
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: not a readable video: {error.strerror}") from None


def _upright(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown: phones store an upright video lying, with its rotation."""
    return (frame.width, frame.height) if frame.rotation % 180 == 90 else (frame.height, frame.width)


def _scaled(frame: VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """A frame as it is shown, uint8 [H, W, 3], scaled to cover `size` and cropped around the centre."""
    height, width = _upright(frame)
    h, w = size or (height, width)
    scale = max(h / height, w / width)
    cover_h, cover_w = max(h, round(height * scale)), max(w, round(width * scale))
    # Area averages going down; bicubic going up, where area repeats pixels.
    how = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    stored_h, stored_w = (cover_w, cover_h) if frame.rotation % 180 == 90 else (cover_h, cover_w)
    image = frame.to_ndarray(format="rgb24", width=stored_w, height=stored_h, interpolation=how)
    image = np.rot90(image, frame.rotation // 90)  # counterclockwise, as ffmpeg counts
    top, left = (cover_h - h) // 2, (cover_w - w) // 2
    return image[top : top + h, left : left + w]


def write_video(path: str | Path, video: Tensor, fps: int = 16) -> None:
    """Write uint8 [F, H, W, 3] as H.264 in yuv420p, which every browser plays; H and W even."""
    frames = _checked(video)
    h, w = frames.shape[1:3]
    check(h % 2 == 0 and w % 2 == 0, "video", f"{h} x {w} pixels", "even height and width")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        for image in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_animation(
    path: str | Path,
    videos: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
    fps: int = 8,
) -> None:
    """Write videos of one shape as a labelled grid, an endless .webp.

    Every browser shows it in an <img>. A grid of eight demo videos took 0.3 MB, as .gif 4.7.
    """
    path = Path(path)
    check(path.suffix == ".webp", "path", path.name, "a name ending in .webp")
    first, *rest = (Image.fromarray(page) for page in grid(videos, labels, columns, scale).numpy())
    first.save(
        path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=80, method=4
    )


def grid(
    videos: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
) -> Tensor:
    """Videos of one shape side by side, `columns` a row, each below its label; uint8 [F, H', W', 3]."""
    check(len(videos) > 0, "videos", "none", "at least one")
    check(scale >= 1, "scale", scale, "a whole number from 1")
    cells = [_checked(video) for video in videos]
    shapes = sorted({cell.shape for cell in cells})
    check(len(shapes) == 1, "videos", f"shapes {shapes}", "one shape")
    if labels is not None:
        check(len(labels) == len(cells), "labels", len(labels), f"{len(cells)}, one a video")
    f, h, w, _ = cells[0].shape
    h, w = h * scale, w * scale
    columns = min(columns or len(cells), len(cells))
    rows = -(-len(cells) // columns)
    font = ImageFont.load_default(size=12)
    head = 16 if labels else 0
    page_size = (columns * (w + GAP) - GAP, rows * (h + head + GAP) - GAP)
    pages = []
    for i in range(f):
        page = Image.new("RGB", page_size, "white")
        draw = ImageDraw.Draw(page)
        for n, cell in enumerate(cells):
            x, y = n % columns * (w + GAP), n // columns * (h + head + GAP)
            page.paste(Image.fromarray(cell[i]).resize((w, h), Image.Resampling.BICUBIC), (x, y + head))
            if labels:
                draw.text((x + 2, y), labels[n], fill="black", font=font)
        pages.append(np.asarray(page))
    return torch.from_numpy(np.stack(pages))


def _checked(video: Tensor) -> np.ndarray:
    got = f"{video.dtype} {list(video.shape)}"
    good = video.dtype == torch.uint8 and video.ndim == 4 and video.shape[-1] == 3 and len(video) > 0
    check(good, "video", got, "torch.uint8 [frames, height, width, 3]")
    return video.cpu().numpy()
