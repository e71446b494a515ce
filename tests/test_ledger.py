"""The kernel ledger: its gates on every Triton kernel, and its counting on kernels known by hand."""

import io
import json
import os
import re
from contextlib import redirect_stdout

import pytest
import torch
from fused import needs_triton

from prfl_bench import operations
from prfl_bench.ledger import collect as ledger
from prfl_bench.ledger import cuda as ledger_cuda
from prfl_bench.ledger import sass
from prfl_bench.ledger import text as ledger_text
from prfl_bench.shapes import MODELS, TEXT, Model, Shape
from prfl_engine import cli
from prfl_kernels import rows as row_kernels
from prfl_kernels.jit import INTERPRETED, jit, tl
from prfl_kernels.reward_pool import triton_kernels as reward_pool

pytestmark = needs_triton
fcntl = pytest.importorskip("fcntl")  # Triton has no Windows either
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton was imported to compile")


OF_WIDTH = ("modulate", "gated_add", "qk_norm_rope")  # whose code depends on the width


def taken(launch, shape):
    if shape.model == MODELS["5B"] and not launch.op.startswith(OF_WIDTH):
        return False
    return len(launch.streams) == 1 or (shape.residual == torch.float32) == (shape.model != MODELS["1.3B"])


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """The operations of `prfl kernels --quick --json`, run once for all of pytest-xdist's workers. Every
    operation at two widths and, of these and two dtypes of the stream, in two of the four pairs; at the third
    width those whose code depends on it, with a stream in float32."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    file = root / "ledger.json"
    with (root / "ledger.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            printed, collect = io.StringIO(), ledger.collect

            def collected(*given):
                found = collect(*given, only=taken)
                return found | {"cuda": [] if found["cuda_absent"] else ledger_cuda.collect(quick=True)}

            with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
                patch.setattr(ledger, "collect", collected)
                assert cli.main(["kernels", "--quick", "--json"]) == 0
            file.write_text(printed.getvalue())
    return json.loads(file.read_text())["operations"]


def launches(rows, *kinds):
    """(operation at a shape, its kernel) of every launch of operations of these kinds."""
    return [
        (f"{row['op']} {row['model']} {row['stream']} {kernel['kernel']}", kernel)
        for row in rows
        for kernel in row["kernels"]
        if row["kind"] in kinds or not kinds
    ]


def test_every_operation_is_there_at_every_width(rows):
    assert {(row["op"], row["model"]) for row in rows} == {
        (launch.op, model)
        for launch in operations.LAUNCHES
        for model in MODELS
        if model != "5B" or launch.op.startswith(OF_WIDTH)
    }
    assert len(ledger_text.render({"operations": rows, "assumptions": ""}).splitlines()) >= len(rows)


def test_no_spills(rows):
    assert not [name for name, k in launches(rows) if k["spills"] or k["stack"]]


def test_matrix_kernels_use_warp_group_products(rows):
    """... wherever they multiply matrices; fp8 ones those for fp8."""
    for name, k in launches(rows, "matrix", "attention"):
        kinds = {dtype for _, _, _, dtype, _, _ in k["dots"]}
        wanted = {"QGMMA" if dtype.startswith("fp8") else "HGMMA" for dtype in kinds}
        found = {op for op in ("HGMMA", "QGMMA", "HMMA", "QMMA") if k["instructions"].get(op)}
        assert found == wanted, name


def test_memory_bound_kernels_access_rows_with_16_bytes_a_thread(rows):
    found = {
        name: argument["name"]
        for name, k in launches(rows, "memory")
        for argument in k["arguments"]
        if argument["rows"] and set(argument["wide"].values()) != {1.0}
    }
    assert found == {}


def test_memory_bound_operations_move_little_more_than_they_must(rows):
    for row in rows:
        if row["kind"] == "memory":
            assert 1.0 <= row["ratio"] <= 1.05, (row["op"], row["model"], row["stream"], row["ratio"])


def test_attention_tiles(rows):
    """Of every product M x N x K one side is the head's 128 dimensions; the others are the tile."""
    for name, k in launches(rows, "attention"):
        for m, n, inner, *_ in k["dots"]:
            tile = sorted((m, n, inner))
            tile.remove(128)
            assert tile[0] >= 64 and tile[1] >= 128, (name, m, n, inner)


