"""`prfl doctor --selftest`: every implementation that runs here, in small cases, against plain torch.

`cases` lists them by name and `run` runs one: `prfl accept` gives each a process of its own, since a GPU that
has faulted computes nothing more in the process that made it. The sizes are those where kernels differ: the
widths and the head dim of Wan, which have templates of their own, tails of every tile, and clusters of one
and of several blocks; in every dtype that an implementation claims.

Outputs and gradients are compared with float64. An implementation may err FACTOR times as much as plain
torch in the same dtype (bfloat16 that is cut instead of rounded errs twice as much); a kernel that was built
or loaded wrong errs by far more. Operations on e4m3 values are compared with their plain torch form, which
rounds as they do.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_bench import gates, operations
from prfl_bench.operations import Operation
from prfl_bench.shapes import Model, Shape
from prfl_kernels import dispatch, extension, jit
from prfl_kernels.attention.fp8 import attention_fp8
from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.reward_pool.op import reward_pool_with_lse

FACTOR = 4.0
E4M3_LIMIT = 2**-4  # half an ULP of e4m3, relative
RAN, REFUSED, FAILED = "ran", "refused", "failed"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (compute dtype, residual stream); the second differs only where an operation reads the residual stream.
DTYPES = ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F16))
LOW = "attention, low scores"
SOME_DTYPES = {  # compute dtypes of operations that are not for all of them
    LOW: (BF16, F16),  # in float32 the scores' own rounding is all there is to see
    "attention_fp8, self": (BF16,),
    "attention_fp8, cross": (BF16,),
    "fp8_linear": (F32, BF16),
}
BY_VERSION = ("fp8_linear",)  # its dtypes depend on versions, so one that is refused is listed too


def _attention(s: Shape, q, k, v):
    """Every key once, and the last one three times; cross-attention to the 512 keys of a text and the 257 of
    an image, of more tiles of queries than a GPU has multiprocessors."""
    many = q.repeat(1, 150 if q.is_cuda else 1, 1, 1)
    crossed = [
        attention_with_lse(many, *(a.repeat(1, 5, 1, 1)[:, :keys] for a in (k, v))) for keys in (512, 257)
    ]
    return *attention_with_lse(q, k, v), *attention_with_lse(q, k, v, repeats=3), *crossed[0], *crossed[1]


def _low_scores(s: Shape) -> list[Tensor]:
    """q, k and v with scores of about -138, so that exp(lse) is 0 in float32: lse is far below -88.7."""
    q, k, v = (s.per_head(n) for n in (s.tokens, s.text, s.text))
    return [q + 3.5, k - 3.5, v]


# What the self-test runs: the list of the benchmark without what is made of several operations, or a part of
# one. Some calls ask for more than the benchmark's do.
_PARTS = ("query_pool", "modulated_attention", "modulated_ffn", "quantize_values")
CALLS: dict[str, Callable] = {
    "attention": _attention,
    "attention_fp8": lambda s, *inputs: attention_fp8(*inputs),
    "reward_pool": lambda s, *inputs: reward_pool_with_lse(*inputs),
}
_listed = [o for o in operations.OPERATIONS if o.name not in _PARTS]
_cross = next(o for o in _listed if o.name == "attention, cross")
OPERATIONS = {
    o.name: o._replace(call=CALLS.get(o.op, o.call))
    for o in (*_listed, _cross._replace(name=LOW, inputs=_low_scores))
}


class Case(NamedTuple):
    """One call of one implementation, forward and (where there is one) backward."""

    name: str  # "operation/implementation/dtypes/size": unique, without blanks
    operation: str  # one of OPERATIONS
    implementation: str
    dtype: torch.dtype  # of the computation; e4m3 operations have it for what is not e4m3
    shape: Shape  # with the dtype of the residual stream, and the device
    backward: str = ""  # whose backward follows, if not that of the implementation
    isa: str = ""  # instruction set of the compiled CPU kernels

    @property
    def op(self) -> str:
        """The operation of prfl_kernels.dispatch."""
        return OPERATIONS[self.operation].op


class Row(NamedTuple):
    """What became of a case."""

    case: str  # its name
    op: str  # of prfl_kernels.dispatch
    implementation: str  # with the instruction set or the other backward
    state: str  # RAN, and right; REFUSED: it says itself that it does not run this; FAILED: wrong, or raised
    detail: str
    error: float | None  # the largest of a result, over what is allowed; None where there is no finite one
    seconds: float


def selftest() -> Iterator[Row]:
    """The row of every case of this machine, in this process."""
    return map(run, cases())


def cases(device: str = "") -> list[Case]:
    """Every implementation of every operation but plain torch, in all sizes and dtypes that it claims.

    Where it does not run at all it has one case, which will be refused, and so has every dtype that it
    refuses of an operation in BY_VERSION. `device` is "cuda" or "cpu"; "" is CUDA where it is there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dispatch.complete()
    found = []
    for op, records in dispatch.OPERATIONS.items():
        for name, record in records.items():
            if name == dispatch.REFERENCE:
                continue
            forms = [o for o in OPERATIONS.values() if o.op == op]
            every = [c for o in forms for c in candidates(o, record, device)]
            claimed = [c for c in every if _refusal(c) is None]
            found += claimed or [next(candidates(forms[0], record._replace(backwards=()), device))]
            if claimed and op in BY_VERSION:
                refused = {c.dtype: c for c in every if c.dtype not in {one.dtype for one in claimed}}
                found += refused.values()
    return found


