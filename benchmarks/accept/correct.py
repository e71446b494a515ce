"""Every implementation of every operation against float64 or float32: the cases of the self-test."""

from functools import cache, partial

from prfl_bench import selftest
from prfl_bench.accept.costs import TRITON
from prfl_bench.accept.row import REFUSED, Context, Outcome, Row
from prfl_kernels import dispatch

FIRST = ("attention", "gated_add_modulate", "modulate", "qk_norm_rope", "bias_gelu", "reward_pool")
COMPILED = (dispatch.TRITON,)  # what compiles for every case; the others compute at once
CASE, SMALL_CASE = 0.3, 0.12  # seconds of a case without, on a GPU and on a CPU core


@cache
def cases(device: str) -> dict[str, selftest.Case]:
    return {case.name: case for case in selftest.cases(device)}


def run(context: Context) -> Outcome:
    if not context.part:
        return Outcome(REFUSED, "there is no case of it")
    row = selftest.run(cases(context.device)[context.part])
    return Outcome(
        row.state, row.detail, {"error": row.error, "op": row.op, "implementation": row.implementation}
    )


def rows() -> list[Row]:
    """One for every operation of the dispatcher and implementation; its parts are the cases."""
    dispatch.complete()
    ops = sorted(dispatch.OPERATIONS, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))
    return [
        _row(op, record)
        for op in ops
        for record in dispatch.OPERATIONS[op].values()
        if record.name != dispatch.REFERENCE
    ]


def _row(op: str, record: dispatch.Implementation) -> Row:
    own = [o for o in selftest.OPERATIONS.values() if o.op == op]
    # On a CPU alone it has no case on a GPU but the one that is refused, and the other way round.
    every = {d: sum(1 for o in own for _ in selftest.candidates(o, record, d)) for d in ("cuda", "cpu")}
    count = 1 if record.name == dispatch.CPU else every["cuda"]
    small = every["cpu"] if record.name in (dispatch.CPU, "sdpa") else 1
    each = CASE + TRITON * (record.name in COMPILED)
    return Row(
        f"correct/{op}/{record.name}",
        run,
        count * each,
        small * SMALL_CASE,
        alone=False,
        parts=partial(names, op=op, implementation=record.name),
    )


def names(device: str, op: str, implementation: str) -> list[str]:
    """The cases of an implementation on this machine."""
    return [c.name for c in cases(device).values() if (c.op, c.implementation) == (op, implementation)] or [
        ""
    ]
