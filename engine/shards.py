"""Parameters that are sharded over ranks (FSDP2): what is here, and norms over all of them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from prfl_kernels.waits import waiting


def local(a: Tensor) -> Tensor:
    """The part of `a` on this rank: all of it unless it is sharded."""
    return a.to_local() if isinstance(a, DTensor) else a


def offset(a: Tensor) -> int:
    """The place of the first value of `local(a)` among those of `a`, which FSDP shards along dim 0."""
    if not isinstance(a, DTensor) or not a.numel():
        return 0
    _, first = compute_local_shape_and_global_offset(a.shape, a.device_mesh, a.placements)
    return first[0] * (a.numel() // a.shape[0])


def rows(a: Tensor) -> slice:
    """The rows of `a` that are on this rank."""
    if not isinstance(a, DTensor):
        return slice(None)
    first = offset(a) // max(1, math.prod(a.shape[1:]))
    return slice(first, first + len(local(a)))


def put(a: Tensor, value: Tensor) -> None:
    """Copy to `a` its rows of the whole `value`, of the same shape."""
    local(a).copy_(value[rows(a)])


def whole(a: Tensor) -> Tensor:
    """All of `a`; of a sharded one all its ranks call it, and each gets a copy."""
    with waiting():
        return a.full_tensor() if isinstance(a, DTensor) else a


def reshard(module: nn.Module) -> None:
    """Drop gathered weights: afterwards the parameters are the shards, which alone hold what is written."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """A with block in which the parameters of a module that is one unit of FSDP are whole; all ranks enter it
    together. Any other module stays as it is."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def summed(norm: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The norm over all shards, given that of the local parts of parameters, which share one mesh."""
    p = next(iter(parameters))
    if not isinstance(p, DTensor):
        return norm
    square = norm.square()
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            with waiting():
                dist.all_reduce(square, group=p.device_mesh.get_group(dim))
    return square.sqrt()
