"""When the gradients of an optimizer step are clipped, when they are applied, and when the average moves.

Usually once: everything is added up, clipped and applied. The official script (HY-Video-PRFL, train_prfl.py)
clips what has been added up after every backward (optim.clip_each), and updates twice (loss.split): before
the reward gradient of the last micro-batch, and after it. Its average moves after every micro-batch
(train.ema_each).
"""

import torch
from torch import Tensor

from prfl_engine.config import Config
from prfl_engine.optim.optimizer import EMA, clip_gradients, lr_factor, set_lr, update
from prfl_engine.phases import mark


class Updates:
    """The updates of a run. In every optimizer step: `begin`, `after` every backward, `end`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: Config,
        ema: EMA | None,
        micro_batches: int,
        split: bool,
    ):
        """micro_batches: those of this process in an optimizer step; split: two updates in it."""
        self.optimizer, self.config, self.ema = optimizer, config.optim, ema
        self.split, self.micro_batches = split, micro_batches
        self.each = config.train.ema_each == "micro_batch"
        self.count = 2 if self.split else 1  # in an optimizer step
        self.horizon = config.optim.horizon or self.count * config.train.steps
        self.norm: Tensor | None = None  # largest before clipping, of the updates of this step
        self.seen: Tensor | None = None  # before the last clipping that was not by an update
        self.lr = 0.0  # of the last update, of the first group

    def begin(self, step: int) -> None:
        """Optimizer step `step`, counted from 0."""
        self.norm, self.number = None, self.count * step
        if self.ema is not None and self.each:
            self.ema.update(self.micro_batches - 1)  # the weights change with the last one alone

    def after(self, number: int, last: bool) -> None:
        """After backward `number` of a micro-batch, from 0; last: of the last micro-batch."""
        o = self.config
        if o.clip_each:
            self.seen = self._clip()
        if self.split and last and number == 0:
            self._update()

    def end(self) -> Tensor:
        """The (last) update; returns the norm of the gradient before clipping, the largest of the step,
        0-dim on the device."""
        self._update()
        if self.ema is not None:
            self.ema.update()
        return self.norm

    def _clip(self) -> Tensor:
        groups = self.optimizer.param_groups if self.config.clip_heads else self.optimizer.param_groups[:1]
        return clip_gradients([p for group in groups for p in group["params"]], self.config.clip)

    def _update(self) -> None:
        mark("optimizer")
        o = self.config
        if not o.clip_each and not o.clip_heads:
            self.seen = self._clip()
        factor = lr_factor(self.number, self.horizon, o)
        set_lr(self.optimizer, factor)
        self.lr, self.number = self.optimizer.param_groups[0]["base_lr"] * factor, self.number + 1
        norm = update(self.optimizer, o.clip if o.clip_heads else None)
        if self.seen is not None:  # that of what is clipped, unless something else is not finite
            norm, self.seen = torch.where(norm.isfinite(), self.seen, norm), None
        self.norm = norm if self.norm is None else torch.maximum(self.norm, norm)
