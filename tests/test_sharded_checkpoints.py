"""A sharded checkpoint holds everything to the bit, for any number of ranks, or is not there at all."""

import pytest
import sharded_checkpoint_cases as cases
import torch
from helpers import tiny_config, tiny_model, tiny_reward
from ranks import Ranks

from prfl_engine.model.checkpoint import save_reward, save_transformer


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


def test_steps_go_on_after_a_load_as_they_would_have(ranks, tmp_path):
    assert all(ranks[2](cases.same_steps, tmp_path / "made", "bits"))


def test_a_save_in_the_background_is_of_the_moment_of_its_call(ranks, tmp_path):
    for early, after, want, got in ranks[2](cases.in_background, tmp_path / "made", "host"):
        assert (early, after) == (False, True)
        assert got == want


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_breaks_on_one_rank_leaves_nothing(ranks, tmp_path, background):
    for last, want in ((True, []), (False, ["made"])):
        said = ranks[3](cases.broken_save, tmp_path, last, background)
        assert [left for _, left in said] == [want] * 3
        words = "No space left on device" if last else "saved"
        assert all(words in line for line, _ in said), said
    assert sum(line.startswith("TrainingError: rank 2: ") for line, _ in said) == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "reward"])
def test_every_rank_reads_its_own_rows(ranks, tmp_path, kind, dtype):
    if kind == "reward":
        save_reward(tiny_reward(tiny_config(), blocks=2), tmp_path, 3)
    else:
        save_transformer(tiny_model(tiny_config(kind)).half(), tmp_path)
    found = ranks[2](cases.load, kind, tmp_path, dtype)
    assert all(same for same, _, _ in found)
