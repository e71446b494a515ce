"""How often the phases of a training step run on average, and their model FLOPs (`model.flops`)."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prfl_engine.config import Config
from prfl_engine.config_method import scales
from prfl_engine.flow import TRAIN_STEPS
from prfl_engine.guidance import step_forwards
from prfl_engine.model.flops import costs
from prfl_engine.objectives import index_range, schedule_of, steps_inside, whole_schedule
from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.setup import Setup
from prfl_engine.rollout.choice import graded_rows, judged_step


def rollout_forwards(setup: Setup, groups: int = 1, padded: bool = False) -> float:
    """Forwards of one sample without gradient, on average, for all graded steps of a sample of a micro-batch.
    padded: `groups` ranks each make as many as the one that needs most."""
    r = setup.rollout
    first, last = index_range(r)
    steps, k = last + 1 - first, r.samples
    timesteps = schedule_of(r).timesteps
    each = step_forwards(r.guidance, setup.boundary, timesteps)
    total = 0.0
    if scales(setup.chain.guidance) != (1, 1) and setup.chain.unconditional == "detached":
        graded = _graded_forwards(setup, timesteps)
        total = _windows(setup, [n - 1 for n in graded])  # of halves of graded steps
    if r.mode == "persistent":  # a new chain makes the steps before the range
        between = (r.stride - 1) * sum(each[first : last + 1]) / steps
        return total + k * (between + sum(each[:first]) * r.stride / steps)
    judged, many, width = judged_step(r), groups if padded else 1, steps / k

    def made(i: int, part: int) -> float:
        """The chance that the graded step in one of k strata is not after step i."""
        return min(1.0, max(0.0, (i + 1 - first - part * width) / width))

    total += r.seeds * sum(each[:judged])
    for rows in graded_rows(r):
        *before, final = range(k)[rows]
        for i in range(judged, last):
            graded = sum(made(i, part) - made(i - 1, part) for part in before)
            total += each[i] * (1 - made(i, final) ** many - graded)
    return total


def graded_passes(setup: Setup) -> float:
    """Forwards with gradient, on average, for all graded steps of a sample."""
    scale, each = setup.chain.guidance, [1] * len(schedule_of(setup.rollout))
    if scales(scale) != (1, 1) and setup.chain.unconditional == "gradient":
        each = _graded_forwards(setup, schedule_of(setup.rollout).timesteps)
    return _windows(setup, each)


def _graded_forwards(setup: Setup, timesteps: Tensor) -> list[int]:
    """Forwards of a graded step at each of `timesteps`."""
    scale = setup.chain.guidance
    if {"graded step", "window"} & {*setup.beside} and scales(scale) != (1, 1):  # see Guidance.always
        return [2] * len(timesteps)
    return step_forwards(scale, setup.boundary, timesteps)


def start_forwards(setup: Setup) -> float:
    """Forwards of the frozen start, on average, for all graded steps of a sample: guided as they are."""
    first, last = index_range(setup.rollout)
    timesteps = schedule_of(setup.rollout).timesteps[first : last + 1]
    each = _graded_forwards(setup, timesteps)
    return setup.rollout.samples * sum(each) / len(each)


def expert_switches(setup: Setup, boundary: float) -> float:
    """How often, at most, the chains of a sample go from one of two experts to the other, on average: fresh
    ones there and back where they cross `boundary`, and of chains that persist every graded step."""
    r, chosen = setup.rollout, setup.experts
    if chosen == (True, True) and r.mode == "persistent":
        return r.samples
    if chosen != (True, True) and not setup.through_high:
        return 0.0
    first, last = index_range(r)
    steps = last + 1 - first
    if r.mode == "persistent":  # a new chain begins with the high-noise expert
        return 2 * r.samples * r.stride / steps
    low = schedule_of(r).timesteps < TRAIN_STEPS * boundary
    judged, chains = judged_step(r), len(graded_rows(r))
    crossing = r.seeds if judged and low[judged - 1] else 0  # seeds that are there before they are judged
    graded = min(1.0, int(low[first : last + 1].sum()) * r.samples / steps)  # the last of the strata says
    return 2 * (crossing + chains * graded)


def _windows(setup: Setup, each: Sequence[int]) -> float:
    """The sum of `each` over the steps with gradient, on average, for all graded steps of a sample: windows
    are cut at the noise."""
    first, last = index_range(setup.rollout)
    window = sum(sum(each[max(0, i + 1 - setup.window) : i + 1]) for i in range(first, last + 1))
    return setup.rollout.samples * window / (last + 1 - first)


def _trained_reward(setup: Setup) -> float:
    trunk = setup.config, setup.count
    return costs(setup.config, setup.latent[2:], 0, trunk, setup.lora is None).flops["reward"]


def validation_forwards(config: Config) -> int:
    """Forwards of the generator for a sample of a validation: of one expert alone its own steps."""
    r, boundary = config.rollout, config.model.boundary
    timesteps = schedule_of(r).timesteps[: steps_inside(r)[1]]
    if boundary is not None:
        timesteps = whole_schedule(r).timesteps
    return sum(step_forwards(config.eval.guidance, boundary, timesteps))


def probe_forwards(setup: Setup, last: int) -> int:
    """Forwards of a plain chain to step `last`."""
    timesteps = schedule_of(setup.rollout).timesteps[:last]
    return sum(step_forwards(setup.rollout.guidance, setup.boundary, timesteps))


def step_flops(setup: Setup, forwards: float | None = None) -> dict[str, float]:
    """Model FLOPs of one micro-batch on all ranks that share it, by phase: "flow matching", "rollout",
    "graded step", "reward", and the scores of several "seeds"; or of "reward training" alone. forwards: of
    one sample without gradient, made in fact; None: on average."""
    samples = setup.latent[0]
    if setup.trains is not None:
        return {REWARD_TRAINING: samples * setup.sides * _trained_reward(setup)}
    trunks = [(r.config or setup.config, r.blocks) for r in setup.scored]
    rank = 0 if setup.lora is None else setup.lora.rank
    config = replace(setup.config, num_layers=setup.count)
    cost = costs(config, setup.latent[2:], rank).flops
    found = {"flow matching": samples * cost["flow_matching"] if setup.sft else 0.0}
    if not trunks:
        return found
    rewards = [costs(config, setup.latent[2:], rank, trunk).flops for trunk in trunks]
    judged = sum(each["judged"] for each in rewards[:: setup.draws])  # seeds at one noise level
    return found | {
        "rollout": samples * (rollout_forwards(setup) if forwards is None else forwards) * cost["rollout"],
        **({"seeds": samples * setup.rollout.seeds * judged} if setup.rollout.seeds > 1 else {}),
        "graded step": samples * graded_passes(setup) * cost["graded"],
        "reward": samples * setup.rollout.samples * sum(each["reward"] for each in rewards),
    }
