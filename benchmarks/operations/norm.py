"""LayerNorm, modulation and gated addition."""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_bench import formulas
from prfl_bench.formulas import quantized
from prfl_bench.operations.record import EPS, F32, Operation
from prfl_bench.shapes import Shape
from prfl_kernels import norm
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.norm import op, triton_kernels


def _norm(name: str, call: Callable, vector: Callable, base: float) -> Operation:
    def launch_backward(s, dn, x, scale, stats):
        return op.backward(triton_kernels.backward, dn, None, x, None, None, scale, stats, base, True, None)

    return Operation(
        name, name,
        lambda s: [s.residual_rows(), vector(s), vector(s)],
        lambda s, *inputs: call(*inputs, EPS, s.dtype),
        lambda s, *inputs: formulas.layer_norm(*inputs, base, EPS, s.dtype),
        wanted=(0, 1, 2),
        launch=lambda s, x, *ab: op.forward(triton_kernels.forward, x, None, None, *ab, base, EPS, s.dtype),
        backward=(
            lambda s: [s.rows(), s.residual_rows(), vector(s), s.statistics(2, s.batch, s.length)],
            launch_backward,
        ),
    )  # fmt: skip


def _modulate_fp8() -> Operation:
    return Operation(
        "modulate_fp8", "modulate",
        lambda s: [s.residual_rows(), s.modulation(), s.modulation()],
        lambda s, *inputs: norm.modulate_fp8(*inputs, EPS),
        lambda s, *inputs: quantized(formulas.layer_norm(*inputs, 1.0, EPS, F32)),
        exact=lambda s, *inputs: formulas.layer_norm(*inputs, 1.0, EPS, s.dtype),
        decode=lambda n, scale: [n.double() * scale[..., None]],
        launch=lambda s, x, *ab: op.forward(triton_kernels.forward, x, None, None, *ab, 1.0, EPS, E4M3),
    )  # fmt: skip


def _added_and_normed(s, base: float, x, y, gate, scale, shift, dtype: torch.dtype | None = None):
    x = formulas.gated_add(x, y, gate)
    return x, formulas.layer_norm(x, scale, shift, base, EPS, dtype or s.dtype)


def _gated_norm_inputs(s: Shape, vector: Callable) -> list[Tensor]:
    return [s.residual_rows(), s.rows(), s.modulation(), vector(s), vector(s)]


def _gated_norm(name: str, call: Callable, vector: Callable, base: float) -> Operation:
    def backward_inputs(s):
        rows = [s.rows(), s.residual_rows(), s.residual_rows(), s.rows()]
        return [*rows, s.modulation(), vector(s), s.statistics(2, s.batch, s.length)]

    return Operation(
        name, name,
        lambda s: _gated_norm_inputs(s, vector),
        lambda s, *inputs: call(*inputs, EPS, s.dtype),
        lambda s, *inputs: _added_and_normed(s, base, *inputs),
        wanted=(0, 1, 2, 3, 4),
        launch=lambda s, *inputs: op.forward(triton_kernels.forward, *inputs, base, EPS, s.dtype),
        backward=(
            backward_inputs,
            lambda s, *inputs: op.backward(triton_kernels.backward, *inputs, base, True, s.dtype),
        ),
    )  # fmt: skip


def _gated_norm_fp8(name: str, call: Callable, vector: Callable, base: float) -> Operation:
    def plain(s, *inputs):
        x, n = _added_and_normed(s, base, *inputs, dtype=F32)
        return x, *quantized(n)

    return Operation(
        f"{name}_fp8", name,
        lambda s: _gated_norm_inputs(s, vector),
        lambda s, *inputs: call(*inputs, EPS),
        plain,
        exact=lambda s, *inputs: _added_and_normed(s, base, *inputs),
        decode=lambda x, n, scale: [x, n.double() * scale[..., None]],
        launch=lambda s, *inputs: op.forward(triton_kernels.forward, *inputs, base, EPS, E4M3),
    )  # fmt: skip


def _gated_add() -> Operation:
    def launch_backward(s, dsum, y, gate):
        absent = None, None, 0.0, False  # of a norm
        return op.backward(triton_kernels.backward, None, dsum, None, y, gate, *absent, s.dtype)

    return Operation(
        "gated_add", "gated_add",
        lambda s: [s.residual_rows(), s.rows(), s.modulation()],
        lambda s, *inputs: norm.gated_add(*inputs),
        lambda s, *inputs: formulas.gated_add(*inputs),
        wanted=(0, 1, 2),
        reads=lambda inputs, outputs: inputs[1:],
        launch=lambda s, *inputs: op.forward(triton_kernels.forward, *inputs, None, None, 0.0, 0.0, None),
        backward=(lambda s: [s.residual_rows(), s.rows(), s.modulation()], launch_backward),
    )  # fmt: skip


OPERATIONS = (
    _norm("modulate", norm.modulate, Shape.modulation, 1.0),
    _norm("layer_norm", norm.layer_norm, Shape.vector, 0.0),
    _gated_add(),
    _gated_norm("gated_add_modulate", norm.gated_add_modulate, Shape.modulation, 1.0),
    _gated_norm("gated_add_norm", norm.gated_add_norm, Shape.vector, 0.0),
)
FP8 = (
    _modulate_fp8(),
    _gated_norm_fp8("gated_add_modulate", norm.gated_add_modulate_fp8, Shape.modulation, 1.0),
    _gated_norm_fp8("gated_add_norm", norm.gated_add_norm_fp8, Shape.vector, 0.0),
)