def test_tensor_cores_are_the_busiest_pipe_of_attention(rows):
    """In 16 bits; in fp8 products take half as long and the softmax does not, so all pipes are about full."""
    for name, k in launches(rows, "attention"):
        if not {"HGMMA", "QGMMA"} & set(k["instructions"]):
            assert "loop" not in k, name
            continue
        tensor = k["loop"]["tensor"]
        busiest = max(n for pipe, n in k["loop"].items() if pipe != "tensor")
        assert tensor and busiest <= (1.2 if "QGMMA" in k["instructions"] else 0.6) * tensor, name


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_occupancy_by_hand():
    """An SM of an H100: 64 warps, 32 blocks, 65,536 registers, 228 KiB of which a block costs 1."""
    assert sass.occupancy(32, 1024, 0) == (2, ["registers", "warps"])
    assert sass.occupancy(255, 128, 0) == (2, ["registers"])  # 8,160 a warp round up to 8,192
    assert sass.occupancy(168, 384, 0) == (1, ["registers"])  # 3 warps of 5,376 in each quarter
    assert sass.occupancy(16, 32, 0) == (32, ["blocks"])
    assert sass.occupancy(32, 128, 100 << 10) == (2, ["shared"])
    assert sass.occupancy(32, 128, (113 << 10) + 1) == (1, ["shared"])
    assert sass.occupancy(32, 128, 227 << 10) == (1, ["shared"])


PTX = """
.visible .entry _k(
	.param .u64 .ptr .global .align 1 _k_param_0,
	.param .u64 .ptr .global .align 1 _k_param_1,
	.param .u32 _k_param_2,
	.param .u64 .ptr .global .align 1 _k_param_3
)
{
	ld.param.b64 	%rd1, [_k_param_0];
	ld.param.b64 	%rd2, [_k_param_1];
	ld.param.s32 	%rd3, [_k_param_2];
	ld.param.b64 	%rd8, [_k_param_3];
	add.s64 	%rd4, %rd1, %rd3;
	mov.b64 	%rd5, %rd4;
	add.s64 	%rd5, %rd5, 16;
	selp.b64 	%rd6, %rd1, %rd2, %p1;
	@%p2 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ];
	ld.global.L1::evict_last.b16 { %rs1 }, [ %rd4 + 0 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd8 + 0 ], 0x10, %r6;
	@%p2 st.global.v2.b32 [ %rd2 + 0 ], { %r1, %r2 };
	st.global.b32 [ %rd6 + 0 ], { %r1 };
}
"""


def test_accesses_belong_to_the_pointer_they_come_from():
    """Third pointer is the fourth parameter; the last store may go to either of two."""
    assert sass.accesses(PTX) == {
        0: {"read": {16: 1, 2: 1}},
        1: {"written": {8: 1}},
        2: {"read": {16: 1}},
        -1: {"written": {4: 1}},
    }


