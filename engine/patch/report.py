"""What a patch replaced, and which calls it could not take."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from prfl_engine.memory.policy import BlockPolicy


@dataclass
class Report:
    """A patched transformer. `calls` and `fallbacks` count from `accelerate` on, outside of torch.compile."""

    structure: str  # whose transformer this is
    block: str  # the class of its blocks
    blocks: int
    kept: tuple[str, ...]  # what runs the original code, by the names of the model's parts
    policy: BlockPolicy
    chunk: int | None
    calls: int = 0  # of blocks, by our operations
    fallbacks: Counter[str] = field(default_factory=Counter)  # calls by the original code, by reason

    def __str__(self) -> str:
        lines = [
            f"{self.blocks} blocks {self.block} ({self.structure}): self-attention, cross-attention and FFN "
            "run by prfl_kernels.sublayers",
            f"as they were: {', '.join(self.kept) or 'nothing'}",
            f"calls of blocks: {self.calls} by our operations, {self.fallbacks.total()} by the original code",
            *(f"  {count} times: {why}" for why, count in self.fallbacks.most_common()),
        ]
        return "\n".join(lines)

    def note(self, why: str | None) -> None:
        """Count a call, with the reason why the original code runs."""
        if torch.compiler.is_compiling():
            return  # a count would be a constant of the compiled code
        if why is None:
            self.calls += 1
        else:
            self.fallbacks[why] += 1


