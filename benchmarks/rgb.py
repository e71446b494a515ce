"""RGB ReFL: the gradient of a reward of pixels, through the VAE decoder, for comparison with PRFL.

As ReFL (Xu et al., arXiv 2304.05977) does it: a rollout without gradient, one denoising step with gradient,
the latent x_0 that this step predicts, decoded, and a reward of the frames. Policy, solver and data are those
of PRFL, whose reward model scores the noisy latent after the step instead.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks
from prfl_engine.objectives import bind, fixed

FRAMES = ("first", "all")  # that are decoded and judged

Decode = Callable[[Tensor], Tensor]
"""Latents [B, 16, T, h, w] to frames [B, 3, F, H, W] with levels in [0, 1], with gradient."""


class PixelReward(Protocol):
    """What judges frames, with gradient to them: a module or a function. docs/benchmarks.md has one."""

    def __call__(self, video: Tensor) -> Tensor:
        """Logits [B] of frames [B, 3, F, H, W] with levels in [0, 1]; F is 1 for the first alone."""


class PixelJudge(NamedTuple):
    """The logit of a latent, by way of its frames."""

    decode: Decode
    reward: PixelReward
    frames: str  # one of FRAMES
    given: int = 0  # latent frames that the model is given, which come before the first one that it makes

    def __call__(self, latent: Tensor) -> Tensor:
        """Logits [B] of clean latents [B, C, T, h, w]. The first latent frame is the first frame alone."""
        return self.reward(self.decode(latent[:, :, : self.given + 1] if self.frames == "first" else latent))


def graded_pixels(
    model: WanTransformer,
    judge: PixelJudge,
    schedule: flow.Schedule,
    batch: Batch,
    noise: Tensor,
    index: Tensor,
    run_blocks: RunBlocks = plain_blocks,
) -> Tensor:
    """Logits [B] of the x_0 that step index [B] of a rollout from noise predicts, with gradient through that
    step to the model. index is long, on the CPU; it may be the last step, which PRFL never grades."""
    velocity, noise = bind(model, batch, run_blocks=run_blocks), fixed(model, batch, noise)
    return judge(predicted(velocity, schedule, chain.rollout(velocity, schedule, noise, index), index))


def predicted(
    velocity: chain.Velocity, schedule: flow.Schedule, state: flow.SolverState, index: Tensor
) -> Tensor:
    """The x_0 [B, C, T, H, W] that step index [B] predicts from the state before it."""
    return chain.advance(velocity, schedule, state, index, torch.arange(len(index))).m0


def vae_decoder(vae: nn.Module) -> Decode:
    """The decoder of diffusers' AutoencoderKLWan, for latents normalised as in data."""
    c = vae.config
    mean, std = (torch.tensor(of).view(-1, 1, 1, 1) for of in (c.latents_mean, c.latents_std))

    def decode(latent: Tensor) -> Tensor:
        return (vae.decode(latent * std.to(latent) + mean.to(latent)).sample + 1) / 2

    return decode


class FrameReward(nn.Module):
    """A small network over frames and their differences: convolutions, mean and spread, a linear layer."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.convolutions = nn.ModuleList([
            nn.Conv3d(6, width, (3, 4, 4), (1, 4, 4), (1, 0, 0)),
            nn.Conv3d(width, width, 3, (1, 2, 2), 1),
            nn.Conv3d(width, 2 * width, 3, 1, 1),
        ])  # fmt: skip
        self.head = nn.Linear(4 * width, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B] of frames [B, 3, F, H, W] with levels in [0, 1]; H and W at least 4."""
        x = 2 * video - 1
        change = torch.cat([torch.zeros_like(x[:, :, :1]), x.diff(dim=2)], 2)
        x = torch.cat([x, 4 * change], 1)  # what moves is small beside what is there
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        x = x.flatten(2)
        spread = (x.var(2, correction=0) + 1e-6).sqrt()
        return self.head(torch.cat([x.mean(2), spread], 1)).squeeze(1)


def difference(loss: Callable[[], Tensor], parameters: list[Tensor], width: float = 1e-3) -> float:
    """How far the gradients in .grad are from a central difference of loss() along a random direction, as a
    share of the slope that is usual along such a direction. parameters: float64; they are changed, by a
    vector of norm `width`."""
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    draw = torch.randn(len(gradient), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draw = (draw * (width / draw.norm())).to(gradient)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, part in zip(parameters, draw.split([p.numel() for p in parameters]), strict=True):
                p += sign * part.view_as(p)
            values.append(loss().item())
    off = abs((values[0] - values[1]) / 2 - (draw @ gradient).item())
    return off * len(draw) ** 0.5 / (width * gradient.norm().item())


def gate(loss: Callable[[], Tensor], parameters: list[Tensor], name: str, limit: float = 1e-5) -> None:
    """Backpropagate loss(); SystemExit unless the gradients agree with a central difference."""
    loss().backward()
    off = difference(loss, parameters)
    print(f"gate: {name}: within {off:.1e} of a central difference", flush=True)
    if not off < limit:
        raise SystemExit(f"gate failed, want {limit}: nothing is measured")
