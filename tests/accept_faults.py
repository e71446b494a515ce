"""Rows with planted faults for the workers of tests/test_accept.py: real cases on a broken implementation."""

import ctypes
import time

from prfl_bench.accept import correct
from prfl_bench.accept.row import RAN, Context, Outcome, Row
from prfl_bench.selftest import OPERATIONS
from prfl_kernels.attention.op import RECORDS


def broken(forward):
    """A correctness row of attention whose forward by "sdpa" is `forward`(its own, *inputs)."""

    def run(context: Context) -> Outcome:
        record = RECORDS["sdpa"]
        RECORDS["sdpa"] = record._replace(forward=lambda *inputs: forward(record.forward, *inputs))
        try:
            return correct.run(context)
        finally:
            RECORDS["sdpa"] = record

    return run


def wrong(forward, *inputs):
    out, lse = forward(*inputs)
    return 1.05 * out, lse


def hang(forward, *inputs):
    while True:
        time.sleep(3600)


def crash(forward, *inputs):
    ctypes.string_at(0)  # reads address 0: SIGSEGV, as an illegal access of a host


def raising(forward, *inputs):
    raise RuntimeError("no kernel image is available\nfor execution")


def nothing(context: Context) -> Outcome:
    return Outcome(RAN, "", {"known": sorted(context.known)})


def cases(device: str) -> list[str]:
    """One case of attention by sdpa."""
    return [name for name in correct.names(device, "attention", "sdpa") if "/float32/" in name][:1]


def rows(device: str) -> list[Row]:
    assert "attention, self" in OPERATIONS
    planted = {
        "right": lambda forward, *inputs: forward(*inputs),
        "wrong": wrong,
        "hang": hang,
        "crash": crash,
        "raising": raising,
    }
    return [
        *(
            Row(f"correct/{name}", broken(fault), 1, alone=False, parts=cases)
            for name, fault in planted.items()
        ),
        Row(
            "correct/absent",
            correct.run,
            1,
            alone=False,
            parts=lambda device: correct.names(device, "attention", "cuda"),
        ),
        Row("environment/last", nothing, 1),
    ]
