"""Bytes by category, each with how it is known."""

from collections.abc import Sequence
from typing import NamedTuple

COUNTED, PREDICTED, ESTIMATED, MEASURED = "counted", "predicted", "estimated", "measured"


class Entry(NamedTuple):
    """Bytes of one category in a phase, how they are known, and from what."""

    category: str
    bytes: int
    how: str
    basis: str


class Phase(NamedTuple):
    """A part of a run with all bytes that are on the device in its peak, or on the host."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(e.bytes for e in self.entries)

    def of(self, *how: str) -> int:
        """Bytes that are known in one of these ways."""
        return sum(e.bytes for e in self.entries if e.how in how)


def entries(found: Sequence[tuple[str, int, str, str]]) -> tuple[Entry, ...]:
    """Those that are not nothing."""
    return tuple(Entry(*entry) for entry in found if entry[1])
