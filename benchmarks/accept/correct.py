"""Every implementation of every operation against float64 or float32: the cases of the self-test."""

from prfl_bench import selftest
from prfl_bench.accept.costs import CASE
from prfl_bench.accept.row import Context, Outcome, Row
from prfl_kernels import dispatch

FIRST = ("attention", "gated_add_modulate", "modulate", "qk_norm_rope", "bias_gelu", "reward_pool")
CASES, SMALL_CASE = 10, 0.15  # of an implementation of an operation, about; seconds of one on a CPU


def run(context: Context) -> Outcome:
    row = selftest.run(selftest.case(context.part, context.device))
    return Outcome(row.state, row.detail, {"error": row.error, "op": row.op, "implementation": row.implementation})


def rows() -> list[Row]:
    """One for every operation of the dispatcher and implementation; its parts are the cases."""
    dispatch.complete()
    ops = sorted(dispatch.OPERATIONS, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))
    return [
        Row(
            f"correct/{op}/{name}", run, CASES * CASE, CASES * SMALL_CASE, alone=False,
            parts=lambda device, op=op, name=name: names(device, op, name),
        )
        for op in ops
        for name in dispatch.OPERATIONS[op]
        if name != dispatch.REFERENCE
    ]  # fmt: skip


def names(device: str, op: str, implementation: str) -> list[str]:
    """The cases of an implementation on this machine."""
    return [c.name for c in selftest.cases(device) if (c.op, c.implementation) == (op, implementation)]
