"""`prfl doctor --selftest`: every implementation that runs on this machine, once, against plain torch.

One small case an operation, outputs and gradients, compared with float64. An implementation may err
FACTOR times as much as plain torch in the same dtype (bfloat16 that is cut instead of rounded errs
twice as much); a kernel that was built or loaded wrong errs by far more. Operations on e4m3 values are
compared with their plain torch form, which rounds as they do.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_bench import gates, operations
from prfl_bench.shapes import Shape, gate_shape
from prfl_kernels import dispatch, extension, jit
from prfl_kernels.attention.fp8 import attention_fp8
from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.reward_pool.op import reward_pool_with_lse

FACTOR = 4.0
E4M3_LIMIT = 2**-4  # half an ULP of e4m3, relative
DTYPES = (torch.float32, torch.bfloat16)


def _attention(s: Shape, q, k, v):
    """Every key once, and the last one three times; cross-attention to the 512 keys of a text and the 257 of
    an image, of more tiles of queries than a GPU has multiprocessors."""
    many = q.repeat(1, 150 if q.is_cuda else 1, 1, 1)
    crossed = [
        attention_with_lse(many, *(a.repeat(1, 5, 1, 1)[:, :keys] for a in (k, v))) for keys in (512, 257)
    ]
    return *attention_with_lse(q, k, v), *attention_with_lse(q, k, v, repeats=3), *crossed[0], *crossed[1]


# One of the list for every operation of the dispatcher, and calls that ask for more than the benchmark's do.
NAMES = {
    "attention": "attention, self",
    "attention_fp8": "attention_fp8, self",
    "quantize_fp8": "quantize_fp8, gelu",
}
OPERATIONS = {o.op: o for o in operations.OPERATIONS if o.name == NAMES.get(o.op, o.op)}
CALLS: dict[str, Callable] = {
    "attention": _attention,
    "attention_fp8": lambda s, *inputs: attention_fp8(*inputs),
    "reward_pool": lambda s, *inputs: reward_pool_with_lse(*inputs),
}


class Row(NamedTuple):
    op: str
    implementation: str
    state: str  # ok, FAILED or absent
    detail: str


def selftest() -> Iterator[Row]:
    """One row for every implementation of every operation but plain torch, as it is tested."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = extension.absence("cpu", device) is None
    try:
        for op, implementations in dispatch.OPERATIONS.items():
            for name in implementations:
                if name == dispatch.REFERENCE:
                    continue
                for isa in extension.isas() if name == "cpu" and built else [""]:
                    yield _tested(op, name, isa, device)
    finally:
        dispatch.configure(os.environ.get("PRFL_KERNELS", ""))
        if extension.absence("cpu", "cpu") is None:
            extension.use_isa(os.environ.get("PRFL_CPU_ISA", ""))


def _tested(op: str, name: str, isa: str, device: str) -> Row:
    title = f"{name} {isa}".strip()
    if name == dispatch.TRITON and jit.INTERPRETED:
        return Row(op, title, "absent", "Triton interprets here: no kernel is built")
    try:
        dispatch.configure(f"{op}={name}")
        dispatch.check(device)
    except ValueError as error:
        return Row(op, title, "absent", str(error))
    if isa:
        extension.use_isa(isa)
    start, worst, notes = time.perf_counter(), 0.0, []
    for dtype in DTYPES if OPERATIONS[op].wanted else DTYPES[1:]:
        try:
            worst = max(worst, _excess(op, name, dtype, device))
        except ValueError as error:  # a dtype or shape that it refuses
            notes.append(str(error))
        except RuntimeError as error:  # how a kernel that does not load or launch shows itself
            return Row(op, title, "FAILED", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if len(notes) == len(DTYPES):
        return Row(op, title, "absent", notes[0])
    detail = f"error {worst:.2g} of the limit, {time.perf_counter() - start:.1f} s"
    return Row(op, title, "ok" if worst <= 1.0 else "FAILED", "; ".join([detail, *notes]))


def _excess(op: str, name: str, dtype: torch.dtype, device: str) -> float:
    """The largest error of a result of the implementation, as a part of what is allowed."""
    operation, s = OPERATIONS[op], gate_shape(dtype, dtype, device)

    def results(choice: str, exact: bool = False) -> list[Tensor]:
        dispatch.configure(f"{op}={choice}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = operation.inputs(s)
        shape, inputs = (s.exact(), [a.double() for a in inputs]) if exact else (s, inputs)
        found = gates.results(partial(CALLS.get(op, operation.call), shape), inputs, operation.wanted)
        return found if operation.wanted else list(operation.decode(*found))

    got, plain = results(name), results(dispatch.REFERENCE)
    if not operation.wanted:
        return max(_error(a, b) / E4M3_LIMIT for a, b in zip(got, plain, strict=True))
    want = results(dispatch.REFERENCE, exact=True)
    return max(
        _error(a, c) / (FACTOR * _error(b, c) + gates.ROUNDING)
        for a, b, c in zip(got, plain, want, strict=True)
    )


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of `want`; infinite for NaN."""
    found = gates.error(got, want)
    return math.inf if math.isnan(found) else found
