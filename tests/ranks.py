"""Runs functions on several processes that talk over gloo.

The processes come from one server that has imported torch and the engine, and stay for many calls. A function
must be importable by name. Where a rank fails, hangs or crashes, all end and the test gets its traceback; of
a crash also what the process said last, where its threads were, in C++ too, and what tests it has served.
"""

import datetime
import faulthandler
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

LIMIT = 600.0  # seconds; a call that takes longer hangs


def server(*preload: str) -> multiprocessing.context.ForkServerContext:
    """The server, which imports these modules too if it has not started yet."""
    context = multiprocessing.get_context("forkserver")
    heavy = "torch.distributed", "prfl_engine.parallel", "prfl_engine.train", "torchao.optim.quant_utils"
    context.set_forkserver_preload([*heavy, *preload])
    return context


def _serve(rank: int, size: int, folder: Path, group: bool, pipe) -> None:
    with open(folder / f"crash-{rank}", "w") as crash:
        os.dup2(crash.fileno(), 2)  # also what glibc says of a heap that is corrupt
        faulthandler.enable()
        _answer_calls(rank, size, folder / "store" if group else None, pipe)


def _answer_calls(rank: int, size: int, store: Path | None, pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    import torch
    import torch.distributed as dist

    torch._C._set_print_stack_traces_on_fatal_signal(True)  # then the handler of Python's frames is called
    gc.freeze()  # what the server has imported stays
    gc.set_threshold(10_000, 10, 10)  # as in conftest.py
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=LIMIT)
    if store is not None:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    pipe.send((True, None))
    while (call := pipe.recv()) is not None:
        function, arguments = call
        torch.manual_seed(0)
        try:
            found = True, function(*arguments)
        except Exception:  # whatever a function under test raises belongs to the test
            found = False, traceback.format_exc()
        pipe.send(found)
    if store is not None:
        dist.destroy_process_group()


class Ranks:
    """`size` processes with a default process group; new ones after a failure."""

    def __init__(self, size: int, preload: tuple[str, ...] = (), group: bool = True):
        """preload: modules to import once for all. group False: the functions make the process group."""
        self.size, self.preload, self.group = size, preload, group
        self._start()

    def _start(self) -> None:
        context = server(*self.preload)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._pipes, self._processes, self._served = [], [], {}
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = rank, self.size, folder, self.group, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers("the start")

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        """What function(*arguments) returns on every rank. RuntimeError where one raises, ends or hangs."""
        if not self._processes:
            self._start()
        self._served[os.environ.get("PYTEST_CURRENT_TEST", "no test")] = None
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._answers(function.__name__)

    def _answers(self, what: str) -> list[Any]:
        found, end = {}, time.monotonic() + LIMIT
        while len(found) < len(self._pipes):
            left = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(left, max(0.0, end - time.monotonic()))
            for pipe in ready or left:
                try:
                    ok, value = pipe.recv() if ready else (False, self._silent(left[pipe]))
                except EOFError:
                    ok, value = False, self._end(left[pipe])
                if not ok:  # the others may wait for this rank
                    rank, value = self._ended(left) or (left[pipe], value)
                    self.close()
                    raise RuntimeError(f"rank {rank} of {len(self._pipes)}, {what}: {value}")
                found[left[pipe]] = value
        return [found[rank] for rank in range(len(found))]

    def _ended(self, left: dict) -> tuple[int, str] | None:
        """A rank that has ended by itself, and what is known of it: another's error may be of its loss."""
        for pipe in wait(left, 0):
            try:
                pipe.recv()
            except EOFError:
                return left[pipe], self._end(left[pipe])
        return None

    def _end(self, rank: int) -> str:
        """Of a process that has ended by itself: its exit code, and what is known of it."""
        self._processes[rank].join()
        return self._told(rank, f"the process has ended with exit code {self._processes[rank].exitcode}")

    def _silent(self, rank: int) -> str:
        return self._told(rank, f"no answer in {LIMIT:g} s")

    def _told(self, rank: int, what: str) -> str:
        crash = Path(self._folder.name, f"crash-{rank}").read_text(errors="replace")
        return "\n".join((what, crash, "tests that these processes have served:", *self._served))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        self._folder.cleanup()
