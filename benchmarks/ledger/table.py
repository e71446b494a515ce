"""Rows of the kernel ledger: what is known of an operation's launches together, and its predicted time."""

from collections.abc import Collection

from prfl_bench.ledger import sass
from prfl_bench.operations import Launch
from prfl_bench.shapes import Shape

# Assumed for predictions: measured copy bandwidth of an H100 SXM; FLOP/s of tensor-core products as
# FlashAttention 3 reaches them (float32 in tf32 at half of bfloat16's rate, a third of that when
# split in three, and on the CUDA cores in full precision); one lane an operation of 132 SMs with 128
# lanes at 1.755 GHz for everything elementwise.
BANDWIDTH = 3.0e12
DOT_RATES = {"fp8": 1000e12, "16-bit": 660e12, "TF32": 330e12, "TF32x3": 110e12, "IEEE": 59e12}
LANES = 29.6e12
ASSUMPTIONS = (
    f"Predicted for an H100 SXM, not measured: the longest of bytes / {BANDWIDTH / 1e12:.1f} TB/s, "
    f"FLOP / {DOT_RATES['16-bit'] / 1e12:.0f} TFLOP/s (fp8: {DOT_RATES['fp8'] / 1e12:.0f}, tf32: "
    f"{DOT_RATES['TF32'] / 1e12:.0f}, tf32x3: {DOT_RATES['TF32x3'] / 1e12:.0f}), and elementwise "
    f"operations / {LANES / 1e12:.1f} T/s, summed over an operation's kernels; no launch cost, no latency."
)


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
        "kernels": kernels,
    }


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
        "arguments": arguments,
    }
