"""What a test is told of a rank that crashes, and what a training leaves in the process of a rank."""

import ctypes
import os
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import run_cases
import torch
from helpers import tiny_model
from ranks import Ranks

from prfl_engine.config import Config
from prfl_engine.parallel import started


def crash() -> None:
    ctypes.string_at(0)


def corrupt_heap() -> None:
    """What is freed is no piece of memory, which malloc finds."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,),
    )  # fmt: skip
    libc.free(libc.malloc(900) + 8)


@pytest.mark.parametrize("function, code, said", [
    (crash, -11, "Fatal Python error: Segmentation fault"), (corrupt_heap, -6, "free(): "),
])  # fmt: skip
def test_a_rank_that_crashes_is_named_with_its_exit_code_and_where_it_was(function, code, said):
    """In C++ and in Python, with what it said last, and with the tests that it has served."""
    ranks, name = Ranks(1, ("test_ranks",), group=False), function.__name__
    with pytest.raises(RuntimeError) as error:
        ranks(function)
    ranks.close()
    first, *rest = str(error.value).splitlines()
    assert first == f"rank 0 of 1, {name}: the process has ended with exit code {code}"
    for known in (said, "frame #0: ", f" in {name}", "served:", "test_a_rank_that_crashes"):
        assert any(known in line for line in rest), known


def one_crashes() -> None:
    if os.environ["RANK"] == "1":
        crash()
    raise ValueError("a rank is lost")


def test_a_crash_is_told_before_what_another_rank_says_of_it(monkeypatch):
    """Where both are known at once: a test is run once more for a crash alone."""
    ranks = Ranks(2, ("test_ranks",), group=False)

    def all_of(pipes, limit):
        return wait(pipes, 0) if limit == 0 else [wait([pipe])[0] for pipe in pipes]

    monkeypatch.setattr("ranks.wait", all_of)
    with pytest.raises(RuntimeError, match="^rank 1 of 2, one_crashes: the process .* exit code -11\n"):
        ranks(one_crashes)
    ranks.close()


def gloo_threads(port: int) -> int:
    """Threads of gloo in this process after what a training does with groups."""
    with run_cases.launched(2, port), started(Config(), torch.device("cpu")) as world:
        model = world.place(tiny_model())
        next(model.parameters()).full_tensor()
        del model, world
    names = (task / "comm" for task in Path("/proc/self/task").iterdir())
    return sum("gloo" in name.read_text() for name in names)


def test_the_groups_of_a_training_end_with_it():
    """Those of the first stay with the mesh, which DTensor's cache of shardings holds."""
    ranks = Ranks(2, ("test_ranks",), group=False)
    first, *more = (ranks(gloo_threads, run_cases.free_port()) for _ in range(3))
    ranks.close()
    assert first[0] > 0 and more == [first, first]
