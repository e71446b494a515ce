"""The CUDA C++ kernels in the ledger: the gates on what nvcc makes of them, and the counts of their bytes."""

import json
import math
import os
from functools import partial

import pytest
import torch
from cuda_sim import build, missing
from fused import needs_triton
from test_cuda_kernels import watch
from test_ledger import rows

from prfl_bench.ledger import cuda as ledger_cuda
from prfl_bench.ledger import sass
from prfl_bench.ledger import table as ledger_rows
from prfl_bench.ledger import text as ledger_text
from prfl_bench.shapes import MODELS
from prfl_kernels import solver_step
from prfl_kernels.attention import cuda as attention_hopper
from prfl_kernels.norm import cuda as norm_cuda
from prfl_kernels.norm import op as norm
from prfl_kernels.qk_norm_rope import cuda as rope_cuda
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.reward_pool import cuda as pool_cuda
from prfl_kernels.reward_pool import op as reward_pool

__all__ = ["rows"]
pytestmark = [
    needs_triton,  # whose wheel brings cuobjdump and nvdisasm
    pytest.mark.skipif(bool(ledger_cuda.absence()), reason=ledger_cuda.absence()),
]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="session")
def cuda_rows(rows, tmp_path_factory):
    """The CUDA part of what test_ledger's fixture has made."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return json.loads((root / "ledger.json").read_text())["cuda"]


def kernels(rows):
    return [
        (f"{row['op']} {row['model']} {row['stream']} {k['kernel']}", row, k)
        for row in rows
        for k in row["kernels"]
    ]


def test_nothing_spills_and_every_block_fits(cuda_rows):
    assert len(cuda_rows) == len(MODELS) * sum(len(entry.streams) for entry in ledger_cuda.ENTRIES)
    for name, _, k in kernels(cuda_rows):
        assert k["spills"] == k["stack"] == 0, name
        assert k["blocks"] >= 1 and k["threads"] <= k["most_threads"], name
        assert not {"RED", "REDG", "ATOM", "ATOMG"} & set(k["instructions"]), name


def test_whole_rows_move_with_16_bytes_a_thread(cuda_rows):
    for name, row, k in kernels(cuda_rows):
        width = MODELS[row["model"]].width
        for a in k["arguments"]:
            if a["footprint"] >= row["length"] * width:
                sides = [side for side in ("read", "written") if a[side]]
                assert all(a["wide"].get(side) == 1.0 for side in sides), f"{name}: {a['name']}"


def test_bytes_stay_within_a_twentieth_of_the_minimum(cuda_rows):
    assert not [(row["op"], row["ratio"]) for row in cuda_rows if not 1 <= row["ratio"] <= 1.05]


def test_features_go_through_the_bulk_copy_engine(cuda_rows):
    found = [k for _, _, k in kernels(cuda_rows) if k["kernel"] in ("pool_forward", "pool_backward")]
    assert len(found) == 4 * len(MODELS)
    for k in found:
        assert k["instructions"]["UBLKCP"] and k["instructions"]["HMMA"] and k["instructions"]["LDG"] < 60
        assert k["grid"][0] == 128 and not {"x", "dx"} & set(k["widths"])


def attention_rows(cuda_rows):
    return [(row, row["kernels"][0]) for row in cuda_rows if row["kind"] == "attention"]


def test_attention_has_its_warp_groups_and_pipes(cuda_rows):
    """HGMMA and QGMMA alone, fed by TMA; in bfloat16 no other pipe is busy for half of the products' time."""
    found = attention_rows(cuda_rows)
    assert len(found) == 5 * len(MODELS) and all(len(row["kernels"]) == 1 for row, _ in found)
    keys = {"self": 0, "cross": 512, "cross 257": 257}
    for row, k in found:
        product = "QGMMA" if "fp8" in row["op"] else "HGMMA"
        assert {"HGMMA", "QGMMA", "HMMA", "QMMA"} & set(k["instructions"]) == {product}
        assert k["instructions"]["UTMALDG"] and k["instructions"]["UTMASTG"]
        assert k["warp_groups"] == [24, 240] and k["cluster"] == 2 and k["blocks"] == 1
        width = MODELS[row["model"]].width
        assert k["flops"] >= 4 * row["length"] * (keys[row["op"].split(", ")[1]] or row["length"]) * width
        busiest = max(n for name, n in k["loop"].items() if name != "tensor")
        assert busiest <= (1.12 if product == "QGMMA" else 0.52) * k["loop"]["tensor"]
    text = ledger_text.render({"operations": [], "cuda": [row for row, _ in found], "assumptions": ""})
    assert text.count("warp groups of 24 and 240 registers, clusters of 2") == 5 * len(MODELS)
    for tile in (1408, 1024, 1152):
        assert text.count(f"hot loop: {tile} cycles of the tensor cores; of that issue 0.") == len(MODELS)


