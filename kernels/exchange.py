"""A sequence that is cut over the ranks of a group: tokens against heads, and whole again.

Every rank holds parts[rank] tokens of all H heads, in order; attention needs all tokens of H / P heads. An
exchange sends n tensors in one all-to-all and receives them as [L, n, B, H / P, D], tokens outermost. So the
results are views of what arrived, and parts need not be equal: nothing is padded or masked. Source: Ulysses
(Jacobs et al. 2023, arXiv 2309.14509).

Adjoints are true ones: the gradient of a gather is a reduce-scatter *sum*. If every rank computes the whole
loss of its sample, the mean over all ranks of their gradients is the gradient, with no factor of the group's
size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Newer versions of torch have the second names, and warn of the first ones.
GATHER = "all_gather_into_tensor" if not hasattr(dist, "all_gather_single") else "all_gather_single"
REDUCE = "reduce_scatter_tensor" if not hasattr(dist, "reduce_scatter_single") else "reduce_scatter_single"
_GROUPS: dict[str, dist.ProcessGroup] = {}  # an operation takes a group by its name


class Cut(NamedTuple):
    """How a sequence is cut over the ranks of a group."""

    parts: tuple[int, ...]  # tokens of every rank
    rank: int
    group: str  # the name of a SequenceGroup

    @property
    def span(self) -> slice:
        """The tokens of this rank."""
        first = sum(self.parts[: self.rank])
        return slice(first, first + self.parts[self.rank])


class SequenceGroup:
    """The ranks over which the tokens of a sample are cut."""

    def __init__(self, group: dist.ProcessGroup):
        self.name, self.size, self.rank = group.group_name, dist.get_world_size(group), dist.get_rank(group)
        _GROUPS[self.name] = group

    def cut(self, length: int) -> Cut:
        """`length` tokens over the ranks, the first ones with one more. ValueError for fewer than ranks."""
        if length < self.size:
            raise ValueError(f"sequence: got {length} tokens for {self.size} ranks, want at least one each")
        parts = tuple(length // self.size + (r < length % self.size) for r in range(self.size))
        return Cut(parts, self.rank, self.name)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place and without gradient."""
        dist.all_reduce(x, group=_GROUPS[self.name])
        return x

    def stack(self, x: Tensor) -> Tensor:
        """[P, ...] of every rank's x [...], on every rank; its gradient as that of `gather`."""
        return gather(x[None, None], Cut((1,) * self.size, self.rank, self.name))[0]


def is_group(name: str) -> bool:
    """Whether a SequenceGroup of this name has been made."""
    return name in _GROUPS


def to_heads(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, parts[rank], H, D] to [B, L, H / P, D] each: views of one buffer."""
    a, ranks = tensors[0], len(parts)
    batch, mine, _, width = a.shape
    h = a.shape[2] // ranks
    send = a.new_empty(ranks, mine, len(tensors), batch, h, width)
    for i, t in enumerate(tensors):
        send[:, :, i] = t.unflatten(2, (ranks, h)).permute(2, 1, 0, 3, 4)
    found = a.new_empty(sum(parts), len(tensors), batch, h, width)
    dist.all_to_all_single(found, send.flatten(0, 1), list(parts), [mine] * ranks, group=_GROUPS[group])
    return [found[:, i].transpose(0, 1) for i in range(len(tensors))]


def to_tokens(tensors: Sequence[Tensor], parts: Sequence[int], group: str) -> list[Tensor]:
    """Tensors of one shape [B, L, H / P, D] to [B, parts[rank], H, D] each; the inverse and the adjoint of
    `to_heads`."""
    ranks, mine = len(parts), parts[dist.get_rank(_GROUPS[group])]
    send = torch.stack([t.transpose(0, 1) for t in tensors], 1)  # [L, n, B, H / P, D]
    found = send.new_empty(ranks * mine, *send.shape[1:])
    dist.all_to_all_single(found, send, [mine] * ranks, list(parts), group=_GROUPS[group])
    found = found.unflatten(0, (ranks, mine))
    return [found[:, :, i].permute(2, 1, 0, 3, 4).flatten(2, 3) for i in range(len(tensors))]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        most = max(cut.parts)
        send = x.new_zeros(most, *x.transpose(0, 1).shape[1:])
        send[: len(x[0])] = x.transpose(0, 1)
        found = x.new_empty(len(cut.parts) * most, *send.shape[1:])
        getattr(dist, GATHER)(found, send, group=_GROUPS[cut.group])
        parts = [a[:n] for a, n in zip(found.split(most), cut.parts, strict=True)]
        return torch.cat(parts).transpose(0, 1)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        cut, most = ctx.cut, max(ctx.cut.parts)
        send = d.new_zeros(len(cut.parts), most, *d.transpose(0, 1).shape[1:])
        for part, own in zip(send, d.transpose(0, 1).split(cut.parts), strict=True):
            part[: len(own)] = own
        mine = d.new_empty(send.shape[1:])
        getattr(dist, REDUCE)(mine, send.flatten(0, 1), group=_GROUPS[cut.group])
        return mine[: cut.parts[cut.rank]].transpose(0, 1), None


def gather(x: Tensor, cut: Cut) -> Tensor:
    """The whole [B, L, ...] of x [B, parts[rank], ...] on every rank. Its gradient is the sum over the ranks
    of what each has for the tokens of this one."""
    return _Gather.apply(x, cut)
