"""What the engine raises at the user: one line that names a field or file, what it got and what it wants."""

from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: one line, shown without a traceback, exit code 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: one line, shown without a traceback, exit code 1."""


def check(ok: bool, name: str, got: Any, want: str) -> None:
    """Raise UserError "name: got ..., want ..." unless ok."""
    if not ok:
        raise UserError(f"{name}: got {got!r}, want {want}")
