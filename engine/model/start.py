"""The frozen start of a training: the generator as it was, beside the one that is trained.

With LoRA it is the trained model with its updates left out, which takes no bytes; what lora.path starts from
is left out, too. Where the weights are trained, it is a copy: on the device, or on the host, from where its
blocks come for every forward (memory/idle.py).
"""

import torch
from torch import Tensor

from prfl_engine.memory.idle import Idle
from prfl_engine.model import lora
from prfl_engine.model.experts import Experts
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks


class Start:
    """Called as the generator is, without gradient. A forward of it comes before the one that it is compared
    with, so that it meets none of the activations that this one saves."""

    def __init__(self, model: WanTransformer | Experts, host: bool = False):
        """model: the trained one with updates, or a frozen copy; host: whether its blocks wait there."""
        self.model, self.idle = model, None
        if host:
            self.idle = Idle(next(model.parameters()).device)
            self.idle.take(model)

    @torch.no_grad()
    def embed_context(self, text: Tensor, clip: Tensor | None = None) -> Tensor:
        """As WanTransformer.embed_context."""
        with lora.left_out(self.model):
            return self.model.embed_context(text, clip)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """The velocity, as WanTransformer.forward gives it."""
        if self.idle is not None:
            self.idle({0})
        with lora.left_out(self.model):
            velocity = self.model(x, t, context, condition, run_blocks)
        if self.idle is not None:
            self.idle(set())
        return velocity
