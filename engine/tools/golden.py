"""Compute the values of a golden folder, to compare this engine with other code.

A golden folder holds config.json, policy.safetensors, reward_transformer.safetensors,
query_attention.ckpt, mlp.ckpt and inputs.safetensors; the result has the keys of the folder's
expected.safetensors. Everything runs in float32 on the CPU.
"""

from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.bounds import Count, Natural, Positive, Probability, Section, Within, describe, hints
from prfl_engine.config import LossConfig
from prfl_engine.errors import UserError, check, named
from prfl_engine.inputs import check_file, read_json, read_tensors
from prfl_engine.model.checkpoint import build, with_heads
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.sources import check_blocks, stored
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.objectives import bind, graded_windows, reward_loss, sft_loss

FILES = (
    "config.json", "policy.safetensors", "reward_transformer.safetensors",
    "query_attention.ckpt", "mlp.ckpt", "inputs.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class RewardSpec(Section, name="reward"):
    """The section `reward` of a golden config.json."""

    num_blocks: Count
    feature_layer: Count
    num_heads: Count
    return_type: str | None


@dataclass(frozen=True)
class RolloutSpec(Section, name="rollout"):
    """The section `rollout`; mid_index is the graded step."""

    solver: Literal["unipc", "euler"]
    num_steps: Annotated[int, Within(2, 1000)]
    shift: Positive
    mid_index: Natural

    def __post_init__(self):
        super().__post_init__()
        check(
            self.mid_index <= self.num_steps - 2, "rollout.mid_index", self.mid_index,
            f"0 to {self.num_steps - 2}",
        )  # fmt: skip


@dataclass(frozen=True)
class SftSpec(Section, name="sft"):
    """The section `sft`: the noise level of the flow-matching loss."""

    sigma: Probability


@dataclass(frozen=True)
class Spec(Section, name=""):
    """What a golden config.json says in addition to the model's hyper-parameters."""

    reward: RewardSpec
    rollout: RolloutSpec
    sft: SftSpec
    forward_timestep: Annotated[float, Within(0, 1000)]


def compute(folder: str | Path) -> dict[str, Tensor]:
    """All values of expected.safetensors; UserError where the folder lacks or misstates something."""
    folder = Path(folder)
    for name in FILES:
        check_file(folder / name, "a golden folder")
    values = read_json(folder / "config.json", "a golden folder's config.json")
    with named(str(folder / "config.json")):
        check("model" in values, "model", values.get("model"), "a Wan transformer's hyper-parameters")
        spec = _section(Spec, values)
        config = WanConfig.from_values(values["model"], "model")
    inputs = _inputs(folder / "inputs.safetensors", config)
    with named(str(folder)):
        policy, reward = _models(folder, spec.reward, config)
    batch = Batch(
        inputs["latent"],
        inputs["text_states"],
        inputs.get("clip_features"),
        inputs.get("latent_condition"),
    )
    rollout = spec.rollout
    schedule = flow.make_schedule(rollout.solver, rollout.num_steps, rollout.shift)
    mid, noise = torch.tensor([rollout.mid_index]), inputs["noise"]
    out = {"timesteps": schedule.timesteps, "sigmas": schedule.sigmas.float()}

    with torch.no_grad():
        velocity = bind(policy, batch)
        t = torch.tensor([float(spec.forward_timestep)])
        out["forward"] = velocity(batch.latent, t, torch.arange(1))
        out["latent_mid"] = chain.rollout(velocity, schedule, noise, mid).x
        out["latent_next"] = chain.Chain(velocity, schedule, noise).graded(mid).x
        out["latent_final"] = chain.sample(velocity, schedule, noise)
        t_next = schedule.timesteps[mid + 1]
        context = reward.embed_context(batch.text, batch.clip)
        features = reward.transformer.features(
            out["latent_next"], t_next, context, batch.condition, reward.feature_layer
        )
        out["reward_features"], out["reward_pooled"] = features, reward.pool(features)

    sigma = torch.tensor([float(spec.sft.sigma)])
    out["sft_loss"] = sft_loss(policy, batch, noise, sigma).mean()
    out["sft_loss"].backward()
    out |= _gradients("sft", policy)
    (window,) = graded_windows(policy, reward, schedule, batch, noise, mid[None])
    out["reward"] = torch.sigmoid(window.logit)
    out["prfl_loss"] = reward_loss(window.logit, LossConfig()).mean()
    window.backward(out["prfl_loss"])
    out |= _gradients("prfl", policy)
    return {k: v.detach().float().contiguous() for k, v in out.items()}


def _section(cls: type, values: Any, name: str = "") -> Any:
    """A dataclass from those of the values that it has fields for; all of them are needed."""
    check(isinstance(values, dict), name or "config", values, "a mapping of fields")
    found = {}
    for field, kind in hints(cls).items():
        where = f"{name}.{field}".lstrip(".")
        check(field in values, where, None, describe(kind))
        found[field] = _section(kind, values[field], where) if is_dataclass(kind) else values[field]
    return cls(**found)


def _inputs(path: Path, config: WanConfig) -> dict[str, Tensor]:
    """The tensors of inputs.safetensors, their shapes and dtypes checked against one another."""
    inputs = read_tensors(path)
    latent = inputs.get("latent", torch.empty(0))
    video = tuple(latent.shape[2:]) if latent.dim() == 5 else (0, 0, 0)
    tokens = inputs["text_states"].shape[1] if inputs.get("text_states", latent).dim() == 3 else 0
    tokens = min(max(tokens, 1), config.text_len)
    want = {"latent": (1, config.out_dim, *video), "noise": (1, config.out_dim, *video),
            "text_states": (1, tokens, config.text_dim)}  # fmt: skip
    if config.image:
        channels = config.in_dim - config.out_dim
        want["latent_condition"] = 1, channels, *video
    if config.clip:
        want["clip_features"] = 1, IMAGE_TOKENS, IMAGE_DIM
    for key, shape in want.items():
        tensor = inputs.get(key)
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        good = tensor is not None and tensor.dtype == torch.float32 and tuple(tensor.shape) == shape
        if not good or 0 in shape:
            raise UserError(f"{path}: {key}: got {got}, want float32 {list(shape)}, none of them 0")
    for n, patch in zip(video, config.patch_size, strict=True):
        check(n % patch == 0, f"{path}: latent", list(latent.shape), f"multiples of {config.patch_size}")
    return inputs


def _models(folder: Path, spec: RewardSpec, config: WanConfig) -> tuple[WanTransformer, RewardModel]:
    def read(name: str, blocks: int, head: bool) -> WanTransformer:
        path = folder / name
        where = stored(path)
        check_blocks(where, path, blocks)
        return build(config, where, path, torch.float32, blocks=blocks, head=head)

    policy = read("policy.safetensors", config.num_layers, True)
    trunk = read("reward_transformer.safetensors", spec.num_blocks, False)
    heads = folder / "query_attention.ckpt", folder / "mlp.ckpt"
    reward = with_heads(trunk, *heads, spec.num_heads, spec.feature_layer, spec.return_type)
    return policy.set_precision(torch.float32), reward.freeze()


def _gradients(name: str, model: WanTransformer) -> dict[str, Tensor]:
    """The model's gradients, which are cleared, and their L2 norms, under {name}_grad.* and
    {name}_grad_norm.*."""
    out = {}
    for key, p in model.named_parameters():
        out[f"{name}_grad.{key}"], p.grad = p.grad, None
        out[f"{name}_grad_norm.{key}"] = out[f"{name}_grad.{key}"].norm()
    return out
