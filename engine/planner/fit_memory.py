"""The plan of a training run: from its configuration, models and data to the policies of the blocks."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from prfl_engine.config import Config
from prfl_engine.config_method import scales
from prfl_engine.config_models import Storage
from prfl_engine.errors import UserError, check
from prfl_engine.flow import SolverState
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.lora_files import read
from prfl_engine.model.reward import QueryPool, RewardModel
from prfl_engine.model.wan import Precision, WanConfig, WanTransformer
from prfl_engine.planner.dry_run import rollout_bytes
from prfl_engine.planner.plan import Plan, plan
from prfl_engine.planner.seconds import Rates
from prfl_engine.planner.setup import RewardSetup, Setup, Validation
from prfl_engine.planner.sharded import Shards, gathered_bytes
from prfl_engine.planner.standing import models_of, pinned, rounded
from prfl_engine.rollout.choice import judged_step
from prfl_engine.together import asked


def fit_memory(
    config: Config,
    model: WanTransformer,
    rewards: Sequence[RewardModel],
    shapes: Sequence[tuple[int, ...]],
    held_out: Sequence[tuple[int, ...]] = (),
    shards: Shards = Shards(),  # noqa: B008 - never changed
) -> Plan:
    """The plan for model.recompute = auto:GB. rewards: the reward models, none or more.

    shapes [16, T, H, W] are those of the latents of training; held_out are those that a validation samples,
    in their order (none: no validation); shards: how processes share the work. UserError where nothing fits,
    or the validation does not.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    found = [_reward_setup(reward, config.reward.storage) for reward in rewards]
    readers = shards.size // shards.sequence
    setup = setup_of(config, model.config, model.precision, found, shapes, held_out, on_cpu, readers)
    return planned(config, setup, shards)


def _reward_setup(reward: RewardModel, storage: Storage) -> RewardSetup:
    trunk, pool = reward.transformer, reward.pool
    check_pooling("query" if isinstance(pool, QueryPool) else pool.kind, reward.layers)
    heads, queries = pool.multihead_attn.num_heads, len(pool.queries)
    return RewardSetup(reward.feature_layer, trunk.config, queries, heads, pool.add_query, storage)


def planned(
    config: Config, setup: Setup, shards: Shards, rates: Rates = Rates()  # noqa: B008 - never changed
) -> Plan:
    """The same from what a step takes. Resident weights count in a rollout, and where they stay in every
    pass."""
    m, resident = config.model, 0
    if shards.many:
        setup = replace(setup, sharding=shards.sharding(), grad_dtype=None, arriving=None)
        resident = gathered_bytes(models_of(setup, shards.shards), shards, setup.compute_dtype).resident
    if resident:
        needed = rollout_bytes(setup) + resident
        if needed > m.budget:
            raise UserError(
                f"model.recompute: got {m.recompute}, want at least auto:{-(-needed // 10**6) / 1e3:g}, or"
                " parallel.resident=false: a rollout with resident weights needs that much in addition to"
                " weights, gradients and optimizer states"
            )
    host = float("inf") if m.host is None else 1e9 * m.host
    if config.rollout.cuda_graph:
        setup = replace(setup, pool=setup.pool + resident)
    return plan(setup, m.budget, host, m.costs, rates)


def check_pooling(pool: str, layers: int | Sequence[int]) -> None:
    """UserError for a reward model that pools otherwise than by queries after one block."""
    one = isinstance(layers, int) or len(layers) == 1
    check(pool == "query", "reward.pool", pool, "query: the planner counts no other")
    check(one, "reward.feature_layer", layers, "one layer: the planner counts no more")


