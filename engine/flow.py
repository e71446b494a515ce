"""Flow matching: noise levels, training noise, and the Euler and UniPC samplers.

The path is x_t = (1 - sigma) x_0 + sigma eps with velocity v = eps - x_0, so x_0 = x - sigma v.

A sampler is a table. With m_t = x - sigma v the x_0 prediction at step i, both samplers are

    x_c    = a_x x + a_l x_last + a_0 m_0 + a_1 m_1 + a_t m_t      corrector
    x_next = b_x x_c + b_t m_t + b_0 m_0                           predictor

with coefficients that depend on the step alone. Euler has no corrector and only b_x = sigma'/sigma,
b_t = 1 - b_x; UniPC (Zhao et al., arXiv 2302.04867; order 2, variant bh2, x_0 prediction, lower
order in the first and last step, corrector from the second step on) fills all of them. A step is
therefore a differentiable linear function of an explicit state; nothing is hidden in an object,
any step can be recomputed, and the samples of a batch may be at different steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_engine.config import Config
from prfl_engine.errors import check
from prfl_kernels.solver_step import solver_step

SIGMA_MAX = 0.999  # the largest sigma of a table of 1000 steps, before shifting
TRAIN_STEPS = 1000


def shift_sigma(u, shift: float):
    """Move noise levels u in [0, 1] towards 1: shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The noise level that shift_sigma moves to `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def within(t: Tensor, low: float, high: float) -> Tensor:
    """Which timesteps are at noise levels in [low, high); 1000 is in [low, 1]."""
    return (t >= TRAIN_STEPS * low) & ((t < TRAIN_STEPS * high) | (high == 1))


def train_sigmas(shift: float) -> Tensor:
    """The 1000 training noise levels [1000], float32, from 1 downwards; timestep = 1000 sigma."""
    return shift_sigma(torch.linspace(1, 0, TRAIN_STEPS + 1, dtype=torch.float64), shift)[:-1].float()


def latent_dtype(config: Config) -> torch.dtype | None:
    """What latents, and the texts beside them, are rounded to; None: nothing."""
    return None if config.model.latent_dtype == "float32" else torch.bfloat16


def rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`a` in its own dtype with values that `dtype` has, its gradient too; None: as it is."""
    return a if dtype is None else a.to(dtype).to(a.dtype)


class Levels:
    """The noise levels of flow matching and of reward training: `sigmas` [n] falling, on the CPU,
    and the timesteps that the model is given with them.

    whole: timesteps without their fraction, by the float32 arithmetic of the official table, in which some
    are one less. dtype: what the level of a given timestep is rounded to. low, high: of all levels those
    whose timesteps are `within`, so that a model for this range alone is never given another.
    """

    def __init__(
        self,
        shift: float,
        whole: bool = False,
        dtype: torch.dtype | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ):
        self.whole, self.dtype, self.table = whole, dtype, train_sigmas(shift)
        if whole:
            self.table = shift_sigma(torch.linspace(1, 0, TRAIN_STEPS + 1), shift)[:-1]
        self.sigmas = self.table[within(self.timestep(self.table), low, high)]

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps [B] of noise levels [B]."""
        t = TRAIN_STEPS * sigma
        return t.floor() if self.whole else t

    def at(self, t: float, name: str) -> float:
        """The noise level of a timestep; `name` is the field that it is from. UserError where whole timesteps
        of the table have to be given and it has not this one."""
        sigma = torch.tensor(t / TRAIN_STEPS)
        if self.whole:
            steps = self.timestep(self.table)
            near = steps[(steps - t).abs().argmin()].item()
            want = f"timesteps of the schedule, such as {near:g}, with rollout.whole_timesteps"
            check(near == t, name, t, want)
            sigma = self.table[steps == t][0]
        return rounded(sigma, self.dtype).item()


def add_noise(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) latent + sigma noise for sigma [B], on any device, and latents [B, ...]."""
    sigma = sigma.to(latent.device, latent.dtype, non_blocking=True).view(-1, *[1] * (latent.dim() - 1))
    return (1 - sigma) * latent + sigma * noise


def add_more_noise(x: Tensor, noise: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """Latents x [B, ...] at noise levels sigma [B] brought to the levels `to` [B], sigma <= to <= 1, both in
    float64 on the CPU: of x = (1 - sigma) x_0 + sigma e it has the distribution of (1 - to) x_0 + to e."""
    keep = (1 - to) / (1 - sigma)
    more = (to.square() - (keep * sigma).square()).clamp(min=0).sqrt()
    keep, more = (a.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1)) for a in (keep, more))
    return keep * x + more * noise


def distance(velocity: Tensor, other: Tensor) -> Tensor:
    """Mean of the squared differences of a sample's values [B], of velocities [B, C, T, H, W]."""
    return (velocity - other).square().flatten(1).mean(1)


class SolverState(NamedTuple):
    """All that a sampler carries from step to step; every field [B, C, T, H, W]."""

    x: Tensor  # the sample to be denoised next
    x_last: Tensor  # the corrected sample of the previous step
    m0: Tensor  # the x_0 prediction of the previous step
    m1: Tensor  # the one before

    def select(self, index: Tensor) -> "SolverState":
        """The samples of the batch that index (long or bool, [B]) picks."""
        return SolverState(*(a[index] for a in self))


def init_state(noise: Tensor) -> SolverState:
    """The state before the first step; the unset history is zero and meets zero coefficients."""
    zero = torch.zeros_like(noise)
    return SolverState(noise, zero, zero, zero)


@dataclass(frozen=True)
class Schedule:
    """A sampler of n steps: sigmas [n + 1] (the last is 0), timesteps [n], table [n, 9], on the CPU."""

    sigmas: Tensor
    timesteps: Tensor
    table: Tensor  # columns: sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0
    dtype: torch.dtype | None = None  # what samples are rounded to; the x_0 predictions are not

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(
    solver: str,
    steps: int,
    shift: float,
    dtype: torch.dtype | None = None,
    first: int = 0,
    levels: Sequence[float] = (),
) -> Schedule:
    """Schedule of `solver` ("euler" or "unipc") with steps >= 1 and shift > 0; ValueError otherwise. dtype:
    what samples are rounded to after every step; None: nothing is. Of its steps those from `first` on, for a
    chain that begins there, without a history. levels: noise levels of all steps, in place of shift's."""
    if solver not in ("euler", "unipc"):
        raise ValueError(f"solver: got {solver!r}, want euler or unipc")
    if steps < 1 or shift <= 0:
        raise ValueError(f"schedule: got {steps} steps and shift {shift}, want steps >= 1 and shift > 0")
    u = torch.linspace(SIGMA_MAX, 0, steps + 1, dtype=torch.float64)[:-1]
    starts = torch.tensor(levels, dtype=torch.float64) if levels else shift_sigma(u, shift)
    sigmas = torch.cat([starts, torch.zeros(1, dtype=torch.float64)])[first:]
    timesteps = (TRAIN_STEPS * sigmas[:-1]).floor().float()
    row = _euler_row if solver == "euler" else _unipc_row
    table = torch.tensor([row(sigmas.tolist(), i) for i in range(steps - first)], dtype=torch.float64)
    return Schedule(sigmas, timesteps, table, dtype)


def step(schedule: Schedule, state: SolverState, velocity: Tensor, index: Tensor) -> SolverState:
    """One denoising step from the velocity predicted at state.x.

    velocity [B, C, T, H, W]; index [B] long, on the CPU: the step that each sample is at.
    Differentiable with respect to the velocity and every field of the state.
    """
    x = state.x
    columns = schedule.table[index].to(x.device, x.dtype, non_blocking=True)
    x_next, x_c, m_t = solver_step(*state, velocity, columns)
    x_next, x_c = rounded(x_next, schedule.dtype), rounded(x_c, schedule.dtype)
    return SolverState(x_next, x_c, m_t, state.m0)


def _euler_row(sigmas: list[float], i: int) -> list[float]:
    ratio = sigmas[i + 1] / sigmas[i]
    return [sigmas[i], 1, 0, 0, 0, 0, ratio, 1 - ratio, 0]


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log((1 - sigma) / sigma)


def _unipc_row(sigmas: list[float], i: int) -> list[float]:
    lam = [_log_snr(s) for s in sigmas]
    order = 1 if i in (0, len(sigmas) - 2) else 2

    # Predictor from sigma_i to sigma_{i+1}:
    # x' = (s'/s) x_c - alpha' phi m_t - alpha' phi D / 2, D = (m_0 - m_t) / r, in order 1 without D.
    h = lam[i + 1] - lam[i]
    alpha_phi = (1 - sigmas[i + 1]) * math.expm1(-h)
    b_x, b_t, b_0 = sigmas[i + 1] / sigmas[i], -alpha_phi, 0.0
    if order == 2:
        b_0 = -0.5 * alpha_phi * h / (lam[i - 1] - lam[i])
        b_t -= b_0
    if i == 0:
        return [sigmas[i], 1, 0, 0, 0, 0, b_x, b_t, b_0]

    # Corrector at sigma_i, from sigma_{i-1}, in the order of the predictor that led here:
    # x_c = (s/s_0) x_last - alpha phi m_0 - alpha phi R.
    h = lam[i] - lam[i - 1]
    phi = math.expm1(-h)
    alpha_phi = (1 - sigmas[i]) * phi
    if i == 1:  # R = (m_t - m_0) / 2
        rho_last, rho_old, r = 0.5, 0.0, 1.0
    else:  # R = rho_0 (m_1 - m_0) / r + rho_1 (m_t - m_0)
        r = (lam[i - 2] - lam[i - 1]) / h
        b0 = (phi / -h - 1) / phi
        b1 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
        rho_old = (b0 - b1) / (1 - r)
        rho_last = b0 - rho_old
    a_t = -alpha_phi * rho_last
    a_1 = -alpha_phi * rho_old / r
    a_0 = -alpha_phi - a_t - a_1
    return [sigmas[i], 0, sigmas[i] / sigmas[i - 1], a_0, a_1, a_t, b_x, b_t, b_0]
