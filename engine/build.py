"""From a configuration to a device, a generator and a reward model."""

import os
from pathlib import Path

import torch

from prfl_engine.checkpoint_shards import INDEX
from prfl_engine.config import Config, ModelConfig
from prfl_engine.errors import UserError, refusing
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import Shard, load_reward, load_transformer, new_reward
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import PRESETS, WanTransformer
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
) -> WanTransformer:
    """The generator, weights in model.weights_dtype: from `resume`, from model.path, or random.

    With LoRA the checkpoint `resume` holds the adapter, which goes onto the generator of the other two. What
    a sharded checkpoint holds is loaded later, into the shards. shard: as load_transformer takes it.
    """
    m = config.model
    if resume is not None and (resume / INDEX).is_file():
        resume = None
    lora.check_path(config.lora)
    source = Path(m.path) if m.path else None
    if resume is not None and not config.lora.rank:
        source = resume
    if source is not None:

        def attached(model: WanTransformer) -> object:
            if config.lora.rank:
                lora.start(model, config.lora, config.train.seed, resume)
            return shard(model)

        policy = load_transformer(source, DTYPES[m.weights_dtype], device, shard=shard and attached)
    else:
        if m.preset not in PRESETS:
            raise UserError(
                f"model.preset: got {m.preset!r}, want {', '.join(PRESETS)}, or set model.path"
            )
        with torch.device(device):
            policy = WanTransformer(PRESETS[m.preset])
        generator = torch.Generator(device).manual_seed(torch_seed(Purpose.WEIGHTS, config.train.seed))
        policy.init_weights(generator)
        policy.to(DTYPES[m.weights_dtype])
    if config.lora.rank:
        lora.start(policy, config.lora, config.train.seed, resume)
    return set_up(policy, m)


def make_frozen_reward(
    config: Config, policy: WanTransformer, device: torch.device, shard: Shard | None = None
) -> RewardModel:
    """The reward model of reward.path, frozen, computing in the precision of the policy."""
    r, m = config.reward, config.model
    if r.path is None:
        raise UserError("reward.path: got null, want the folder of a reward model (loss.weight > 0)")
    reward = load_reward(r.path, dtype=DTYPES[m.weights_dtype], device=device, shard=shard, **r.pooling)
    ours, theirs = policy.config, reward.transformer.config
    for name in ("model_type", "in_dim", "text_dim", "text_len"):
        got, want = getattr(theirs, name), getattr(ours, name)
        if got != want:
            raise UserError(f"reward.path: {name} is {got!r}, want the generator's {want!r}")
    set_up(reward.transformer, m)
    return reward.freeze()


EMBEDDINGS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb")


def freeze_embeddings(transformer: WanTransformer) -> None:
    """No gradient to the embeddings of patches, text, time and image from here on."""
    for name in EMBEDDINGS:
        if (part := getattr(transformer, name)) is not None:
            part.requires_grad_(False)


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
        model = load_reward(
            source, dropout=r.dropout, dtype=dtype, device=device, shard=shard, **r.pooling
        )
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
