"""The frozen blocks of the expert that is not asked wait in host memory.

At the switch of a chain the blocks of the other expert are copied to the device, one after another, into the
memory that those of the first one leave: one transfer, of which a block waits for its own part alone. So the
first forward after the switch runs beside it. Frozen weights do not change, so nothing is copied back.
Trained parameters stay where they are, and so do embeddings and head.
"""

import torch
from torch import Tensor, nn

from prfl_engine.memory.host import CopyStream, HostTensor
from prfl_engine.model.layers import Block
from prfl_engine.model.wan import WanTransformer


class Idle:
    """Moves the blocks of experts to the device before they are asked; what `Experts` calls `bring`."""

    def __init__(self, device: torch.device):
        self.copies = CopyStream(device)
        self.here: set[int] = set()
        self.events: dict[nn.Module, torch.cuda.Event | None] = {}
        self.held: list[list[tuple[Block, list[tuple[nn.Parameter, HostTensor]]]]] = []

    def take(self, expert: WanTransformer) -> None:
        """From now on the frozen blocks of another expert are on the device only while they are asked."""
        blocks = []
        for block in expert.blocks:
            kept = [(p, HostTensor(p.data, self.copies)) for p in block.parameters() if not p.requires_grad]
            pairs = (pair for p, host in kept for pair in host.parts(p.data))
            self.copies.copy(pairs, self.copies.queued())
            blocks.append((block, kept))
            block.register_forward_pre_hook(self._arrived)
        self.copies.synchronize()
        self.held.append(blocks)
        self._leave(len(self.held) - 1)

    def __call__(self, asked: set[int]) -> None:
        """Let the blocks of the experts `asked` be on the device, and no others."""
        for i in self.here - asked:
            self._leave(i)
        for i in sorted(asked - self.here):
            self._come(i)
        self.here = set(asked)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks of both experts that move."""
        return sum(p.numel() * p.element_size() for of in self.held for _, kept in of for p, _ in kept)

    def _leave(self, i: int) -> None:
        for block, kept in self.held[i]:
            self.copies.await_copy(self.events.pop(block, None))  # else it could write to what comes next
            for p, _ in kept:
                p.data = _absent(p)

    def _come(self, i: int) -> None:
        for block, kept in self.held[i]:
            for p, _ in kept:
                p.data = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            back = ((part, host) for p, stored in kept for host, part in stored.parts(p.data))
            # After all that is queued: it may still read memory that the other expert has left.
            self.events[block] = self.copies.copy(back, self.copies.queued())

    def _arrived(self, block: nn.Module, _: object) -> None:
        self.copies.await_copy(self.events.get(block))


def _absent(p: Tensor) -> Tensor:
    """What stands for a parameter that is on the host: as it in shape and place, without memory, and NaN."""
    return torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)
