"""A sharded checkpoint holds everything to the bit, for any number of ranks, or is not there at all."""

import pytest
import sharded_checkpoint_cases as cases
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    """Ranks by their number."""
    made = {size: Ranks(size, ("sharded_checkpoint_cases",)) for size in (1, 2, 3, 4)}
    yield made
    for some in made.values():
        some.close()


@pytest.mark.parametrize("mode", cases.MODES)
def test_any_number_of_ranks_reads_what_any_other_wrote(ranks, mode, tmp_path):
    want = ranks[4](cases.write, tmp_path / "0", mode, 2 if mode == "plain" else 1)
    for i, size in enumerate((2, 1, 3, 4)):
        for got in ranks[size](cases.pass_on, tmp_path / f"{i}", tmp_path / f"{i + 1}", mode):
            assert got == want[0]
    for got in ranks[4](cases.pass_on, tmp_path / "4", tmp_path / "5", mode, 2):
        assert got == want[0]
    assert len(want[0]) > 100
