"""A latent codec fitted to videos, for demos and tests: the shape of a video VAE, linear.

A latent frame holds the 16 strongest principal components of a block of 2 x 4 x 4 pixels in RGB; the first
latent frame stands for the first video frame alone, a block of 4 x 4:

    z = A (x - mean) / scale          A [16, 3*2*4*4] with orthonormal rows
    x = mean + A^T (z * scale)

So encode(decode(z)) = z, and decode(encode(x)) is a projection. A scale is the standard deviation of its
component, but at least FLOOR of the largest: fine detail has less than unit variance, so it weighs less
in a loss.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from prfl_engine.errors import UserError, check
from prfl_engine.inputs import check_finite, read_json

STRIDE_T, STRIDE_S, CHANNELS = 2, 4, 16
FLOOR = 1 / 6
MIN_SCALE = 1e-3  # of all components, where videos hardly vary


class BlockCodec(nn.Module):
    """encode and decode; differentiable. Of the first latent frame and of the others: mean [n],
    basis [16, n], scale [16], n the values of a block."""

    def __init__(self, first: tuple[Tensor, Tensor, Tensor], rest: tuple[Tensor, Tensor, Tensor]):
        super().__init__()
        for part, values, frames in ("first", first, 1), ("rest", rest, STRIDE_T):
            n = 3 * frames * STRIDE_S**2
            for name, value, shape in zip(
                ("mean", "basis", "scale"), values, ((n,), (CHANNELS, n), (CHANNELS,)), strict=True
            ):
                check(value.shape == shape, f"{part}.{name}", list(value.shape), f"shape {list(shape)}")
                self.register_buffer(f"{part}_{name}", value.float())
            positive = bool((values[2] > 0).all())
            check(positive, f"{part}.scale", values[2].tolist(), "positive numbers")

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 1+2k, H, W] in [0, 1] -> [B, 16, 1+k, H/4, W/4]."""
        shape = list(video.shape)
        good = video.ndim == 5 and shape[1] == 3 and shape[2] % STRIDE_T == 1 and shape[3] * shape[4] > 0
        good = good and shape[3] % STRIDE_S == 0 and shape[4] % STRIDE_S == 0
        check(good, "video", shape, "[B, 3, 1+2k, H, W] with H and W multiples of 4")
        check(video.is_floating_point(), "video", video.dtype, "a floating-point tensor in [0, 1]")
        parts = []
        for part, frames, seen in ("first", 1, video[:, :, :1]), ("rest", STRIDE_T, video[:, :, 1:]):
            mean, basis, scale = self._part(part, video.dtype)
            parts.append((_blocks(seen, frames) - mean) @ basis.T / scale)
        return torch.cat(parts, 1).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latent: Tensor, clamp: bool = True) -> Tensor:
        """[B, 16, 1+k, h, w] -> [B, 3, 1+2k, 4h, 4w]; clamped to [0, 1], or as it comes."""
        shape = list(latent.shape)
        good = latent.ndim == 5 and shape[1] == CHANNELS and min(shape[2:]) > 0
        check(good, "latent", shape, f"[B, {CHANNELS}, T, h, w], none of T, h, w zero")
        z, parts = latent.permute(0, 2, 3, 4, 1), []
        for part, frames, seen in ("first", 1, z[:, :1]), ("rest", STRIDE_T, z[:, 1:]):
            mean, basis, scale = self._part(part, latent.dtype)
            parts.append(_video(mean + (seen * scale) @ basis, frames))
        video = torch.cat(parts, 2)
        return video.clamp(0, 1) if clamp else video

    @classmethod
    def fit(cls, videos: Tensor) -> "BlockCodec":
        """The codec of these videos [B, 3, 1+2k > 1, H, W], under which their latents have mean 0."""
        good = videos.ndim == 5 and videos.shape[2] > 1
        check(good, "videos", list(videos.shape), "[B, 3, 1+2k > 1, H, W]")
        parts = []
        for frames, seen in (1, videos[:, :, :1]), (STRIDE_T, videos[:, :, 1:]):
            blocks = _blocks(seen, frames).flatten(0, -2).double()
            mean = blocks.mean(0)
            centred = blocks - mean
            variance, vectors = torch.linalg.eigh(centred.T @ centred / len(blocks))  # rising
            basis = vectors[:, -CHANNELS:].T.flip(0)
            largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
            basis = basis * largest.sign()  # whichever way the solver points
            scale = variance[-CHANNELS:].flip(0).clamp(min=MIN_SCALE**2).sqrt()
            parts.append((mean, basis, scale.clamp(min=FLOOR * scale[0].item())))
        return cls(*parts)

    def save(self, path: str | Path) -> None:
        """Write mean, basis and scale of both parts as JSON."""
        parts = {part: {k: getattr(self, f"{part}_{k}").tolist() for k in ("mean", "basis", "scale")}
                 for part in ("first", "rest")}  # fmt: skip
        Path(path).write_text(json.dumps({"codec": "pca-2x4x4", **parts}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "BlockCodec":
        """The codec that `save` wrote. UserError for another file."""
        content = read_json(path, "a codec's JSON")
        try:
            parts = [
                tuple(torch.tensor(content[part][k], dtype=torch.float32) for k in ("mean", "basis", "scale"))
                for part in ("first", "rest")
            ]
            codec = cls(*parts)
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise UserError(f"{path}: not a codec's JSON: {error}") from None
        check_finite(torch.cat([b.flatten() for b in codec.buffers()]), path, "mean, basis or scale")
        return codec

    def _part(self, part: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"{part}_{name}").to(dtype) for name in ("mean", "basis", "scale"))


def _blocks(video: Tensor, frames: int) -> Tensor:
    """[B, 3, T*frames, 4h, 4w] -> [B, T, h, w, 3*frames*16]."""
    f, h, w = video.shape[2] // frames, video.shape[3] // STRIDE_S, video.shape[4] // STRIDE_S
    x = video.unflatten(4, (w, STRIDE_S)).unflatten(3, (h, STRIDE_S)).unflatten(2, (f, frames))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _video(blocks: Tensor, frames: int) -> Tensor:
    """The inverse of `_blocks`."""
    x = blocks.unflatten(4, (3, frames, STRIDE_S, STRIDE_S)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
