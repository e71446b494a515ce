"""A latent codec fitted to videos, for demos and tests: linear, a latent frame of one value a channel.

The first latent frame holds the strongest principal components of a whole frame, every other one those of
what its frame adds to the first as that is decoded:

    z_0 = A (x_0 - m) / s               x'_0 = m + A^T (z_0 s)
    z_f = B (x_f - x'_0) / r            x'_f = x'_0 + B^T (z_f r)

A and B [C, 3*H*W] have orthonormal rows, so encode(decode(z)) = z, and decode(encode(x)) is a projection: of
what stands still nothing has to be said twice. A scale s, r is the standard deviation of its component, but
at least FLOOR of the largest: fine detail has less than unit variance, so it weighs less in a loss.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_engine.errors import UserError, check
from prfl_engine.inputs import check_finite, read_tensors

CHANNELS = 64
FLOOR = 1 / 6
MIN_SCALE = 1e-3  # of all components, where videos hardly vary
MORE, POWERS = 32, 4  # random vectors besides the components, and their passes: good to 1e-5
NAMES = "mean", "basis", "scale", "change_basis", "change_scale"


class FrameCodec(nn.Module):
    """encode and decode; differentiable. mean [3, H, W] of a frame; basis [C, 3, H, W] and scale [C] of the
    first frame, change_basis and change_scale of what the others add to it."""

    def __init__(
        self, mean: Tensor, basis: Tensor, scale: Tensor, change_basis: Tensor, change_scale: Tensor
    ):
        super().__init__()
        good = mean.ndim == 3 and len(mean) == 3 and mean.numel() > 0
        check(good, "mean", list(mean.shape), "shape [3, H, W]")
        check(scale.ndim == 1 and len(scale) > 0, "scale", list(scale.shape), "shape [C > 0]")
        values = mean, basis, scale, change_basis, change_scale
        for name, value in zip(NAMES, values, strict=True):
            if name != "mean":
                shape = (len(scale), *mean.shape) if "basis" in name else (len(scale),)
                check(value.shape == shape, name, list(value.shape), f"shape {list(shape)}")
            self.register_buffer(name, value.float())
        for name in "scale", "change_scale":
            least = getattr(self, name).min().item()
            check(least > 0, name, least, "positive numbers")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames, in pixels."""
        return tuple(self.mean.shape[1:])

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] -> [B, C, F, 1, 1]."""
        h, w = self.size
        good = video.ndim == 5 and video.shape[1] == 3 and video.shape[2] > 0 and video.shape[3:] == (h, w)
        check(good, "video", list(video.shape), f"[B, 3, F, {h}, {w}]")
        check(video.is_floating_point(), "video", video.dtype, "a floating-point tensor in [0, 1]")
        mean, basis, scale, change_basis, change_scale = self._values(video.dtype)
        frames = video.transpose(1, 2).flatten(2)
        first = (frames[:, :1] - mean) @ basis.T / scale
        others = (frames[:, 1:] - self._first(first)) @ change_basis.T / change_scale
        return torch.cat([first, others], 1).mT[..., None, None].contiguous()

    def decode(self, latent: Tensor, clamp: bool = True) -> Tensor:
        """[B, C, F, 1, 1] -> [B, 3, F, H, W]; clamped to [0, 1], or as it comes."""
        shape, channels = list(latent.shape), len(self.scale)
        good = latent.ndim == 5 and shape[1] == channels and shape[2] > 0 and shape[3:] == [1, 1]
        check(good, "latent", shape, f"[B, {channels}, F, 1, 1]")
        _, _, _, change_basis, change_scale = self._values(latent.dtype)
        z = latent.flatten(2).mT
        first = self._first(z[:, :1])
        frames = torch.cat([first, first + (z[:, 1:] * change_scale) @ change_basis], 1)
        video = frames.unflatten(2, (3, *self.size)).transpose(1, 2)
        return video.clamp(0, 1) if clamp else video

    @classmethod
    def fit(cls, videos: Tensor, channels: int = CHANNELS) -> "FrameCodec":
        """The codec of these videos [B, 3, F > 1, H, W]."""
        good = videos.ndim == 5 and videos.shape[1] == 3 and videos.shape[2] > 1
        check(good, "videos", list(videos.shape), "[B, 3, F > 1, H, W]")
        most, shape = videos[0, :, 0].numel(), videos.shape[1:2] + videos.shape[3:]
        check(0 < channels <= most, "channels", channels, f"1 to {most}, the values of a frame")
        frames = videos.transpose(1, 2).flatten(2).float()
        mean = frames[:, 0].mean(0)
        basis, scale = _components(frames[:, 0] - mean, channels)
        first = mean + (frames[:, :1] - mean) @ basis.T @ basis
        change_basis, change_scale = _components((frames[:, 1:] - first).flatten(0, 1), channels)
        first_basis, other_basis = (b.view(-1, *shape) for b in (basis, change_basis))
        return cls(mean.view(shape), first_basis, scale, other_basis, change_scale)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({name: getattr(self, name).contiguous() for name in NAMES}, path)

    @classmethod
    def load(cls, path: str | Path) -> "FrameCodec":
        """The codec that `save` wrote. UserError for another file."""
        content = read_tensors(path, "a codec, a safetensors file")
        if set(content) != set(NAMES):
            raise UserError(f"{path}: not a codec: got tensors {sorted(content)}, want {sorted(NAMES)}")
        for name, value in content.items():
            check_finite(value, path, name)
        try:
            return cls(**content)
        except ValueError as error:
            raise UserError(f"{path}: not a codec: {error}") from None

    def _values(self, dtype: torch.dtype) -> list[Tensor]:
        """`NAMES` in dtype, frames as vectors [n]."""
        values = (getattr(self, name).to(dtype) for name in NAMES)
        return [v.flatten(-3) if v.ndim > 1 else v for v in values]

    def _first(self, z: Tensor) -> Tensor:
        """The first frames [B, 1, 3*H*W] of their latents [B, 1, C]."""
        mean, basis, scale, *_ = self._values(z.dtype)
        return mean + (z * scale) @ basis


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The strongest principal components [count, n] of rows x [N, n], signed so that the largest value of
    each is positive, and their scales [count].

    They are those of x in the space that powers of x^T x take random vectors to (Halko et al., arXiv
    0909.4061); all components of frames would take seconds.
    """
    wanted = min(count + MORE, x.shape[1])
    rows = F.pad(x, (0, 0, 0, max(0, wanted - len(x))))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _, singular, vectors = torch.svd_lowrank(rows, wanted, POWERS)  # falling
    basis = vectors[:, :count].T.contiguous()
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    scale = (singular[:count] / len(x) ** 0.5).clamp(min=MIN_SCALE)
    return basis, scale.clamp(min=FLOOR * scale[0].item())
