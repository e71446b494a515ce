"""Rows of the kernel ledger: what is known of an operation's launches together, and its predicted time."""

import math
from collections.abc import Collection, Sequence

from prfl_bench.ledger import sass
from prfl_bench.operations import Launch
from prfl_bench.shapes import Shape

# Assumed for predictions: measured copy bandwidth of an H100 SXM; products of warp groups in 16 bits without
# a pause at what an H200 reaches on matrices of 8192 (published: 770 to 800 TFLOP/s; power keeps its clock
# at 1.45 GHz then), twice that in 8 bits; the pauses of a kernel from `timeline`.
BANDWIDTH = 3.0e12
SMS = 132
PEAK = 785e12
FLOPS = 4096  # a cycle of an SM's tensor cores in 16 bits
CLOCK = PEAK / (SMS * FLOPS)
# Cycles of a block that no other block on its SM covers: launch, barriers, first loads, last stores. A guess.
BEGIN = 3000
# FLOP/s of products whose loop is not known, as of smaller instructions and of float32: in tf32 at half of
# bfloat16's rate, a third of that when split in three, and on the CUDA cores in full precision. One lane an
# operation of 132 SMs with 128 lanes at 1.755 GHz for everything elementwise.
DOT_RATES = {"fp8": 1000e12, "16-bit": 660e12, "TF32": 330e12, "TF32x3": 110e12, "IEEE": 59e12}
LANES = 29.6e12
ASSUMPTIONS = (
    f"Predicted for an H100 SXM, not measured: the longest of bytes / {BANDWIDTH / 1e12:.1f} TB/s (memory), "
    f"the time of products, and elementwise operations / {LANES / 1e12:.1f} T/s (lanes), summed over an "
    f"operation's kernels; no launch cost. Products of attention: tensor cores at {PEAK / 1e12:.0f} "
    f"TFLOP/s in 16 bits and twice that in 8 while they are busy; when they are not is simulated from the "
    f"machine code of the hot loop (issue slots, exponentials, waits for products, barriers, turns of warp "
    f"groups; loads are there in time, masks of a last block are left out), and a block costs {BEGIN} cycles "
    f"more for its begin and end (a guess). Other products: FLOP / {DOT_RATES['16-bit'] / 1e12:.0f} TFLOP/s "
    f"(fp8: {DOT_RATES['fp8'] / 1e12:.0f}, tf32: {DOT_RATES['TF32'] / 1e12:.0f}, tf32x3: "
    f"{DOT_RATES['TF32x3'] / 1e12:.0f})."
)


def product_seconds(code: dict, grid: Sequence[int], blocks: int, flops: int, steps: int = 0) -> float:
    """Of a kernel with products of warp groups, by the `cycles` of its loop (timeline.facts).

    blocks: resident on an SM. steps: the trips of the inner loop, and one that stands around it, of what a
    block computes in a pass of its outer loop; 0 where it has none.
    """
    cycles, number = code["cycles"], math.prod(grid)
    a_trip = cycles["tensor"] / blocks * FLOPS * (2 if "QGMMA" in code["instructions"] else 1)
    trips = flops / number / a_trip
    if steps:
        passes = math.ceil(round(trips / steps, 6))
        busy = passes * ((steps - 1) * cycles["trip"] + cycles["between"])
    else:
        busy = cycles["first"] + (trips - 1) * cycles["trip"]
    return math.ceil(number / (SMS * blocks)) * (BEGIN + busy) / CLOCK


def operation(
    launch: Launch, s: Shape, minimum: int, kernels: list[dict], torch_bytes: dict[str, int], reread: int = 0
) -> dict:
    """An operation at one shape: its kernels, and what torch reads and writes around them in memory, by
    operation, and again from a cache. minimum: bytes of inputs and outputs, each once."""
    around = sum(torch_bytes.values())
    moved = around + sum(k["bytes"] for k in kernels)
    return {
        "op": launch.op,
        "kind": launch.kind,
        "model": s.model.name,
        "length": s.tokens,
        "stream": str(s.residual).removeprefix("torch.") if len(launch.streams) > 1 else None,
        "minimum_bytes": minimum,
        "bytes": moved,
        "ratio": moved / minimum,
        "reread_bytes": reread + sum(k["reread_bytes"] for k in kernels),
        "torch_bytes": torch_bytes,
        "flops": sum(k["flops"] for k in kernels),
        "predicted_seconds": around / BANDWIDTH + sum(max(k["seconds"].values()) for k in kernels),
        "bound": _bound([k["seconds"] for k in kernels] + [{"memory": around / BANDWIDTH}]),
        "kernels": kernels,
    }


def _bound(seconds: list[dict[str, float]]) -> str:
    """The unit that most of the predicted time goes to."""
    total: dict[str, float] = {}
    for one in seconds:
        unit = max(one, key=one.__getitem__)
        total[unit] = total.get(unit, 0.0) + one[unit]
    return max(total, key=total.__getitem__)


def kernel(
    code: dict, arguments: list[dict], copied: Collection[str], flops: int, seconds: dict[str, float]
) -> dict:
    """One launch. Bytes up to an argument's size are memory traffic, beyond it re-reads; so are all reads of
    one that is "cached": the kernel wrote it first, or an earlier step of the operation if it is small.

    Arguments named in `copied` move by TMA, the others in the widths that the code has for them. seconds:
    predicted for each unit of an SM but memory.
    """
    moved = reread = 0
    for a in arguments:
        memory = min(a["written"], a["footprint"])
        memory += 0 if a.get("cached") else min(a["read"], a["footprint"])
        moved += memory
        reread += a["read"] + a["written"] - memory
        if a["name"] in copied:
            a["wide"] = {side: 1.0 for side in ("read", "written") if a[side]}
        else:
            widths = code["widths"].get(a["name"], {})
            a["wide"] = {side: sass.wide_share(counts) for side, counts in widths.items()}
    accessed = [(a[side], a["wide"].get(side, 0.0)) for a in arguments for side in ("read", "written")]
    return code | {
        "bytes": moved,
        "reread_bytes": reread,
        "wide_share": sum(b * w for b, w in accessed) / max(1, sum(b for b, _ in accessed)),
        "flops": flops,
        "seconds": {"memory": moved / BANDWIDTH} | seconds,
        "bound": _bound([{"memory": moved / BANDWIDTH} | seconds]),
        "arguments": arguments,
    }
