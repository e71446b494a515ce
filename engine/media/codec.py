"""A latent codec without learned weights, for demos and tests: the shape of the Wan VAE, linear.

A latent frame holds 16 coefficients of the 3-D DCT (orthonormal, type II) of a block of 4 x 8 x 8
pixels in YCbCr; the first latent frame stands for the first video frame alone, an 8 x 8 block:

    z = (A x - mean) / std        A [16, 3*4*8*8]: rows of DCT_t (x) DCT_y (x) DCT_x (x) YCbCr
    x = S (z * std + mean)        S: the matching columns of the inverse

A S = 1, so encode(decode(z)) = z and decode(encode(x)) is a projection. Twelve channels mean the
same in every latent frame; where a later frame keeps four of motion, the first, which has none,
keeps the slopes of its colors. Both maps are convolutions with stride = kernel. What this gives up
against a VAE: all detail finer than about 3 pixels, and blocks show, in colors above all.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine.errors import UserError, check
from prfl_engine.inputs import check_finite, read_json

STRIDE_T, STRIDE_S, CHANNELS = 4, 8, 16
MIN_STD = 1e-3  # of a channel that hardly varies; a gray level's DC coefficient is 16 times the gray

# (color, t, y, x) of every channel: color 0 Y, 1 Cb, 2 Cr, then frequencies. By variance over the
# sample clips, except that fine luma goes before chroma slopes: 25.4 dB instead of 24.4 dB.
_SHARED = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 0, 2), (0, 0, 2, 0),
    (0, 0, 0, 3), (0, 0, 3, 0), (0, 0, 1, 2), (0, 0, 2, 1), (1, 0, 0, 0), (2, 0, 0, 0),
)  # fmt: skip
_MOTION = ((0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0))
_DETAIL = ((1, 0, 0, 1), (1, 0, 1, 0), (2, 0, 0, 1), (2, 0, 1, 0))

_YCBCR = torch.tensor(  # full range, BT.601
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]],
    dtype=torch.float64,
)


def _dct(n: int) -> Tensor:
    """The orthonormal DCT-II matrix [n, n], float64."""
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    d = torch.cos(torch.pi * (x + 0.5) * k / n) * (2 / n) ** 0.5
    d[0] /= 2**0.5
    return d


def _kernels(channels: tuple, frames: int) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis kernels [16, 3, frames, 8, 8] of a block of `frames` frames, float32.

    Coefficients are scaled to those of the block held still for STRIDE_T frames, so that a still
    scene has the same values in the first latent frame and in the others.
    """
    dct_t, dct_s, inverse = _dct(frames), _dct(STRIDE_S), torch.linalg.inv(_YCBCR)
    waves = torch.stack([torch.einsum("t,y,x->tyx", dct_t[t], dct_s[y], dct_s[x]) for _, t, y, x in channels])
    color = [c for c, *_ in channels]
    hold = (STRIDE_T / frames) ** 0.5
    analysis = hold * torch.einsum("kd,ktyx->kdtyx", _YCBCR[color], waves)
    synthesis = torch.einsum("dk,ktyx->kdtyx", inverse[:, color], waves) / hold
    return analysis.float(), synthesis.float()


class DCTCodec(nn.Module):
    """encode and decode; differentiable. mean, std: [2, 16], of the first latent frame and the rest."""

    def __init__(self, mean: Tensor | None = None, std: Tensor | None = None):
        super().__init__()
        mean = torch.zeros(2, CHANNELS) if mean is None else mean
        std = torch.ones(2, CHANNELS) if std is None else std
        for name, value in ("mean", mean), ("std", std):
            check(value.shape == (2, CHANNELS), name, list(value.shape), f"shape [2, {CHANNELS}]")
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float().clamp(min=MIN_STD))
        kernels = _kernels(_SHARED + _DETAIL, 1) + _kernels(_SHARED + _MOTION, STRIDE_T)
        for name, kernel in zip(("a_first", "s_first", "a_rest", "s_rest"), kernels, strict=True):
            self.register_buffer(name, kernel, persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 1+4k, H, W] in [0, 1] -> [B, 16, 1+k, H/8, W/8]."""
        shape = list(video.shape)
        good = video.ndim == 5 and shape[1] == 3 and shape[2] % STRIDE_T == 1 and shape[3] * shape[4] > 0
        good = good and shape[3] % STRIDE_S == 0 and shape[4] % STRIDE_S == 0
        check(good, "video", shape, "[B, 3, 1+4k, H, W] with H and W multiples of 8")
        check(video.is_floating_point(), "video", video.dtype, "a floating-point tensor in [0, 1]")
        return _by_part(video, self._encode)

    def decode(self, latent: Tensor, clamp: bool = True) -> Tensor:
        """[B, 16, 1+k, h, w] -> [B, 3, 1+4k, 8h, 8w]; clamped to [0, 1], or as it comes."""
        shape = list(latent.shape)
        good = latent.ndim == 5 and shape[1] == CHANNELS and min(shape[2:]) > 0
        check(good, "latent", shape, f"[B, {CHANNELS}, T, h, w], none of T, h, w zero")
        video = _by_part(latent, self._decode)
        return video.clamp(0, 1) if clamp else video

    @classmethod
    def fit(cls, videos: Tensor) -> "DCTCodec":
        """A codec under which the latents of these videos [B, 3, F > 1, H, W] have mean 0, variance 1."""
        check(videos.ndim == 5 and videos.shape[2] > 1, "videos", list(videos.shape), "[B, 3, F > 1, H, W]")
        z = cls().encode(videos)
        parts = [part.transpose(0, 1).flatten(1).double() for part in (z[:, :, :1], z[:, :, 1:])]
        mean = torch.stack([part.mean(1) for part in parts])
        std = torch.stack([part.std(1, correction=0) for part in parts])
        return cls(mean, std)

    def save(self, path: str | Path) -> None:
        """Write mean and std as JSON; they are all that is not fixed."""
        content = {"codec": "dct-4x8x8", "mean": self.mean.tolist(), "std": self.std.tolist()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "DCTCodec":
        """The codec whose mean and std `save` wrote. UserError for another file."""
        content = read_json(path, "a codec's JSON")
        try:
            mean, std = (torch.tensor(content[name], dtype=torch.float32) for name in ("mean", "std"))
            codec = cls(mean, std)
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise UserError(f"{path}: not a codec's JSON: {error}") from None
        check_finite(torch.stack([codec.mean, codec.std]), path, "mean or std")
        return codec

    def _encode(self, part: Tensor, n: int) -> Tensor:
        kernel = (self.a_first, self.a_rest)[n].to(part.dtype)
        mean, std = self._statistics(n, part.dtype)
        return (F.conv3d(part, kernel, stride=kernel.shape[2:]) - mean) / std

    def _decode(self, part: Tensor, n: int) -> Tensor:
        kernel = (self.s_first, self.s_rest)[n].to(part.dtype)
        mean, std = self._statistics(n, part.dtype)
        return F.conv_transpose3d(part * std + mean, kernel, stride=kernel.shape[2:])

    def _statistics(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return tuple(s[n, :, None, None, None].to(dtype) for s in (self.mean, self.std))


def _by_part(x: Tensor, apply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """apply(part, 0) on the first frame and apply(part, 1) on the rest, if there is one; joined."""
    parts = (x[:, :, :1], x[:, :, 1:])
    return torch.cat([apply(part, n) for n, part in enumerate(parts) if part.shape[2]], dim=2)
