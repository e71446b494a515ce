"""Work in a process of its own, beside other work that does not need it."""

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from typing import Any

import torch

from prfl_engine.errors import TrainingError


@contextmanager
def beside(run: Callable, *args: Any) -> Iterator[Callable[[], Any]]:
    """A with block beside which run(*args) works in a new process, both with half of torch's threads, at
    least one. Gives what waits for its result, or raises what it has raised; what it printed is printed then.

    A training step of the demo is 1.2 to 1.3 times as fast with two threads as with one (Zen 4): most of its
    operations are small. Two processes with a thread each keep two cores busy. The block ends when both have.
    """
    threads = torch.get_num_threads()
    theirs = max(1, threads // 2)
    torch.set_num_threads(max(1, threads - theirs))
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            future = pool.submit(_printing, theirs, run, args)
            yield lambda: _printed(future)
    finally:
        torch.set_num_threads(threads)


def _printing(threads: int, run: Callable, args: tuple) -> tuple[bytes, str]:
    """What run(*args) returns, pickled (the pool would share memory of tensors), and what it prints."""
    torch.set_num_threads(threads)
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        return pickle.dumps(run(*args)), text.getvalue()


def _printed(future: Future) -> Any:
    try:
        result, text = future.result()
    except BrokenProcessPool:
        raise TrainingError("a process was killed: perhaps there was too little memory") from None
    print(text, end="", file=sys.stderr, flush=True)
    return pickle.loads(result)
