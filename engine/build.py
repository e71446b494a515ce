"""From a configuration to a device, a generator and a reward model."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine.checkpoint_shards import INDEX
from prfl_engine.checks import check_base_idle
from prfl_engine.config import Config, LoraConfig, ModelConfig
from prfl_engine.errors import UserError, named, refusing
from prfl_engine.memory.frozen import Frozen
from prfl_engine.memory.idle import Idle
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import (
    Shard,
    load_reward,
    load_transformer,
    new_reward,
    save_transformer,
)
from prfl_engine.model.experts import HIGH, LOW, Experts, adapter_of, pair_at
from prfl_engine.model.reward import RewardModel, freeze_embeddings
from prfl_engine.model.start import Anchor, Start
from prfl_engine.model.wan import PRESETS, WanConfig, WanTransformer
from prfl_engine.parallel import World
from prfl_engine.seeds import Purpose, torch_seed
from prfl_kernels import dispatch, extension, tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(config: Config) -> torch.device:
    """The device of a run; the kernels that the configuration asks for are chosen on the way."""
    name = config.train.device
    if name in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"train.device: got {name!r}, but torch sees no CUDA GPU here")
        if device.index is not None:
            if device.index >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise UserError(f"train.device: got {name!r}, want one of the {count} GPUs that torch sees")
            torch.cuda.set_device(device)  # the one on which Triton launches and graphs are recorded
    if device.type == "cpu":
        extension.keep_freed_memory()
    with refusing("PRFL_KERNELS" if config.model.kernels is None else "model.kernels"):
        if config.model.kernels is not None:
            dispatch.configure(config.model.kernels)
        dispatch.check(device.type)
    with refusing():
        tuning.tuned()
    return device


def set_up(model: WanTransformer, config: ModelConfig) -> WanTransformer:
    """How the blocks of a model compute in training: chunks, compilation, precision."""
    model.set_chunk(config.chunk)
    if config.compile:
        model.compile_blocks()
    return model.set_precision(DTYPES[config.compute_dtype], DTYPES[config.residual_dtype])


def make_policy(
    config: Config, resume: Path | None, device: torch.device, shard: Shard | None = None
) -> WanTransformer | Experts:
    """The generator, weights in model.weights_dtype: from `resume`, from model.path, or random.

    With LoRA the checkpoint `resume` holds the adapter, which goes onto the generator of the other two. What
    a sharded checkpoint holds is loaded later, into the shards. shard: as load_transformer takes it. With
    model.boundary both experts, of which those that rollout.sigma_range has noise levels of are trained.
    """
    m = config.model
    if resume is not None and (resume / INDEX).is_file():
        resume = None
    lora.check_path(config.lora)
    frozen = Frozen(config.lora.storage, device)
    if m.boundary is None:
        source = m.path and Path(m.path)
        loads = device if source is None else frozen.loads
        return frozen.take(_generator(config, source, resume, config.lora, loads, shard))
    paths = (None, None) if m.path is None else pair_at(m.path, m.low)
    loads = device if m.path is None else frozen.loads
    trained, made = config.trained_experts, []
    idle = Idle(device) if m.idle == "host" else None
    for place, (folder, path) in enumerate(zip((HIGH, LOW), paths, strict=True)):
        adapter = replace(config.lora, path=adapter_of(config.lora.path, folder, all(trained)))
        if trained[place]:
            own = resume and resume / folder
            made.append(_generator(config, path, own, adapter, loads, shard, place))
        else:
            made.append(_generator(config, path, None, LoraConfig(), loads, shard, place))
            if config.lora.path is not None and (Path(config.lora.path) / folder).is_dir():
                lora.apply(made[-1], adapter.path)
            made[-1].requires_grad_(False)
        frozen.take(made[-1])
        if idle is not None:
            idle.take(made[-1])
    return Experts(*made, m.boundary, idle)


def make_anchor(
    config: Config, policy: WanTransformer | Experts, device: torch.device, world: World
) -> Anchor | None:
    """The leash of a training, None without one. With LoRA the start is in `policy`; otherwise it is loaded
    or drawn as for the first step, wherever the run goes on from."""
    loss, start, idle = config.loss, policy, None
    if not loss.anchored:
        return None
    if not config.lora.rank:
        start = world.place(make_policy(config, None, device, world.shard).requires_grad_(False))
    if loss.anchor_place == "host":
        idle = Idle(device)
        idle.take(start)
    return Anchor(Start(start, idle), loss.anchor, loss.anchor_every)


def trains_a_part(config: Config) -> bool:
    """Whether some weights of what is trained stay as they are: all with LoRA, or those of an expert."""
    return config.lora.rank > 0 or not all(config.trained_experts or (True,))


def load_generator(config: Config, device: torch.device) -> WanTransformer | Experts:
    """The generator of model.path for sampling, with the adapter of lora.path, or both experts with the
    adapter of each. Weights that are stored apart are in model.weights_dtype, as in training."""
    m, made = config.model, []
    frozen = Frozen(config.lora.storage, device)
    dtype = DTYPES[m.weights_dtype] if frozen.storage.apart else None

    def load(path: str | Path, adapter: str | None) -> WanTransformer:
        model = load_transformer(path, dtype, frozen.loads).eval()
        if adapter is not None:
            lora.apply(model, adapter)
        model.set_precision(DTYPES[m.compute_dtype], DTYPES[m.residual_dtype])
        return frozen.take(model.requires_grad_(False))

    check_base_idle(config)
    if m.boundary is None:
        return load(m.path, config.lora.path)
    idle = Idle(device) if m.idle == "host" else None
    for folder, path in zip((HIGH, LOW), pair_at(m.path, m.low), strict=True):
        made.append(load(path, adapter_of(config.lora.path, folder, both=True)))
        if idle is not None:
            idle.take(made[-1])
    return Experts(*made, m.boundary, idle)


def save_generator(
    model: WanTransformer | Experts, config: Config, folder: Path, values: dict[str, Tensor] | None = None
) -> None:
    """Write the trained parts of a generator, or in their place `values` by their names in it: of experts in
    a folder for each."""
    save = lora.save if config.lora.rank else save_transformer
    if not isinstance(model, Experts):
        save(model, folder, values)
        return
    for name, sub, expert in model.named_experts(trained=True):
        own = {k.removeprefix(f"{name}."): v for k, v in (values or {}).items() if k.startswith(f"{name}.")}
        save(expert, folder / sub, own)


def read_generator(
    model: WanTransformer | Experts, config: Config, folder: Path, device: torch.device
) -> dict[str, Tensor]:
    """What save_generator has written, in float32, by names in the model."""
    if isinstance(model, Experts):
        parts = {f"{name}.": folder / sub for name, sub, _ in model.named_experts(trained=True)}
    else:
        parts = {"": folder}
    found: dict[str, Tensor] = {}
    for prefix, path in parts.items():
        if config.lora.rank:
            own = lora.named(lora.read(path)[0])
        else:
            own = dict(load_transformer(path, torch.float32, device).named_parameters())
        found |= {prefix + k: a for k, a in own.items()}
    return found


def _generator(
    config: Config,
    source: Path | None,
    resume: Path | None,
    adapter: LoraConfig,
    device: torch.device,
    shard: Shard | None,
    place: int = 0,
) -> WanTransformer:
    """One transformer; `place` keys its random weights."""
    m = config.model
    if resume is not None and not adapter.rank:
        source = resume
    if source is not None:

        def attached(model: WanTransformer) -> object:
            if adapter.rank:
                lora.start(model, adapter, config.train.seed, resume)
            return shard(model)

        policy = load_transformer(source, DTYPES[m.weights_dtype], device, shard=shard and attached)
    else:
        if m.preset not in PRESETS:
            raise UserError(
                f"model.preset: got {m.preset!r}, want {', '.join(PRESETS)}, or set model.path"
            )
        with torch.device(device):
            policy = WanTransformer(PRESETS[m.preset])
        generator = torch.Generator(device).manual_seed(torch_seed(Purpose.WEIGHTS, config.train.seed, place))
        policy.init_weights(generator)
        policy.to(DTYPES[m.weights_dtype])
    if adapter.rank:
        lora.start(policy, adapter, config.train.seed, resume)
    return set_up(policy, m)


def make_more_rewards(
    config: Config, policy: WanTransformer | Experts, device: torch.device, shard: Shard | None = None
) -> list[RewardModel]:
    """The reward models of reward.more, as make_frozen_reward makes one."""
    made = []
    for name, own in config.reward.further:
        with named(f"reward.more {name}"):
            made.append(make_frozen_reward(replace(config, reward=own), policy, device, shard))
    return made


def make_frozen_reward(
    config: Config, policy: WanTransformer | Experts | None, device: torch.device, shard: Shard | None = None
) -> RewardModel:
    """The reward model of reward.path, frozen, stored as reward.weights and reward.place say, computing in
    the precision of the generator. policy: the one that it has to fit; None: any. UserError without
    reward.path, for files that do not fit, or for a model that does not fit `policy`."""
    r, m = config.reward, config.model
    if r.path is None:
        raise UserError("reward.path: got null, want the folder of a reward model")
    frozen = Frozen(r.storage, device)
    made = dict(dtype=DTYPES[m.weights_dtype], device=frozen.loads, shard=shard)
    reward = load_reward(r.path, **r.heads, **made, **r.pooling)
    if policy is not None:
        _check_fits(reward.transformer.config, policy.config)
    set_up(reward.freeze().transformer, m)
    if r.storage.apart:
        frozen.take(reward.transformer)
        reward.to(device)
    return reward


def _check_fits(theirs: WanConfig, ours: WanConfig) -> None:
    """UserError for a reward model that cannot score the latents of a generator."""
    # A T2V model scores the latents of an I2V generator, too, without its first frame.
    own = theirs.model_type != "t2v"
    names = ("model_type", "in_dim", "clip") if own else ()
    wanted = {name: getattr(ours, name) for name in (*names, "text_dim", "text_len")}
    wanted |= {} if own else {"in_dim": ours.out_dim}
    for name, want in wanted.items():
        got = getattr(theirs, name)
        if got != want:
            raise UserError(f"reward.path: {name} is {got!r}, want the generator's {want!r}")


def make_reward(
    config: Config,
    source: str | Path | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    shard: Shard | None = None,
) -> RewardModel:
    """The reward model of the folder `source`, or a new one on the first blocks of model.path.

    The weights of its transformer are in dtype, None: model.weights_dtype; those of the head in float32. The
    embeddings require no gradient unless reward.train_embeddings.
    """
    r, m = config.reward, config.model
    dtype = dtype or DTYPES[m.weights_dtype]
    if source is not None:
        heads = r.heads if source == r.path else {}
        made = dict(dropout=r.dropout, dtype=dtype, device=device, shard=shard)
        model = load_reward(source, **heads, **made, **r.pooling)
    else:
        if m.path is None:
            raise UserError("model.path: got null, want the generator that the reward starts from")
        trunk = load_transformer(m.path, dtype, device, trunk=True, blocks=r.blocks, shard=shard)
        torch.manual_seed(torch_seed(Purpose.REWARD_HEAD, config.train.seed))
        with torch.device(device):
            model = new_reward(trunk, r.blocks, r.num_queries, dropout=r.dropout, **r.pooling)
    if m.budget is not None:
        raise UserError(f"model.recompute: got {m.recompute!r} for a reward model, want a mode or names")
    if not r.train_embeddings:
        freeze_embeddings(model.transformer)
    set_up(model.transformer, m)
    return model
