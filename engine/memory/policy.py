"""What a block saves for its backward: the names of its intermediates, and policies over them."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from prfl_engine.config import ModelConfig
from prfl_engine.errors import refusing
from prfl_kernels.sublayers import ffn as modulated_ffn
from prfl_kernels.sublayers import self_attention
from prfl_kernels.sublayers.cross_attention import KEEP as CROSS_KEEP
from prfl_kernels.sublayers.cross_attention import KEPT as CROSS_KEPT

# The parts inside each sublayer: our name, the sublayer's own name, and how many tensors it saves for it. The
# list of what a sublayer saves ends with them, in this order.
INNER = {
    "attend": [(name, name, len(parts)) for name, parts in self_attention.KEPT.items()],
    "cross": [("cross_" + name, name, len(parts)) for name, parts in CROSS_KEPT.items()],
    "feed": [("hidden", "hidden", 1), ("ffn_normed", "normed", 1)],
}
# The tensors between the sublayers: the residual stream, and what cross-attention reads.
BETWEEN = ("input", "after_attention", "cross_normed", "after_cross")
NAMES = (*BETWEEN, *(name for parts in INNER.values() for name, _, _ in parts))
MODES = ("none", "full", "attention")


class Saves(NamedTuple):
    """What each sublayer of a block saves: a mode, or names of its own parts."""

    attend: str | Collection[str]
    cross: str | Collection[str]
    feed: str | Collection[str]


@dataclass(frozen=True)
class BlockPolicy:
    """Which intermediates of a block stay on the device (keep) and which wait on the host (offload).
    All others are recomputed.

    `rerun` is what a sublayer that is rerun saves until its own backward: a mode of the sublayers. ValueError
    for an unknown name, one in both sets, and an input in neither.
    """

    keep: frozenset[str]
    offload: frozenset[str] = frozenset()
    rerun: str = "all"

    def __post_init__(self):
        for field in ("keep", "offload"):
            names = frozenset(getattr(self, field))
            object.__setattr__(self, field, names)
            for name in sorted(names - set(NAMES)):
                raise ValueError(f"{field}: got {name!r}, want some of {', '.join(NAMES)}")
        for name in sorted(self.keep & self.offload):
            raise ValueError(f"offload: got {name!r}, which keep names too, want it in one of them")
        if "input" not in self.saved:
            raise ValueError("keep: got no input, want it in keep or offload: it cannot be recomputed")

    @cached_property
    def saved(self) -> frozenset[str]:
        """What is not recomputed."""
        return self.keep | self.offload

    @cached_property
    def saves(self) -> Saves:
        """What the sublayers save in the forward."""
        return Saves(*(tuple(o for n, o, _ in parts if n in self.saved) for parts in INNER.values()))

    @cached_property
    def plain(self) -> bool:
        """Whether the sublayers alone can do all of it: nothing is offloaded, and no sublayer is rerun."""
        return not self.offload and self.keep >= set(BETWEEN)

    def staying(self) -> "BlockPolicy":
        """The same with everything on the device: for the last block, whose backward comes at once."""
        return BlockPolicy(self.saved, rerun=self.rerun)


def named(mode: str, keep: str = "all") -> BlockPolicy:
    """The policy of a mode. none: the tensors between the sublayers stay, and what these save in their mode
    `keep`; full: the input alone; attention: the output and log-sum-exp of self-attention too. ValueError for
    another mode."""
    if mode not in MODES:
        raise ValueError(f"recompute: got {mode!r}, want one of {', '.join(MODES)}")
    if mode == "none":
        modes = self_attention.KEEP, CROSS_KEEP, modulated_ffn.KEEP
        parts = zip(INNER.values(), (m[keep] for m in modes), strict=True)
        inner = {name for names, kept in parts for name, own, _ in names if own in kept}
        return BlockPolicy(frozenset({*BETWEEN, *inner}), rerun=keep)
    return BlockPolicy({"input"} if mode == "full" else {"input", "attention"}, rerun=keep)


def of_config(model: ModelConfig) -> BlockPolicy:
    """The policy that model.recompute and model.keep ask for; that of "none" for auto:GB, which the planner
    replaces. Raises UserError for names that are none."""
    if isinstance(model.recompute, str):
        return named("none" if model.budget is not None else model.recompute, model.keep)
    with refusing("model.recompute"):
        return BlockPolicy(model.recompute.keep, model.recompute.offload, rerun=model.keep)
