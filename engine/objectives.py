"""The losses: flow matching, the reward of a graded denoising step, and those of reward training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine import chain, flow, phases
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig, LossConfig, MoreReward, RolloutConfig
from prfl_engine.errors import check
from prfl_engine.guidance import Guidance
from prfl_engine.model.experts import Experts
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.start import Start
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks, with_first_frame

Generator = WanTransformer | Experts


def bind(
    model: Generator | Start,
    batch: Batch,
    context: Tensor | None = None,
    run_blocks: RunBlocks = plain_blocks,
) -> chain.Velocity:
    """The model with the batch's context: a velocity for the denoising chain.

    The context tokens are computed once here, with gradient if that is enabled, unless they are given.
    """
    if context is None:
        context = model.embed_context(batch.text, batch.clip)

    def velocity(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        if len(active) == len(context):
            return model(x, t, context, batch.condition, run_blocks)
        rows = active.to(x.device, non_blocking=True)
        condition = None if batch.condition is None else batch.condition[rows]
        return model(x, t, context[rows], condition, run_blocks)

    return velocity


def fixed(model: Generator, batch: Batch, x: Tensor) -> Tensor:
    """x [B, C, T, H, W], where a chain of the batch begins or ends, with the first frame that is given to a
    ti2v model in its place. A chain that begins so keeps it: the velocity of that frame is 0."""
    return with_first_frame(x, batch.condition) if _is_fixed(model, batch) else x


def _is_fixed(model: Generator, batch: Batch) -> bool:
    """Whether the first frame of the latents is given."""
    return model.config.model_type == "ti2v" and batch.condition is not None


def chain_velocity(model: Generator, batch: Batch, guidance: Guidance | None) -> chain.Velocity:
    """The model with the batch's context, guided as steps without gradient are."""
    if guidance is None:
        return bind(model, batch)
    batch = guidance.both(batch)
    return guidance.velocity(partial(bind, model), batch, model.embed_context(batch.text, batch.clip))


def sft_loss(
    model: Generator,
    batch: Batch,
    noise: Tensor,
    sigma: Tensor,
    run_blocks: RunBlocks = plain_blocks,
    t: Tensor | None = None,
) -> Tensor:
    """Flow matching at noise levels sigma [B] (for two experts on the CPU): mean of (v(x_t) - (eps - x_0))^2
    [B], per sample, over all frames but one that is given to a ti2v model. t [B]: the timesteps that the
    model is given; None: 1000 sigma."""
    return anchored_sft_loss(model, None, batch, noise, sigma, run_blocks, t)[0]