def case(name: str, device: str = "") -> Case:
    """The case of that name. ValueError if there is none."""
    for found in cases(device):
        if found.name == name:
            return found
    raise ValueError(f"selftest: got case {name!r}, want one of prfl_bench.selftest.cases()")


def run(case: Case) -> Row:
    """Run one case. It never raises for what an implementation does, and leaves the choice of kernels as it
    was."""
    how = f"{case.implementation} {case.isa or case.backward and f'+ {case.backward}'}".strip()
    row = partial(Row, case.name, case.op, how)
    if why := _refusal(case):
        return row(REFUSED, f"it {why}", None, 0.0)
    start, chosen = time.perf_counter(), dispatch.configured()
    try:
        error = _excess(case)
    # Libraries raise whatever they like (AssertionError, TypeError, Triton's OutOfResources), and no row may
    # end the others. Nothing is hidden: the row has failed, with type and message.
    except Exception as raised:  # noqa: BLE001
        message = (str(raised).splitlines() or [""])[0]
        return row(FAILED, f"{type(raised).__name__}: {message}", None, time.perf_counter() - start)
    finally:
        dispatch.configure(chosen)
        if case.isa:
            extension.use_isa(os.environ.get("PRFL_CPU_ISA", ""))
    state, finite = RAN if error <= 1.0 else FAILED, error if math.isfinite(error) else None
    return row(state, f"error {error:.2g} of the limit", finite, time.perf_counter() - start)