def test_cross_attention_is_predicted_to_use_the_tensor_cores(cuda_rows):
    """For the keys that are there, of what they can without a pause; 257 keys are padded to 288, and a
    cluster has 24 tiles of queries where 1.3B has 23.3 for it."""
    for row, k in attention_rows(cuda_rows):
        if "fp8" in row["op"] or "cross" not in row["op"]:
            continue
        keys, width = (257 if "257" in row["op"] else 512), MODELS[row["model"]].width
        use = 4 * row["length"] * keys * width / k["seconds"]["products"] / ledger_rows.PEAK
        least = 0.8 if keys == 257 else 0.91
        assert least < use < 1 and k["grid"] == [132, 1, 1], (row["op"], row["model"], use)


def test_triton_and_cuda_differ_in_what_they_wait_for(rows, cuda_rows):
    """Triton's forward drains its products before the softmax and the CUDA kernel's does not."""
    for row, k in attention_rows(cuda_rows):
        if row["op"] != "attention, self" or row["model"] == "5B":  # of which Triton's is not made here
            continue
        (triton,) = (r for r in rows if (r["op"], r["model"]) == (row["op"], row["model"]))
        assert row["bound"] == triton["bound"] == "products"
        assert triton["predicted_seconds"] > 1.4 * row["predicted_seconds"]
        (other,) = triton["kernels"]
        busy = [one["cycles"]["tensor"] / one["cycles"]["trip"] for one in (k, other)]
        assert busy[0] > 0.95 and busy[1] < 0.7


def normal(*shape, dtype=F32):
    return torch.randn(shape).to(dtype)


