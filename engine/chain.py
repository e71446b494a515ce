"""The denoising chain: rollout without gradient, then a step with gradient.

A `Velocity` is a model bound to its context: (x [B, C, T, H, W], t [B], active [N] long) -> v, where
`active` names the samples of the full batch that x holds, so that it can pick their context.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_engine import flow

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def advance(
    velocity: Velocity, schedule: flow.Schedule, state: flow.SolverState, index: Tensor, active: Tensor
) -> flow.SolverState:
    """One denoising step of the samples `active` [N] of a batch, each at its own step index [N]."""
    t = schedule.timesteps[index].to(state.x.device, non_blocking=True)
    return flow.step(schedule, state, velocity(state.x, t, active), index)


@torch.no_grad()
def rollout(
    velocity: Velocity, schedule: flow.Schedule, noise: Tensor, index: Tensor
) -> flow.SolverState:
    """Denoise every sample from noise up to (not including) step index[b], without gradient.

    noise [B, C, T, H, W]; index [B] long on the CPU, 0 <= index <= len(schedule). A sample leaves
    the batch as soon as its index is reached, so a batch costs index.sum() forwards of one sample.
    """
    done = flow.init_state(noise)
    done = flow.SolverState(*(a.clone() for a in done))
    for i in range(int(index.max())):
        active = (index > i).nonzero().squeeze(1)
        everyone = len(active) == len(index)
        state = done if everyone else done.select(active.to(noise.device))
        state = advance(velocity, schedule, state, torch.full_like(active, i), active)
        if everyone:
            done = state
        else:
            for whole, part in zip(done, state, strict=True):
                whole[active.to(noise.device)] = part
    return done


def graded_step(
    velocity: Velocity, schedule: flow.Schedule, state: flow.SolverState, index: Tensor
) -> Tensor:
    """The latent [B, C, T, H, W] after step index[b] of each sample, with gradient through the step.

    The gradient passes the corrector and the predictor of this step; the history in `state` comes
    from a rollout and is constant.
    """
    everyone = torch.arange(len(index))
    return advance(velocity, schedule, state, index, everyone).x


def sample(velocity: Velocity, schedule: flow.Schedule, noise: Tensor) -> Tensor:
    """The whole chain without gradient: noise [B, C, T, H, W] to latents of the same shape."""
    index = torch.full((len(noise),), len(schedule), dtype=torch.long)
    return rollout(velocity, schedule, noise, index).x
