"""AdamW, its learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prfl_engine.config import OptimConfig


def make_optimizer(groups: list[tuple[nn.Module, float]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over (module, learning rate) groups; only parameters that require gradients."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "base_lr": lr}
            for module, lr in groups
        ],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0) of `steps`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


class EMA:
    """Exponential moving average of a module's parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.average = {k: p.detach().float().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        now = [p.float() for p in self.module.parameters()]
        torch._foreach_lerp_(list(self.average.values()), now, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged weights, inside a with block."""
        own: dict[str, Tensor] = {}
        with torch.no_grad():
            for k, p in self.module.named_parameters():
                own[k] = p.data
                p.data = self.average[k].to(p.dtype)
        try:
            yield
        finally:
            for k, p in self.module.named_parameters():
                p.data = own[k]