def setup_of(
    config: Config,
    model: WanConfig,
    precision: Precision,
    rewards: Sequence[RewardSetup],
    shapes: Sequence[tuple[int, ...]],
    held_out: Sequence[tuple[int, ...]] = (),
    on_cpu: bool = False,
    readers: int = 1,
) -> Setup:
    """What PRFL as configured takes; shapes as `fit_memory` takes them. readers: groups of processes with
    samples of their own, which share the chains that persist, and ask experts at the same time."""
    c, counts = config, Counter(shapes)
    latent = max(((min(c.data.batch_size, n), *shape) for shape, n in counts.items()), key=math.prod)
    validation = _validation(c, held_out, len(rewards), on_cpu) if held_out else None
    reward, more = (rewards[0], tuple(rewards[1:])) if rewards else (None, ())
    setup = Setup(
        model, latent, precision.compute, precision.residual, precision.weights, reward, more,
        c.reward.draws, c.loss.weight > 0, c.loss.sft_weight > 0, c.rollout, c.chain, chunk=c.model.chunk,
        keep=c.model.keep, lora=c.lora if c.lora.rank else None, storage=c.lora.storage,
        validation=validation,
        anchor=c.loss.anchor_place if c.loss.anchored else "none",
        sequence=c.parallel.sequence, experts=c.trained_experts, boundary=c.model.boundary,
        beside=asked(c, readers).beside, idle=c.model.idle == "host",
        first_frame=c.data.first_frame, lent=_lent(c.rollout.lora),
        grad_dtype=torch.float32 if c.optim.grad_dtype == "float32" else None,
        arriving=c.optim if c.optim.in_backward else None,
    )  # fmt: skip
    if setup.reward_blocks:
        judged_step(c.rollout)  # which refuses what it cannot be
    if setup.reward_blocks and c.rollout.mode == "persistent":
        chains, on_host = c.pool // readers, c.rollout.pool_place == "host"
        setup = replace(
            setup, pool=pool_bytes(setup, 0 if on_host else chains), drawn=pool_bytes(setup, 0)
        )
        if on_host:
            setup = replace(setup, pool_host=chains * sum(pinned(4 * n) for n in chain_values(setup)))
    return setup


def _lent(path: str | None) -> tuple[tuple[str, int], ...]:
    """The layers of the adapter of rollouts at a path, and their ranks."""
    if path is None:
        return ()
    return tuple((name, len(low.down)) for name, low in read(path)[0].items())


def chain_values(setup: Setup) -> list[int]:
    """Values of the tensors of a chain that persists: the states that a window needs, and the prompt."""
    held = setup.window if setup.chain.window == setup.window else setup.window + 1  # after a graded step
    return [math.prod(setup.latent[1:])] * (len(SolverState._fields) * held) + _prompt_values(setup)


def _prompt_values(setup: Setup) -> list[int]:
    c, (_, _, *shape) = setup.config, setup.latent
    prompt = [c.text_len * c.text_dim]
    prompt += [IMAGE_TOKENS * IMAGE_DIM] if c.clip else []
    prompt += [20 * math.prod(shape)] if c.image else []
    return prompt + ([setup.latent[1] * math.prod(shape[1:])] if setup.first_frame else [])


def pool_bytes(setup: Setup, chains: int) -> int:
    """Bytes of so many chains that persist on the device, and of the prompts of those that are graded."""

    def taken(values: list[int]) -> int:
        return sum(rounded(4 * n) for n in values)

    return chains * taken(chain_values(setup)) + setup.latent[0] * taken(_prompt_values(setup))


def _validation(
    config: Config, shapes: Sequence[tuple[int, ...]], rewards: int, on_cpu: bool
) -> Validation:
    """Of eval.samples of these latents, by so many rewards."""
    e, shapes = config.eval, [shapes[i % len(shapes)] for i in range(config.eval.samples)]
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    latent = max(((min(e.batch_size, n), *shape) for shape, n in runs), key=math.prod)
    batches = sum(-(-n // e.batch_size) for _, n in runs)
    compared = config.loss.start_there(config.lora.rank)
    values, scored = batches * (1 + compared + rewards * len(e.timesteps)), rewards > 0
    kept = read = 0
    if on_cpu:
        kept, read = min(-(-min(e.videos, e.samples) // e.batch_size), batches - 1), latent[0] + 1
    guided = scales(e.guidance) != (1, 1)
    return Validation(
        latent, scored, batches, values, kept, read, e.samples, guided=guided,
        at_once=config.rollout.guidance_at_once, compared=compared,
    )  # fmt: skip
