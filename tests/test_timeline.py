"""The ledger on products of warp groups: the hot loop in machine code, and when it lets them run."""

import pytest

from prfl_bench.ledger import loop_cycles, timeline
from prfl_bench.ledger import table as ledger_rows

LOOPS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x176x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R0, R1 ;
        /*0030*/                   FMNMX R2, R0, R1, !PT ;
        /*0040*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   FADD R0, R0, R1 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   NANOSLEEP 0x20 ;
        /*00a0*/                   BRA `(.L_x_2) ;
"""


def test_the_hot_loop_and_its_cycles_by_hand():
    """The loop with the product, and the wait that stands behind the code and jumps back into it."""
    loop = loop_cycles.hot_loop(LOOPS)
    assert [text.split()[0].split(".")[0] for text in loop][:3] == ["HGMMA", "MUFU", "FMNMX"]
    assert any("NANOSLEEP" in text for text in loop) and not any("EXIT" in text for text in loop)
    found = loop_cycles.cycles(loop)
    assert found["tensor"] == 64 * 176 * 16 / 2048 and found["issue"] == len(loop)
    assert found["mufu"] == 8 and found["alu"] == 2


def test_the_shortest_way_through_a_loop_and_the_one_around_it_by_hand():
    """Without the wait behind the code and without what a branch may leave out, but with every product."""
    found = loop_cycles.nest(LOOPS)
    assert [loop_cycles.opcode(one.text) for one in found.loop][:3] == ["HGMMA", "MUFU", "FMNMX"]
    assert len(found.loop) == 5 and found.before == found.after == []
    found = loop_cycles.nest(NESTED)
    assert [one.text.split()[0] for one in found.loop] == ["HGMMA.64x128x16.F32.BF16", "@P1"]
    assert [one.text.split()[0] for one in found.before] == ["@P0"]
    assert [one.text.split()[0] for one in found.after] == ["HGMMA.64x64x16.F32.BF16", "@P2"]
    assert [one.control for one in found.loop] == [0x000FE20000000000, 0]


NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   FSEL R0, R0, -INF , !P6 ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;  /* 0x02a000000c1879f0 */
                                                                                 /* 0x000fe20000000000 */
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
# 512 cycles of the tensor cores, waited for, 64 exponentials of 8 cycles, and 512 cycles of the next product.
SCORES = ["HGMMA.64x128x128.F32.BF16 R88, gdesc[UR4], RZ, gsb0"]
SOFTMAX = ["MUFU.EX2 R0, R1"] * 64
VALUES = ["HGMMA.64x128x128.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"]
DRAIN, ONE_LEFT = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"], ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]
BARRIER = ["BAR.SYNC.DEFER_BLOCKING 0x0"]
TURN, PASS = ["BAR.SYNC.DEFER_BLOCKING R0, 0x100"], ["@!P1 BAR.ARV R4, 0x100"]


@pytest.mark.parametrize(
    "loop, groups, busy",
    [
        (SCORES + DRAIN + SOFTMAX + VALUES + DRAIN, 1, 2 / 3),  # nothing runs under the softmax
        (SCORES + DRAIN + SOFTMAX + VALUES + DRAIN, 2, 1.0),  # but the other group's products
        (BARRIER + SCORES + DRAIN + BARRIER + SOFTMAX + VALUES + DRAIN, 2, 0.8),  # less if it waits, too
        (SCORES + VALUES + ONE_LEFT + SOFTMAX + DRAIN, 1, 1.0),  # or the group's own p v
        (TURN + SCORES + VALUES + PASS + ONE_LEFT + 2 * SOFTMAX + DRAIN, 2, 1.0),
        (TURN + SCORES + VALUES + PASS + ONE_LEFT + 4 * SOFTMAX + DRAIN, 2, 0.45),  # below 1/2, their limit
    ],
)
def test_the_time_that_tensor_cores_are_busy(loop, groups, busy):
    one = [loop_cycles.Instruction(text) for text in loop]
    steady = timeline.run(one, groups, 1, 9) - timeline.run(one, groups, 1, 5)
    assert 4 * 1024 * groups / steady == pytest.approx(busy, rel=0.06)


def test_scoreboards_and_stalls_hold_a_warp():
    """An exponential whose result is waited for, and five cycles of stall."""
    waited = [
        loop_cycles.Instruction("MUFU.EX2 R0, R1", 1 << 41 | 2 << 46 | 7 << 49),
        loop_cycles.Instruction("FADD R0, R0, R0", 5 << 41 | 7 << 46 | 7 << 49 | 1 << 54),
    ]
    assert timeline.run(waited, 1, 1, 1) == timeline.LATENCY + 5


def test_groups_that_wait_for_each_other_are_an_error():
    with pytest.raises(ValueError, match="ledger: got warp groups that wait for each other"):
        timeline.run([loop_cycles.Instruction(text) for text in TURN + TURN + PASS], 2, 1, 1)


def test_predicted_time_of_products_by_hand():
    """264 blocks in two rounds of 132; 132 blocks that stay, with 5 passes of 4 steps each."""
    cycles = {"tensor": 1000, "trip": 1250, "first": 1500, "between": 1750}
    code = {"cycles": cycles, "instructions": {"HGMMA": 8}}
    a_trip = 1000 * ledger_rows.FLOPS
    seconds = ledger_rows.product_seconds(code, (66, 4), 1, 264 * 10 * a_trip)
    assert seconds * ledger_rows.CLOCK == pytest.approx(2 * (ledger_rows.BEGIN + 1500 + 9 * 1250))
    seconds = ledger_rows.product_seconds(code, (132, 1, 1), 1, 132 * 20 * a_trip, steps=4)
    assert seconds * ledger_rows.CLOCK == pytest.approx(ledger_rows.BEGIN + 5 * (3 * 1250 + 1750))
