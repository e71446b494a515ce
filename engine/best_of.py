"""Best of N with an early exit: N chains of a prompt run to one step, and the best of them there is finished.

A reward model judges. The chain that is kept goes on from its own state, so its latent is the one that it has
when it is sampled alone. Where a chain has `steps` steps and is judged after `step` of them, a sample costs
N * step + steps - step forwards; to finish all N costs N * steps.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.errors import check
from prfl_engine.model.reward import RewardModel


class Best(NamedTuple):
    """What best_of keeps of a batch."""

    latent: Tensor  # [B, C, T, H, W]
    kept: Tensor  # [B] long: which of the N chains
    logits: Tensor  # [N, B]: of every chain where it was judged


def check_choice(count: int, step: int | None, steps: int) -> None:
    """UserError unless best of `count` can be judged after `step` of `steps` steps; 1 and None: no choice."""
    check(count >= 1, "--best-of", count, "a whole number from 1 on")
    if count == 1:
        check(step is None, "--judge-at", step, "none without --best-of N, N from 2 on")
    else:
        ok = step is not None and 1 <= step < steps
        check(ok, "--judge-at", step, f"1 to {steps - 1} of the {steps} steps with --best-of")


def judge(
    reward: RewardModel, schedule: flow.Schedule, batch: Batch, step: int
) -> Callable[[Tensor], Tensor]:
    """What scores latents of a batch [B, C, T, H, W] that `step` steps have been made of: logits [B], at the
    timestep that they have then."""
    context = reward.embed_context(batch.text, batch.clip)

    def logits(x: Tensor) -> Tensor:
        t = schedule.timesteps[step].to(x.device).expand(len(x))
        return reward.score(x, t, context, batch.condition)

    return logits


@torch.no_grad()
def best_of(
    velocity: chain.Velocity,
    schedule: flow.Schedule,
    noises: Iterable[Tensor],
    step: int,
    score: Callable[[Tensor], Tensor],
) -> Best:
    """Of the chains from every one of `noises` [B, C, T, H, W] the one with the highest `score` after `step`
    steps, finished; of equal ones the first. Every sample of the batch chooses by itself.

    1 <= step < len(schedule). Two states of the batch are held, whatever N is.
    """
    logits: list[Tensor] = []
    for noise in noises:
        state = chain.rollout(velocity, schedule, noise, torch.full((len(noise),), step))
        logits.append(score(state.x))
        if len(logits) == 1:
            best, top, kept = state, logits[0], torch.zeros_like(logits[0], dtype=torch.long)
            continue
        better = logits[-1] > top
        rows = better.view(-1, 1, 1, 1, 1)
        best = flow.SolverState(*(torch.where(rows, a, b) for a, b in zip(state, best, strict=True)))
        top, kept = torch.where(better, logits[-1], top), kept.masked_fill(better, len(logits) - 1)
    start = [[None] * step + [best.select(slice(b, b + 1))] for b in range(len(top))]
    end = torch.full((len(top),), len(schedule))
    return Best(chain.rollout(velocity, schedule, start, end).x, kept, torch.stack(logits))


def forwards(count: int, step: int, steps: int) -> tuple[int, int]:
    """Forwards of the generator for a sample: of best of `count`, and to finish all."""
    return count * step + steps - step, count * steps
