"""Bounds of configuration fields: part of the type annotation, checked when a section is built.

    lr: Annotated[float, Within(0, 1)] = 5e-6

Every field of a `Section` is checked, those without a bound too. Every number has bounds, within which a run
neither overflows float32 nor fails for that number.
"""

import functools
import os
import re
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from prfl_engine.errors import check

UNIONS = typing.Union, types.UnionType


@dataclass(frozen=True)
class Within:
    """Numbers from low to high, both included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else end for end in (self.low, self.high))
        return f" in [{low}, {high}]"


class NotEmpty:
    """A list that is not empty."""

    def holds(self, value: tuple) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return ", not empty"


class Short:
    """Printable text of 1 to 1000 characters, not only blanks."""

    def holds(self, value: str) -> bool:
        return 0 < len(value) <= 1000 and value.isprintable() and not value.isspace()

    def __str__(self) -> str:
        return ", printable, of 1 to 1000 characters, not only blanks"


class Matches:
    """Text that matches a regular expression in full; `want` says what does."""

    def __init__(self, pattern: str, want: str):
        self.pattern, self.want = pattern, want

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f": {self.want}"


class PathText:
    """Text that a file system takes as a path, and not only blanks: no NUL, no name or path that is too
    long."""

    def holds(self, value: str) -> bool:
        try:
            name = os.fsencode(value)
        except UnicodeEncodeError:
            return False
        good = value.strip() != "" and len(name) < 4096 and b"\0" not in name
        return good and max(map(len, name.split(b"/"))) < 256

    def __str__(self) -> str:
        return " that can be a path (not empty or blank, no NUL, not too long)"


def check_path(value: Any, name: str) -> None:
    """UserError for what is not text, or cannot be a path."""
    check(isinstance(value, str) and PathText().holds(value), name, value, f"text{PathText()}")


Count = Annotated[int, Within(1, 2**31 - 1)]
Natural = Annotated[int, Within(0, 2**31 - 1)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
Real = Annotated[float, Within(-1e9, 1e9)]  # the squares of these are finite in float32, and not 0 below
Nonnegative = Annotated[float, Within(0, 1e9)]
Positive = Annotated[float, Within(1e-9, 1e9)]
Probability = Annotated[float, Within(0, 1)]
Fraction = Annotated[float, Within(0, 0.999999)]  # below 1 in float32 too
FilePath = Annotated[str, PathText()]
Name = Annotated[str, Short()]


class Section:
    """A frozen dataclass whose fields are checked when it is built; `section` is the prefix of their
    names."""

    section: typing.ClassVar[str]

    def __init_subclass__(cls, name: str):
        cls.section = name

    def __post_init__(self):
        for field, kind in hints(type(self)).items():
            value = getattr(self, field)
            check(fits(kind, value), f"{self.section}.{field}".lstrip("."), value, describe(kind))


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, bounds included."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type and within its bounds."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return fits(args[0], value) and all(bound.holds(value) for bound in args[1:])
    if origin in UNIONS:
        return any(fits(option, value) for option in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        each = args[:1] * len(value) if args[-1] is ... and isinstance(value, tuple) else args
        return (
            isinstance(value, tuple) and len(value) == len(each)
            and all(fits(k, v) for k, v in zip(each, value, strict=True))
        )  # fmt: skip
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def describe(kind: Any) -> str:
    """What a field wants, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return describe(args[0]) + "".join(map(str, args[1:]))
    if origin in UNIONS:
        return " or ".join(map(describe, args))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list{'' if args[-1] is ... else f' of {len(args)}'}, each {describe(args[0])}"
    if is_dataclass(kind):
        return "a mapping of " + ", ".join(hints(kind))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(kind, "null")
