"""Compute what a golden folder asks for: the numbers of this engine beside those of another code.

A golden folder holds config.json, policy.safetensors, reward_transformer.safetensors,
query_attention.ckpt, mlp.ckpt and inputs.safetensors; the result has the keys of the folder's
expected.safetensors. Everything runs in float32 on the CPU.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.checkpoint import load_pickle, load_strict
from prfl_engine.config import LossConfig
from prfl_engine.dit import WanConfig, WanTransformer
from prfl_engine.errors import UserError
from prfl_engine.objectives import Batch, bind, graded_windows, reward_loss, sft_loss
from prfl_engine.reward import QueryPool, RewardModel

FILES = (
    "config.json", "policy.safetensors", "reward_transformer.safetensors",
    "query_attention.ckpt", "mlp.ckpt", "inputs.safetensors",
)  # fmt: skip


def compute(folder: str | Path) -> dict[str, Tensor]:
    """All values of expected.safetensors; UserError where the folder lacks or misstates something."""
    folder = Path(folder)
    try:
        return _compute(folder)
    except KeyError as error:
        raise UserError(f"{folder}: got no {error} in config.json or inputs.safetensors") from None


def _compute(folder: Path) -> dict[str, Tensor]:
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, want a golden folder")
    try:
        spec = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not JSON: {error}") from None
    inputs = load_file(folder / "inputs.safetensors")
    policy, reward = _models(folder, spec)
    batch = Batch(
        inputs["latent"],
        inputs["text_states"],
        inputs.get("clip_features"),
        inputs.get("latent_condition"),
    )
    if policy.config.image and (batch.clip is None or batch.condition is None):
        raise UserError(
            f"{folder}: an i2v model, want clip_features and latent_condition in inputs.safetensors"
        )
    rollout = spec["rollout"]
    schedule = flow.make_schedule(rollout["solver"], rollout["num_steps"], rollout["shift"])
    mid, noise = torch.tensor([rollout["mid_index"]]), inputs["noise"]
    out = {"timesteps": schedule.timesteps, "sigmas": schedule.sigmas.float()}

    with torch.no_grad():
        velocity = bind(policy, batch)
        t = torch.tensor([spec["forward_timestep"]])
        out["forward"] = velocity(batch.latent, t, torch.arange(1))
        out["latent_mid"] = chain.rollout(velocity, schedule, noise, mid).x
        out["latent_next"] = chain.Chain(velocity, schedule, noise).graded(mid).x
        out["latent_final"] = chain.sample(velocity, schedule, noise)
        t_next = schedule.timesteps[mid + 1]
        context = reward.transformer.embed_context(batch.text, batch.clip)
        features = reward.transformer.features(
            out["latent_next"], t_next, context, batch.condition, reward.feature_layer
        )
        out["reward_features"], out["reward_pooled"] = features, reward.pool(features)

    sigma = torch.tensor([spec["sft"]["sigma"]])
    out["sft_loss"] = sft_loss(policy, batch, noise, sigma).mean()
    out["sft_loss"].backward()
    out |= _gradients("sft", policy)
    (window,) = graded_windows(policy, reward, schedule, batch, noise, mid[None])
    out["reward"] = torch.sigmoid(window.logit)
    out["prfl_loss"] = reward_loss(window.logit, LossConfig()).mean()
    window.backward(out["prfl_loss"])
    out |= _gradients("prfl", policy)
    return {k: v.detach().float().contiguous() for k, v in out.items()}


def _models(folder: Path, spec: dict) -> tuple[WanTransformer, RewardModel]:
    config = WanConfig.from_values(spec["model"], folder / "config.json")
    policy = WanTransformer(config)
    load_strict(policy, load_file(folder / "policy.safetensors"), folder / "policy.safetensors")
    r = spec["reward"]
    trunk = WanTransformer(config, r["num_blocks"], head=False)
    path = folder / "reward_transformer.safetensors"
    load_strict(trunk, load_file(path), path)
    pool = QueryPool(
        config.dim, r["num_queries"], r["num_heads"], add_query=r["return_type"] == "query"
    )
    reward = RewardModel(trunk, pool, r["feature_layer"])
    for module, name in ((pool, "query_attention.ckpt"), (reward.mlp, "mlp.ckpt")):
        load_strict(module, load_pickle(folder / name), folder / name)
    return policy.set_precision(torch.float32), reward.freeze()


def _gradients(name: str, model: WanTransformer) -> dict[str, Tensor]:
    """The model's gradients, which are cleared, and their L2 norms, under {name}_grad.* and
    {name}_grad_norm.*."""
    out = {}
    for key, p in model.named_parameters():
        out[f"{name}_grad.{key}"], p.grad = p.grad, None
        out[f"{name}_grad_norm.{key}"] = out[f"{name}_grad.{key}"].norm()
    return out
