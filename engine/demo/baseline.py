"""The yardstick of the learned reward model: logistic regression on hand-made features of motion.

Both see the same thing, a noisy latent x_t = (1 - sigma) x_0 + sigma eps with sigma = t / 1000, and its
first frame without noise. One classifier is fit for every timestep, with fresh noise drawn on the training
latents at just that timestep: stronger than one classifier for all t, and more than the learned model is
given.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine.errors import check
from prfl_engine.metrics import progress
from prfl_engine.model.wan import with_first_frame

TIMESTEPS = (201, 400, 600, 800, 1000)
DRAWS = 2  # of noise on every training latent
# Channels of the codec, which stand in the order of their variance, four and four.
GROUP = 4
L2 = (1e-3, 1e-2, 1e-1)  # chosen for every t on a fifth of the training latents


def features(x: Tensor) -> Tensor:
    """Motion statistics [N, 13 C / 4] of latents [N, C, T >= 4, h, w], whatever their size.

    Of the first and second temporal differences and of the frames after the first themselves (they
    have channels of motion): the log energy of every group of channels; its mean, highest, lowest and
    spread over time; and how far successive differences go the same way.
    """
    out, d1 = [], x.diff(dim=2)
    for d in (d1, d1.diff(dim=2), x[:, :, 1:]):
        energy = _by_group(d.square()).add(1e-6).log()
        out += [energy.mean(2), energy.amax(2), energy.amin(2), energy.std(2)]
    along = _by_group(d1[:, :, 1:] * d1[:, :, :-1]) / _by_group(d1.square()).mean(2, keepdim=True)
    return torch.cat([*out, along.mean(2)], dim=1).double()


def _by_group(x: Tensor) -> Tensor:
    """Means over the pixels and the channels of a group: [N, C, T, h, w] -> [N, C / 4, T]."""
    return x.mean((3, 4)).unflatten(1, (-1, GROUP)).mean(2)


def handmade_logits(
    train_latents: Tensor,
    train_labels: Tensor,
    held_out: Sequence[Tensor],
    timesteps: Sequence[float] = TIMESTEPS,
    seed: int = 0,
) -> list[Tensor]:
    """Logits [N, n], at each of n timesteps, of every one of some held-out latents [N, C, T, h, w].

    The classifiers are fit to train_latents [M, C, T, h, w] with train_labels [M] of 0 and 1.
    """
    for name, latents in ("train_latents", train_latents), *(("held_out", x) for x in held_out):
        good = latents.ndim == 5 and latents.shape[1] % GROUP == 0 and latents.shape[2] >= 4
        check(good, name, list(latents.shape), "[N, C, T >= 4, h, w]")
    shape, want = list(train_labels.shape), list(train_latents.shape[:1])
    check(shape == want, "train_labels", shape, want)
    found: list[list[Tensor]] = [[] for _ in held_out]
    for t in progress(timesteps, "hand-made features"):
        check(0 <= t <= 1000, "timesteps", t, "numbers from 0 to 1000")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + round(t))
        seen = [features(_noisy(latents, t, generator)) for latents in held_out]
        train = [features(_noisy(train_latents, t, generator)) for _ in range(DRAWS)]
        weight = _choose_and_fit(train, train_labels.double(), generator)
        for logits, x in zip(found, seen, strict=True):
            logits.append(x @ weight[:-1] + weight[-1])
    return [torch.stack(logits, 1) for logits in found]


def _noisy(latents: Tensor, t: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(latents.shape, generator=generator)
    return with_first_frame((1 - t / 1000) * latents.float() + t / 1000 * noise, latents[:, :, :1])


def _choose_and_fit(draws: list[Tensor], labels: Tensor, generator: torch.Generator) -> Tensor:
    """The weights under the L2 that does best on a fifth of the latents, fit on all of them."""
    order = torch.randperm(len(labels), generator=generator)
    out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    part, part_labels = torch.cat([d[kept] for d in draws]), labels[kept].repeat(len(draws))
    left, left_labels = torch.cat([d[out] for d in draws]), labels[out].repeat(len(draws))
    scores = {l2: _accuracy(_fit(part, part_labels, l2), left, left_labels) for l2 in L2}
    return _fit(torch.cat(draws), labels.repeat(len(draws)), max(L2, key=scores.get))


def _fit(x: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Logistic regression on standardised features: mean cross-entropy + l2/2 |w|^2, by L-BFGS.

    Returns weights [D + 1] for the features as they come, the bias last.
    """
    mean, std = x.mean(0), x.std(0).clamp(min=1e-8)
    z = F.pad((x - mean) / std, (0, 1), value=1.0)
    w = torch.zeros(z.shape[1], dtype=z.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=150, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.binary_cross_entropy_with_logits(z @ w, labels) + l2 / 2 * w[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    w = w.detach()
    slope = w[:-1] / std
    return torch.cat([slope, w[-1:] - slope @ mean])


def _accuracy(weight: Tensor, x: Tensor, labels: Tensor) -> float:
    logit = x @ weight[:-1] + weight[-1]
    return ((logit > 0) == (labels > 0.5)).double().mean().item()
