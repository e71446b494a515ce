"""Both experts of Wan2.2 A14B in several processes: the losses, gradients and runs of one process."""

import expert_cases as cases
import pytest
import run_cases
from ranks import Ranks
from test_expert_pair import LOW_ALONE, written
from test_shards import check
from training_runs import run, values

from prfl_engine.config import load_config
from prfl_engine.objectives import schedule_of
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.together import asked


@pytest.fixture(scope="module")
def two():
    made = Ranks(2, ("expert_cases",))
    yield made
    made.close()


@pytest.fixture(scope="module")
def four():
    made = Ranks(4, ("expert_cases",))
    yield made
    made.close()


EQUAL, UNEQUAL = [[2] * 4, [4] * 4], [[0, 1, 0, 2], [1, 4, 3, 3]]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_flow_matching(two, policy):
    check(two, cases.flow_matching, policy)


@pytest.mark.parametrize("window, indices, frozen, resident", [
    (3, EQUAL, None, False), (1, UNEQUAL, None, False), (3, UNEQUAL, None, True), (3, UNEQUAL[1:], 0, False),
    (3, UNEQUAL[1:], 1, True),
], ids=["equal", "unequal", "resident", "high frozen", "low frozen, resident"])  # fmt: skip
def test_graded_steps(two, window, indices, frozen, resident):
    """Windows go through the boundary, and with unequal indices ranks ask other experts at a time."""
    check(two, cases.graded, window, indices, frozen, resident)


def test_on_four_ranks(four):
    """Two copies of the weights, and two ranks a sample."""
    check(four, cases.graded, 3, UNEQUAL, None, False)


def test_an_image(two):
    check(two, cases.image)


@pytest.mark.parametrize("high, indices", [(4, [[1, 4, 3, 2]]), (1, [[1, 1, 4, 4]])])
def test_updates_with_guidance_and_a_leash(two, high, indices):
    """Also where a step of one expert is not guided, and ranks ask different experts."""
    check(two, cases.leashed, high, indices)


def test_copies_add_up_what_the_last_backward_has_no_part_in(four):
    check(four, cases.accumulated)


def test_resident_weights_of_one_expert_at_a_time(two):
    first, last = two(cases.resident, 5)
    assert first == ([(True, False)], 0)
    assert last == ([(True, False)] * 4 + [(False, True)], 0)


@pytest.fixture(scope="module")
def runs():
    made = Ranks(2, ("run_cases", "prfl_engine.train"), group=False)
    yield made
    made.close()


@pytest.mark.parametrize("given, apart", [
    (("chain.window=1",), True), ((LOW_ALONE, "chain.window=3", "chain.unconditional=gradient"), True),
    (("rollout.one_index=2", "chain.window=3"), False), ((LOW_ALONE, "chain.window=1"), False),
], ids=["graded", "windows of one trained", "one index", "one expert"])  # fmt: skip
def test_a_training_where_one_expert_alone_is_guided(runs, tmp_path, given, apart):
    """As in one process, whether two ranks may ask different experts in a step with gradient, and do, or not:
    then no step has a half that it does not need."""
    config = written(
        tmp_path, samples=8, train={"accumulate": 2, "steps": 4}, loss={"sft_weight": 0.0},
        data={"negative_text": str(tmp_path / "data/null.npy")},
        chain={"guidance": [4, 1]}, rollout={"guidance": [4, 1], "guidance_at_once": True},
    )  # fmt: skip
    c = load_config(config, given)
    assert asked(c, 2).apart == apart
    high = schedule_of(c.rollout).timesteps >= 1000 * c.model.boundary
    graded = [Fresh(None, c, readers=2).indices(key, 1).item() for key in range(8)]
    window = range(c.chain.window)
    differ = [high[max(0, a - d)] != high[max(0, b - d)]
              for a, b in zip(graded[::2], graded[1::2], strict=True) for d in window]  # fmt: skip
    assert any(differ) == apart
    found = runs(run_cases.command, 2, run_cases.free_port(), run_cases.told_halves, "train", config, *given)
    assert [code for code, _ in found] == [0, 0], found
    assert all(f"both halves in all steps: {apart}\n" in said for _, said in found)
    run("train", config, *given, f"train.out={tmp_path / 'one'}")
    for step, one in values(tmp_path / "one").items():
        assert values(tmp_path / "run")[step] == pytest.approx(one, rel=2e-3, abs=1e-5)
