"""Classifier-free guidance of denoising steps: v = v_0 + s (v_1 - v_0), with v_1 given the prompt and v_0 the
negative text (Ho and Salimans 2022, arXiv 2207.12598).

A step then costs two forwards of the generator. They run one after the other, or as one batch of twice the
size. Where the scale is 1, as it may be of one expert of two, v is v_1 and v_0 is not computed. In a step
with gradient the half without the prompt may be a constant: then it saves nothing for backward, and
dv = s dv_1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.chain import Velocity
from prfl_engine.config import Config
from prfl_engine.config_method import Scale, scales
from prfl_engine.data import read_text
from prfl_engine.errors import UserError, check, named
from prfl_engine.flow import TRAIN_STEPS, latent_dtype, rounded
from prfl_engine.model.experts import Experts
from prfl_engine.model.wan import WanTransformer

Bind = Callable[[Batch, Tensor], Velocity]
"""Makes the velocity of a model from a batch and its context tokens."""


class Scales(NamedTuple):
    """The scale of guidance at timesteps from `boundary` on, and below; 1 is none."""

    high: float
    low: float
    boundary: float

    @property
    def none(self) -> bool:
        """Whether nothing is guided."""
        return self.high == self.low == 1

    def at(self, t: Tensor) -> Tensor:
        """The scales [N] at timesteps t [N], both on the CPU."""
        found = [self.high if value >= self.boundary else self.low for value in t.tolist()]
        return torch.tensor(found, dtype=torch.float64)


class Guided:
    """A guided velocity, of one for both halves or of one each."""

    def __init__(
        self, scales: Scales, velocity: Velocity, other: Velocity | int, gradient: bool, always: bool = False
    ):
        """velocity: of the prompts, other: without them. Or velocity is of both, in a batch of 2 `other`
        samples, the prompts first. gradient: whether the half without the prompt has one. always: compute
        that half in steps with gradient where the scale is 1, too."""
        self.scales, self.velocity, self.other, self.gradient = scales, velocity, other, gradient
        self.always = always
        # The work of the half without the prompt, by the phase that counts the other half.
        self.also = {"rollout": "rollout", "graded": "graded" if gradient else "rollout"}
        self.also |= {"earlier": "earlier"} if gradient else {}
        self.halves = 0  # of these, samples of the last call

    def __call__(self, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        scale = self.scales.at(t)
        rows = ((scale != 1) | (self.always and torch.is_grad_enabled())).nonzero().flatten()
        n = self.halves = len(rows)
        if n == 0:
            return self.velocity(x, t, active)
        every = n == len(t)
        at = slice(None) if every else rows.to(x.device, non_blocking=True)
        scale = scale[rows].view(-1, 1, 1, 1, 1).to(x.device, x.dtype, non_blocking=True)
        given = x[at], t[rows], active[rows]
        if isinstance(self.other, int):
            again = given[0], given[1], given[2] + self.other
            twice = (torch.cat(parts) for parts in zip((x, t, active), again, strict=True))
            whole, base = self.velocity(*twice).split([len(t), n])
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient):
                base = self.other(*given)
            whole = self.velocity(x, t, active)
        guided = base + scale * (whole[at] - base)
        return guided if every else whole.index_copy(0, at, guided)


@dataclass(frozen=True)
class Guidance:
    """How the steps of chains are guided. Whoever uses it gives `both` of a batch in place of the batch."""

    text: Tensor  # [n, text_dim], the negative text
    rollout: Scales  # of steps without gradient
    graded: Scales  # of steps with gradient
    gradient: bool = False  # whether the half without the prompt has one
    at_once: bool = False  # both halves in one batch
    always: bool = False  # both halves in all steps with gradient: ranks may ask different experts in one

    def both(self, batch: Batch) -> Batch:
        """The batch [2 B] of all samples with their prompts, and of all with the negative text."""
        longest = max(batch.text.shape[1], len(self.text))
        text, other = (F.pad(a, (0, 0, 0, longest - a.shape[-2])) for a in (batch.text, self.text))
        doubled = Batch(*(None if a is None else torch.cat([a, a]) for a in batch))
        return doubled._replace(text=torch.cat([text, other.to(text.dtype).expand_as(text)]))

    def velocity(self, bind: Bind, batch: Batch, context: Tensor, with_gradient: bool = False) -> Velocity:
        """The velocity of a step with gradient or of one without, from what `both` gives and its context
        tokens [2 B, S, C]."""
        scales, gradient = self.graded if with_gradient else self.rollout, with_gradient and self.gradient
        n = len(context) // 2
        if self.at_once and not scales.none and (gradient or not with_gradient):
            return Guided(scales, bind(batch, context), n, gradient, with_gradient and self.always)
        parts = (Batch(*(a if a is None else a[at] for a in batch)) for at in (slice(n), slice(n, None)))
        first, second = parts
        guided = bind(first, context[:n])
        if scales.none:
            return guided
        other = bind(second, context[n:] if gradient else context[n:].detach())
        return Guided(scales, guided, other, gradient, with_gradient and self.always)


def step_forwards(scale: Scale, boundary: float | None, timesteps: Tensor) -> list[int]:
    """Forwards of a step at each of `timesteps` [n]: two where its guidance is not 1."""
    found = Scales(*scales(scale), TRAIN_STEPS * (boundary or 0.0)).at(timesteps)
    return [1 + (value != 1) for value in found.tolist()]


def check_scales(config: Config, rollout: Scale, graded: Scale, field: str) -> tuple[Scales, Scales]:
    """These scales by timestep. UserError where one is not 1 and there is no negative text; `field` names
    the scale."""
    boundary = TRAIN_STEPS * (config.model.boundary or 0.0)
    found = Scales(*scales(rollout), boundary), Scales(*scales(graded), boundary)
    if config.data.negative_text is None and not all(scale.none for scale in found):
        raise UserError(f"data.negative_text: got null, want a .npy ({field} is not 1)")
    return found


def check_training(config: Config) -> str:
    """UserError where the guidance of the chains that a generator is trained on does not fit; returns the
    name of its scale."""
    r, c = config.rollout, config.chain
    if r.mode == "persistent":
        want = f"chain.guidance's {c.guidance} with rollout.mode persistent, whose steps are graded steps"
        check(scales(r.guidance) == scales(c.guidance), "rollout.guidance", r.guidance, want)
    field = "rollout.guidance" if scales(r.guidance) != (1, 1) else "chain.guidance"
    check_scales(config, r.guidance, c.guidance, field)
    return field


def guidance_of(
    config: Config, rollout: Scale, graded: Scale, model: WanTransformer | Experts, field: str
) -> Guidance | None:
    """The guidance with these scales, None where there is none. UserError as `check_scales`."""
    found = check_scales(config, rollout, graded, field)
    if all(scale.none for scale in found):
        return None
    with named("data.negative_text"):
        text = rounded(read_text(config.data.negative_text, model.config), latent_dtype(config))
    text = text.to(next(model.parameters()).device)
    gradient = config.chain.unconditional == "gradient"
    return Guidance(text, *found, gradient, config.rollout.guidance_at_once)


def training_guidance(
    config: Config, model: WanTransformer | Experts, always: bool = False
) -> Guidance | None:
    """That of the chains that a generator is trained on; always: as in Guidance. UserError where it does not
    fit."""
    field = check_training(config)
    made = guidance_of(config, config.rollout.guidance, config.chain.guidance, model, field)
    return made and replace(made, always=always)
