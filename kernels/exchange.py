"""A sequence that is cut over the ranks of a group: tokens against heads, and whole again.

Every rank holds parts[rank] tokens of all H heads, in order; attention needs all tokens of H / P heads. An
exchange sends n tensors in one all-to-all and receives them as [L, n, B, H / P, D], tokens outermost. So the
results are views of what arrived, and parts need not be equal: nothing is padded or masked. Source: Ulysses
(Jacobs et al. 2023, arXiv 2309.14509).

Where P does not divide the heads, the largest number U of neighbours that divides both trades tokens for
heads, and each of them gathers keys and values from those of the other neighbourhoods that have its heads.
So a rank computes the rows of its neighbourhood's queries against all keys, exactly, and the gradients of
keys and values are summed back. Its buffers of keys and values are those of all tokens and H / U heads.

Adjoints are true ones: the gradient of a gather is a reduce-scatter *sum*. If every rank computes the whole
loss of its sample, the mean over all ranks of their gradients is the gradient, with no factor of the group's
size.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prfl_kernels.waits import waiting

# Newer versions of torch have the second names, and warn of the first ones.
GATHER = "all_gather_into_tensor" if not hasattr(dist, "all_gather_single") else "all_gather_single"
REDUCE = "reduce_scatter_tensor" if not hasattr(dist, "reduce_scatter_single") else "reduce_scatter_single"
_GROUPS: dict[str, dist.ProcessGroup] = {}  # an operation takes a group by its name


class Cut(NamedTuple):
    """How a sequence is cut over the ranks of a group."""

    parts: tuple[int, ...]  # tokens of every rank
    rank: int
    group: str  # the name of a SequenceGroup
    near: tuple[int, ...]  # tokens of the ranks that trade them for heads with this one
    near_group: str
    far: tuple[int, ...] = ()  # tokens of every such neighbourhood; () where there is only this one
    far_group: str = ""

    @property
    def span(self) -> slice:
        """The tokens of this rank."""
        first = sum(self.parts[: self.rank])
        return slice(first, first + self.parts[self.rank])


def group_of(ranks: Tensor, limit: timedelta | None) -> dist.ProcessGroup:
    """The group of this rank among new ones, the rows of `ranks` [groups, members]; all ranks call it. (Those
    that init_device_mesh makes have torch's own time-out.)"""
    return dist.new_subgroups_by_enumeration(ranks.tolist(), limit)[0]


class SequenceGroup:
    """The ranks over which the tokens of a sample are cut."""

    def __init__(self, group: dist.ProcessGroup, heads: int, limit: timedelta | None = None):
        """group: one of those into which all ranks are divided, each of neighbours; all call it together.
        heads: of the attention, on which it depends how many neighbours trade; limit: the time-out of groups
        that are made where not all do."""
        self.name, self.size, self.rank = group.group_name, dist.get_world_size(group), dist.get_rank(group)
        _GROUPS[self.name] = group
        self.limit = limit
        self._split(heads)

    def _split(self, heads: int) -> None:
        self.near, self.near_name, self.far_name = math.gcd(self.size, heads), self.name, ""
        if self.near < self.size:
            self.near_name, self.far_name = self._parts()

    def _parts(self) -> tuple[str, str]:
        """The names of two new groups: of the ranks that trade with this one, and of those with its heads."""
        ranks = torch.arange(dist.get_world_size()).view(-1, self.size // self.near, self.near)
        made = [group_of(part.flatten(0, 1), self.limit) for part in (ranks, ranks.mT)]
        _GROUPS.update((group.group_name, group) for group in made)
        return made[0].group_name, made[1].group_name

    def cut(self, length: int) -> Cut:
        """`length` tokens over the ranks, the first ones with one more. ValueError for fewer than ranks."""
        if length < self.size:
            raise ValueError(f"sequence: got {length} tokens for {self.size} ranks, want at least one each")
        parts = tuple(length // self.size + (r < length % self.size) for r in range(self.size))
        hoods = [parts[i : i + self.near] for i in range(0, self.size, self.near)]
        far = tuple(map(sum, hoods)) if len(hoods) > 1 else ()
        return Cut(
            parts, self.rank, self.name, hoods[self.rank // self.near], self.near_name, far, self.far_name
        )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place and without gradient."""
        with waiting():
            dist.all_reduce(x, group=_GROUPS[self.name])
        return x

    def stack(self, x: Tensor) -> Tensor:
        """[P, ...] of every rank's x [...], on every rank; its gradient as that of `gather`."""
        return gather(x[None, None], self.cut(self.size))[0]


def is_group(name: str) -> bool:
    """Whether a SequenceGroup of this name has been made."""
    return name in _GROUPS


def _exchange(found: Tensor, send: Tensor, theirs: Sequence[int], mine: Sequence[int], group: str) -> None:
    """theirs, mine: rows that come from every rank and go to it."""
    with waiting():
        dist.all_to_all_single(found, send, list(theirs), list(mine), group=_GROUPS[group])


def to_heads(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, parts[rank], H, D] to [B, L, H / P, D] each: views of one buffer."""
    a, ranks = tensors[0], len(parts)
    batch, mine, _, width = a.shape
    h = a.shape[2] // ranks
    send = a.new_empty(ranks, mine, len(tensors), batch, h, width)
    for i, t in enumerate(tensors):
        send[:, :, i] = t.unflatten(2, (ranks, h)).permute(2, 1, 0, 3, 4)
    found = a.new_empty(sum(parts), len(tensors), batch, h, width)
    _exchange(found, send.flatten(0, 1), parts, [mine] * ranks, group)
    return [found[:, i].transpose(0, 1) for i in range(len(tensors))]


def to_tokens(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, L, H / P, D] to [B, parts[rank], H, D] each; the inverse and the adjoint of
    `to_heads`."""
    ranks, mine = len(parts), parts[dist.get_rank(_GROUPS[group])]
    send = torch.stack([t.transpose(0, 1) for t in tensors], 1)  # [L, n, B, H / P, D]
    found = send.new_empty(ranks * mine, *send.shape[1:])
    _exchange(found, send, [mine] * ranks, parts, group)
    found = found.unflatten(0, (ranks, mine))
    return [found[:, :, i].permute(2, 1, 0, 3, 4).flatten(2, 3) for i in range(len(tensors))]


def _gathered(x: Tensor, parts: Sequence[int], group: str) -> Tensor:
    """[L, ...] of every rank's x [parts[rank], ...]."""
    most = max(parts)
    send = x.new_zeros(most, *x.shape[1:])
    send[: len(x)] = x
    found = x.new_empty(len(parts) * most, *send.shape[1:])
    with waiting():
        getattr(dist, GATHER)(found, send, group=_GROUPS[group])
    return torch.cat([a[:n] for a, n in zip(found.split(most), parts, strict=True)])


def _summed(d: Tensor, parts: Sequence[int], group: str) -> Tensor:
    """[parts[rank], ...], the sum of every rank's d [L, ...]; the adjoint of `_gathered`."""
    send = d.new_zeros(len(parts), max(parts), *d.shape[1:])
    for part, own in zip(send, d.split(list(parts)), strict=True):
        part[: len(own)] = own
    mine = d.new_empty(send.shape[1:])
    with waiting():
        getattr(dist, REDUCE)(mine, send.flatten(0, 1), group=_GROUPS[group])
    return mine[: parts[dist.get_rank(_GROUPS[group])]]


def all_keys(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, parts[rank], ...] to [B, L, ...] each: views of one buffer."""
    found = _gathered(torch.stack([t.transpose(0, 1) for t in tensors], 1), parts, group)
    return [found[:, i].transpose(0, 1) for i in range(len(tensors))]


def own_keys(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, L, ...], summed over the ranks, to [B, parts[rank], ...] each; the adjoint of
    `all_keys`."""
    found = _summed(torch.stack([t.transpose(0, 1) for t in tensors], 1), parts, group)
    return [found[:, i].transpose(0, 1) for i in range(len(tensors))]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return _gathered(x.transpose(0, 1), cut.parts, cut.group).transpose(0, 1)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return _summed(d.transpose(0, 1), ctx.cut.parts, ctx.cut.group).transpose(0, 1), None


def gather(x: Tensor, cut: Cut) -> Tensor:
    """The whole [B, L, ...] of x [B, parts[rank], ...] on every rank. Its gradient is the sum over the ranks
    of what each has for the tokens of this one."""
    return _Gather.apply(x, cut)
