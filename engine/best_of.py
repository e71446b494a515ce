"""Best of N with an early exit: N chains of a prompt run to one step, the worst are dropped there, and the
best, one or K of them, are finished.

A reward model judges. A chain that is kept goes on from its own state, so its latent is the one that it has
when it is sampled alone. Where a chain has `steps` steps and is judged after `step` of them, a prompt costs
N * step + K * (steps - step) forwards; to finish all N costs N * steps.
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

    latent: Tensor  # [K, B, C, T, H, W], the best where it was judged first
    kept: Tensor  # [K, B] long: which of the N chains
    logits: Tensor  # [N, B]: of every chain where it was judged


def check_choice(count: int, step: int | None, steps: int, finish: int = 1) -> None:
    """UserError unless best of `count` can be judged after `step` of `steps` steps and `finish` of them be
    finished; 1 and None: no choice."""
    ok = finish == 1 or 1 < finish < count
    check(ok, "--finish", finish, "1, or fewer than --best-of N")
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
    finish: int = 1,
) -> Best:
    """Of the chains from every one of `noises` [B, C, T, H, W] those `finish` with the highest `score` after
    `step` steps, finished; of equal ones the first. Every sample of the batch chooses by itself.

    1 <= step < len(schedule). finish + 1 states of the batch are held, whatever N is.
    """
    logits: list[Tensor] = []
    held: list[tuple[flow.SolverState, Tensor, Tensor]] = []  # of the best: state, logits, which chain
    for n, noise in enumerate(noises):
        state = chain.rollout(velocity, schedule, noise, torch.full((len(noise),), step))
        logits.append(score(state.x))
        if n < finish:
            held.append((state, logits[n], torch.full_like(logits[n], n, dtype=torch.long)))
            continue
        worst = torch.stack([top for _, top, _ in held]).argmin(0)
        for i, (best, top, kept) in enumerate(held):
            better = (worst == i) & (logits[n] > top)
            rows = better.view(-1, 1, 1, 1, 1)
            best = flow.SolverState(*(torch.where(rows, a, b) for a, b in zip(state, best, strict=True)))
            held[i] = best, torch.where(better, logits[n], top), kept.masked_fill(better, n)
    tops, kept = (torch.stack([of[i] for of in held]) for i in (1, 2))
    order = tops.sort(dim=0, descending=True, stable=True).indices
    end, latents = torch.full((order.shape[1],), len(schedule)), []
    for chosen in order.tolist():
        states = [held[i][0].select(slice(b, b + 1)) for b, i in enumerate(chosen)]
        latents.append(chain.rollout(velocity, schedule, [[None] * step + [of] for of in states], end).x)
    return Best(torch.stack(latents), kept.gather(0, order), torch.stack(logits))


def forwards(count: int, step: int, steps: int) -> tuple[int, int]:
    """Forwards of the generator for a sample: of best of `count`, one of them finished, and to finish all."""
    return count * step + steps - step, count * steps
