"""The two experts of Wan2.2 A14B as one model: the high-noise one at timesteps from the boundary on, the
low-noise one below it. Both have the structure of a Wan transformer and their own weights, text embedding
included. A sampler's state knows nothing of them, so a chain goes from one to the other with its history.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from prfl_engine.errors import UserError, check
from prfl_engine.model.sources import CONFIG, PAIRS
from prfl_engine.model.wan import Precision, RunBlocks, WanConfig, WanTransformer, plain_blocks

HIGH, LOW = PAIRS[0]
"""The folders of the two in checkpoints, as in the official layout."""
TRAIN_STEPS = 1000  # a timestep is so many times a noise level


class Experts(nn.Module):
    """Two transformers that share a chain. It is called as a WanTransformer is, with timesteps on the CPU."""

    def __init__(
        self,
        high: WanTransformer,
        low: WanTransformer,
        boundary: float,
        bring: Callable[[set[int]], None] | None = None,
    ):
        """boundary: the noise level from which on `high` is asked. bring: called with the experts (0: high,
        1: low) that are asked next; None: both are always there. UserError for models of different structure,
        and for a CLIP branch, which no model of Wan2.2 has."""
        super().__init__()
        if high.config != low.config:
            raise UserError(f"model.low: got {low.config}, want the high-noise expert's {high.config}")
        check(not high.config.clip, "model.boundary", boundary, "null with a CLIP branch, as in Wan2.1")
        self.high, self.low, self.boundary, self.bring = high, low, TRAIN_STEPS * boundary, bring
        self.agree: Callable[[set[int]], set[int]] = set  # the experts that some rank asks: see forward

    @property
    def config(self) -> WanConfig:
        """The hyper-parameters of either."""
        return self.high.config

    @property
    def precision(self) -> Precision:
        """The dtypes of either."""
        return self.high.precision

    def of(self, high: WanTransformer, low: WanTransformer) -> "Experts":
        """Other models in the same places, both always there, which no rank shares with others."""
        made = Experts(high, low, 0.0)
        made.boundary = self.boundary
        return made

    def named_experts(self, trained: bool = False) -> Iterator[tuple[str, str, WanTransformer]]:
        """(name here, name of the folder, expert) of both, or of those with trained parameters."""
        for name, folder in (("high", HIGH), ("low", LOW)):
            expert = getattr(self, name)
            if not trained or any(p.requires_grad for p in expert.parameters()):
                yield name, folder, expert

    def embed_context(self, text: Tensor, clip: None = None) -> Tensor:
        """The text [B, n, text_dim] as it is: an expert embeds it in every forward, at 1e-5 of its cost."""
        return text

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """Velocity [B, out_dim, T, H, W] at noisy latents x, each by the expert of its timestep t [B], on the
        CPU; the rest as WanTransformer takes it, context from embed_context.

        Ranks that share sharded weights gather them in every forward and backward. So all ask the experts
        that one of them asks, in the same order: without a sample for one a frame of one, whose gradient is
        zero.
        """
        high = t >= self.boundary
        own = {i: rows for i, rows in enumerate((high, ~high)) if rows.any()}
        asked = sorted(self.agree(set(own)))
        if self.bring is not None:
            self.bring(set(asked))
        if len(asked) == 1:
            return self._ask(asked[0], x, t, context, condition, run_blocks)
        made, order, unused = [], [], None
        for i in asked:
            if i not in own:
                frame = None if condition is None else condition[:1, :, :1]
                unused = self._ask(i, x[:1, :, :1], t[:1], context[:1], frame, run_blocks)
                continue
            at = own[i].nonzero().flatten()
            order.append(at)
            at = at.to(x.device, non_blocking=True)
            some = None if condition is None else condition[at]
            made.append(self._ask(i, x[at], t[own[i]], context[at], some, run_blocks))
        back = torch.cat(order).argsort().to(x.device, non_blocking=True)
        found = torch.cat(made)[back]
        if unused is None:
            return found
        return torch.where(torch.ones((), dtype=torch.bool, device=x.device), found, unused.sum())

    def _ask(self, i: int, x, t, context, condition, run_blocks) -> Tensor:
        expert = (self.high, self.low)[i]
        return expert(x, t, expert.embed_context(context), condition, run_blocks)


def pair_at(path: str | Path, low: str | Path | None) -> tuple[Path, Path]:
    """The high- and the low-noise expert of model.path and model.low: the folders or files of each, or of
    model.path alone a folder with both, as Wan or as diffusers has them. UserError where one is missing."""
    path = Path(path)
    if low is not None:
        return path, Path(low)
    for high, low in PAIRS:
        if (path / high / CONFIG).is_file() and (path / low / CONFIG).is_file():
            return path / high, path / low
    raise UserError(f"model.path: {path}: got no {HIGH} and {LOW}, want both there, or model.low")


def adapter_of(path: str | None, folder: str, both: bool) -> str | None:
    """The adapter of one expert at lora.path: in the folder named after the expert; None where another one's
    is there; and without such folders lora.path itself. UserError where that may be of `both`."""
    if path is None or (Path(path) / folder).is_dir():
        return path and str(Path(path) / folder)
    if any((Path(path) / name).is_dir() for name in (HIGH, LOW)):
        return None
    check(not both, "lora.path", path, f"a folder with {HIGH} or {LOW}: an adapter of one expert or of each")
    return path
