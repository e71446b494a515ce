"""RMSNorm and rotation of queries and keys."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from prfl_bench import formulas
from prfl_bench.formulas import quantized
from prfl_bench.operations.record import BF16, EPS, Operation
from prfl_bench.shapes import Shape
from prfl_kernels.jit import wide
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.qk_norm_rope import triton_kernels


def _rms_norm() -> Operation:
    def launch(s, x, weight):
        inputs = x, None, weight, None, None
        (out, _), _, rstd = qk_norm_rope.forward(triton_kernels.forward, *inputs, 1, EPS, 0)
        return out, rstd

    def launch_backward(s, dn, x, weight, rstd):
        dx, _, dweight = qk_norm_rope.backward(
            triton_kernels.backward, dn, None, x, None, weight, None, rstd, None, 1, 0, True
        )
        return dx, dweight[0]

    return Operation(
        "rms_norm", "rms_norm",
        lambda s: [s.rows(), s.vector()],
        lambda s, *inputs: qk_norm_rope.rms_norm(*inputs, EPS),
        lambda s, *inputs: formulas.rms_norm(*inputs, EPS).to(s.dtype),
        wanted=(0, 1),
        launch=launch,
        backward=(
            lambda s: [s.rows(), s.rows(), s.vector(), s.statistics(1, s.batch, s.length)],
            launch_backward,
        ),
        streams=(BF16,),
    )  # fmt: skip


def _qk_inputs(s: Shape) -> list[Tensor]:
    return [*s.projected()[:2], s.vector(), s.vector()]


def with_rotation(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    """... and the cosines and sines, which eager code keeps from call to call."""
    tables = formulas.rotation(s.head_dim, s.grid, s.offset, s.length, s.device, wide(s.dtype))
    return *inputs, *tables


def normed_and_turned(s, q, k, weight_q, weight_k, *tables):
    pairs = (q, weight_q), (k, weight_k)
    return tuple(formulas.norm_rope(a, weight, s.model.heads, *tables, EPS) for a, weight in pairs)


def _qk_launch(s, *inputs, fp8: bool = False):
    made = qk_norm_rope.forward(triton_kernels.forward, *inputs, s.grid, s.model.heads, EPS, s.offset, fp8)
    return *made[0], *made[1], made[2]


def _qk_norm_rope() -> Operation:
    def backward_inputs(s):
        gradients = [s.rows().unflatten(2, (s.model.heads, -1)) for _ in range(2)]
        return [*gradients, *_qk_inputs(s), s.statistics(2, s.batch, s.length)]

    return Operation(
        "qk_norm_rope", "qk_norm_rope", _qk_inputs,
        lambda s, *inputs: qk_norm_rope.qk_norm_rope(*inputs, s.grid, s.model.heads, EPS, s.offset),
        normed_and_turned,
        wanted=(0, 1, 2, 3),
        prepare=with_rotation,
        launch=_qk_launch,
        backward=(
            backward_inputs,
            lambda s, *inputs: qk_norm_rope.backward(
                triton_kernels.backward, *inputs, s.grid, s.model.heads, s.offset, True
            ),
        ),
        streams=(BF16,),
    )  # fmt: skip


def _qk_norm_rope_fp8() -> Operation:
    def plain(s, q, k, *rest):
        (q, scale_q), (k, scale_k) = map(quantized, normed_and_turned(s, q.float(), k.float(), *rest))
        return q, k, scale_q, scale_k

    return Operation(
        "qk_norm_rope_fp8", "qk_norm_rope", _qk_inputs,
        lambda s, *inputs: qk_norm_rope.qk_norm_rope_fp8(*inputs, s.grid, s.model.heads, EPS, s.offset),
        plain,
        prepare=with_rotation,
        exact=normed_and_turned,
        decode=lambda q, k, *scales: [
            a.double() * scale[..., None] for a, scale in zip((q, k), scales, strict=True)
        ],
        launch=partial(_qk_launch, fp8=True),
        streams=(BF16,),
    )  # fmt: skip


OPERATIONS = _rms_norm(), _qk_norm_rope()
FP8 = (_qk_norm_rope_fp8(),)
