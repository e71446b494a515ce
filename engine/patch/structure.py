"""What is to know of a layout of transformers: its blocks by their names, what is what in them, how they are
called.

A structure gives the parts of a block, says what of it is not understood, and turns the arguments of a call
into ours, or says why this call is for the original code.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine.patch.layers import Replacement
from prfl_engine.patch.memo import Memo
from prfl_engine.patch.view import Call, Parts
from prfl_kernels.qk_norm_rope.rope import Grid

TEXT_TOKENS = 512  # of a text context, in all of these models
ROPE = "another table of rotations than Wan's (RIFLEx, NTK, interpolation)"
TOKENS = "tokens that are padded, or cut over processes"
MODULATION = "modulation that differs from token to token"


class Structure(ABC):
    """One layout of a transformer. It has no state."""

    name: str

    @abstractmethod
    def matches(self, block: nn.Module) -> bool:
        """Whether the block has the attributes of this structure."""

    @abstractmethod
    def parts(self, block: nn.Module) -> Parts:
        """The modules of a block that matches."""

    @abstractmethod
    def complaint(self, block: nn.Module) -> str | None:
        """What of the block, besides layers and hooks, our code does not do; also asked in every call."""

    @abstractmethod
    def model_complaint(self, model: nn.Module) -> str | None:
        """What of the whole transformer our code does not do."""

    @abstractmethod
    def bind(self, block: nn.Module, memo: Memo, *args, **kwargs) -> Call | str:
        """Our arguments of a call of the block, or why the original code takes it."""

    @abstractmethod
    def examples(
        self, memo: Memo, x: Tensor, e: Tensor, context: Tensor, grid: Grid, head_dim: int
    ) -> Iterator[tuple]:
        """The arguments of a block as its callers may write them."""

    def unpatched(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments for the original code."""
        return args, kwargs

    def others(self, model: nn.Module, memo: Memo) -> dict[nn.Module, Replacement]:
        """More modules whose forward is replaced, and by what."""
        return {}

    @contextmanager
    def exact(self, block: nn.Module) -> Iterator[None]:
        """Inside it the original code attends in the dtype of its tensors, on any device."""
        yield


def attend(q: Tensor, k: Tensor, v: Tensor, *, window_size=(-1, -1), causal=False, **more) -> Tensor:
    """Attention [B, L, H, D] of q, k, v [B, L, H, D] to everything, in the dtype of q. ValueError where the
    caller asks for less."""
    if tuple(window_size) != (-1, -1) or causal:
        raise ValueError(f"attention to a window of {window_size}, causal {causal}")
    q, k, v = (a.to(q.dtype).transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def unwrapped(block: nn.Module) -> nn.Module:
    """The block inside of checkpoint wrappers and torch.compile."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        if name in block._modules:
            return unwrapped(block._modules[name])
    return block