def calls():
    """(name, launcher call) at a small size, every argument a tensor of its own."""
    for width in (1536, 3072, 5120):
        for stream in (F32, BF16):
            x, y = normal(1, 5, width, dtype=stream), normal(1, 5, width, dtype=BF16)
            gate, scale, shift = (normal(1, width) for _ in range(3))
            stats, dn = normal(2, 1, 5), normal(1, 5, width, dtype=BF16)
            forward = partial(norm.forward, norm_cuda.forward)
            backward = partial(norm.backward, norm_cuda.backward)
            name = f"{width} {stream}"
            yield f"norm {name}", partial(forward, x, y, gate, scale, shift, 1.0, 1e-6, BF16)
            fp8 = torch.float8_e4m3fn
            yield f"fp8 {name}", partial(forward, x, None, None, scale, shift[0], 1.0, 1e-6, fp8)
            rest = (x, y, gate, scale, stats, 1.0, True, BF16)
            yield f"norm backward {name}", partial(backward, dn, x.clone(), *rest)
            u, scores = normal(3, width), normal(1, 40, 3)
            x = normal(1, 40, width, dtype=stream)
            yield f"pool {name}", partial(reward_pool.forward, pool_cuda.forward, x, u)
            small = normal(1, 3, width), normal(1, 3), x, u, scores, normal(1, 3)
            wanted = True, True
            yield f"pool backward {name}", partial(reward_pool.backward, pool_cuda.backward, *small, *wanted)
        heads, grid = width // 128, (1, 2, 3)
        q, k = normal(1, 6, width, dtype=BF16), normal(1, 6, width, dtype=BF16)
        weights = normal(width), normal(width)
        for fp8 in (False, True):
            turned = (q, k, *weights, grid, heads, 1e-6, 0, fp8)
            yield f"qk {width} {fp8}", partial(qk_norm_rope.forward, rope_cuda.forward, *turned)
        held = normal(1, 6, heads, 128, dtype=BF16), normal(1, 6, heads, 128, dtype=BF16), q, k, *weights
        rest = (normal(2, 1, 6), grid, heads, 0, True)
        yield f"qk backward {width}", partial(qk_norm_rope.backward, rope_cuda.backward, *held, *rest)
    # One tile of queries, and an odd number of more than 32, which gets another block for its cluster.
    scale, fp8 = 128**-0.5, torch.float8_e4m3fn
    # Keys that stay in shared memory, that go through it for every tile, and many of them.
    shapes = (70, 190, 2), (33 * 128 - 60, 20, 1), (600, 257, 3), (300, 512, 2), (200, 1030, 1)
    for queries, keys, heads in shapes:
        q, k, v = (normal(1, n, heads, 128, dtype=BF16) for n in (queries, keys, keys))
        yield f"attention {queries}", partial(attention_hopper.forward, q, k, v, scale)
        v8 = normal(1, heads, 128, -(-keys // 128) * 128).to(fp8)
        scales = (normal(1, queries, heads), normal(1, keys, heads), normal(1, heads, 128))
        held = (q.to(fp8), scales[0].exp(), k.to(fp8), scales[1].exp(), v8, scales[2].exp(), scale)
        yield f"attention fp8 {queries}", partial(attention_hopper.launch_forward_fp8, *held)
    state = [normal(2, math.prod((16, 3, 4, 16))) for _ in range(4)]
    v, columns = normal(*state[0].shape, dtype=BF16), normal(2, 9)
    yield "solver", partial(solver_step.forward, solver_step.cuda, *state, v, columns)


@pytest.mark.skipif(bool(missing()), reason=f"cannot build csrc/sim: {missing()}")
@pytest.mark.parametrize("name, call", [pytest.param(n, c, id=n) for n, c in calls()])
def test_counts_are_what_the_kernels_access(name, call, monkeypatch):
    monkeypatch.setattr(ledger_cuda.Recorder, "multiprocessors", 4)
    with ledger_cuda.recording() as recorder:
        call()
    simulation = watch(monkeypatch, build())
    simulation.use_multiprocessors(4)
    call()
    simulation.use_multiprocessors(132)
    counted = {}
    for launch in recorder.launches:
        for a in launch.arguments:
            read, written = counted.get(a.name, (0, 0))
            counted[a.name] = read + a.read, written + a.written
    assert {name: n for name, n in simulation.traffic.items() if any(n)} == counted
    shapes = [(*k.grid[:2], k.threads, k.shared, k.cluster) for k in recorder.launches]
    assert [tuple(shape) for shape in simulation.launches] == shapes


def test_two_blocks_of_3072_columns_are_on_an_sm_in_the_backward(cuda_rows):
    """Where rows are of 16 bits: as many threads an SM as at the other widths, without a spill."""
    found = {k["kernel"]: k for _, row, k in kernels(cuda_rows) if row["model"] == "5B"}
    for kernel in ("norm_backward", "qk_backward"):
        k = found[kernel]
        assert (k["threads"], k["blocks"]) == (384, 2) and k["registers"] <= 80, kernel


def test_occupancy_of_the_widest_kernels():
    """640 threads of 96 registers: one block an SM; 48 registers: two."""
    assert sass.occupancy(96, 640, 320)[0] == 1 and sass.occupancy(48, 640, 320)[0] == 2