def test_instructions_are_counted():
    text = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0020*/              @UP1 UTMALDG.2D [UR8], [UR10] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   STL.64 [R1], R4 ;
    """
    want = {"LDG": 2, "LDG.128": 1, "UTMALDG": 1, "HGMMA": 1, "STL": 1}
    assert sass.instructions(text) == want


@jit
def _scaled(x_ptr, scale_ptr, out_ptr, part_ptr, L, run, C: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * scale over runs of rows, with row sums beside it and one partial sum a program."""
    o_c = tl.arange(0, BLOCK)
    first = tl.program_id(0) * run
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tl.minimum(run, L - first)):
        scale = tl.load(scale_ptr + o_c, mask=o_c < C, other=0.0)
        x = tl.load(x_ptr + (first + i) * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        tl.store(out_ptr + (first + i) * C + o_c, x * scale, mask=o_c < C)
        total += x
    tl.store(part_ptr + tl.program_id(0) * C + o_c, total, mask=o_c < C)


@interpreted
def test_masked_lanes_rereads_and_partials_are_counted():
    """23 rows of 10 values in 4 runs of 6: every value once, the scale once a row."""
    from prfl_bench.ledger.traffic import count

    def call():
        x, scale = empty(23, 10, dtype=torch.bfloat16), empty(10)
        out, part = empty(23, 10), empty(4, 10)
        _scaled[(4,)](x, scale, out, part, 23, 6, C=10, BLOCK=16)
        return x, scale, out, part.sum(0)

    _, (launch,), torch_traffic = count(call)
    moved = {a["name"]: (a["read"], a["written"]) for a in launch["arguments"]}
    assert moved == {
        "x_ptr": (23 * 10 * 2, 0),
        "scale_ptr": (23 * 10 * 4, 0),
        "out_ptr": (0, 23 * 10 * 4),
        "part_ptr": (0, 4 * 10 * 4),
    }
    assert torch_traffic == {"memory": {"sum": 10 * 4}, "cached": {"sum": 4 * 10 * 4}}
    assert launch["elementwise"] == 23 * 2 * 16  # a product and a sum on 16 lanes a row

    code = {"kernel": "_scaled", "widths": {"x_ptr": {"read": {"16": 3, "4": 4}}}, "descriptors": []}
    row = ledger._kernel(code, launch, 23 * 10)
    assert row["bytes"] == 23 * 10 * (2 + 4) + 10 * 4 + 4 * 10 * 4
    assert row["reread_bytes"] == 22 * 10 * 4
    assert row["arguments"][0]["wide"] == {"read": 0.75} and row["arguments"][0]["rows"]


@jit
def _product(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK + o
    columns = tl.program_id(1) * BLOCK + o
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in tl.range(0, K, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * K + (k + o)[None, :])
        b = tl.load(b_ptr + columns[:, None] * K + (k + o)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    width = tl.num_programs(1) * BLOCK
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], acc)


@interpreted
def test_products_are_counted():
    """A [48, 80] times B [32, 80] in 3 x 2 programs of 16 x 16: A is read twice, B three times."""
    from prfl_bench.ledger.traffic import count

    def call():
        a, b = (empty(n, 80, dtype=torch.bfloat16) for n in (48, 32))
        _product[(3, 2)](a, b, empty(48, 32), 80, BLOCK=16)

    _, (launch,), _ = count(call)
    assert [a["read"] for a in launch["arguments"]] == [2 * 48 * 80 * 2, 3 * 32 * 80 * 2, 0]
    ((m, n, k, dtype, _, number),) = launch["dots"]
    assert (m, n, k, dtype, number) == (16, 16, 16, "bf16", 3 * 2 * 5)
    row = ledger._kernel({"kernel": "_product", "widths": {}, "descriptors": []}, launch, 1)
    assert row["flops"] == 2 * 48 * 32 * 80
    assert row["seconds"]["products"] == row["flops"] / 660e12 and row["bound"] == "memory"


@jit
def _double(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, 2 * tl.load(x_ptr + o))


@jit
def _beyond(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@jit
def _tiles(x_desc, out_ptr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    x = x_desc.load([first, 0])
    o = tl.arange(0, BLOCK)
    mask = (first + o < 20)[:, None] & (o < 16)[None, :]
    tl.store(out_ptr + (first + o)[:, None] * 16 + o[None, :], x, mask=mask)


def test_a_second_reading_of_what_a_kernel_wrote_itself_is_no_memory_traffic():
    accumulator = {
        "name": "acc", "footprint": 40, "read": 120, "written": 160, "scalar": False, "cached": True,
    }  # fmt: skip
    traffic = {"arguments": [accumulator], "dots": [], "elementwise": 0}
    row = ledger._kernel({"kernel": "k", "widths": {}, "descriptors": []}, traffic, 1)
    assert (row["bytes"], row["reread_bytes"]) == (40, 240)


@interpreted
@pytest.mark.parametrize("rows, cached", [(4, True), (1 << 20, False)])
def test_a_small_tensor_written_before_is_read_from_the_cache(rows, cached):
    """By a later kernel and by torch: [rows, 16] values, 25 MB at most."""
    from prfl_bench.ledger.traffic import count

    def call():
        part, out = empty(rows, 16), empty(rows, 16)
        _double[(1,)](out, part, 16)
        _double[(1,)](part, out, 16)
        return out.sum(0)

    _, launches, torch_traffic = count(call)
    assert [[a["cached"] for a in launch["arguments"]] for launch in launches] == [
        [False, True],  # what is written first is never read from memory
        [cached, True],
    ]
    assert (torch_traffic["cached"] == {"sum": rows * 16 * 4}) == cached


@interpreted
def test_an_address_outside_a_tensor_is_named():
    from prfl_bench.ledger.traffic import count

    with pytest.raises(ValueError, match="ledger: _beyond: got an address outside x_ptr"):
        count(lambda: _beyond[(1,)](empty(15), BLOCK=16))


@interpreted
def test_tensor_descriptors_are_counted_inside_the_tensor():
    """20 rows in two tiles of 16: the descriptor reads no row past the end."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from prfl_bench.ledger.traffic import count

    def call():
        described = TensorDescriptor.from_tensor(empty(20, 16), [16, 16])
        _tiles[(2,)](described, empty(20, 16), BLOCK=16)

    _, (launch,), _ = count(call)
    assert [(a["read"], a["written"]) for a in launch["arguments"]] == [(1280, 0), (0, 1280)]


@interpreted
@pytest.mark.parametrize("launch", operations.LAUNCHES, ids=lambda launch: launch.op)
def test_sampling_agrees_with_every_program_and_iteration(launch, monkeypatch):
    """60 tokens in 9 runs of 7, the last one shorter; of tiles 330 tokens (pooling: 2 runs of up to 3)."""
    from prfl_bench.ledger import traffic as ledger_traffic

    monkeypatch.setattr(row_kernels, "RUNS", 9)
    monkeypatch.setattr(reward_pool, "SMS", 2)
    tiny = Model("tiny", 256, 2, 700)
    grid = (3, 10, 11) if re.match("attention|reward_pool|quantize_values", launch.op) else (3, 4, 5)
    s = Shape(tiny, grid, 1, 1, TEXT, torch.bfloat16, launch.streams[0], "meta")
    sampled = ledger._count(launch.bind(s))
    monkeypatch.setattr(ledger_traffic, "sampled", lambda n: [(i, 1) for i in range(n)])
    assert ledger._count(launch.bind(s)) == sampled


def test_without_triton_one_line_says_so(monkeypatch, capsys):
    from prfl_engine.cli import main

    monkeypatch.setattr(ledger, "find_spec", lambda name: None)
    assert main(["kernels"]) == 2
    assert capsys.readouterr().err == "prfl: ledger: got no Triton, want it installed\n"


def test_peers_that_are_not_there_are_named(monkeypatch, capsys, tmp_path):
    from prfl_bench.ledger import peers as ledger_peers
    from prfl_engine.cli import main

    monkeypatch.setattr(ledger_peers, "find_spec", lambda name: None)
    assert main(["kernels", "--peers"]) == 2
    assert "no liger-kernel installed" in capsys.readouterr().err
    assert main(["kernels", "--peers", str(tmp_path / "no.py")]) == 2
    assert str(tmp_path / "no.py") in capsys.readouterr().err


def test_without_the_disassembler_one_line_says_so(monkeypatch):
    monkeypatch.setattr(sass, "find_spec", lambda name: None)
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="ledger: got no nvdisasm, want it in Triton's wheel or on PATH"):
        sass.tool("nvdisasm")
