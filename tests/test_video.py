"""Video files: what is written comes back, sizes and refusals."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prfl_engine.media.video import (
    _scaled,
    _upright,
    grid,
    read_clip,
    read_image,
    read_video,
    write_animation,
    write_video,
)


def moving_square(frames=6, h=48, w=64):
    video = torch.full((frames, h, w, 3), 40, dtype=torch.uint8)
    for t in range(frames):
        video[t, 16:32, 8 * t : 8 * t + 16] = torch.tensor([220, 60, 30], dtype=torch.uint8)
    return video


@pytest.fixture
def file(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square())
    return tmp_path / "a.mp4"


def error(a, b):
    return (a.float() - b.float()).abs().mean().item()


def test_mp4_round_trip(file):
    video = read_video(file)
    assert video.dtype == torch.uint8 and video.shape == (6, 48, 64, 3)
    for t, frame in enumerate(video):
        assert error(frame, moving_square()[t]) < 4  # of 255; yuv420p blurs the square's colors


@pytest.mark.parametrize("size", [(24, 32), (96, 128), (24, 24), (30, 64), (17, 9)])
def test_size(file, size):
    video = read_video(file, size)
    assert video.shape == (6, *size, 3)


def test_the_crop_is_central(tmp_path):
    video = torch.zeros(1, 32, 96, 3, dtype=torch.uint8)
    video[:, :, 32:64] = 255
    write_video(tmp_path / "a.mp4", video)
    assert read_video(tmp_path / "a.mp4", (32, 32)).float().mean() > 245
    assert read_video(tmp_path / "a.mp4", (16, 48)).float().mean(dim=(0, 1, 3))[20:28].min() > 235


def test_animation(tmp_path):
    path = tmp_path / "a.webp"
    write_animation(path, [moving_square()] * 3, ["a", "b", "c"], columns=2, scale=2)
    with Image.open(path) as image:
        assert image.n_frames == 6 and image.info["loop"] == 0
        assert image.size == (2 * 128 + 4, 2 * (96 + 16 + 4) - 4)
        for t in (0, 5):
            image.seek(t)
            frame = torch.tensor(list(image.convert("RGB").tobytes())).view(*image.size[::-1], 3)
            square = frame[16 + 34 : 16 + 62, 16 * t + 4 : 16 * t + 28].float()
            assert (square.mean((0, 1)) - torch.tensor([220.0, 60, 30])).abs().max() < 16


def test_grid_without_labels_holds_the_pixels():
    a = moving_square()
    page = grid([a, 255 - a], columns=1)
    assert page.shape == (6, 2 * 48 + 4, 64, 3)
    assert torch.equal(page[:, :48], a) and torch.equal(page[:, 52:], 255 - a)
    assert torch.equal(grid([a]), a)


def numbered(path, frames, fps):
    """A video whose frames are gray levels 20, 24, ..."""
    video = torch.stack([torch.full((32, 48, 3), 20 + 4 * i, dtype=torch.uint8) for i in range(frames)])
    write_video(path, video, fps)
    return path


@pytest.mark.parametrize("fps, want", [
    (24, [0, 1, 3, 4, 6, 7, 9, 10]), (16, [*range(12)]), (30, [0, 1, 3, 5, 7, 9, 11]),
    (8, [i // 2 for i in range(24)]),
])  # fmt: skip
def test_clips_are_resampled(tmp_path, fps, want):
    """Frame i is at i / 16 s of the file, or just before."""
    path = numbered(tmp_path / "a.mp4", 12, fps)
    clip = read_clip(path, Fraction(16), 99, lambda h, w: (h // 2, w))
    assert clip.shape == (len(want), 16, 48, 3)
    assert [round((frame.float().mean().item() - 20) / 4) for frame in clip] == want
    assert torch.equal(read_clip(path, Fraction(16), 5, lambda h, w: (h // 2, w)), clip[:5])


@pytest.mark.parametrize("rotation, turns", [(0, 0), (90, 1), (-90, 3), (180, 2)])
def test_videos_of_phones_are_shown_upright(rotation, turns):
    """`rotation` is counterclockwise, as PyAV says it."""
    stored = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3).numpy()
    frame = SimpleNamespace(
        height=4, width=6, rotation=rotation,
        to_ndarray=lambda width, height, **_: stored if (height, width) == (4, 6) else None,
    )  # fmt: skip
    shown = np.rot90(stored, turns)
    assert _upright(frame) == shown.shape[:2]
    assert np.array_equal(_scaled(frame, None), shown)
    assert np.array_equal(_scaled(frame, shown.shape[:2]), shown)


def test_images_are_videos_of_one_frame(tmp_path):
    Image.new("RGBA", (40, 20), (10, 200, 30, 255)).save(tmp_path / "a.png")
    seen = []
    image = read_image(tmp_path / "a.png", lambda *size: seen.append(size) or (16, 16))
    assert seen == [(20, 40)] and image.shape == (1, 16, 16, 3)
    assert (image.float() - torch.tensor([10.0, 200, 30])).abs().max() <= 2
    (tmp_path / "b.png").write_text("nonsense")
    with pytest.raises(ValueError, match="b.png: not a readable image"):
        read_image(tmp_path / "b.png", lambda *_: (16, 16))


def test_refusals(tmp_path):
    good = moving_square()
    with pytest.raises(ValueError, match="none.mp4: no such file"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("nonsense")
    with pytest.raises(ValueError, match="text.mp4: not a readable video"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="video: got '47 x 64 pixels', want even"):
        write_video(tmp_path / "a.mp4", good[:, :47])
    with pytest.raises(ValueError, match=r"video: got 'torch.float32 \[6, 48, 64, 3\]'"):
        write_video(tmp_path / "a.mp4", good.float())
    with pytest.raises(ValueError, match="path: got 'a.mp4', want a name ending in .webp"):
        write_animation(tmp_path / "a.mp4", [good])
    with pytest.raises(ValueError, match="labels: got 1, want 2"):
        grid([good, good], ["a"])
    with pytest.raises(ValueError, match="videos: got .* want one shape"):
        grid([good, good[:3]])
    assert not list(tmp_path.glob("a.mp4"))
