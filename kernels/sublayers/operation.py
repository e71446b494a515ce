"""A composite operation, declared once.

    inputs    NamedTuple of Tensor or Tensor | None: what the gradients are of
    settings  NamedTuple of int, float, torch.dtype, tuples of them, or None: what is not a tensor
    results   names: first the results proper, which take gradient, then what is saved; "NAME?" where the
              backward may go without
    saves     {group: results}: what the forward saves for the backward if asked for the group
    wants     {group: inputs}: gradients that the backward computes if asked for the group; an input that is
              in no group takes no gradient

Two operations of torch.ops.prfl follow, with schemas, fakes, checks and autograd:

    NAME           (*inputs, *settings, saves as bool[]) -> results
    NAME_backward  (gradients of the results proper, *inputs, *results, *settings, wants as bool[])
                   -> gradients of inputs

A result that is not saved and a gradient that is not computed are empty tensors [0].
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from prfl_kernels.checks import expect, expect_length
from prfl_kernels.declare import or_empty, schema
from prfl_kernels.jit import register

Record = type[NamedTuple]
Groups = Mapping[str, Sequence[str]]
Shape = tuple[tuple[int, ...], torch.dtype]


def tensors(names: Iterable[str], given: Iterable[str] = ()) -> list[tuple[str, type]]:
    """The fields of a record of inputs: tensors of these names, then `given`, which are tensors or None."""
    return [*((name, Tensor) for name in names), *((name, Tensor | None) for name in given)]


def _arguments(record: Record) -> list[str]:
    return [f"{schema(hint)} {name}" for name, hint in get_type_hints(record).items()]


def _missing(a: Tensor) -> bool:
    return a.dim() == 1 and not a.shape[0]


class Operation:
    """Registers both forms of an operation; its functions get records with the names above as attributes.

    check(op, inputs, settings, saved) raises ValueError for what does not fit; saved are the results that the
    backward gets, None in the forward. shapes(inputs, settings) is the shape and dtype of every result by
    name, None for one that there is not; fake and backward check follow from it. forward(inputs, settings,
    saves) returns the results by name; what is not there or None is [0]. save(inputs, results) returns what
    of both the backward gets: None for what it does not need, or [0] for an input of the first one's shape
    whose dtype it needs. backward(gradients, inputs, saved, settings, wants) returns gradients by the name of
    their input, of any dtype. The first `proper` results take gradient; those that a backward has none of are
    None.
    """

    def __init__(
        self,
        name: str,
        inputs: Record,
        settings: Record,
        results: Sequence[str],
        saves: Groups,
        wants: Groups,
        check: Callable[..., None],
        shapes: Callable[..., Mapping[str, Shape | None]],
        forward: Callable[..., Mapping[str, Tensor | None]],
        save: Callable[..., tuple[NamedTuple, NamedTuple]],
        backward: Callable[..., Mapping[str, Tensor]],
        proper: int = 1,
    ):
        self.name, self.inputs, self.settings, self.proper = name, inputs, settings, proper
        names = [k.rstrip("?") for k in results]
        self.results, self.saved_groups = namedtuple("Results", names), saves
        self.saves, self.wants = namedtuple("Saves", saves), namedtuple("Wants", wants)
        self.check, self.shapes, self.forward, self.save, self.backward = (
            check, shapes, forward, save, backward,
        )  # fmt: skip
        # Of every group of gradients the places of its inputs, and of every input the place of its group.
        self.wanted = [[inputs._fields.index(k) for k in names] for names in wants.values()]
        group_of = {place: group for group, places in enumerate(self.wanted) for place in places}
        self.group_of = [group_of.get(place) for place in range(len(inputs._fields))]
        self.end = len(inputs._fields)  # of the inputs among the arguments
        both = ", ".join(_arguments(inputs)), ", ".join(_arguments(settings))
        given = ", ".join(f"Tensor{'?' * (proper > 1)} d{k}" for k in names[:proper])
        saved = ", ".join(f"Tensor{'?' * k.endswith('?')} saved_{k.rstrip('?')}" for k in results)
        register(
            f"{name}({both[0]}, {both[1]}, bool[] saves) -> ({', '.join(['Tensor'] * len(results))})",
            lambda *args: self._forward(*self._checked(args)),
            lambda *args: self._fake(*self._checked(args)),
            self._gradient,
            self._setup_context,
        )
        register(
            f"{name}_backward({given}, {both[0]}, {saved}, {both[1]}, bool[] wants)"
            f" -> ({', '.join(['Tensor'] * self.end)})",
            lambda *args: self._backward(*self._checked_backward(args)),
            lambda *args: self._backward_fake(*self._checked_backward(args)),
        )
        self.call, self.call_backward = (getattr(torch.ops.prfl, k) for k in (name, f"{name}_backward"))

    def _checked(self, args: tuple) -> tuple:
        """(inputs, settings, saves)."""
        saves, end = args[-1], self.end
        expect_length(self.name, "saves", saves, len(self.saved_groups))
        inputs, settings = self.inputs._make(args[:end]), self.settings._make(args[end:-1])
        self.check(self.name, inputs, settings, None)
        return inputs, settings, self.saves._make(saves)

    def _checked_backward(self, args: tuple) -> tuple:
        """(gradients, inputs, saved, settings, wants)."""
        op, names = f"{self.name}_backward", self.results._fields
        expect_length(op, "wants", args[-1], len(self.wants._fields))
        a = self.proper
        b, c = a + self.end, a + self.end + len(names)
        inputs, saved = self.inputs._make(args[a:b]), self.results._make(args[b:c])
        gradients, settings = args[:a], self.settings._make(args[c:-1])
        self.check(op, inputs, settings, saved)
        x, shapes = inputs[0], self.shapes(inputs, settings)
        for name, d in zip(names, gradients, strict=False):
            if d is not None:
                expect(op, f"d{name}", d, (0,) if shapes[name] is None else shapes[name][0], x)
        there = {name for name, a in zip(names, saved, strict=True) if a is not None and not _missing(a)}
        left_out = {name for group in self.saved_groups.values() if there.isdisjoint(group) for name in group}
        for name, a in zip(names, saved, strict=True):
            if a is not None and name not in left_out and (shape := shapes[name]) is not None:
                expect(op, name, a, shape[0], x, shape[1])
        return gradients, inputs, saved, settings, self.wants._make(args[-1])

    def _forward(self, inputs, settings, saves) -> tuple[Tensor, ...]:
        made = self.forward(inputs, settings, saves)
        return or_empty(inputs[0], *map(made.get, self.results._fields))

    def _fake(self, inputs, settings, saves) -> tuple[Tensor, ...]:
        x, shapes = inputs[0], dict(self.shapes(inputs, settings))
        for saved, names in zip(saves, self.saved_groups.values(), strict=True):
            shapes |= {} if saved else dict.fromkeys(names)
        found = map(shapes.get, self.results._fields)
        return tuple(x.new_empty(0) if a is None else x.new_empty(a[0], dtype=a[1]) for a in found)

    def _setup_context(self, ctx, inputs: tuple, output: tuple) -> None:
        ctx.settings = inputs[self.end : -1]
        ctx.set_materialize_grads(False)  # or every saved tensor gets a gradient of zeros of its size
        plain = (a for i, a in enumerate(output) if i >= self.proper or _missing(a))
        ctx.mark_non_differentiable(*plain)
        inputs, results = self.save(self.inputs._make(inputs[: self.end]), self.results._make(output))
        ctx.save_for_backward(*inputs, *results)

    def _gradient(self, ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, needs = gradients[: self.proper], ctx.needs_input_grad
        if all(d is None for d in gradients):
            return (None,) * len(needs)
        wants = [any([needs[i] for i in places]) for places in self.wanted]
        made = self.call_backward(*gradients, *ctx.saved_tensors, *ctx.settings, wants)
        made = [a if need else None for a, need in zip(made, self._wanted(needs, wants), strict=True)]
        return *made, *[None] * (len(needs) - self.end)

    def _wanted(self, values: Sequence, wants: Sequence[bool]) -> list:
        """The values of the inputs, None for those whose gradient is not computed."""
        return [
            value if group is not None and wants[group] else None
            for value, group in zip(values, self.group_of, strict=False)
        ]

    def _backward(self, gradients, inputs, saved, settings, wants) -> tuple[Tensor, ...]:
        made = self.backward(*gradients, inputs, saved, settings, wants)
        wanted = zip(self.inputs._fields, self._wanted(inputs, wants), strict=True)
        return or_empty(inputs[0], *(a if a is None else made[k].to(a.dtype) for k, a in wanted))

    def _backward_fake(self, gradients, inputs, saved, settings, wants) -> tuple[Tensor, ...]:
        x = inputs[0]
        return tuple(
            x.new_empty(0) if a is None else a.new_empty(x.shape if _missing(a) else a.shape)
            for a in self._wanted(inputs, wants)
        )
