"""Sharded over 2 and 4 ranks (FSDP2, HSDP, with a cut sequence) training is that of one process."""

import phase_cases
import pytest
import shard_cases as cases
import torch
from ranks import Ranks

from prfl_engine.memory.policy import BlockPolicy

OFFLOAD = BlockPolicy({"input", "rotated"}, {"attention", "projections", "after_attention"})
MIXED = BlockPolicy({"input", "attention", "hidden"}, {"after_attention"})


@pytest.fixture(scope="module")
def two():
    made = Ranks(2, ("shard_cases", "phase_cases"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def four():
    made = Ranks(4, ("shard_cases", "phase_cases"))
    yield made
    made.close()


@pytest.fixture(params=["two", "four"])
def ranks(request):
    return request.getfixturevalue(request.param)


def layouts(size: int) -> list[tuple[int, int]]:
    """(replicas, ranks that share a sequence). Four ranks do both at once."""
    return [(1, 1), (1, 2)] if size == 2 else [(2, 2)]


def check(ranks, function, *arguments, given=None) -> None:
    """In the layouts that are given, or the usual ones."""
    given = given or layouts(ranks.size)
    for found in ranks(function, *arguments, given):
        for layout, (loss, gradient, name) in zip(given, found, strict=True):
            assert loss < 1e-12, layout
            assert gradient < 1e-11, (layout, name)


@pytest.mark.parametrize(
    "policy, keep, backend",
    [
        ("none", "all", None), ("none", "nothing", None), ("none", "projections", None),
        ("full", "all", None), ("attention", "all", None), (OFFLOAD, "all", None), (MIXED, "all", None),
        ("none", "all", "aot_eager"), ("attention", "all", "aot_eager"),
    ],
)  # fmt: skip
def test_flow_matching(two, policy, keep, backend):
    check(two, cases.flow_matching, policy, keep, backend)


@pytest.mark.parametrize("policy", ["none", MIXED])
def test_flow_matching_on_four_ranks(four, policy):
    check(four, cases.flow_matching, policy, "all", None)


EQUAL, UNEQUAL = [[2] * 4, [4] * 4], [[0, 1, 0, 2], [1, 4, 2, 3]]


GRADED = {
    "a step": (1, EQUAL[:1], False), "windows": (3, EQUAL, False),
    "windows of other lengths": (3, UNEQUAL, False), "resident": (3, UNEQUAL, True),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADED)
def test_graded_steps(two, name):
    """With different indices ranks have rollouts and windows of different lengths."""
    check(two, cases.graded, *GRADED[name])


@pytest.mark.parametrize("name", ["windows of other lengths", "resident"])
def test_graded_steps_on_four_ranks(four, name):
    check(four, cases.graded, *GRADED[name])


def test_a_graded_window_in_every_other_layout_of_four_ranks(four):
    check(four, cases.graded, 2, UNEQUAL[:1], False, given=[(1, 1), (1, 4), (2, 1), (1, 2)])


def test_an_image(two):
    check(two, cases.image, given=[(1, 2)])


def test_chains_that_persist_need_no_equal_index(ranks):
    check(ranks, cases.chains)


def test_single_precision(ranks):
    for layout in layouts(ranks.size):
        for loss, gradient in ranks(cases.single, *layout):
            assert loss < 1e-6 and gradient < 1e-6


def test_reward_training(ranks):
    check(ranks, cases.rewards)


def test_an_adapter(ranks):
    check(ranks, cases.adapter)


@pytest.mark.parametrize("updates", [True, False])
def test_a_leash(two, updates):
    check(two, cases.anchored, updates)


BF16 = torch.bfloat16


FP32 = torch.float32
MODES = {  # (settings, dtype, length of 20 steps, limit of the distance)
    "AdamW": ({}, FP32, 1e-5, 1e-6),
    "states on the host": ({"offload": "states"}, FP32, 1e-5, 1e-6),
    "in backward": ({"in_backward": True, "clip": None}, FP32, 1e-5, 1e-6),
    "masters": ({"rounding": "master"}, BF16, 3e-6, 1e-6),
    "masters, sums, all on the host": (
        {"rounding": "master", "grad_dtype": "float32", "offload": "all"}, BF16, 3e-6, 1e-6,
    ),
    "stochastic": ({"rounding": "stochastic"}, BF16, 3e-3, 2e-2),
    "8 bits": ({"name": "adamw8bit", "offload": "all"}, FP32, 1e-5, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_modes(two, mode):
    check_mode(two, mode, 20 if mode in ("AdamW", "masters", "8 bits") else 5)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "states on the host"])
def test_optimizer_modes_with_copies(four, mode):
    check_mode(four, mode, 5)


def check_mode(ranks, mode, steps):
    """After 20 steps, or 5 of four times the length, the weights are those of one process, relative to their
    norm, masters and all. Losses and averaged weights, too, which see bfloat16 weights: rounded, they may
    differ by a bit."""
    settings, dtype, lr, limit = MODES[mode]
    lr *= 20 / steps
    for distance, moved, others in ranks(cases.trained, settings, dtype, lr, steps, ranks.size // 2):
        assert distance < limit
        assert moved > max(2e-4, 5 * limit)
        assert others < (limit if dtype == torch.float32 else max(limit, 1e-5))


def test_gradients_of_several_micro_batches(ranks):
    check(ranks, cases.accumulated, given=[(2, 1)])


def test_float32_sums_of_bfloat16_gradients(two):
    for errors, on_the_way in two(cases.float32_sums):
        assert 2 * errors["float32"] < errors["weights"]
        assert on_the_way == [("float32", "torch.float32"), ("weights", "torch.bfloat16")]


@pytest.mark.parametrize("updates", [False, True])
def test_sharding_casts_nothing(two, updates):
    assert max(two(cases.own_precision, updates)) == 0


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_an_optimizer_is_made_without_gathering_weights(two, name):
    assert two(cases.made, name) == [0, 0]


def test_ranks_agree_on_a_gradient_that_is_no_number(ranks):
    """In a backward, what came before it is updated on all ranks, and what comes after it on none."""
    for in_backward in (False, True):
        norms, changed = zip(*ranks(cases.one_bad_shard, in_backward), strict=True)
        assert not any(norms)
        assert all(names == changed[0] for names in changed)
        assert ("blocks.1.ffn.0.weight" in changed[0]) == in_backward
        assert "head.head.weight" not in changed[0]


def test_shards_are_rounded_by_other_numbers_and_copies_by_the_same(ranks):
    found, states = zip(*ranks(cases.rounded, ranks.size // 2), strict=True)
    shards = found[::2] if ranks.size == 4 else found
    assert found[0] != found[1] and len(set(found[0])) == 2
    assert ranks.size == 2 or (found[2], found[3]) == (found[0], found[1])
    assert len(shards) == 2 and all("exp_avg_rms" in names for names in states)


def test_a_reward_model_with_updates_is_written_from_its_shards(two, tmp_path):
    assert all(two(cases.adapted, str(tmp_path)))


@pytest.mark.parametrize("precision, cache", [("fp8", 0.0), ("same", 0.3)])
@pytest.mark.parametrize("resident", [False, True])
def test_accelerated_rollouts(two, precision, cache, resident):
    """They are those of one process. With resident weights samples and indices differ, and every group
    chooses by itself which steps to compute."""
    check_rollouts(two, precision, cache, resident)


@pytest.mark.parametrize("resident", [False, True])
def test_accelerated_rollouts_on_four_ranks(four, resident):
    check_rollouts(four, "fp8", 0.3, resident)


def check_rollouts(ranks, precision, cache, resident):
    for layout in layouts(ranks.size):
        made = ranks(phase_cases.rollout, precision, cache, resident, not resident, *layout)
        for sharded, accelerated, _, same in made:
            assert sharded < 1e-3 < 5e-3 < accelerated
            assert same


def test_a_step_that_one_rank_computes_is_computed_on_all(ranks):
    """Samples and indices differ, and no rank waits for another. Five steps gather the root and the first
    block, whose input tells how much has changed, and two blocks if they are computed."""
    gathers = {found[2] for found in ranks(phase_cases.rollout, "same", 0.3, False, False, 1, 1)}
    assert len(gathers) == 1 and max(gathers) < 5 * (2 + 2)


@pytest.mark.parametrize("window, resident, last", [(1, False, True), (1, True, False), (2, False, True)])
def test_collectives_of_a_step(ranks, window, resident, last):
    """One gather of a unit (a block, or the rest) in a forward and one in a backward, and one reduction in a
    backward. The context's backward is one of the rest alone. A rollout with resident weights gathers them
    once and has no collective inside. Copies add up nothing but gradients, and blocks in the last backward
    of a step alone."""
    units = phase_cases.BLOCKS + 1
    for rank, found in enumerate(ranks(phase_cases.phases, resident, ranks.size // 2, window, last)):
        shards, copies = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        gather, scatter, add = ("gather", shards), ("scatter", shards), ("all_reduce", copies)
        forwards = phase_cases.STEPS * units
        assert found["rollout"] == {gather: units if resident else forwards}
        assert found["inside"] == ({} if resident else {gather: forwards})
        assert found["steps"] == {gather: window * units}
        want = {gather: (2 * window - 1) * units + 1, scatter: window * units + 1}
        if ranks.size == 4:
            want[add] = window * (units if last else 1) + 1
        assert found["backward"] == want


@pytest.mark.parametrize("updates", [False, True])
def test_resident_weights_are_a_copy_as_products_read_it(ranks, updates):
    """In their compute dtype, with the same results. Where they are kept they stay at one place, so that what
    was recorded once is replayed with the weights of every step; each of two sizes of a batch is recorded."""
    for found in ranks(phase_cases.resident, updates, ranks.size // 2):
        equal, recorded, dtypes, freed = found
        assert equal and freed and dtypes == {torch.bfloat16}
        assert recorded == [2, 2]


@pytest.mark.parametrize("policy", ["none", "full", "attention", OFFLOAD, MIXED])
def test_a_block_is_gathered_before_the_backward_of_the_one_after_it(two, policy):
    """FSDP's own order, which recomputation leaves as it is: the rest, the last block and the one before it;
    another one; none."""
    assert all(seen == [3, 4, 4] for seen in two(phase_cases.ahead, policy))


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_rank_waits_for_one_that_is_late(two, tmp_path, sequence):
    """Ten seconds in the phase of the wait, of a clock that stands still otherwise; the late one waits for
    nobody."""
    first, second = two(phase_cases.waits, str(tmp_path), sequence)
    late = {"data", "rollout", "graded", "reward"} | ({"validation"} if sequence > 1 else set())
    assert {phase: seconds for phase, seconds in first.items() if seconds} == dict.fromkeys(late, 10.0)
    assert late <= second.keys() and not any(second.values())
