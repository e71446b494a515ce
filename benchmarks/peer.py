"""The PRFL step of a checkout of HY-Video-PRFL, with our weights and data: what bench_step.py compares with.

The checkout's model, sampler, query attention and MLP run as they are, in the order of its train_prfl.py:
block checkpointing of policy and reward model as published (or none), weights of the reward model with
gradients, UniPC with the history of the rollout detached. Two things are replaced, since they run on CUDA
alone: flash_attention by torch's SDPA, and torch.cuda.amp.autocast inside the model by its counterpart on
the device. Left out, in its favour: barriers, cache and garbage collection, logging, the second optimizer
step. Its files are imported without their packages' __init__, which would load a VAE and text encoders.
"""

import argparse
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import WanTransformer
from prfl_engine.paths import a_path

PACKAGE = "diffusers_lite"


def load_module(checkout: Path, name: str) -> types.ModuleType:
    """A module of a checkout by its dotted name, without what the __init__ of its packages would load."""
    *parents, _ = full = name.split(".")
    file = checkout.joinpath(*full).with_suffix(".py")
    if not file.is_file():
        raise SystemExit(f"{file}: no such file, want a checkout of HY-Video-PRFL")
    for i in range(1, len(parents) + 1):
        package = types.ModuleType(".".join(parents[:i]))
        package.__path__ = [str(checkout.joinpath(*parents[:i]))]
        sys.modules.setdefault(package.__name__, package)
    try:
        return importlib.import_module(".".join(full))
    except ModuleNotFoundError as error:
        raise SystemExit(f"{file} needs the package {error.name}, which is not installed") from None


def new_folder(name: str) -> Path:
    """A folder that is to be written, a type of argparse, whose parser exits with 2 for one that is there."""
    path = a_path(name)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{name} exists, want a new name")
    return path


def _sdpa(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_) -> Tensor:
    """flash_attention for samples that are not padded, in the dtype that autocast gives the products."""
    dtype = v.dtype if torch.is_autocast_enabled(q.device.type) else q.dtype
    q, k, v = (a.to(dtype).transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Peer:
    """Policy, reward model and sampler of the checkout, holding the weights of ours."""

    def __init__(
        self,
        checkout: Path,
        policy: WanTransformer,
        reward: RewardModel,
        schedule: flow.Schedule,
        shift: float,
    ):
        code = load_module(checkout, f"{PACKAGE}.wan.modules.model")
        parts = load_module(checkout, f"{PACKAGE}.utils.network")
        sampler = load_module(checkout, f"{PACKAGE}.wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler
        self.device = next(policy.parameters()).device
        code.flash_attention = _sdpa
        code.amp = types.SimpleNamespace(
            autocast=lambda dtype=None, enabled=True: torch.autocast(self.device.type, enabled=False)
        )
        c = policy.config
        values = dict(
            model_type=c.model_type, text_len=c.text_len, in_dim=c.in_dim, dim=c.dim, ffn_dim=c.ffn_dim,
            freq_dim=c.freq_dim, text_dim=c.text_dim, out_dim=c.out_dim, num_heads=c.num_heads, eps=c.eps,
        )  # fmt: skip
        self.policy = code.WanModel(num_layers=len(policy.blocks), **values)
        self.policy.load_state_dict(policy.state_dict())
        self.trunk = code.WanModel(num_layers=len(reward.transformer.blocks), **values)
        self.trunk.head = None
        self.trunk.load_state_dict(reward.transformer.state_dict())
        code.WanModel.enable_teacache = False
        for name in ("patch_embedding", "text_embedding", "time_embedding", "time_projection"):
            getattr(self.trunk, name).requires_grad_(False)  # the blocks keep their gradients, as published
        heads = reward.pool.multihead_attn.num_heads
        self.pool = parts.QueryAttention(c.dim, 1, heads, 0.0, return_type="query")
        self.mlp = parts.MLP(c.dim).requires_grad_(False)
        self.pool.load_state_dict(reward.pool.state_dict())
        self.mlp.load_state_dict(reward.mlp.state_dict())
        for module in self.modules():
            module.to(self.device)
        self.layer, self.block = reward.feature_layer, code.WanAttentionBlock
        self.sampler = sampler(num_train_timesteps=flow.TRAIN_STEPS, shift=1, use_dynamic_shifting=False)
        self.steps, self.shift = len(schedule), shift

    def checkpoint_blocks(self) -> None:
        """Recompute every block in backward from here on, as the published configurations do."""
        for model in (self.policy, self.trunk):
            apply_activation_checkpointing(
                model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, self.block)
            )

    def losses(
        self, batch: Batch, noise: Tensor, sigma: Tensor, index: int, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """The flow-matching loss at sigma [1], then the reward's; backpropagate each before the next."""
        cast = torch.autocast(self.device.type, torch.bfloat16, dtype == torch.bfloat16)
        length = batch.latent[0, 0].numel() // 4

        def run(model: nn.Module, x: Tensor, t: Tensor, **more) -> Tensor:
            with cast:
                return model(list(x), t, list(batch.text), length, **more)[0]

        x = flow.add_noise(batch.latent, noise, sigma)
        velocity = run(self.policy, x, flow.TRAIN_STEPS * sigma)[None]
        yield (velocity.float() - (noise - batch.latent)).square().mean()

        self.sampler.set_timesteps(self.steps, device=self.device, shift=self.shift)
        times, x = self.sampler.timesteps, noise
        for i in range(index + 1):
            with torch.set_grad_enabled(i == index):
                velocity = run(self.policy, x, times[i][None])[None]
                x = self.sampler.step(velocity, times[i], x, return_dict=False)[0]
        more = dict(output_features=True, selected_layers=[self.layer])
        features = run(self.trunk, x, times[index + 1][None], **more)
        with cast:
            reward = torch.sigmoid(self.mlp(self.pool(features)))
        yield 0.1 * F.relu(2 - reward.squeeze()).mean()

    def modules(self) -> tuple[nn.Module, ...]:
        return self.policy, self.trunk, self.pool, self.mlp
