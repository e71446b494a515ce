"""Several seeds of a sample: all are rolled out to an early step, and the one with the best contrast goes on.

A process reward scores a state at its own timestep, so a seed is known after a few steps, before most of its
chain is made. Every sample of a micro-batch chooses by itself, by numbers that the host reads, once a seed.
With `rollout.seeds_keep`

    steepest    the largest slope of the reward loss, sum over rewards of |dL / d logit|: of the forms hinge
                and linear the reward nearest to 1/2, of log the lowest one
    highest, lowest, median (of an even number the lower one)
    both        the highest and the lowest, in two chains that share the graded steps of the sample

by the mean of the rewards, weighted as in the loss. PRFL's loss compares no samples with each other. So what
contrast there is in a gradient comes from the slopes, and steepest takes the largest.

The chain that goes on does so from its own states, as if it had begun with this noise alone. It has all
states that its first window needs, so that steps before the judgement can be graded, too. States of seeds
that can no longer be chosen are dropped at once.
"""

from bisect import insort_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl_engine import phases
from prfl_engine.batch import Batch
from prfl_engine.chain import Chain, Together
from prfl_engine.config import Config, LossConfig, MoreReward, RolloutConfig
from prfl_engine.errors import check
from prfl_engine.flow import SolverState
from prfl_engine.objectives import Grading, chain_steps, fixed, index_range, reward_loss, start_of
from prfl_engine.seeds import Purpose, integers, noise_like, seed_position

States = list[list[SolverState | None]]
"""The known states of every sample, as Chain takes them."""


