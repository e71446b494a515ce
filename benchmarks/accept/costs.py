"""Seconds that rows are predicted to take on an H200: what decides how many minutes a run is given."""

from prfl_bench.operations import Operation
from prfl_bench.shapes import Shape
from prfl_engine.planner.seconds import Rates

RATES = Rates()
TRITON, INDUCTOR = (
    2.0,
    5.0,
)  # seconds to compile an operation; a function, forward or backward, by torch.compile
ASSUMPTIONS = (
    f"Predicted, not measured: products at {RATES.products / 1e12:.0f} TFLOP/s, attention at"
    f" {RATES.attention / 1e12:.0f} forward and {RATES.attention_backward / 1e12:.0f} backward, memory at"
    f" {RATES.memory / 1e12:.1f} TB/s, the host link at {RATES.link / 1e9:.0f} GB/s (the planner's rates of"
    f" an H100; an H200 has faster memory); {TRITON:.0f} s to compile an operation by Triton,"
    f" {INDUCTOR:.0f} s by torch.compile."
)


def seconds_of(entry: Operation, s: Shape, moved: tuple[int, int]) -> tuple[float, float]:
    """Predicted seconds of a forward and a backward: the longer of its bytes and its FLOPs."""
    attention = entry.kind == "attention" or entry.op == "attention"
    rates = (RATES.attention, RATES.attention_backward) if attention else (RATES.products,) * 2
    passes = zip(moved, entry.flops(s), rates, strict=True)
    return tuple(max(b / RATES.memory, flops / rate) for b, flops, rate in passes)
