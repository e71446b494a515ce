"""A composite operation, declared once by five NamedTuples.

    Inputs    Tensor or Tensor | None: what the gradients are of
    Settings  int, float, torch.dtype, tuples of them, or None: what forward and backward need besides
    Saves     Annotated[bool, results]: groups of results that the forward saves for the backward if asked
    Results   Tensor, or Tensor | None where the backward may go without: first the results proper, which
              take gradient, then what is saved
    Wants     Annotated[bool, inputs]: groups of gradients that the backward computes if asked; an input
              that is in none takes no gradient

Two operations of torch.ops.prfl follow, with schemas, fakes, checks and autograd:

    NAME           (*Inputs, *Settings, Saves as bool[]) -> Results
    NAME_backward  (gradients of the results proper, *Inputs, *Results, *Settings, Wants as bool[])
                   -> gradients of Inputs

A result that is not saved and a gradient that is not computed are empty tensors [0].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from prfl_kernels.checks import checked, expect, expect_length
from prfl_kernels.jit import register

Record = type[NamedTuple]
Shape = tuple[tuple[int, ...], torch.dtype]
_TYPES = {Tensor: "Tensor", int: "int", float: "float", torch.dtype: "ScalarType"}


def groups(record: Record) -> dict[str, tuple[str, ...]]:
    """The names that every field of a Saves or Wants stands for."""
    return {k: hint.__metadata__ for k, hint in get_type_hints(record, include_extras=True).items()}


def _schema(hint: Any) -> str:
    """A type as a schema spells it."""
    options = get_args(hint)
    if get_origin(hint) is tuple:
        return f"{_schema(options[0])}[{len(options)}]"
    return f"{_schema(options[0])}?" if type(None) in options else _TYPES[hint]


def _arguments(record: Record, prefix: str = "") -> list[str]:
    return [f"{_schema(hint)} {prefix}{name}" for name, hint in get_type_hints(record).items()]


def _missing(a: Tensor) -> bool:
    return a.dim() == 1 and not a.shape[0]


class Operation:
    """Registers both forms of an operation; the functions get and give the records named above.

    check(op, inputs, settings, saved) raises ValueError for what does not fit; saved are the Results that the
    backward gets, None in the forward. shapes(inputs, settings) is the shape and dtype of every result by
    name, None for one that there is not; fake and backward check follow from it. forward(inputs, settings,
    saves) returns the results by name, None for [0]. save(inputs, results) returns what of both the backward
    gets: None for what it does not need, or [0] for an input of the first one's shape whose dtype it needs.
    backward(gradients, inputs, saved, settings, wants) returns gradients by the name of their input, of any
    dtype. The first `proper` results take gradient; those that a backward has none of are None.
    """

    def __init__(
        self,
        name: str,
        inputs: Record,
        settings: Record,
        saves: Record,
        results: Record,
        wants: Record,
        check: Callable[..., None],
        shapes: Callable[..., Mapping[str, Shape | None]],
        forward: Callable[..., Mapping[str, Tensor | None]],
        save: Callable[..., tuple[NamedTuple, NamedTuple]],
        backward: Callable[..., Mapping[str, Tensor]],
        proper: int = 1,
    ):
        self.name, self.proper = name, proper
        self.inputs, self.settings, self.saves, self.results, self.wants = (
            inputs, settings, saves, results, wants,
        )  # fmt: skip
        self.check, self.shapes, self.forward, self.save, self.backward = (
            check, shapes, forward, save, backward,
        )  # fmt: skip
        self.saved_groups = groups(saves)
        self.group_of = {k: group for group, names in groups(wants).items() for k in names}
        places = {k: i for i, k in enumerate(inputs._fields)}
        self.wanted_places = [[places[k] for k in names] for names in groups(wants).values()]
        both = ", ".join(_arguments(inputs)), ", ".join(_arguments(settings))
        kind = "Tensor" if proper == 1 else "Tensor?"
        given = ", ".join(f"{kind} d{k}" for k in results._fields[:proper])
        saved = ", ".join(_arguments(results, "saved_"))
        register(
            f"{name}({both[0]}, {both[1]}, bool[] saves) -> ({', '.join(['Tensor'] * len(results._fields))})",
            *self._taking(self._unpacked, checked(self._check, self._forward, self._fake)),
            self._gradient,
            self._setup_context,
        )
        register(
            f"{name}_backward({given}, {both[0]}, {saved}, {both[1]}, bool[] wants)"
            f" -> ({', '.join(['Tensor'] * len(inputs._fields))})",
            *self._taking(
                self._unpacked_backward, checked(self._check_backward, self._backward, self._backward_fake)
            ),
        )
        self.call, self.call_backward = (
            getattr(torch.ops.prfl, k) for k in (name, f"{name}_backward")
        )

    @staticmethod
    def _taking(unpack: Callable[[tuple], tuple], functions: list[Callable]) -> list[Callable]:
        """Functions of records as functions of the arguments of a schema."""

        def after(function: Callable) -> Callable:
            return lambda *args: function(*unpack(args))

        return [after(function) for function in functions]

    def _unpacked(self, args: tuple) -> tuple:
        """(inputs, settings, saves)."""
        expect_length(self.name, "saves", args[-1], len(self.saves._fields))
        end = len(self.inputs._fields)
        return (
            self.inputs._make(args[:end]), self.settings._make(args[end:-1]), self.saves._make(args[-1]),
        )  # fmt: skip

    def _unpacked_backward(self, args: tuple) -> tuple:
        """(gradients, inputs, saved, settings, wants)."""
        expect_length(f"{self.name}_backward", "wants", args[-1], len(self.wants._fields))
        a = self.proper
        b = a + len(self.inputs._fields)
        c = b + len(self.results._fields)
        return (
            args[:a], self.inputs._make(args[a:b]), self.results._make(args[b:c]),
            self.settings._make(args[c:-1]), self.wants._make(args[-1]),
        )  # fmt: skip

    def _check(self, inputs, settings, saves) -> None:
        self.check(self.name, inputs, settings, None)

    def _check_backward(self, gradients, inputs, saved, settings, wants) -> None:
        op = f"{self.name}_backward"
        self.check(op, inputs, settings, saved)
        x, shapes = inputs[0], self.shapes(inputs, settings)
        for name, d in zip(self.results._fields, gradients, strict=False):
            if d is not None:
                expect(op, f"d{name}", d, (0,) if shapes[name] is None else shapes[name][0], x)
        left_out = set()
        for names in self.saved_groups.values():
            if all(a is None or _missing(a) for a in (getattr(saved, k) for k in names)):
                left_out.update(names)
        for name, a in saved._asdict().items():
            if a is not None and shapes[name] is not None and name not in left_out:
                expect(op, name, a, shapes[name][0], x, shapes[name][1])

    def _forward(self, inputs, settings, saves) -> tuple[Tensor, ...]:
        results = self.results(**self.forward(inputs, settings, saves))
        return tuple(inputs[0].new_empty(0) if a is None else a for a in results)

    def _fake(self, inputs, settings, saves) -> tuple[Tensor, ...]:
        shapes = self.results(**self.shapes(inputs, settings))._asdict()
        for saved, names in zip(saves, self.saved_groups.values(), strict=True):
            shapes |= {} if saved else dict.fromkeys(names)
        x = inputs[0]
        return tuple(x.new_empty(0) if a is None else x.new_empty(a[0], dtype=a[1]) for a in shapes.values())

    def _setup_context(self, ctx, inputs: tuple, output: tuple) -> None:
        inputs, ctx.settings, _ = self._unpacked(inputs)
        ctx.set_materialize_grads(False)  # or every saved tensor gets a gradient of zeros of its size
        plain = (a for i, a in enumerate(output) if i >= self.proper or _missing(a))
        ctx.mark_non_differentiable(*plain)
        inputs, results = self.save(inputs, self.results._make(output))
        ctx.save_for_backward(*inputs, *results)

    def _gradient(self, ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, needs = gradients[: self.proper], ctx.needs_input_grad
        if all(d is None for d in gradients):
            return (None,) * len(needs)
        wants = [any(needs[i] for i in places) for places in self.wanted_places]
        made = self.call_backward(*gradients, *ctx.saved_tensors, *ctx.settings, wants)
        made = (
            a if need and name in self.group_of else None
            for name, a, need in zip(self.inputs._fields, made, needs, strict=False)
        )
        return *made, *[None] * (len(needs) - len(self.inputs._fields))

    def _wanted(self, inputs: NamedTuple, wants: NamedTuple) -> dict[str, Tensor | None]:
        """The inputs, None for those whose gradient is not computed."""
        return {
            k: a if k in self.group_of and getattr(wants, self.group_of[k]) else None
            for k, a in inputs._asdict().items()
        }

    def _backward(self, gradients, inputs, saved, settings, wants) -> tuple[Tensor, ...]:
        made = self.backward(*gradients, inputs, saved, settings, wants)
        return tuple(
            inputs[0].new_empty(0) if a is None else made[k].to(a.dtype)
            for k, a in self._wanted(inputs, wants).items()
        )

    def _backward_fake(self, gradients, inputs, saved, settings, wants) -> tuple[Tensor, ...]:
        x = inputs[0]
        return tuple(
            x.new_empty(0) if a is None else a.new_empty(x.shape if _missing(a) else a.shape)
            for a in self._wanted(inputs, wants).values()
        )
