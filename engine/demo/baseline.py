"""The yardstick of the learned reward model: a linear comparison of hand-made features of motion.

Both see the same two things, noisy latents x_t = (1 - sigma) x_0 + sigma eps of two videos with sigma = t /
1000, the same noise and the same first frame without noise, and say which of them moves steadily. One
comparison is fit for every timestep, with fresh noise drawn on the training latents at just that timestep:
stronger than one for all t, and more than the learned model is given.
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
L2 = (1e-3, 1e-2, 1e-1)  # chosen for every t on a fifth of the training pairs


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


def handmade_margins(
    win: Tensor,
    lose: Tensor,
    held_out: Sequence[tuple[Tensor, Tensor]],
    timesteps: Sequence[float] = TIMESTEPS,
    seed: int = 0,
) -> list[Tensor]:
    """By how much, at each of n timesteps, the first of every held-out pair is preferred, [N, n] for each
    of some (win, lose) of latents [N, C, T, h, w]: positive is right.

    The comparisons are fit to training pairs win and lose [M, C, T, h, w].
    """
    given = {"win": win, "lose": lose}
    for i, pair in enumerate(held_out):
        given |= {f"held_out[{i}].win": pair[0], f"held_out[{i}].lose": pair[1]}
    for name, latents in given.items():
        good = latents.ndim == 5 and latents.shape[1] % GROUP == 0 and latents.shape[2] >= 4
        check(good, name, list(latents.shape), "[N, C, T >= 4, h, w]")
    for a, b in (win, lose), *held_out:
        check(a.shape == b.shape, "lose", list(b.shape), f"the shape of win, {list(a.shape)}")
    found: list[list[Tensor]] = [[] for _ in held_out]
    for t in progress(timesteps, "hand-made features"):
        check(0 <= t <= 1000, "timesteps", t, "numbers from 0 to 1000")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + round(t))
        seen = [_differences(*pair, t, generator) for pair in held_out]
        train = [_differences(win, lose, t, generator) for _ in range(DRAWS)]
        weight = _choose_and_fit(train, generator)
        for margins, x in zip(found, seen, strict=True):
            margins.append(x @ weight)
    return [torch.stack(margins, 1) for margins in found]


def _differences(win: Tensor, lose: Tensor, t: float, generator: torch.Generator) -> Tensor:
    """Features of the winners less those of the losers, both under one noise."""
    noise = torch.randn(win.shape, generator=generator)

    def seen(latents: Tensor) -> Tensor:
        noisy = (1 - t / 1000) * latents.float() + t / 1000 * noise
        return features(with_first_frame(noisy, latents[:, :, :1]))

    return seen(win) - seen(lose)


def _choose_and_fit(draws: list[Tensor], generator: torch.Generator) -> Tensor:
    """The weights under the L2 that does best on a fifth of the pairs, fit on all of them."""
    order = torch.randperm(len(draws[0]), generator=generator)
    out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    part, left = (torch.cat([d[some] for d in draws]) for some in (kept, out))
    scores = {l2: (left @ _fit(part, l2) > 0).double().mean().item() for l2 in L2}
    return _fit(torch.cat(draws), max(L2, key=scores.get))


def _fit(x: Tensor, l2: float) -> Tensor:
    """Bradley-Terry on differences [N, D] of features in units of their root mean square: mean
    -log sigmoid(x w) + l2/2 |w|^2, by L-BFGS. Returns weights [D] for the differences as they come."""
    scale = x.square().mean(0).sqrt().clamp(min=1e-8)
    z = x / scale
    w = torch.zeros(z.shape[1], dtype=z.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=150, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.softplus(-(z @ w)).mean() + l2 / 2 * w.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return w.detach() / scale
