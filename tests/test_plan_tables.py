"""Tables of predictions: the official code's memory beside the paper's, and the form of a table."""

import pytest
import torch
from helpers import tiny_config

from prfl_bench import official_memory as official
from prfl_bench import plan_tables
from prfl_bench.plan_tables import counted, table
from prfl_engine.planner.flops import rollout_forwards
from prfl_engine.planner.machine import MACHINES
from prfl_engine.planner.subject import SIZES

pytest.importorskip("diffusers")
GIB = 2**30


def test_of_all_cases_720p_on_8_gpus_is_nearest_to_the_paper():
    """66.81 and 55.47, within 5 % as GiB; all other cases are 10 % off and more."""
    for paper, case in zip((66.81, 55.47), official.CASES.values(), strict=False):
        for latent, size in SIZES.items():
            for gpus in (8, 24):
                off = abs(official.total(case(size, gpus)) / GIB / paper - 1)
                assert off < 0.05 if (latent, gpus) == ("720p", 8) else off > 0.1, (latent, gpus)


def test_no_gpu_differentiates_a_decode_of_many_frames():
    """Of 480p even without a model, 6 of 21 latent frames."""
    one, six = (official.decoder_bytes((n, 60, 104), torch.bfloat16) for n in (1, 6))
    assert 6 * one < six > MACHINES["h100-80"].memory


def test_a_block_without_values_allocates_what_a_real_one_does(monkeypatch):
    config = tiny_config("t2v", dim=64, num_heads=4)
    told = official.block_bytes(48, 2, config)
    monkeypatch.setattr(official, "DEVICE", "cpu")
    official.block_bytes.cache_clear()
    assert official.block_bytes(48, 2, config) == told
    official.block_bytes.cache_clear()


def test_a_table_is_markdown():
    assert list(table("a | b", [(1, "x")])) == ["| a | b |", "|---|---|", "| 1 | x |"]


def test_a_summary_follows_the_numbers():
    assert [counted(met) for met in ([True, False], [True], [True, True], [False], [False, False])] == [
        "met by 1 of 2.", "met.", "met by all 2.", "missed.", "missed by all 2.",
    ]  # fmt: skip


def test_the_official_settings_are_the_planners():
    """One graded step for all ranks at a time; of the expert of high noise, its own steps."""
    found = plan_tables.official("prfl_t2v_1.3b_480p", 8, "1x4x4", plan_tables.HIGH)
    c = found.subject.config
    assert c.rollout.one_index == "turn" and c.parallel.sequence == 4 and c.train.accumulate == 2
    assert c.eval.every == 0 and c.rollout.shift == 12
    assert rollout_forwards(found.subject.setup) == pytest.approx(12.5)
