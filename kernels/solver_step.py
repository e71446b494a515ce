"""One step of the Euler and UniPC samplers: two linear combinations of the state and the velocity.

    m_t    = x - sigma v                                             the prediction of x_0
    x_c    = a_x x + a_l x_last + a_0 m_0 + a_1 m_1 + a_t m_t        corrector
    x_next = b_x x_c + b_t m_t + b_0 m_0                             predictor

x, x_last, m_0 and m_1 [B, ...] have one dtype, in which the results come; the velocity may have another
float dtype, as a network in bfloat16 gives it. columns [B, 9] is (sigma, a_x, a_l, a_0, a_1, a_t, b_x,
b_t, b_0) of every sample, a row of the sampler's table (prfl_engine.flow), and takes no gradient.

The step is linear, so its backward needs nothing but the columns. With d the gradient of a result,

    d_c = d x_c + b_x d x_next,    d_t = d m_t + b_t d x_next + a_t d_c
    dx = a_x d_c + d_t,   dx_last = a_l d_c,   dm_0 = a_0 d_c + b_0 d x_next,   dm_1 = a_1 d_c
    dv = -sigma d_t
"""

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels, dispatch
from prfl_kernels.checks import expect, expect_float
from prfl_kernels.declare import operation
from prfl_kernels.dispatch import CUDA, REFERENCE, record
from prfl_kernels.extension import supported


def reference(x, x_last, m0, m1, velocity, columns, x_next, x_c, m_t):
    """Fill x_next, x_c and m_t in plain torch."""
    sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0 = _columns(columns, x)
    prediction = x - sigma * velocity
    corrected = a_x * x + a_l * x_last + a_0 * m0 + a_1 * m1 + a_t * prediction
    torch.add(b_x * corrected + b_t * prediction, b_0 * m0, out=x_next)
    x_c.copy_(corrected)
    m_t.copy_(prediction)


def cuda(x, x_last, m0, m1, velocity, columns, *made):
    """Fill x_next, x_c and m_t by the CUDA C++ kernel. ValueError unless x is float32 and velocity that or
    bfloat16."""
    if x.dtype != torch.float32:
        raise ValueError(f"solver_step: got {x.dtype} for cuda, want float32")
    supported("solver_step", velocity)
    names = "x", "x_last", "m0", "m1", "velocity", "columns", "x_next", "x_c", "m_t"
    held = [a.contiguous() for a in (x, x_last, m0, m1, velocity, columns.float())]
    tensors = {name: a.view(len(x), -1) for name, a in zip(names, (*held, *made), strict=True)}
    size, rows = x[0].numel(), [a for name, a in tensors.items() if name != "columns"]
    cuda_kernels.launch(
        "solver_step", **tensors, batch=len(x), size=size, bf16=velocity.dtype == torch.bfloat16,
        aligned=cuda_kernels.aligned(size, *rows),
    )  # fmt: skip


def _columns(columns: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The nine coefficients, each [B, 1, ...]."""
    return columns.reshape(-1, 9, *[1] * (like.dim() - 1)).unbind(1)


dispatch.register("solver_step", dispatch.common({REFERENCE: reference, CUDA: cuda}))


def forward(fill, *inputs):
    """(x_next, x_c, m_t), which fill(x, x_last, m0, m1, velocity, columns, x_next, x_c, m_t) computes
    unless it is None."""
    x = inputs[0]
    made = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)
    if fill is not None and x.numel():
        fill(*inputs, *made)
    return made


def _setup_context(ctx, inputs, output):
    if ctx.needs_input_grad[5]:
        raise ValueError("solver_step: got columns that require grad, want a table of constants")
    ctx.dtype = inputs[4].dtype
    ctx.save_for_backward(inputs[5])


def _gradient(ctx, d_next, d_c, d_t):
    sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0 = _columns(*ctx.saved_tensors, d_next)
    wants, dtype = ctx.needs_input_grad, d_next.dtype
    d_c = d_c + b_x * d_next
    d_t = d_t + b_t * d_next + a_t * d_c
    return (
        (a_x * d_c + d_t).to(dtype) if wants[0] else None,
        (a_l * d_c).to(dtype) if wants[1] else None,
        (a_0 * d_c + b_0 * d_next).to(dtype) if wants[2] else None,
        (a_1 * d_c).to(dtype) if wants[3] else None,
        (-sigma * d_t).to(ctx.dtype) if wants[4] else None,
        None,
    )


@operation("solver_step", _gradient, _setup_context)
def _solver_step(
    fake: bool, x: Tensor, x_last: Tensor, m0: Tensor, m1: Tensor, velocity: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    op = "solver_step"
    if x.dim() < 1:
        raise ValueError(f"{op}: got x {list(x.shape)}, want [B, ...]")
    expect_float(op, "x", x.dtype)
    for name, a in (("x_last", x_last), ("m0", m0), ("m1", m1)):
        expect(op, name, a, x.shape, x, x.dtype)
    expect(op, "velocity", velocity, x.shape, x)
    expect(op, "columns", columns, (x.shape[0], 9), x)
    return forward(None if fake else record(op, x).forward, x, x_last, m0, m1, velocity, columns)


def solver_step(
    x: Tensor, x_last: Tensor, m0: Tensor, m1: Tensor, velocity: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_next, x_c, m_t) in x.dtype; shapes and dtypes as in the head of this file, or ValueError."""
    return torch.ops.prfl.solver_step(x, x_last, m0, m1, velocity, columns)