def summary(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(operation and implementation, state, detail): one line for all that ran or was refused, and one for
    every case that failed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike = row.case if row.state == FAILED else f"{row.op} {row.implementation}"
        groups.setdefault((alike, row.state), []).append(row)
    lines = []
    for (title, state), alike in groups.items():
        detail = alike[0].detail
        if state == RAN:
            worst, seconds = max(row.error for row in alike), sum(row.seconds for row in alike)
            detail = f"{len(alike)} cases, error {worst:.2g} of the limit, {seconds:.1f} s"
        lines.append((title, state, detail))
    return lines


def candidates(operation: Operation, record: dispatch.Implementation, device: str) -> Iterator[Case]:
    """All cases of an operation for an implementation, claimed or not."""
    built = record.name == dispatch.CPU and extension.absence("cpu", device) is None
    backwards = record.backwards or ("",)
    if record.backwards and record.backward:
        backwards = "", record.name  # the one that follows by default, and its own
    for size, shape in _sizes(operation, device):
        for dtype, residual in DTYPES:
            if dtype != residual and len(operation.streams) == 1:
                continue  # it reads no residual stream
            if dtype not in SOME_DTYPES.get(operation.name, (dtype,)):
                continue
            s = shape._replace(dtype=dtype, residual=residual)
            kinds = [dtype] if dtype == residual else [dtype, residual]
            dtypes = "-".join(str(a).removeprefix("torch.") for a in kinds)
            for backward in backwards:
                for isa in extension.isas() if built else ("",):
                    how = "-".join(filter(None, (record.name, backward, isa)))
                    name = "/".join((operation.name.replace(", ", "-").replace(" ", "-"), how, dtypes, size))
                    yield Case(name, operation.name, record.name, dtype, s, backward, isa)


def _sizes(operation: Operation, device: str) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of all sizes. 376 and 1,784 are 32,760 modulo 64, 128 and 176."""
    gpu = device == "cuda"

    def shape(heads: int, head_dim: int, grid: tuple[int, int, int], keys: int) -> Shape:
        model = Model("selftest", heads * head_dim, heads, 656)
        return Shape(model, grid, 1, 2, keys, F32, F32, device)

    if operation.kind != "attention":
        grid = (2, 4, 223) if gpu else (3, 5, 7)  # in reward pooling of 5,120 columns 7 tiles a cluster of 8
        for heads in (3, 12, 24, 40) if gpu else (3, 40):
            s = shape(heads, 128, grid, 77)
            yield f"{s.model.width}x{s.tokens}", s
        return
    tokens = (2, 4, 47)
    if operation.name.endswith("self"):
        # 3 tiles of 128 queries have clusters of one block, 14 of two.
        sizes = [(128, tokens, 376), (64, tokens, 376), *([(128, (2, 4, 223), 1784)] if gpu else [])]
    elif operation.name.endswith("cross"):
        # 33 tiles: the cluster of two with a block that computes nothing.
        sizes = [(128, (8, 17, 31) if gpu else tokens, keys) for keys in (257, 512)]
    else:
        sizes = [(128, tokens, 192)]  # 64 modulo 128, where cuDNN has made NaN
    for head_dim, grid, keys in sizes:
        s = shape(3, head_dim, grid, keys)
        yield f"{head_dim}x{s.tokens}x{keys}", s


def _refusal(case: Case) -> str | None:
    """Why the implementation does not run a case, by its own account."""
    if case.implementation == dispatch.TRITON and jit.INTERPRETED:
        return "is interpreted here: no kernel is built"
    s, fp8 = case.shape, "fp8" in case.operation
    dim = s.head_dim if OPERATIONS[case.operation].kind == "attention" else s.model.width
    for dtype in {case.dtype, s.residual}:
        facts = s.device, dtype, dim, fp8
        why = dispatch.absence(case.op, case.implementation, *facts)
        if why is None and case.backward:
            why = dispatch.absence(f"{case.op}_backward", case.backward, *facts)
        if why:
            return why
    if case.operation == LOW and case.backward:  # known faults, for which it is no default
        return dispatch.OPERATIONS[case.op][case.backward].doubt(s.device, True)
    return None


def _excess(case: Case) -> float:
    """The largest error of a result of the implementation, as a part of what is allowed."""
    operation, s = OPERATIONS[case.operation], case.shape
    if case.isa:
        extension.use_isa(case.isa)

    def results(choice: str, exact: bool = False) -> list[Tensor]:
        dispatch.configure(choice)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = operation.inputs(s)
        shape, inputs = (s.exact(), [a.double() for a in inputs]) if exact else (s, inputs)
        found = gates.results(partial(operation.call, shape), inputs, operation.wanted)
        return found if operation.wanted else list(operation.decode(*found))

    reference = f"{case.op}={dispatch.REFERENCE}"
    backward = f",{case.op}_backward={case.backward}" if case.backward else ""
    got, plain = results(f"{case.op}={case.implementation}{backward}"), results(reference)
    if not operation.wanted:
        return max(_error(a, b) / E4M3_LIMIT for a, b in zip(got, plain, strict=True))
    want = results(reference, exact=True)
    return max(
        _error(a, c) / (FACTOR * _error(b, c) + gates.ROUNDING)
        for a, b, c in zip(got, plain, want, strict=True)
    )


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of `want`; infinite for NaN."""
    found = gates.error(got, want)
    return math.inf if math.isnan(found) else found
