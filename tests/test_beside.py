"""Work in a process of its own: its result, its errors, and the threads of both."""

import os

import pytest
import torch

from prfl_engine.demo.beside import beside
from prfl_engine.errors import TrainingError, UserError


def facts(word):
    print("printed", word)
    return os.getpid(), torch.get_num_threads(), word, torch.arange(3.0)


def refuse(name):
    raise UserError(f"{name}: got nothing")


def die():
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_of_another_process_and_the_threads_of_both(threads, capfd):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with beside(facts, "here") as other:
            mine = torch.get_num_threads()
            pid, theirs, word, tensor = other()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert pid != os.getpid() and word == "here"
    assert mine + theirs == max(2, threads)
    assert tensor.tolist() == [0, 1, 2] and not tensor.is_shared()
    assert capfd.readouterr().err.endswith("printed here\n")


def test_what_the_other_process_raises_is_raised_here():
    with pytest.raises(UserError, match="^data: got nothing$"), beside(refuse, "data") as other:
        other()


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(TrainingError, match="^a process was killed: "), beside(die) as other:
        other()


def test_what_the_block_raises_is_raised_and_threads_are_as_before():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), beside(facts, "here"):
        raise KeyError
    assert torch.get_num_threads() == before
