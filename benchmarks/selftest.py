"""`prfl doctor --selftest`: every implementation that runs on this machine, once, against plain torch.

One small case an operation, outputs and gradients, compared with float64. An implementation may err
FACTOR times as much as plain torch in the same dtype (bfloat16 that is cut instead of rounded errs
twice as much); a kernel that was built or loaded wrong errs by far more. Operations on e4m3 values are
compared with their plain torch form, which rounds as they do.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import dispatch, extension, jit
from prfl_kernels.attention.fp8 import attention_fp8, quantize_values
from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.bias_gelu import bias_gelu
from prfl_kernels.fp8.e4m3 import quantize_rows
from prfl_kernels.fp8.linear import fp8_linear
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, rms_norm
from prfl_kernels.reward_pool.op import reward_pool_with_lse
from prfl_kernels.solver_step import solver_step

FACTOR = 4.0
E4M3_LIMIT = 2**-4  # half an ULP of e4m3, relative
DTYPES = (torch.float32, torch.bfloat16)
GRID, HEADS = (3, 4, 5), 3


class Case(NamedTuple):
    """How to run an operation, and shapes of what it takes: "BLC" become the operation's dtype."""

    run: Callable
    shapes: tuple[tuple[int, ...], ...]
    exact: bool = True  # has a float64 form and gradients


def _rope(q, k, weight_q, weight_k):
    return qk_norm_rope(q, k, weight_q, weight_k, GRID, HEADS)


def _linear(x, w, bias):
    return fp8_linear(*quantize_rows(x), *quantize_rows(w), bias)


def _quantized(x):
    values, scale = quantize_fp8(x, gelu=True)
    return values.float() * scale[..., None]


def _attention(q, k, v):
    """Every key once, and the last one three times."""
    return *attention_with_lse(q, k, v), *attention_with_lse(q, k, v, repeats=3)


def _attention_fp8(q, k, v):
    return attention_fp8(*quantize_rows(q), *quantize_rows(k), *quantize_values(v))


def _solver(x, x_last, m0, m1, velocity):
    """The state [B, C] stays in float32 as a parameter does; the velocity comes as [B, 1, C]."""
    columns = torch.arange(18, dtype=x.dtype, device=x.device).view(2, 9) / 8 - 1
    return solver_step(x, x_last, m0, m1, velocity[:, 0], columns)


_X, _BC, _C, _QKV = (2, 60, 96), (2, 96), (96,), (1, 70, 2, 64)
CASES = {
    "modulate": Case(modulate, (_X, _BC, _BC)),
    "layer_norm": Case(layer_norm, (_X, _C, _C)),
    "gated_add": Case(gated_add, (_X, _X, _BC)),
    "gated_add_modulate": Case(gated_add_modulate, (_X, _X, _BC, _BC, _BC)),
    "gated_add_norm": Case(gated_add_norm, (_X, _X, _BC, _C, _C)),
    "bias_gelu": Case(bias_gelu, (_X, _C)),
    "rms_norm": Case(rms_norm, (_X, _C)),
    "qk_norm_rope": Case(_rope, (_X, _X, _C, _C)),
    "attention": Case(_attention, (_QKV, _QKV, _QKV)),
    "reward_pool": Case(reward_pool_with_lse, (_X, (3, 96))),
    "fp8_linear": Case(_linear, ((60, 96), (32, 96), (32,)), exact=False),
    "quantize_fp8": Case(_quantized, (_X,), exact=False),
    "attention_fp8": Case(_attention_fp8, (_QKV, _QKV, _QKV), exact=False),
    "solver_step": Case(_solver, (_BC, _BC, _BC, _BC, (2, 1, 96))),
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
    for dtype in DTYPES if CASES[op].exact else DTYPES[1:]:
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
    case, generator = CASES[op], torch.Generator().manual_seed(0)
    # Parameters stay in float32, and are small enough for a softmax over the tokens to stay broad.
    inputs = [
        torch.randn(shape, generator=generator) * (1 if len(shape) > 2 else shape[-1] ** -0.5)
        for shape in case.shapes
    ]
    inputs = [a.to(device, dtype if a.dim() > 2 else None) for a in inputs]
    dispatch.configure(f"{op}={name}")
    got = _results(case, inputs)
    dispatch.configure(f"{op}={dispatch.REFERENCE}")
    plain = _results(case, inputs)
    if not case.exact:
        return max(_error(a, b) / E4M3_LIMIT for a, b in zip(got, plain, strict=True))
    want = _results(case, [a.double() for a in inputs])
    return max(
        _error(a, c) / (FACTOR * _error(b, c) + 2**-22) for a, b, c in zip(got, plain, want, strict=True)
    )


def _results(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and, where there are any, the gradients of a fixed projection of them."""
    inputs = [a.detach().requires_grad_(case.exact) for a in inputs]
    outputs = case.run(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not case.exact:
        return outputs
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, directions))


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of `want`; infinite for NaN."""
    difference = (got.double() - want.double()).norm() / want.double().norm()
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).item()
