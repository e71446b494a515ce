"""The launch of Triton kernels whose programs walk over runs of tokens with a row, and sums, in registers."""

from typing import Literal

from torch import Tensor

from prfl_kernels import tuning
from prfl_kernels.jit import triton

Way = Literal["forward", "backward"]
# Runs of tokens on the whole batch: enough to fill 132 SMs, few enough that their partial sums stay
# under 5 % of the traffic at 32,760 tokens. A wide row takes a whole SM in the backward.
RUNS_WIDE, RUNS = 264, 528
# Most warps of a program. Three accumulators and six rows of 5,120 in float32 fit the registers of
# one SM with 8 warps (238 a thread); with 16 they spill. Those of 3,072 fit with 16 (84), and spill with 8.
WARPS = 16
WARPS_WIDE_BACKWARD = 8
_CANDIDATES = {
    "forward": {
        (2048,): ((8, 528), (8, 264), (4, 528)),
        (4096,): ((8, 528), (16, 264)),
        (8192,): ((16, 528), (8, 264), (8, 528)),
    },
    "backward": {
        (2048,): ((8, 264), (8, 1056)),
        (4096,): ((16, 264), (4, 528)),
        (8192,): ((8, 132), (8, 528)),
    },
}


def candidates(kernel: str) -> dict[str, dict[tuple[int], tuple[tuple[int, int], ...]]]:
    """(warps, runs) that `prfl tune` tries in addition to the default, by the width rounded up to a power of
    two."""
    return {f"{kernel} {way}": found for way, found in _CANDIDATES.items()}


def plan(
    kernel: str, way: Way, kind: tuning.Key, like: Tensor, block: int, least: int = 256
) -> tuple[tuple[int, int], int, dict[str, int | bool]]:
    """((runs, samples), tokens of a run, launch options) for the rows of `like` [B, L, C], `block` values
    each with padding.

    kind is what else a tuned choice depends on. A warp has `least` values of a row or more: 512 where e4m3 is
    written are 16 bytes of a thread.
    """
    batch, length, _ = like.shape
    wide = block > 4096
    warps = min(WARPS_WIDE_BACKWARD if wide and way == "backward" else WARPS, max(1, block // least))
    key = block, *kind, tuning.bucket(batch * length)
    default = warps, RUNS_WIDE if wide else RUNS
    warps, runs = tuning.choice(f"{kernel} {way}", key, default, like.device)
    rows = triton.cdiv(length, max(1, runs // batch))
    return (triton.cdiv(length, rows), batch), rows, {"num_warps": warps, "enable_fp_fusion": True}
