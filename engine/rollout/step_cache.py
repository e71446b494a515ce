"""Step caching of a rollout: successive denoising steps that hardly differ reuse what the blocks added.

The blocks add a residual to the tokens. It changes slowly along the chain, and what it depends on can be
seen before the blocks run: their first modulated input m_i = LN(x_i) (1 + scale(t_i)) + shift(t_i). With

    d_i = sum |m_i - m_(i-1)| / sum |m_(i-1)|        between successive steps, one number a sample

a step is computed when the sum of d since the last computed one reaches the threshold, and otherwise gets
that one's residual. The first step of a stretch and the last step of the schedule are always computed.
Every sample of a batch has its own sum and residual; those that are computed go through the blocks together.
Where ranks gather the weights of a sharded model in every forward, a step that is computed on one of them is
computed on all: no rank may wait for the weights of another that has skipped its blocks.

The samples to compute are the one thing the host has to know: one read of N flags a step, where some
sample has a choice. State: m and the residual of every sample, [L, C] each, for as long as a stretch of
steps without gradient lasts.
Source: TeaCache (Liu et al. 2024, arXiv 2411.19108), without its polynomials, which are fitted to
single models: the threshold counts the change of the input itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl_engine.chain import Together
from prfl_engine.model.layers import Block
from prfl_engine.model.wan import RunBlocks
from prfl_kernels.exchange import SequenceGroup
from prfl_kernels.qk_norm_rope.rope import Grid


@dataclass
class _Kept:
    """What a sample carries from step to step."""

    modulated: Tensor  # [L, C], of the step before
    residual: Tensor  # [1, L, C], of the last computed step
    moved: Tensor  # the sum of d since then, a float32 scalar on the device


class StepCache:
    """The residuals of the samples of one batch along one stretch of steps."""

    def __init__(
        self,
        threshold: float,
        last_timestep: float,
        sequence: SequenceGroup | None = None,
        together: Together | None = None,
    ):
        """sequence: the ranks over which the tokens are cut, which choose alike; together: those that share
        a sharded model."""
        self.threshold, self.last_timestep = threshold, last_timestep
        self.sequence, self.together = sequence, together
        self.kept: dict[int, _Kept] = {}
        self.computed = self.reused = 0  # forwards of one sample

    def __call__(
        self,
        blocks: Callable[[Tensor, list[int]], Tensor],
        tokens: Tensor,
        modulated: Tensor,
        t: Tensor,
        active: Tensor,
    ) -> Tensor:
        """The tokens [N, L, C] after the blocks, computed or from the cache.

        blocks(tokens [n, L, C], rows) runs the blocks on n of the N samples at hand, those numbered in rows;
        modulated [N, L, C] is their first modulated input, t [N] the timesteps, active [N] (on the CPU)
        the samples of the batch that they are.
        """
        samples = active.tolist()
        compute = self.chosen(modulated, t, samples)
        rows = [row for row, chosen in enumerate(compute) if chosen]
        self.computed, self.reused = self.computed + len(rows), self.reused + len(samples) - len(rows)
        made = iter(blocks(tokens if all(compute) else tokens[rows], rows).split(1)) if rows else iter(())
        out = []
        for row, (b, chosen) in enumerate(zip(samples, compute, strict=True)):
            x = tokens[row : row + 1]
            if chosen:
                out.append(next(made))
                self.keep(b, modulated[row], x, out[-1])
            else:
                out.append(self.reuse(b, x))
        return out[0] if len(out) == 1 else torch.cat(out)

    def keep(self, sample: int, modulated: Tensor, x: Tensor, out: Tensor) -> None:
        """A computed step of a sample: its first modulated input [L, C], its tokens [1, L, C] before
        and after the blocks."""
        self.kept[sample] = _Kept(modulated, out - x, torch.zeros((), device=x.device))

    def reuse(self, sample: int, x: Tensor) -> Tensor:
        """Tokens x [1, L, C] of a sample with what the blocks added in its last computed step."""
        return x + self.kept[sample].residual

    def chosen(self, modulated: Tensor, t: Tensor, samples: list[int]) -> list[bool]:
        """Which of the samples are to be computed; the changes of the others' inputs are added up. modulated
        [N, L, C] and t [N] as in a call."""
        flags: dict[int, Tensor] = {}
        for row, b in enumerate(samples):
            if b not in self.kept:
                continue
            kept, m, before = self.kept[b], modulated[row], self.kept[b].modulated
            sums = torch.stack([a.abs().sum(dtype=torch.float32) for a in (m - before, before)])
            change, size = sums if self.sequence is None else self.sequence.sum(sums)
            kept.moved = kept.moved + change / size
            kept.modulated = m
            # not <: a NaN is computed
            flags[row] = ~(kept.moved < self.threshold) | (t[row] <= self.last_timestep)
        chosen = torch.stack(list(flags.values())) if flags else t.new_zeros(0, dtype=torch.bool)
        if self.together is not None:
            forced = len(flags) < len(samples)  # some have no residual yet
            anywhere = self.together.largest((chosen.any() | forced).int()).bool()
            chosen = chosen if forced else torch.where(chosen.any(), chosen, anywhere)
        read = dict(zip(flags, chosen.tolist(), strict=True)) if flags else {}
        return [read.get(row, True) for row in range(len(samples))]


def cached(run_blocks: RunBlocks, cache: StepCache, t: Tensor, active: Tensor) -> RunBlocks:
    """run_blocks for one step of the samples `active` [N] at timesteps t [N], through the cache."""

    def run(blocks, tokens, e_B6C, context, repeats, grid):
        def some(tokens: Tensor, rows: list[int]) -> Tensor:
            part = slice(None) if len(rows) == len(context) else rows
            return run_blocks(blocks, tokens, e_B6C[part], context[part], repeats, grid)

        # A call of the block, so that a sharded one is gathered.
        modulated = blocks[0](tokens, e_B6C, context, repeats, grid, _input)
        return cache(some, tokens, modulated, t, active)

    return run


def _input(block: Block, x: Tensor, e_B6C: Tensor, context: Tensor, repeats: int, grid: Grid) -> Tensor:
    """The first modulated input of a block, a `BlockRun`."""
    return block.attention_input(x, e_B6C, grid)
