"""What the engine raises at the user: one line that names a field or file, what it got and what it wants."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict = 3, 8
_repr.maxlist = _repr.maxtuple = _repr.maxset = 16
_repr.maxstring = _repr.maxother = _repr.maxlong = 400


class UserError(ValueError):
    """A mistake in what the user gave: one line, shown without a traceback, exit code 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class TrainingError(RuntimeError):
    """A run that cannot go on: one line, shown without a traceback, exit code 1."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with every character that is not printable, line ends included, as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip())


def show(value: Any) -> str:
    """repr(value), shortened where the value is long or deep."""
    return _repr.repr(value)


def check(ok: bool, name: str, got: Any, want: str) -> None:
    """Raise UserError "name: got ..., want ..." unless ok."""
    if not ok:
        raise UserError(f"{name}: got {show(got)}, want {want}")


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put `where` before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@contextmanager
def refusing(where: str = "") -> Iterator[None]:
    """Turn a ValueError, as the kernels raise it at what the user gave, into a UserError after `where`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
