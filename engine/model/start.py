"""The frozen start of a training, the generator as it was, and the leash to it: how far the velocities of the
one that is trained are from those of the start.

    d = mean over elements of (v(x, t) - v_0(x, t))^2

at the states that graded steps begin with (guided as they are), and at the samples of flow matching. v_0 is a
constant, also where the window of a graded step gives a gradient to x. A reward that is hacked moves d.

With LoRA it is the trained model with its updates left out, which takes no bytes; what lora.path starts from
is left out, too. Where the weights are trained, it is a copy: on the device, or on the host, from where its
blocks come for every forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl_engine.model import lora
from prfl_engine.model.experts import Experts
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks


class Start:
    """Called as the generator is, without gradient. A forward of it comes before the one that it is compared
    with, so that it meets none of the activations that this one saves."""

    def __init__(
        self, model: WanTransformer | Experts, bring: Callable[[set[int]], None] | None = None
    ):
        """model: the trained one with updates, or a frozen copy; bring: called with {0} before a forward and
        with nothing after it (memory.idle.Idle); None: the copy is always there."""
        self.model, self.bring = model, bring

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
        if self.bring is not None:
            self.bring({0})
        with lora.left_out(self.model):
            velocity = self.model(x, t, context, condition, run_blocks)
        if self.bring is not None:
            self.bring(set())
        return velocity


@dataclass(frozen=True)
class Anchor:
    """The start, and in which optimizer steps the distance to it is computed."""

    start: Start
    weight: float
    every: int

    def at(self, step: int) -> Start | None:
        """What optimizer step `step`, counted from 0, is compared with; None: it is not."""
        return self.start if self.weight > 0 or (step + 1) % self.every == 0 else None
