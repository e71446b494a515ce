"""FSDP2 in a dry run: weights that a rank gathers and gradients that it reduces, at the moments when it does.

A dry run has whole weights on the meta device, which are not counted. Here its modules get hooks where
FSDP2 has its own, which allocate what FSDP2 allocates there, in its order (torch.distributed.fsdp):

    before the forward of a unit    the buffer of its all-gather, its weights; the last unit's buffer is freed
    after it                        its weights are freed, its buffer stays until the next unit has gathered
    before its backward             its weights, unless they are here; the buffer of the unit before it
    after it                        its weights are freed, and the buffer of the last reduce-scatter; that of
                                    its own, from which its shards of gradients are reduced; its whole
                                    gradients are freed

A unit's backward is over when the gradients of all of its inputs are there; those whose inputs take none are
over at the end. tests/test_plan_sharded.py compares the bytes with those of FSDP2 itself.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from prfl_engine.model.reward import RewardModel
from prfl_engine.planner.setup import Sharding, rounded

METHODS = "embed_context", "features", "layers"  # of a transformer, forwards like its own: parallel.shard


def padded(p: Tensor, ranks: int) -> int:
    """Values of a parameter whose first dimension is padded to a multiple of the ranks."""
    shape = tuple(p.shape) or (1,)
    return -(-shape[0] // ranks) * ranks * math.prod(shape[1:])


def _size(*tensors: Tensor | None) -> int:
    return sum(rounded(a.nbytes) for a in tensors if a is not None)


def _allocated(size: int) -> Tensor:
    return torch.empty(-(-size // 2), dtype=torch.bfloat16)


class _Tree:
    """What the units below one root share."""

    def __init__(self):
        self.kept: Tensor | None = None  # the buffer of the last all-gather of a forward
        self.order: list[Unit] = []  # units in the order in which their forwards were over
        self.reduced: list[Tensor] = []  # buffers of the reduce-scatter under way
        self.units: list[Unit] = []
        self.root: Unit | None = None  # of the forward under way
        self.queued = False

    def finish(self) -> None:
        """At the end of a backward."""
        for unit in self.units:
            unit.end()
        self.order.clear()
        self.reduced.clear()
        self.queued = False


class _Over(torch.autograd.Function):
    """The inputs of a unit as they are; when all have their gradients, its backward is over."""

    @staticmethod
    def forward(ctx, unit: "Unit", *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        return inputs

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.unit.after_backward()
        return None, *gradients


class Unit:
    """Parameters that FSDP2 gathers at a time."""

    def __init__(self, parameters: Sequence[nn.Parameter], sharding: Sharding, tree: _Tree):
        self.parameters, self.sharding, self.tree = parameters, sharding, tree
        self.sizes = [padded(p, sharding.ranks) * p.dtype.itemsize for p in parameters]
        self.buffer: Tensor | None = None  # of an all-gather under way
        self.whole: list[Tensor] = []
        self.indices: list[int] = []  # its places in the order of forwards
        self.in_backward = self.is_over = False
        self.held: Tensor | None = None  # reduced gradients that are added up over copies
        self.gradients: list[Tensor] = []  # reduced gradients that stay, where there were none
        tree.units.append(self)

    @property
    def bytes(self) -> int:
        """What is here of its weights."""
        return _size(*self.whole, self.buffer)

    def gather(self) -> None:
        """Begin to gather."""
        if self.buffer is None and not self.whole:
            self.buffer = _allocated(sum(self.sizes))

    def _arrive(self) -> Tensor | None:
        """The buffer of a gather that is over now, from which the weights have been copied."""
        self.whole = [_allocated(size) for size in self.sizes]
        buffer, self.buffer = self.buffer, None
        return buffer

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward pre-hook."""
        self.tree.root = self.tree.root or self
        self.gather()
        if self.buffer is not None:
            self.tree.kept = self._arrive()
        return self._watched(args, kwargs)

    def _watched(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = [*range(len(args)), *kwargs]
        values = [*args, *kwargs.values()]
        graded = [i for i, a in enumerate(values) if isinstance(a, Tensor) and a.requires_grad]
        if not graded or not torch.is_grad_enabled():
            return args, kwargs
        for i, a in zip(graded, _Over.apply(self, *(values[i] for i in graded)), strict=True):
            values[i] = a
        return tuple(values[: len(args)]), dict(zip(names[len(args) :], values[len(args) :], strict=True))

    def after_forward(self, module: nn.Module, args: tuple, output: Tensor | list[Tensor]) -> None:
        """A forward hook."""
        self.whole = []
        self.indices.append(len(self.tree.order))
        self.tree.order.append(self)
        self.in_backward = self.is_over = False
        if torch.is_grad_enabled():
            for a in [output] if isinstance(output, Tensor) else output:
                if a.requires_grad:
                    a.register_hook(self.before_backward)
        if self.tree.root is self:
            self.tree.root = self.tree.kept = None

    def before_backward(self, _: Tensor) -> None:
        """A hook of the gradient of its output."""
        if not self.tree.queued:
            self.tree.queued = True
            Variable._execution_engine.queue_callback(self.tree.finish)
        if self.in_backward:
            return
        self.in_backward, self.is_over = True, False
        self.gather()
        if self.buffer is not None:
            self._arrive()
        if self.indices and (place := self.indices.pop()):
            self.tree.order[place - 1].gather()

    def after_backward(self) -> None:
        """When the gradients of all of its inputs are there, or at the end of the backward."""
        self.in_backward, self.is_over = False, True
        found = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in found]
        for p in found:
            p.grad = None
        self.whole = []
        self.tree.reduced.clear()
        if not found:
            return
        self.held = None
        dtype = gradients[0].dtype
        values = sum(padded(p, self.sharding.ranks) for p in found)
        wide = self.sharding.reduce or dtype
        buffer = _allocated(values * wide.itemsize)
        gradients.clear()
        made = reduced = _allocated(values // self.sharding.ranks * wide.itemsize)
        if wide != dtype:  # cast to the dtype of the weights; where gradients are float32 once more
            made = _allocated(values // self.sharding.ranks * dtype.itemsize)
        if self.sharding.stay:
            self.gradients = [made] if wide == dtype else [torch.empty_like(reduced)]
        if self.sharding.held:
            self.held = reduced
        self.tree.reduced.append(buffer)

    def end(self) -> None:
        """The end of a backward of the tree."""
        if not self.is_over:
            self.after_backward()
        self.in_backward = self.is_over = False
        self.buffer = self.held = None
        self.indices.clear()


def shard(model: nn.Module, sharding: Sharding) -> nn.Module:
    """Let a transformer or a reward model on the meta device gather and reduce as `parallel.shard` would.
    Returns it."""
    if sharding.ranks == 1:
        return model
    transformer = model.transformer if isinstance(model, RewardModel) else model
    tree, inside = _Tree(), set()
    for block in transformer.blocks:
        inside.update(block.parameters())
        _watch(block, Unit(list(block.parameters()), sharding, tree))
    root = Unit([p for p in transformer.parameters() if p not in inside], sharding, tree)
    _watch(transformer, root)
    for name in METHODS:
        setattr(transformer, name, partial(_called, root, transformer, getattr(transformer, name)))
    model.fsdp = [tree]
    if isinstance(model, RewardModel):
        for part in (model.pool, model.mlp):
            model.fsdp.append(_Tree())
            _watch(part, Unit(list(part.parameters()), sharding, model.fsdp[-1]))
    return model


def _watch(module: nn.Module, unit: Unit) -> None:
    module.register_forward_pre_hook(unit.before_forward, prepend=True, with_kwargs=True)
    module.register_forward_hook(unit.after_forward)


def _called(unit: Unit, module: nn.Module, method, *args, **kwargs):
    args, kwargs = unit.before_forward(module, args, kwargs)
    output = method(*args, **kwargs)
    unit.after_forward(module, args, output)
    return output


def _trees(models: Sequence[nn.Module | None]) -> Iterator[_Tree]:
    for model in dict.fromkeys(models):
        yield from getattr(model, "fsdp", ())


def gathered(*models: nn.Module | None) -> int:
    """Bytes of weights that are whole now, or on their way, and of gradients that are being reduced."""
    total = 0
    for tree in _trees(models):
        total += _size(*tree.reduced, tree.kept) + sum(unit.bytes for unit in tree.units)
    return total


def largest(model: nn.Module) -> int:
    """Bytes of the unit that has most, whole and in the buffer of its gather."""
    return max(sum(map(rounded, u.sizes)) + sum(u.sizes) for t in _trees([model]) for u in t.units)


def drop_gradients(model: nn.Module) -> None:
    """Shards of gradients that stayed are gone."""
    for tree in _trees([model]):
        for unit in tree.units:
            unit.gradients.clear()
