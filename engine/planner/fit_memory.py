"""The plan of a training run: from its configuration, models and data to the policies of the blocks."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from prfl_engine.config import Config
from prfl_engine.flow import SolverState
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import Precision, WanConfig, WanTransformer
from prfl_engine.planner.plan import Plan, plan
from prfl_engine.planner.setup import ROUND, RewardSetup, Setup, Validation


def fit_memory(
    config: Config,
    model: WanTransformer,
    reward: RewardModel | None,
    shapes: Sequence[tuple[int, ...]],
    held_out: Sequence[tuple[int, ...]] = (),
) -> Plan:
    """The plan for model.recompute = auto:GB.

    shapes [16, T, H, W] are those of the latents of training; held_out are those that a validation samples,
    in their order (none: no validation). UserError where nothing fits, or the validation does not.
    """
    rewarding = None
    if reward is not None:
        trunk, pool = reward.transformer, reward.pool
        rewarding = RewardSetup(
            reward.feature_layer, trunk.config, len(pool.queries), pool.multihead_attn.num_heads,
            pool.add_query,
        )  # fmt: skip
    on_cpu = next(model.parameters()).device.type == "cpu"
    setup = setup_of(config, model.config, model.precision, rewarding, shapes, held_out, on_cpu)
    host = float("inf") if config.model.host is None else 1e9 * config.model.host
    return plan(setup, config.model.budget, host, config.model.costs)


def setup_of(
    config: Config,
    model: WanConfig,
    precision: Precision,
    reward: RewardSetup | None,
    shapes: Sequence[tuple[int, ...]],
    held_out: Sequence[tuple[int, ...]] = (),
    on_cpu: bool = False,
) -> Setup:
    """What PRFL as configured takes; shapes as `fit_memory` takes them."""
    c, counts = config, Counter(shapes)
    latent = max(((min(c.data.batch_size, n), *shape) for shape, n in counts.items()), key=math.prod)
    validation = _validation(c, held_out, reward is not None, on_cpu) if held_out else None
    setup = Setup(
        model, latent, precision.compute, precision.residual, precision.weights, reward,
        c.loss.weight > 0, c.loss.sft_weight > 0, c.rollout, c.chain, chunk=c.model.chunk,
        keep=c.model.keep, lora=c.lora if c.lora.rank else None, validation=validation,
        sequence=c.parallel.sequence,
        grad_dtype=torch.float32 if c.optim.grad_dtype == "float32" else None,
        arriving=c.optim if c.optim.in_backward else None,
    )  # fmt: skip
    if setup.reward_blocks and c.rollout.mode == "persistent":
        chains = c.pool if c.rollout.pool_place == "device" else 0
        setup = replace(setup, pool=pool_bytes(setup, chains), drawn=pool_bytes(setup, 0))
    return setup


def pool_bytes(setup: Setup, chains: int) -> int:
    """Bytes of so many chains that persist on the device, the states that a window needs and the prompt; and
    of the prompts of those that are graded."""
    c, (size, *shape) = setup.config, setup.latent
    held = setup.window if setup.chain.window == setup.window else setup.window + 1  # after a graded step
    states = [math.prod(shape)] * (len(SolverState._fields) * held)
    prompt = [c.text_len * c.text_dim]
    prompt += [IMAGE_TOKENS * IMAGE_DIM, 20 * math.prod(shape[1:])] if c.image else []

    def rounded(values: list[int]) -> int:
        return sum(-(-4 * n // ROUND) * ROUND for n in values)

    return chains * rounded(states + prompt) + size * rounded(prompt)


def _validation(
    config: Config, shapes: Sequence[tuple[int, ...]], scored: bool, on_cpu: bool
) -> Validation:
    """Of eval.samples of these latents."""
    e, shapes = config.eval, [shapes[i % len(shapes)] for i in range(config.eval.samples)]
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    latent = max(((min(e.batch_size, n), *shape) for shape, n in runs), key=math.prod)
    batches = sum(-(-n // e.batch_size) for _, n in runs)
    values = batches * (1 + scored * len(e.timesteps))
    if not on_cpu:
        return Validation(latent, scored, batches, values)
    kept = min(-(-min(e.videos, e.samples) // e.batch_size), batches - 1)
    return Validation(latent, scored, batches, values, kept, latent[0] + 1)
