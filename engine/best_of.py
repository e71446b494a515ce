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
    `step` steps, finished, the best first; of equal ones the earlier is the better. Every sample of the batch
    chooses by itself.

    1 <= step < len(schedule). finish + 1 states of the batch are held, whatever N is.
    """
    logits: list[Tensor] = []
    held: list[tuple[Tensor, ...]] = []  # the best first: the fields of a state, logits, which chain
    for n, noise in enumerate(noises):
        state = chain.rollout(velocity, schedule, noise, torch.full((len(noise),), step))
        top = score(state.x)
        logits.append(top)
        _insert(held, (*state, top, torch.full_like(top, n, dtype=torch.long)), finish)
    end, latents = torch.full((len(logits[0]),), len(schedule)), []
    for *fields, _, _ in held:
        state = flow.SolverState(*fields)
        samples = [state.select(slice(b, b + 1)) for b in range(len(end))]
        latents.append(chain.rollout(velocity, schedule, [[None] * step + [of] for of in samples], end).x)
    return Best(torch.stack(latents), torch.stack([which for *_, which in held]), torch.stack(logits))


def _insert(held: list[tuple[Tensor, ...]], new: tuple[Tensor, ...], finish: int) -> None:
    """Put a chain after those that are as good, the others after it; of more than `finish` the last goes."""
    top = new[-2]
    for i, best in enumerate(held):
        better = top > best[-2]  # from here on all move by one place
        held[i], new = _where(better, new, best), _where(better, best, new)
    if len(held) < finish:
        held.append(new)


def _where(rows: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors whose samples are those of `yes` where rows [B], else those of `no`."""
    pairs = zip(yes, no, strict=True)
    return tuple(torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs)


def forwards(count: int, step: int, steps: int) -> tuple[int, int]:
    """Forwards of the generator for a sample: of best of `count`, one of them finished, and to finish all."""
    return count * step + steps - step, count * steps
