"""What a test is told of a rank that crashes."""

import ctypes

import pytest
from ranks import Ranks


def crash() -> None:
    ctypes.string_at(0)


def test_a_rank_that_crashes_is_named_with_its_exit_code_and_where_it_was():
    ranks = Ranks(1, ("test_ranks",), group=False)
    where = r"rank 0 of 1, crash: .* exit code -11\n.*Segmentation fault(.|\n)* in crash"
    with pytest.raises(RuntimeError, match=where):
        ranks(crash)
    ranks.close()
