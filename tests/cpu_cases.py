"""The C++ kernels for the CPU as differentiable functions, with their formulas in plain torch and inputs."""

import math

import torch
from fused import normal

from prfl_bench import formulas
from prfl_kernels import bias_gelu
from prfl_kernels.jit import wide
from prfl_kernels.norm import cpu as norm_cpu
from prfl_kernels.norm import op as norm
from prfl_kernels.qk_norm_rope import cpu as rope_cpu
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.reward_pool import cpu as pool_cpu
from prfl_kernels.reward_pool import op as reward_pool

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
EPS = 1e-6
GRID, HEADS = (3, 5, 7), 3


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        outputs, ctx.gradients = run(*inputs)
        return outputs

    @staticmethod
    def backward(ctx, *directions):
        return None, *ctx.gradients(*directions)


def _op(run):
    """A differentiable function of run: inputs -> (outputs, directions -> gradients)."""
    return lambda *inputs: _Function.apply(run, *inputs)


def _modulated(base, dtype):
    def run(x, scale, shift):
        _, n, _, stats = norm.forward(norm_cpu.forward, x, None, None, scale, shift, base, EPS, dtype)

        def gradients(dn):
            back = norm.backward(norm_cpu.backward, dn, None, x, None, None, scale, stats, base, True, None)
            return back[0], *back[3:]

        return n, gradients

    return _op(run)


def _added(x, y, gate):
    total = norm.forward(norm_cpu.forward, x, y, gate, None, None, 0.0, 0.0, None)[0]

    def gradients(d):
        back = norm.backward(norm_cpu.backward, None, d, None, y, gate, None, None, 0.0, False, y.dtype)
        return d, *back[1:3]

    return total, gradients


def _added_and_normed(base, dtype):
    def run(x, y, gate, scale, shift):
        total, n, _, stats = norm.forward(norm_cpu.forward, x, y, gate, scale, shift, base, EPS, dtype)

        def gradients(dsum, dn):
            held = dn, dsum, total, y, gate, scale, stats
            return norm.backward(norm_cpu.backward, *held, base, True, y.dtype)

        return (total, n), gradients

    return _op(run)


def row_case(name, batch, length, width, residual=F32, update=F32, parameters=F32):
    x, y = normal(batch, length, width, dtype=residual), normal(batch, length, width, dtype=update)
    gate, scale, shift = (normal(batch, width, dtype=parameters) for _ in range(3))
    weight, bias = normal(width, dtype=parameters), normal(width, dtype=parameters)

    def normed(base):
        # The reference in float64 gives float64.
        return lambda x, a, b: formulas.layer_norm(x, a, b, base, EPS, x.dtype if x.dtype == F64 else update)

    def both(base):
        def run(x, y, gate, a, b):
            total = formulas.gated_add(x, y, gate)
            return total, normed(base)(total, a, b)

        return run

    return {
        "modulate": (_modulated(1.0, update), normed(1.0), [x, scale, shift]),
        "layer_norm": (_modulated(0.0, update), normed(0.0), [x, weight, bias]),
        "add": (_op(_added), formulas.gated_add, [x, y, None]),
        "gated_add": (_op(_added), formulas.gated_add, [x, y, gate]),
        "add_norm": (_added_and_normed(0.0, update), both(0.0), [x, y, None, weight, bias]),
        "gated_add_modulate": (_added_and_normed(1.0, update), both(1.0), [x, y, gate, scale, shift]),
    }[name]


NAMES = ("modulate", "layer_norm", "add", "gated_add", "add_norm", "gated_add_modulate")


def rope_case(batch=2, grid=GRID, heads=HEADS, head_dim=32, dtype=F32, offset=0, length=None):
    def run(q, k, weight_q, weight_k):
        rest = (grid, heads)
        out, _, rstd = qk_norm_rope.forward(rope_cpu.forward, q, k, weight_q, weight_k, *rest, EPS, offset)

        def gradients(dq, dk):
            dq, dk, dweight = qk_norm_rope.backward(
                rope_cpu.backward, dq, dk, q, k, weight_q, weight_k, rstd, *rest, offset, True
            )
            return dq, dk, *dweight

        return tuple(out), gradients

    def reference(q, k, weight_q, weight_k):
        tables = formulas.rotation(q.shape[2] // heads, grid, offset, q.shape[1], q.device, wide(q.dtype))
        pairs = ((q, weight_q), (k, weight_k))
        return tuple(formulas.norm_rope(a, w, heads, *tables, EPS) for a, w in pairs)

    shape = (batch, length or math.prod(grid) - offset, heads * head_dim)
    weights = [normal(heads * head_dim, dtype=dtype) for _ in range(2)]
    return _op(run), reference, [*(normal(*shape, dtype=dtype) for _ in range(2)), *weights]


def _rms_norm(x, weight):
    (out, _), _, rstd = qk_norm_rope.forward(rope_cpu.forward, x, None, weight, None, None, 1, EPS, 0)

    def gradients(d):
        dx, _, dweight = qk_norm_rope.backward(
            rope_cpu.backward, d, None, x, None, weight, None, rstd, None, 1, 0, True
        )
        return dx, dweight[0]

    return out.flatten(2), gradients


def rms_case(*shape, dtype=F32):
    inputs = [normal(*shape, dtype=dtype), normal(shape[-1])]
    return _op(_rms_norm), lambda x, weight: formulas.rms_norm(x, weight, EPS).to(x.dtype), inputs


def _pool(x, u):
    pooled, lse, scores = reward_pool.forward(pool_cpu.forward, x, u)

    def gradients(dpooled, dlse):
        delta = (pooled * dpooled).sum(-1) - dlse
        return reward_pool.backward(pool_cpu.backward, dpooled, delta, x, u, scores, lse, True, True)

    return (pooled, lse), gradients


def pool_case(batch=2, length=77, width=96, queries=3, dtype=F32):
    inputs = [normal(batch, length, width, dtype=dtype), normal(queries, width) * width**-0.5]
    return _op(_pool), formulas.reward_pool_with_lse, inputs


def _gelu(h, bias):
    def gradients(d):
        dh, g, dbias = bias_gelu.backward(bias_gelu.cpu_backward, d, h, bias, bias is not None)
        torch.testing.assert_close(g, out, rtol=0, atol=0)
        return dh, dbias

    out = bias_gelu.forward(bias_gelu.cpu_forward, h, bias)
    return out, gradients


def gelu_case(*shape, dtype=F32, bias=True):
    return _op(_gelu), formulas.bias_gelu, [normal(*shape, dtype=dtype), normal(shape[-1]) if bias else None]


def all_cases(**dtypes):
    """One case of every kernel, long enough for several runs of tokens."""
    for name in NAMES:
        yield row_case(name, 2, 71, 40, **dtypes)
    dtype = dtypes.get("update", F32)
    yield rope_case(dtype=dtype)
    yield rms_case(2, 71, 40, dtype=dtype)
    yield pool_case(2, 1801, 40, 3, dtype)
    yield gelu_case(2, 71, 40, dtype=dtype)
