"""SIGTERM and Ctrl-C: a run ends at its next safe point, a second signal ends the process at once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal has ended the work, with all saved that there was to save; one line says so.

    Like KeyboardInterrupt it is no Exception.
    """


class Interrupts:
    """Whether a signal has come, and what it does: raise Stopped at once, or wait to be asked about."""

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.immediate = True

    @contextmanager
    def at_once(self, immediate: bool) -> Iterator[None]:
        """Inside, a signal raises Stopped (so does one that has come before), or only sets `asked`."""
        if immediate and self.asked is not None:
            raise self.stopped("nothing to save")
        before, self.immediate = self.immediate, immediate
        try:
            yield
        finally:
            self.immediate = before

    def stopped(self, what: str) -> Stopped:
        """The exception for the signal that has come; `what` says what was saved."""
        return Stopped(f"{self.asked.name}: stopped; {what}")

    def __call__(self, number: int, frame) -> None:
        """The handler. Writes to the descriptor: sys.stderr may be busy, and a progress bar open."""
        name = signal.Signals(number).name
        if self.asked is not None:
            os.write(2, f"\nprfl: {name} again: ended at once\n".encode())
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        self.asked = signal.Signals(number)
        if self.immediate:
            self.immediate = False  # so that what is cleaned up now is not interrupted
            raise self.stopped("nothing to save")
        os.write(2, f"\nprfl: {name}: stopping after this step; a second one ends at once\n".encode())


_active: Interrupts | None = None


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle signals inside the block; the outer one's object where blocks nest.

    Only the main thread can: elsewhere, signals do what they did before.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Interrupts()
        return
    _active = Interrupts()
    before = {number: signal.signal(number, _active) for number in SIGNALS}
    try:
        yield _active
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _active = None


@contextmanager
def quiet_children() -> Iterator[None]:
    """Without torch's SIGCHLD handler, which raises in whatever runs when a loader process dies. The loader
    also finds that out when it waits for a batch, within 5 s."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # a generator may end elsewhere
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait for the end of the block. A process that starts in it has them blocked from the beginning,
    until `shield`: torch's own handler, which comes before, would end a loader process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield(worker: int) -> None:
    """For a loader process, started `held_back`: Ctrl-C and a batch system's SIGTERM, which reach every
    process of a run, are the training process's to answer; a SIGTERM from that one ends this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
