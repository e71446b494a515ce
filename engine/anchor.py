"""A leash on training: how far the generator's velocities are from those of its frozen start.

    d = mean over elements of (v(x, t) - v_0(x, t))^2

at the states that graded steps begin with (guided as they are), and at the samples of flow matching. v_0 is a
constant, also where the window of a graded step gives a gradient to x. A reward that is hacked moves d long
before samples look wrong.
"""

from dataclasses import dataclass

import torch

from prfl_engine.build import make_policy
from prfl_engine.config import Config
from prfl_engine.model.experts import Experts
from prfl_engine.model.start import Start
from prfl_engine.model.wan import WanTransformer
from prfl_engine.parallel import World


@dataclass(frozen=True)
class Anchor:
    """The start, and in which optimizer steps the distance to it is computed."""

    start: Start
    weight: float
    every: int

    def at(self, step: int) -> Start | None:
        """What optimizer step `step`, counted from 0, is compared with; None: it is not."""
        return self.start if self.weight > 0 or (step + 1) % self.every == 0 else None


def make_anchor(
    config: Config, policy: WanTransformer | Experts, device: torch.device, world: World
) -> Anchor | None:
    """That of a training, None without one. With LoRA the start is in `policy`; otherwise it is loaded or
    drawn as for the first step, wherever the run goes on from."""
    loss = config.loss
    if not loss.anchored:
        return None
    start = policy
    if not config.lora.rank:
        start = make_policy(config, None, device, world.shard).requires_grad_(False)
        start = world.place(start)
    return Anchor(Start(start, loss.anchor_place == "host"), loss.anchor, loss.anchor_every)
