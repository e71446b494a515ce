"""All rows in the order in which they are run: what teaches most a minute first."""

from functools import cache

from prfl_bench.accept import correct, environment, graphs, kernels, sanitizer, steps, tiles
from prfl_bench.accept.costs import ASSUMPTIONS
from prfl_bench.accept.row import Row
from prfl_bench.accept.run import MOST_WORKERS
from prfl_bench.shapes import TI2V

MINUTES = 8
START = 10.0  # seconds until the first row of a run


@cache
def rows(device: str) -> list[Row]:
    """All rows of a device type; what a machine does not have says so when it is asked."""
    return _small() if device == "cpu" else _all()


def _all() -> list[Row]:
    step, large = steps.rows("step"), steps.rows("large")
    memory = kernels.memory_rows("14B", 32760)
    return [
        *environment.rows(),
        *correct.rows(),
        *(row for row in (*step, *large) if not row.alone),
        *kernels.attention_rows("self", "14B", 32760),
        *memory[:5],
        *(row for row in step if row.alone),
        tiles.row("attention"),
        *(row for row in large if row.alone),
        *kernels.attention_rows("self", "1.3B", 32760),
        *sanitizer.rows()[:1],
        graphs.row(1),
        graphs.row(21),
        *kernels.attention_rows("fp8-self", "14B", 32760),
        *memory[5:],
        tiles.row("norms"),
        *sanitizer.rows()[1:],
        *kernels.attention_rows("cross", "14B", 32760),
        *kernels.attention_rows("self", "14B", 75600),
        *kernels.memory_rows("1.3B", 32760),
        *kernels.memory_rows("5B", TI2V),
        tiles.row("others"),
        *kernels.attention_rows("cross", "1.3B", 32760),
        *kernels.attention_rows("fp8-self", "14B", 75600),
        *kernels.attention_rows("self", "1.3B", 75600),
        *kernels.memory_rows("14B", 75600),
    ]


def _small() -> list[Row]:
    """On a CPU one shape stands for all: small ones do not tell them apart."""
    one = ("attention/self/14B/32760", "attention/fp8-self/14B/32760", "memory/")
    kept = [
        row
        for row in _all()
        if row.stage not in ("attention", "memory") or (row.name.startswith(one) and "/14B/32760" in row.name)
    ]
    first = next(i for i, row in enumerate(kept) if row.stage == "attention")
    return [*kept[:first], kernels.attention_row("self", "14B", 32760, "cpu"), *kept[first:]]


def text(found: list[Row]) -> str:
    """Every row with its predicted seconds on an H200, and the minute at which it would be done."""
    done, lines = START, [f"{'done at':>8} {'seconds':>8}  row"]
    marked = False
    for row in found:
        done += row.seconds / (1 if row.alone else MOST_WORKERS)
        if done > 60 * MINUTES and not marked:
            lines.append(f"---- the first {MINUTES} minutes end here")
            marked = True
        lines.append(f"{done / 60:5.1f} min {row.seconds:8.1f}  {row.name}")
    note = f"{ASSUMPTIONS} Correctness and predictions by {MOST_WORKERS} processes beside each other."
    return "\n".join([*lines, "", note])
