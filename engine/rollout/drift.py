"""Measures how far an accelerated rollout ends from a plain one."""


import torch
from torch import Tensor

from prfl_engine.batch import Batch, to_device
from prfl_engine.metrics import note
from prfl_engine.objectives import start_of
from prfl_engine.rollout.accelerated import Rollout
from prfl_engine.seeds import Purpose, noise_like


class DriftMeter:
    """Measures the drift of a rollout on a fixed sample in due time; turns its acceleration off and on."""

    def __init__(self, rollout: Rollout, sample: Batch, index: int, seed: int, save_every: int):
        """sample: a batch of one, on the CPU; index: the step before which latents are compared;
        save_every: optimizer steps between checkpoints."""
        self.rollout, self.sample, self.index = rollout, sample, torch.tensor([index])
        noise = noise_like(sample.latent, Purpose.DRIFT, seed, 0)
        self.start = start_of(rollout.config, rollout.schedule, sample.latent, noise)
        self.periods = rollout.config.probe_every, save_every
        self.drift: Tensor | None = None  # as measured last
        self.step: int | None = None

    def begin(self, step: int) -> None:
        """To be called before every rollout of optimizer step `step`, counted from 0.

        Where a period ends in a step without a rollout, the next one with a rollout probes.
        """
        before, self.step, self.rollout.version = self.step, step, step
        if before is not None and all(before // period == step // period for period in self.periods):
            return
        device = next(self.rollout.model.parameters()).device
        sample = to_device(self.sample, device)
        self.drift = self.rollout.drift(sample, self.start.to(device), self.index)
        drift, limit, before = self.drift.item(), self.rollout.config.max_drift, self.rollout.accelerated
        self.rollout.accelerated = drift <= limit
        if self.rollout.accelerated != before:
            now = "accelerated again" if self.rollout.accelerated else "plain until it is below"
            note(f"step {step}: rollout drift {drift:.3g}, rollout.max_drift {limit:g}: rollouts are {now}")

    def values(self) -> dict[str, Tensor]:
        """For the metrics: the drift measured last, and 1 where rollouts are accelerated, else 0."""
        on = torch.full_like(self.drift, self.rollout.accelerated)
        return {"rollout_drift": self.drift, "rollout_accelerated": on}