def judged_step(rollout: RolloutConfig) -> int:
    """Steps after which seeds are scored; 0 where there is one seed. UserError where no graded step comes
    after them."""
    if rollout.seeds == 1:
        return 0
    last = index_range(rollout)[1]
    if rollout.seeds_step is None:
        want = "1 where the first step of the chain is the only one that may be graded"
        check(last > 0, "rollout.seeds", rollout.seeds, want)
        return min(last, -(-chain_steps(rollout) // 4))
    want = f"1 to {last}, the last step that may be graded" if last else "null, and rollout.seeds 1"
    check(rollout.seeds_step <= last, "rollout.seeds_step", rollout.seeds_step, want)
    return rollout.seeds_step


def ranks(rollout: RolloutConfig) -> tuple[int, ...]:
    """The places of the seeds that go on, among all in rising order."""
    last = rollout.seeds - 1
    return {"lowest": (0,), "median": (last // 2,), "both": (last, 0)}.get(rollout.seeds_keep, (last,))


def graded_rows(rollout: RolloutConfig) -> list[slice]:
    """Which of a sample's rollout.samples graded steps the chain of each of `ranks` has."""
    count = len(ranks(rollout))
    return [slice(i, None, count) for i in range(count)]


@dataclass
class _Seed:
    """A seed of a sample."""

    place: float  # what seeds are ordered by
    states: list[SolverState | None]


def choose(
    rolled: Iterable[States],
    judge: Callable[[Tensor], tuple[Sequence[float], Sequence[float]]],
    count: int,
    kept: Sequence[int],
) -> tuple[list[States], list[list[float]]]:
    """(the states of the seeds that come in the places `kept` of all `count`; the rewards of all seeds of
    every sample, in the order of seeds). rolled: the states of every seed in turn, the last the newest;
    judge(x) gives what they are ordered by, and rewards, of the newest latents [B, C, T, H, W]. Of equal
    seeds the first has the highest place; NaN is above all."""
    samples: list[list[_Seed]] = []
    rewards: list[list[float]] = []
    for seed, states in enumerate(rolled):
        places, found = judge(_newest(states))
        samples, rewards = samples or [[] for _ in states], rewards or [[] for _ in states]
        left = count - 1 - seed
        for b, ranked in enumerate(samples):
            place = places[b] if places[b] == places[b] else float("inf")
            own = _Seed(place, states[b])
            insort_left(ranked, own, key=lambda s: s.place)
            rewards[b].append(found[b])
            for rank, other in enumerate(ranked):
                if not any(rank <= want <= rank + left for want in kept):
                    other.states = []
            own.states = own.states if len(samples) == 1 else copied(own.states)
        del states, own
    return [[ranked[place].states for ranked in samples] for place in kept], rewards


def copied(states: list[SolverState | None]) -> list[SolverState | None]:
    """States in memory of their own: those of a sample are parts of tensors that the whole batch shares."""
    return [None if state is None else SolverState(*map(torch.clone, state)) for state in states]


def _newest(states: States) -> Tensor:
    found = [own[-1].x for own in states]
    return found[0] if len(found) == 1 else torch.cat(found)


class Seeds:
    """The seeds of micro-batches."""

    def __init__(self, config: Config):
        """UserError where they cannot be judged before a graded step."""
        self.config, self.step = config, judged_step(config.rollout)

    def starts(
        self, grading: Grading, batch: Batch, key: int, indices: Tensor
    ) -> tuple[list[tuple[States, Tensor]], dict[str, Tensor]]:
        """(the chains of micro-batch `key`, each with its graded steps, some of indices [K, B]; metrics)."""
        c, r, g = self.config, self.config.rollout, grading.grader
        first = (indices[0] - (g.window - 1)).clamp(min=0, max=self.step)
        with ExitStack() as stack:
            together = g.together
            parts = [] if together is None else together.parts(g.schedule)
            asked = [i for i, (begin, end) in enumerate(parts) if begin < min(end, self.step)]
            if len(asked) == 1:  # one model for all seeds; of two experts every seed asks one, then the other
                stack.enter_context(together.rollout(r.seeds * self.step, asked[0]))
                together = None
            starts = self._noises(grading, batch, key)
            rolled = (self._rolled(grading, start, first, together) for start in starts)
            chosen, rewards = choose(rolled, lambda x: self._judge(grading, x), r.seeds, ranks(r))
        if len(chosen) > 1:  # the one with the earlier steps is either, by chance
            turns = integers(2, Purpose.SEED_TURN, c.train.seed, key * c.data.batch_size, len(batch.latent))
            for b in turns.nonzero().flatten().tolist():
                chosen[0][b], chosen[1][b] = chosen[1][b], chosen[0][b]
        found = torch.tensor(rewards, device=batch.latent.device)
        spread = found.amax(1) - found.amin(1)
        values = {"seed_reward": found.mean(), "seed_spread": spread.mean()}
        return list(zip(chosen, (indices[rows] for rows in graded_rows(r)), strict=True)), values

    def _noises(self, grading: Grading, batch: Batch, key: int) -> Iterator[Tensor]:
        """Where the chains of all seeds begin; that of the first as without further ones."""
        c, g, first = self.config, grading.grader, key * self.config.data.batch_size
        for seed in range(c.rollout.seeds):
            purpose = Purpose.SEED_NOISE if seed else Purpose.ROLLOUT_NOISE
            noise = noise_like(batch.latent, purpose, c.train.seed, seed_position(seed, first))
            start = start_of(c.rollout, g.schedule, batch.latent, noise)
            yield fixed(g.model, batch, start)

    def _rolled(self, grading: Grading, start: Tensor, first: Tensor, together: Together | None) -> States:
        g = grading.grader
        way = Chain(grading.velocity, g.schedule, start, grading.stretch, together, grading.plain)
        way.advance_to(torch.full_like(first, self.step), first)
        return way.states

    def _judge(self, grading: Grading, x: Tensor) -> tuple[list[float], list[float]]:
        """(what seeds are ordered by, rewards) of latents x [B, C, T, H, W] after the steps."""
        g, c = grading.grader, self.config
        t = g.schedule.timesteps[self.step].to(x.device, non_blocking=True).expand(len(x))
        forms, logits = (c.loss, *c.reward.more), []
        phases.count("judged", x)
        with torch.no_grad():
            for reward, context in zip(g.rewards, grading.scored, strict=True):
                logits.append(reward.score(x, t, context, grading.condition))
        weights = [form.weight for form in forms]
        found = sum(w * torch.sigmoid(a) for w, a in zip(weights, logits, strict=True)) / sum(weights)
        places = found
        if c.rollout.seeds_keep == "steepest":
            places = sum(slope(logit, form) for logit, form in zip(logits, forms, strict=True))
        return torch.stack([places, found]).tolist()


def slope(logit: Tensor, form: LossConfig | MoreReward) -> Tensor:
    """|dL / d logit| [B] of reward_loss, from logits [B]."""
    with torch.enable_grad():
        leaf = logit.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward_loss(leaf, form).sum(), leaf)
    return gradient.abs()