def anchored_sft_loss(
    model: Generator,
    start: Start | None,
    batch: Batch,
    noise: Tensor,
    sigma: Tensor,
    run_blocks: RunBlocks = plain_blocks,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(sft_loss, the distance [B] of its velocities to those of the start; None without one)."""
    x, rows = flow.add_noise(batch.latent, noise, sigma), torch.arange(len(sigma))
    t = flow.TRAIN_STEPS * sigma if t is None else t
    known = None if start is None else bind(start, batch)(x, t, rows)
    velocity = bind(model, batch, run_blocks=run_blocks)(x, t, rows)
    free = slice(1, None) if _is_fixed(model, batch) else slice(None)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return flow.distance(a[:, :, free], b[:, :, free])

    return apart(velocity, noise - batch.latent), None if known is None else apart(velocity, known)


def noisy_reward(
    reward: RewardModel,
    batch: Batch,
    noise: Tensor,
    sigma: Tensor,
    run_blocks: RunBlocks = plain_blocks,
    t: Tensor | None = None,
) -> Tensor:
    """Logits [B] of the batch's latents at noise levels sigma [B]; t as sft_loss takes it."""
    x = flow.add_noise(batch.latent, noise, sigma)
    t = flow.TRAIN_STEPS * sigma if t is None else t
    return reward(x, t, batch.text, batch.clip, batch.condition, run_blocks)


def noisy_rewards(
    reward: RewardModel, batch: Batch, noise: Tensor, timesteps: Sequence[float]
) -> Tensor:
    """Logits [B, n] of the batch's latents under one noise at n timesteps, 1000 times the noise level."""
    levels = (torch.full((len(noise),), t / flow.TRAIN_STEPS, device=noise.device) for t in timesteps)
    return torch.stack([noisy_reward(reward, batch, noise, level) for level in levels], 1)


def whole_schedule(
    rollout: RolloutConfig, dtype: torch.dtype | None = None, first: int = 0
) -> flow.Schedule:
    """The steps of a chain from the noise on, or from step `first`; as flow.make_schedule makes them."""
    return flow.make_schedule(
        rollout.solver, rollout.steps, rollout.shift, dtype, first, rollout.sigmas
    )


def schedule_of(rollout: RolloutConfig, dtype: torch.dtype | None = None) -> flow.Schedule:
    """The steps of a chain that is trained on: all, or with rollout.start data those from the first in
    rollout.sigma_range on. dtype: what latents are rounded to."""
    return whole_schedule(rollout, dtype, _skipped(rollout))


def chain_steps(rollout: RolloutConfig) -> int:
    """The steps of schedule_of(rollout)."""
    return rollout.steps - _skipped(rollout)


def train_levels(rollout: RolloutConfig, dtype: torch.dtype | None = None) -> flow.Levels:
    """The noise levels that flow matching and reward training draw from; UserError where none are. dtype:
    what latents are rounded to."""
    levels = flow.Levels(rollout.shift, rollout.whole_timesteps, dtype, *rollout.sigma_range)
    given = list(rollout.sigma_range)
    check(len(levels.sigmas) > 0, "rollout.sigma_range", given, "one with noise levels to train at")
    return levels


def start_of(rollout: RolloutConfig, schedule: flow.Schedule, latent: Tensor, noise: Tensor) -> Tensor:
    """Where chains of latents [B, C, T, H, W] begin: at the noise, or with rollout.start data at the latents
    with noise of the first level of `schedule`, which is that of schedule_of."""
    if rollout.start == "noise":
        return noise
    return flow.add_noise(latent, noise, schedule.sigmas[:1].expand(len(latent)))


def steps_inside(rollout: RolloutConfig) -> tuple[int, int]:
    """First step of schedule_of(rollout) in rollout.sigma_range, and the one after the last."""
    first, end = _inside(rollout)
    return first - _skipped(rollout), end - _skipped(rollout)


def index_range(rollout: RolloutConfig) -> tuple[int, int]:
    """First and last step of schedule_of(rollout) that may be graded: in rollout.sigma_range, and never the
    last of the chain, since its result has no timestep to be scored at. UserError where there are none."""
    first, end = _inside(rollout)
    n, skipped, levels = min(end, rollout.steps - 1) - first, _skipped(rollout), list(rollout.sigma_range)
    want = f"one with some of the {rollout.steps - 1} steps that can be graded"
    check(n > 0, "rollout.sigma_range", levels, want)
    if not isinstance(rollout.range, str):
        inside = first <= rollout.range[0] and rollout.range[1] < first + n
        want = f"[first, last] within {first}..{first + n - 1}, the steps of rollout.sigma_range = {levels}"
        check(inside, "rollout.range", list(rollout.range), want)
        return rollout.range[0] - skipped, rollout.range[1] - skipped
    parts = {
        "all": (0, n),
        "early": (0, -(-n // 3)),
        "middle": (n // 3, -(-2 * n // 3)),
        "late": (2 * n // 3, n),
    }
    begin, end = parts[rollout.range]
    return first - skipped + begin, first - skipped + end - 1


def _skipped(rollout: RolloutConfig) -> int:
    """How many steps of the whole chain come before those of schedule_of."""
    if rollout.start == "noise":
        return 0
    return _inside(rollout)[0]


@cache
def _inside(rollout: RolloutConfig) -> tuple[int, int]:
    """First step of the whole chain at a noise level in a range, and the one after the last. As in the
    official code a step is at its whole timestep."""
    with torch.device("cpu"):
        timesteps = whole_schedule(rollout).timesteps.double()
    found = flow.within(timesteps, *rollout.sigma_range).nonzero().flatten().tolist()
    return (found[0], found[-1] + 1) if found else (0, 0)


class GradedWindow:
    """A window of denoising steps with gradient, ending with the graded step, and the reward after it.

    `logits` are those of every reward, each [n B] of n draws, the first of them at the noise level that the
    step leaves; `distance` [B] is that of the graded step's velocity to the frozen start's, None where it is
    not computed; `backward(loss)` backpropagates a loss of all.
    """

    def __init__(self, window: chain.Window, logits: list[Tensor], context: Tensor, leaf: Tensor):
        """leaf: what the steps take in place of the model's context tokens `context`."""
        self.logits, self.distance = logits, window.distance
        self._window, self._context, self._leaf = window, context, leaf

    @property
    def logit(self) -> Tensor:
        """The logits of the first reward."""
        return self.logits[0]

    def backward(self, loss: Tensor) -> None:
        """Add the whole gradient of a loss to .grad of the parameters: through the graded step, the steps of
        the window before it, and the embedding of the context. Frees the window, of which the values of
        `logits` and `distance` stay; RuntimeError the second time."""
        self._window.backward(loss)
        self.logits = [logit.detach() for logit in self.logits]
        self.distance = None if self.distance is None else self.distance.detach()
        gradient, self._leaf.grad = self._leaf.grad, None
        if gradient is not None:  # the graph of the embedding serves every window of the rollout
            self._context.backward(gradient, retain_graph=True)


@dataclass(frozen=True)
class Grader:
    """What grades denoising steps: the models, the schedule, and how their blocks run; see graded_windows."""

    model: Generator
    reward: RewardModel
    schedule: flow.Schedule
    config: ChainConfig = ChainConfig()
    stretches: Callable[[Batch, Tensor], Callable[[], chain.Velocity]] | None = None
    run_blocks: RunBlocks = plain_blocks
    score_blocks: RunBlocks = plain_blocks
    together: chain.Together | None = None
    guidance: Guidance | None = None
    more: tuple[RewardModel, ...] = ()  # further rewards
    draws: int = 1  # noise levels that rewards score at

    @property
    def rewards(self) -> tuple[RewardModel, ...]:
        """All of them."""
        return self.reward, *self.more

    @property
    def window(self) -> int:
        """Steps with gradient in the longest window."""
        return len(self.schedule) if self.config.window == "all" else self.config.window


class Grading:
    """A grader with the context of a batch, which is embedded once for all of its graded steps."""

    def __init__(
        self,
        grader: Grader,
        batch: Batch,
        start: Start | None = None,
        draw: Callable[[Tensor], Tensor] | None = None,
    ):
        """start: what the velocities of graded steps are compared with; draw(x): noise like x for several
        draws of a grader, None for one draw."""
        g, self.draw = grader, draw
        self.grader = grader
        self.batch, self.condition, prompts = batch, batch.condition, batch
        if g.guidance is not None:
            batch = g.guidance.both(batch)
        self.context = g.model.embed_context(batch.text, batch.clip)
        self.leaf = self.context.detach().requires_grad_(self.context.requires_grad)
        self.scored = [reward.embed_context(prompts.text, prompts.clip) for reward in g.rewards]
        self.stretch = None if g.stretches is None else g.stretches(batch, self.leaf)
        models = g.model, g.model if g.together is None else g.together.model
        bound, rolled = (partial(bind, model, run_blocks=g.run_blocks) for model in models)
        known = None if start is None else start.embed_context(batch.text, batch.clip)
        if g.guidance is None:
            self.velocity, self.plain = bound(batch, self.leaf), rolled(batch, self.leaf)
            self.anchor = None if start is None else bind(start, batch, known)
            return
        guided = partial(g.guidance.velocity, batch=batch)
        self.anchor = None
        if start is not None:
            self.anchor = guided(partial(bind, start), context=known, with_gradient=True)
        self.velocity = guided(bound, context=self.leaf, with_gradient=True)
        # Between the steps of a window: with the scales of its steps, without their gradient.
        self.plain = guided(rolled, context=self.leaf, with_gradient=True)
        if self.stretch is None and (g.guidance.at_once or g.guidance.rollout != g.guidance.graded):
            plain = guided(rolled, context=self.leaf.detach())
            self.stretch = lambda: plain

    def way(self, start: Tensor | list[list[flow.SolverState | None]]) -> chain.Chain:
        """The chain of the batch from `start`, as chain.Chain takes it."""
        g = self.grader
        return chain.Chain(self.velocity, g.schedule, start, self.stretch, g.together, self.plain)

    def windows(
        self, start: Tensor | list[list[flow.SolverState | None]], indices: Tensor
    ) -> Iterator[GradedWindow]:
        """The windows of one rollout from noise or from known states, see graded_windows."""
        if isinstance(start, Tensor):
            start = fixed(self.grader.model, self.batch, start)
        way = self.way(start)
        yield from map(partial(self.grade, way), indices)  # no window lives here while the next is made

    def grade(self, way: chain.Chain, index: Tensor) -> GradedWindow:
        """The window that ends with steps index [B] of a chain of `way`."""
        g = self.grader
        window = way.graded(index, g.window, g.config.detach_input, self.anchor)
        phases.mark("reward")
        phases.count("reward", window.x)
        logits, noisy = [], list(self._noisy(window.x, index))
        for reward, context in zip(g.rewards, self.scored, strict=True):
            found = [reward.score(x, t, context, self.condition, g.score_blocks) for x, t in noisy]
            logits.append(found[0] if len(found) == 1 else torch.cat(found))
        return GradedWindow(window, logits, self.context, self.leaf)

    def _noisy(self, x: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(latents, timesteps) of all draws from the results x of steps index [B]."""
        g = self.grader
        yield x, g.schedule.timesteps[index + 1].to(x.device, non_blocking=True)
        if g.draws == 1:
            return
        sigma, noise = g.schedule.sigmas[index + 1], self.draw(x).to(x.dtype)
        for j in range(1, g.draws):
            to = sigma + (1 - sigma) * j / g.draws
            t = (flow.TRAIN_STEPS * to).float().to(x.device, non_blocking=True)
            yield flow.rounded(flow.add_more_noise(x, noise, sigma, to), g.schedule.dtype), t


def graded_windows(
    model: Generator,
    reward: RewardModel,
    schedule: flow.Schedule,
    batch: Batch,
    noise: Tensor,
    indices: Tensor,
    config: ChainConfig = ChainConfig(),  # noqa: B008 - frozen
    stretches: Callable[[Batch, Tensor], Callable[[], chain.Velocity]] | None = None,
    run_blocks: RunBlocks = plain_blocks,
    score_blocks: RunBlocks = plain_blocks,
    guidance: Guidance | None = None,
    start: Start | None = None,
) -> Iterator[GradedWindow]:
    """The graded steps indices[0], indices[1], ... of one rollout from noise, one window after another.

        for window in graded_windows(...):
            window.backward(loss(window.logit))

    A graded step is the denoising step that carries gradient: the steps before its window run without, and
    its result is scored at the timestep that it has then, timesteps[index + 1]. indices [K, B] long, on the
    CPU, not decreasing along K. Every forward serves once: a graded step is the next step of the rollout as
    well. Backpropagate a window before taking the next one, or drop it; every window's gradient is whole in
    itself, so the loop may be left at any time. Text and image embeddings, the reward model's too, are
    computed once. Steps without gradient are made by stretches(batch, context) where it is given
    (`rollout.Rollout`); run_blocks runs the blocks of the generator in windows, score_blocks those of the
    reward model. guidance: of all of its steps; the reward model is not guided. start: what the velocities of
    graded steps are compared with.
    """
    given = model, reward, schedule, config, stretches, run_blocks, score_blocks, None, guidance
    grader = Grader(*given)
    return Grading(grader, batch, start).windows(noise, indices)


def stratified_indices(first: int, last: int, uniform: Tensor) -> Tensor:
    """Graded indices [K, B] of K samples of one rollout: the j-th is uniform in the j-th of K equal parts of
    first..last, so that all together are uniform and none is rolled out twice. uniform [K, B] in [0, 1)."""
    count = len(uniform)
    place = (torch.arange(count)[:, None] + uniform) * (last + 1 - first) / count
    return first + place.floor().long().clamp(max=last - first)


def reward_loss(logit: Tensor, loss: LossConfig | MoreReward) -> Tensor:
    """Loss [B] to be minimised, from reward logits [B]; see LossConfig.form."""
    if loss.form == "log":
        return -loss.weight * F.logsigmoid(logit)
    r = torch.sigmoid(logit)
    return -loss.weight * r if loss.form == "linear" else loss.weight * F.relu(loss.target - r)


def cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy [B] of sigmoid(logit) against labels 0 or 1 [B]."""
    return F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), reduction="none")


def bradley_terry(logit_win: Tensor, logit_lose: Tensor, ce_weight: float = 0.0) -> Tensor:
    """-log sigmoid(logit_win - logit_lose) [B], plus ce_weight times the mean cross-entropy (labels 1, 0)."""
    labels = F.softplus(-logit_win) + F.softplus(logit_lose)
    return F.softplus(logit_lose - logit_win) + ce_weight / 2 * labels
