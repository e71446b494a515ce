"""Frozen matrices of blocks in fewer bytes on the device: stored in e4m3, or on the host, or both.

    stored      w8 [N, K] e4m3 and scale [N] float32, one scale a row of W [N, K]; or W as it is
    in use      scale w8, rounded once to the dtype of W; or W

A block's matrices are in use from the beginning of its forward until another block is asked, and again from
the beginning of its backward. So its operations read weights as ever, gradients are those of a model that has
these values, and a recomputed forward has the weights of the first one. Matrices that wait on the host are
copied one block ahead, in the direction of the pass, while a block computes. On the device are at most one
block in use and one on its way, as it is stored.

All matrices of a block lie in one piece of memory, so a copy is one, and the allocator rounds one size.
Trained parameters, biases, norms and modulation stay on the device, as do embeddings and head. Rows are
rounded as in prfl_kernels.fp8.e4m3, whose dequantize_rows defines the values.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from prfl_engine.config_models import Storage
from prfl_engine.memory.host import CopyStream, HostTensor
from prfl_engine.model.layers import Block, Linear
from prfl_engine.model.wan import WanTransformer
from prfl_kernels.fp8.e4m3 import E4M3, dequantize_rows
from prfl_kernels.fp8.quantize import quantize_fp8

ALIGN = 256  # values: at a multiple of so many each matrix begins


def layout(shapes: Sequence[tuple[int, int]]) -> tuple[list[slice], int]:
    """Where matrices of these shapes lie in the memory of a block, and how many values it has."""
    found, end = [], 0
    for shape in shapes:
        found.append(slice(end, end + math.prod(shape)))
        end += -(-math.prod(shape) // ALIGN) * ALIGN
    return found, end


class Frozen:
    """The frozen matrices of the blocks of one model, or of several that take turns."""

    def __init__(self, storage: Storage, device: torch.device):
        self.storage, self.copies = storage, CopyStream(device)
        self.here: list[_Matrices] = []  # those in use or on their way

    @property
    def loads(self) -> torch.device:
        """Where a model is loaded that is taken then: the device may not have room for it."""
        return torch.device("cpu") if self.storage.apart else self.copies.device

    @torch.no_grad()
    def take(self, model: WanTransformer) -> WanTransformer:
        """Store the frozen matrices of a model's blocks, wherever they are now; all else moves to the device.
        From now on they are there only while their block is asked. Returns the model, as it is where nothing
        is to be stored apart."""
        if not self.storage.apart:
            return model
        device = self.copies.device
        absent = torch.full((), torch.nan, dtype=model.precision.weights, device=device)
        own = [_Matrices(block, self.storage, self.copies, absent) for block in model.blocks]
        for p in model.parameters():
            p.data = p.data.to(device)
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self._before, own, i))
            block.register_forward_hook(partial(self._after, own, i))
        return model

    def _before(self, own: "list[_Matrices]", i: int, *_) -> None:
        last = len(own) - 2 if torch.is_grad_enabled() else 0  # what follows the last block
        self._ask(own, i, i + 1 if i + 1 < len(own) else last)

    def _after(self, own: "list[_Matrices]", i: int, block: Block, given: tuple, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(partial(self._backward, own, i))  # called before the block's backward

    def _backward(self, own: "list[_Matrices]", i: int, _: Tensor) -> None:
        self._ask(own, i, i - 1 if i else 1)

    def _ask(self, own: "list[_Matrices]", i: int, following: int) -> None:
        """Let the matrices of block i be in use, and those of block `following` on their way."""
        asked, ahead = own[i], own[following % len(own)]
        stays = (asked, ahead) if asked.used else (asked,)
        for other in self.here:
            if other not in stays:
                other.leave()
        self.here = [asked]
        asked.use()
        if ahead is not asked and self.storage.host:
            ahead.fetch()
            self.here.append(ahead)


class _Matrices:
    """The frozen matrices of a block: how they are stored, and their values while they are in use."""

    def __init__(self, block: Block, storage: Storage, copies: CopyStream, absent: Tensor):
        """absent: NaN, which stands for every value that is not there."""
        matrices = [m.weight for m in block.modules() if isinstance(m, Linear)]
        self.parameters = [p for p in matrices if not p.requires_grad]
        self.places, self.size = layout([p.shape for p in self.parameters])
        self.storage, self.copies, self.absent = storage, copies, absent
        self.used, self.event = False, None
        self.arriving: list[Tensor] = []  # what has been copied from the host, or is being copied
        self.stored: list[Tensor | HostTensor] = self._quantized() if storage.e4m3 else [self._joined()]
        if storage.host:
            self.stored = [_moved(a, copies) for a in self.stored]
        self.leave()

    def _joined(self) -> Tensor:
        return self._filled([p.data for p in self.parameters], self.absent.dtype)

    def _quantized(self) -> list[Tensor]:
        """(e4m3 values, float32 scales of all rows)."""
        parts = [quantize_fp8(p.data.to(self.copies.device)) for p in self.parameters]
        values, scales = zip(*parts, strict=True)
        return [self._filled(values, E4M3), torch.cat(scales)]

    def _filled(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        flat = torch.empty(self.size, dtype=dtype, device=parts[0].device)
        for at, a in zip(self.places, parts, strict=True):
            flat[at].view(a.shape).copy_(a)
        return flat

    def fetch(self) -> None:
        """Start the copies from the host, unless they have started or ended."""
        if self.used or self.arriving or not self.storage.host:
            return
        device = self.copies.device
        self.arriving = [torch.empty(a.shape, dtype=a.dtype, device=device) for a in self.stored]
        pairs = (
            (part, host)
            for stored, a in zip(self.stored, self.arriving, strict=True)
            for host, part in stored.parts(a)
        )
        self.event = self.copies.copy(pairs, self.copies.queued())

    def use(self) -> None:
        """Give the parameters their values."""
        if self.used:
            return
        self.fetch()
        self.copies.await_copy(self.event)
        stored = self.arriving if self.storage.host else self.stored
        flat = self._values(*stored) if self.storage.e4m3 else stored[0]
        for at, p in zip(self.places, self.parameters, strict=True):
            p.data = flat[at].view(p.shape)
        self.used, self.event, self.arriving = True, None, []

    def _values(self, values: Tensor, scales: Tensor) -> Tensor:
        flat = torch.empty(self.size, dtype=self.absent.dtype, device=values.device)
        rows = scales.split([len(p) for p in self.parameters])
        for at, p, scale in zip(self.places, self.parameters, rows, strict=True):
            dequantize_rows(values[at].view(p.shape), scale, flat[at].view(p.shape))
        return flat

    def leave(self) -> None:
        """Free the values, and what is on its way."""
        self.copies.await_copy(self.event)  # else it could write to what comes next
        for p in self.parameters:
            p.data = self.absent.expand(p.shape)
        self.used, self.event, self.arriving = False, None, []


def _moved(a: Tensor, copies: CopyStream) -> HostTensor:
    """A tensor in host memory."""
    made = HostTensor(a, copies)
    for host, part in made.parts(a):
        host.copy_(part)
    return made
