"""Whole sublayers, and the step of a sampler."""

import torch.nn.functional as F
from torch import Tensor

from prfl_bench import formulas
from prfl_bench.operations.attention import products
from prfl_bench.operations.qk_norm_rope import normed_and_turned, with_rotation
from prfl_bench.operations.record import EPS, Operation
from prfl_bench.shapes import Shape
from prfl_kernels import sublayers
from prfl_kernels.jit import wide
from prfl_kernels.solver_step import solver_step


def _solver_step() -> Operation:
    """The latent, 16 channels of 4 values a token, in float32; a velocity in dtype."""

    def inputs(s):
        state, columns = wide(s.residual), s.normal(s.batch, 9, dtype=wide(s.residual))
        x, *rest = (s.normal(s.batch, 64, s.tokens, dtype=state) for _ in range(4))
        return [x, *rest, s.normal(s.batch, 64, s.tokens, dtype=s.dtype), columns]

    return Operation(
        "solver_step", "solver_step", inputs,
        lambda s, *inputs: solver_step(*inputs),
        lambda s, *inputs: formulas.solver_step(*inputs),
        wanted=(0, 1, 2, 3, 4), divided=None, reads=lambda inputs, outputs: inputs[5:],
    )  # fmt: skip


def _weight(s: Shape, rows: int, columns: int) -> list[Tensor]:
    """A linear layer's weight and bias."""
    return [s.normal(rows, columns) * columns**-0.5, s.normal(rows)]


def _modulated_attention() -> Operation:
    """Everything saved, whichever attention is asked for."""

    def inputs(s):
        width = s.model.width
        weights = [a for _ in range(4) for a in _weight(s, width, width)]
        return [s.residual_rows(), *(s.modulation() for _ in range(3)), *weights, s.vector(), s.vector()]

    def call(s, x, shift, scale, gate, *weights):
        rest = (sublayers.AttentionWeights(*weights), s.grid, s.model.heads, EPS, s.offset)
        return sublayers.modulated_attention(x, shift, scale, gate, *rest, dtype=s.dtype)[0]

    def plain(s, x, shift, scale, gate, *rest):
        w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm_q, norm_k, *tables = rest
        n = formulas.layer_norm(x, scale, shift, 1.0, EPS, s.dtype)
        q, k, v = (formulas.linear(n, *layer) for layer in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        q, k = normed_and_turned(s, q, k, norm_q, norm_k, *tables)
        out = formulas.sdpa(q, k, v.unflatten(-1, (s.model.heads, -1)))
        return formulas.gated_add(x, formulas.linear(out.flatten(2), w_o, b_o), gate)

    def flops(s):
        work = 8 * s.length * s.model.width**2 * s.batch
        forward, backward = products(False, s)
        return work + forward, 2 * work + backward

    return Operation(
        "modulated_attention", "attention", inputs, call, plain, tuple(range(14)), flops,
        divided=None, prepare=with_rotation,
    )  # fmt: skip


def _modulated_ffn() -> Operation:
    """Everything saved, whichever bias_gelu is asked for."""

    def inputs(s):
        width, ffn = s.model.width, s.model.ffn
        weights = [*_weight(s, ffn, width), *_weight(s, width, ffn)]
        return [s.residual_rows(), s.rows(), *(s.modulation() for _ in range(3)), *weights]

    def plain(s, x, y, shift, scale, gate, w1, b1, w2, b2):
        x = formulas.gated_add(x, y)
        h = formulas.linear(formulas.layer_norm(x, scale, shift, 1.0, EPS, s.dtype), w1, b1)
        return formulas.gated_add(x, formulas.linear(F.gelu(h, approximate="tanh"), w2, b2), gate)

    def flops(s):
        work = 4 * s.batch * s.length * s.model.width * s.model.ffn
        return work, 2 * work

    return Operation(
        "modulated_ffn", "bias_gelu", inputs,
        lambda s, *a: sublayers.modulated_ffn(*a[:5], sublayers.FFNWeights(*a[5:]), EPS, s.dtype),
        plain, tuple(range(9)), flops,
    )  # fmt: skip


OPERATIONS = _solver_step(), _modulated_attention(), _modulated_ffn()
