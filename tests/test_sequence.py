"""A sequence cut over 2 and 4 ranks (gloo) gives the loss and every gradient of the whole one."""

import pytest
import sequence_cases as cases
from ranks import Ranks
from sequence_cases import EVEN, ODD


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    made = Ranks(request.param, ("sequence_cases",))
    yield made
    made.close()


def check(results) -> None:
    for loss, gradient, name in results:
        assert loss < 1e-12
        assert gradient < 1e-11, name


@pytest.mark.parametrize(
    "policy, keep, chunk",
    [
        ("none", "all", None),
        ("none", "nothing", None),
        ("none", "projections", None),
        ("none", "projections", 7),
        ("none", "nothing", 7),
        ("full", "all", None),
        ("attention", "all", 7),
        (cases.OFFLOAD, "all", None),
    ],
)
def test_flow_matching(ranks, policy, keep, chunk):
    check(ranks(cases.flow_matching, "t2v", ODD, policy, keep, chunk))


def test_flow_matching_of_an_image(ranks):
    check(ranks(cases.flow_matching, "i2v", EVEN, "none", "all", None))


def test_flow_matching_of_a_given_first_frame(ranks):
    """Ranks have tokens of it alone, some, or none."""
    check(ranks(cases.flow_matching, "ti2v", ODD, "attention", "all", 7))


@pytest.mark.parametrize(
    "kind, shape, window, samples",
    [("t2v", EVEN, 1, 1), ("t2v", ODD, 3, 2), ("i2v", ODD, 2, 1), ("ti2v", ODD, 2, 1)],
)
def test_graded_steps(ranks, kind, shape, window, samples):
    check(ranks(cases.graded, kind, shape, window, samples))


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_reward_training(ranks, kind):
    check(ranks(cases.reward_training, kind, ODD))


@pytest.mark.parametrize("precision, cache", [("fp8", 0.0), ("same", 0.3), ("fp8", 0.3)])
def test_accelerated_rollouts(ranks, precision, cache):
    """Cut, a rollout makes the same choices: it is as the whole one, which differs from a plain one."""
    for cut, accelerated in ranks(cases.rollout, precision, cache):
        assert cut < 1e-3 < 5e-3 < accelerated


@pytest.mark.parametrize(
    "policy, keep, chunk, shape",
    [
        ("none", "all", None, ODD), ("none", "nothing", 7, ODD), ("none", "projections", None, EVEN),
        ("attention", "all", None, ODD), (cases.OFFLOAD, "all", None, ODD),
    ],
)  # fmt: skip
def test_more_ranks_than_heads(ranks, policy, keep, chunk, shape):
    """Half of the ranks trade tokens for heads, with one another keys are gathered."""
    check(ranks(cases.flow_matching, "t2v", shape, policy, keep, chunk, ranks.size // 2))


def test_heads_that_no_number_of_ranks_divides(ranks):
    check(ranks(cases.flow_matching, "i2v", ODD, "none", "all", None, 1))


def test_graded_steps_of_more_ranks_than_heads(ranks):
    check(ranks(cases.graded, "t2v", ODD, 2, 1, ranks.size // 2))


def test_rollouts_in_fp8_of_more_ranks_than_heads(ranks):
    for cut, accelerated in ranks(cases.rollout, "fp8", 0.3, ranks.size // 2):
        assert cut < 1e-3 < 5e-3 < accelerated


@pytest.mark.parametrize("heads", [4, 1])
def test_fakes(ranks, heads):
    assert all(ranks(cases.fake_shapes, heads))


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_compiled_blocks(ranks, heads):
    assert max(ranks(cases.compiled, heads)) < 1e-12


def test_groups_have_the_time_out_of_the_run(ranks):
    assert "Timed out waiting 1000ms" in ranks(cases.alone_in_a_group, 1.0)[0]


def test_too_few_tokens_are_refused(ranks):
    short = f"sequence: got 1 tokens for {ranks.size} ranks, want at least one each"
    assert set(ranks(cases.refusal, 4, (16, 1, 2, 2))) == {short}
