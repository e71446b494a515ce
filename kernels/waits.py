"""Where a process waits for others, told to whoever times it (prfl_engine.exposed).

Nothing is timed here, and without a listener a wait costs one comparison.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Listener = Callable[[], AbstractContextManager[None]]
"""Makes a with block that stands around a wait."""

_NOBODY = nullcontext()
_listener: Listener | None = None


def waiting() -> AbstractContextManager[None]:
    """A with block of a collective, its packing and unpacking, that the computation waits for."""
    return _NOBODY if _listener is None else _listener()


@contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Inside, every wait is told to `listener`."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
