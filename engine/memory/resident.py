"""Whole weights of a sharded model for rollouts, in the dtypes that products read them in.

A rollout makes tens of forwards with one version of the weights, so they are gathered once. The copy is a
plain model on every rank: it has no hooks and makes no collective but those of a cut sequence. Matrices that
the blocks round to their compute dtype are rounded as they are gathered, so its results are those of the
sharded model to the bit, and float32 weights take half of their bytes.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prfl_engine.model.layers import Linear
from prfl_engine.model.wan import WanTransformer
from prfl_engine.shards import unsharded

_SETTINGS = ("chunk", "sequence", "compiled", "compute_dtype", "residual_dtype", "lora_scale", "lent")


class Resident:
    """A copy `model` of a sharded model, whose weights are there from `gather` to `drop`."""

    def __init__(self, sharded: WanTransformer):
        self.sharded = sharded
        with torch.device("meta"):
            self.model = WanTransformer(sharded.config)
        for a, b in zip(sharded.modules(), self.model.modules(), strict=True):
            for name in _SETTINGS:
                if hasattr(a, name):
                    setattr(b, name, getattr(a, name))
            for name, p in a._parameters.items():
                b._parameters[name] = None if p is None else _absent(p, _dtype(a, name, p))

    @torch.no_grad()
    def gather(self) -> None:
        """The weights as they are now, into the memory that is there or new one; all ranks call it together.
        One gather for each unit of FSDP."""
        own = dict(self.model.named_parameters())
        for p in own.values():
            if not p.untyped_storage().nbytes():
                p.untyped_storage().resize_(p.nbytes)
        for prefix, unit in self.sharded.named_modules():
            if isinstance(unit, FSDPModule):
                with unsharded(unit):
                    for name, p in unit.named_parameters(prefix):
                        if not isinstance(p, DTensor):
                            own[name].copy_(p)

    def drop(self) -> None:
        """Free the weights."""
        for p in self.model.parameters():
            p.untyped_storage().resize_(0)


def _dtype(module: nn.Module, name: str, p: Tensor) -> torch.dtype:
    """The narrower one of a matrix's dtype and that in which its layer multiplies."""
    narrow = type(module) is Linear and name == "weight" and module.dtype.itemsize < p.dtype.itemsize
    return module.dtype if narrow else p.dtype


def _absent(p: Tensor, dtype: torch.dtype) -> nn.Parameter:
    made = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=p.device), requires_grad=False)
    made.untyped_storage().resize_(0)
    return made
