"""How often the phases of a training step run on average, and their model FLOPs (`model.flops`)."""

from dataclasses import replace

from prfl_engine.config import Config
from prfl_engine.config_method import scales
from prfl_engine.flow import TRAIN_STEPS
from prfl_engine.model.flops import costs
from prfl_engine.objectives import index_range, schedule_of, steps_inside, train_levels
from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.setup import Setup


def rollout_forwards(setup: Setup, groups: int = 1, padded: bool = False) -> float:
    """Forwards of one sample without gradient, on average, for all graded steps of a sample of a micro-batch.
    padded: `groups` ranks each make as many as the one that needs most."""
    r = setup.rollout
    first, last = index_range(r)
    steps, k, halves = last + 1 - first, r.samples, 2 if scales(r.guidance) != (1, 1) else 1
    constant = scales(setup.chain.guidance) != (1, 1) and setup.chain.unconditional == "detached"
    more = _windows(setup) if constant else 0  # of halves of graded steps
    if r.mode == "persistent":  # a new chain makes the steps before the range
        return more + halves * k * (r.stride - 1 + first * r.stride / steps)
    before, width = (k - 1) * steps / k, steps / k  # the last of k strata
    many = groups if padded else 1
    below = (min(1.0, max(0.0, (i + 1 - before) / width)) for i in range(steps))
    return more + halves * (first + sum(1 - share**many for share in below) + 1 - k)


def graded_passes(setup: Setup) -> float:
    """Forwards with gradient, on average, for all graded steps of a sample."""
    both = scales(setup.chain.guidance) != (1, 1) and setup.chain.unconditional == "gradient"
    return (1 + both) * _windows(setup)


def both_asked(config: Config, setup: Setup, readers: int) -> tuple[float, float]:
    """How often, on average, some of `readers` groups of processes ask one of two experts and some the other
    in a pass of flow matching, and in a graded step."""
    if not all(setup.experts or (False,)):
        return 0.0, 0.0
    r, samples = setup.rollout, setup.latent[0]
    levels, boundary = train_levels(r), TRAIN_STEPS * config.model.boundary
    first, last = index_range(r) if setup.reward_blocks else (0, 0)
    alike = readers if r.one_index == "turn" else r.one_index
    drawn = samples if r.mode == "persistent" else readers * samples
    if alike and alike % readers == 0:
        drawn = 1
    found = []
    for timesteps, count in (
        (levels.timestep(levels.sigmas), readers * samples),
        (schedule_of(r).timesteps[first : last + 1], drawn),
    ):
        share = (timesteps >= boundary).double().mean().item()
        found.append(1 - share**count - (1 - share) ** count)
    return found[0], found[1]


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
    levels = schedule_of(r).timesteps[first : last + 1]
    low = int((levels < TRAIN_STEPS * boundary).sum())
    return 2 * min(1.0, low * r.samples / steps)  # the last of the strata says


def _windows(setup: Setup) -> float:
    """Steps with gradient, on average, for all graded steps of a sample: windows are cut at the noise."""
    first, last = index_range(setup.rollout)
    window = sum(min(setup.window, i + 1) for i in range(first, last + 1)) / (last + 1 - first)
    return setup.rollout.samples * window


def _trained_reward(setup: Setup) -> float:
    trunk = setup.config, setup.count
    return costs(setup.config, setup.latent[2:], 0, trunk, setup.lora is None).flops["reward"]


def validation_forwards(config: Config) -> int:
    """Forwards of the generator for a sample of a validation: of one expert alone its own steps."""
    r = config.rollout
    steps = r.steps if config.model.boundary is not None else steps_inside(r)[1]
    return steps * (2 if scales(config.eval.guidance) != (1, 1) else 1)


def step_flops(setup: Setup, forwards: float | None = None) -> dict[str, float]:
    """Model FLOPs of one micro-batch on all ranks that share it, by phase: "flow matching", "rollout",
    "graded step", "reward"; or of "reward training" alone. forwards: of one sample without gradient, made in
    fact; None: on average."""
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
    scored = sum(costs(config, setup.latent[2:], rank, trunk).flops["reward"] for trunk in trunks)
    return found | {
        "rollout": samples * (rollout_forwards(setup) if forwards is None else forwards) * cost["rollout"],
        "graded step": samples * graded_passes(setup) * cost["graded"],
        "reward": samples * setup.rollout.samples * scored,
    }
