"""A step of the samplers as an operation: the formula, its explicit backward, and who runs it."""

import pytest
import torch
from fused import assert_as_good_as_torch, error, outputs_and_gradients, strided
from torch.library import opcheck

from prfl_engine import flow
from prfl_kernels import dispatch
from prfl_kernels import solver_step as module
from prfl_kernels.solver_step import solver_step

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = pytest.mark.parametrize("shape", [(3, 5, 1, 3, 7), (2, 11), (2,), (1, 16, 3, 4, 4)])


def columns(batch, dtype=F32):
    """UniPC in its first, middle and last step."""
    return flow.make_schedule("unipc", 5, 3.0).table[[0, 3, 4]][:batch].to(dtype)


def inputs(*shape, dtype=F32, velocity=None):
    """The state and the velocity."""
    held = [torch.randn(shape, dtype=F64).to(dtype) for _ in range(5)]
    return [*held[:4], held[4].to(velocity or dtype)]


def with_columns(op, *table):
    return lambda *held: op(*held, *(table or [columns(len(held[0]), held[0].dtype)]))


def formula(x, x_last, m0, m1, velocity, columns):
    """Sample by sample."""
    made = []
    for b, (sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0) in enumerate(columns.tolist()):
        m_t = x[b] - sigma * velocity[b]
        x_c = a_x * x[b] + a_l * x_last[b] + a_0 * m0[b] + a_1 * m1[b] + a_t * m_t
        made.append((b_x * x_c + b_t * m_t + b_0 * m0[b], x_c, m_t))
    return tuple(map(torch.stack, zip(*made, strict=True)))


@SHAPES
def test_outputs_and_gradients_are_those_of_the_formula(shape):
    held = inputs(*shape, dtype=F64)
    got = outputs_and_gradients(with_columns(solver_step), held)
    want = outputs_and_gradients(with_columns(formula), held)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_gradients_of_single_results_are_finite_differences():
    held = [a.requires_grad_() for a in inputs(3, 2, dtype=F64)]
    step = with_columns(solver_step)
    assert torch.autograd.gradcheck(step, held) and torch.autograd.gradgradcheck(step, held)
    for i in range(3):
        assert torch.autograd.gradcheck(lambda *a, i=i: step(*a)[i], held)


@SHAPES
@pytest.mark.parametrize("velocity", [F32, BF16])
def test_error_is_at_most_twice_that_of_torch(shape, velocity):
    held, table = inputs(*shape, velocity=velocity), columns(shape[0])
    assert_as_good_as_torch(
        lambda *a: solver_step(*a, table.to(a[0].dtype)), held, lambda *a: formula(*a, table)
    )


def test_a_state_in_bfloat16_rounds_once():
    held = inputs(3, 40, dtype=BF16)
    got = solver_step(*held, columns(3))
    want = formula(*(a.double() for a in held), columns(3))
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == BF16 and error(ours, exact) <= 1.01 * error(exact.bfloat16(), exact)


def test_strides_do_not_matter():
    held = inputs(3, 5, 4, 6)
    op = with_columns(solver_step)
    want = outputs_and_gradients(op, held)
    turned = [a.transpose(1, 3).contiguous().transpose(1, 3) for a in held]
    broadcast = solver_step(*held[:4], held[4][:, :1].expand_as(held[4]), columns(3))
    assert all(a.is_contiguous() for a in broadcast)
    for other in ([strided(a) for a in held], turned):
        torch.testing.assert_close(outputs_and_gradients(op, other), want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing(shape):
    outputs, gradients = outputs_and_gradients(with_columns(solver_step), inputs(*shape))
    assert all(a.shape == shape for a in outputs + gradients)


def test_only_the_gradients_asked_for_and_their_dtypes():
    held, op = inputs(3, 7, velocity=BF16), with_columns(solver_step)
    _, every = outputs_and_gradients(op, held)
    assert [a.dtype for a in every] == [F32] * 4 + [BF16]
    for i, want in enumerate(every):
        _, (got,) = outputs_and_gradients(op, held, wanted=[i])
        assert torch.equal(got, want)


def test_backward_keeps_the_columns_alone():
    kept = []
    held = [a.requires_grad_() for a in inputs(3, 7)]
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        solver_step(*held, columns(3))
    assert [a.shape for a in kept] == [(3, 9)]


def test_registration_and_no_graph_break():
    held = [a.requires_grad_() for a in inputs(3, 4, 5, velocity=BF16)]
    opcheck(torch.ops.prfl.solver_step.default, (*held, columns(3)))
    compiled = torch.compile(solver_step, fullgraph=True, backend="aot_eager")
    got, want = (outputs_and_gradients(with_columns(op), held) for op in (compiled, solver_step))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.__setitem__(2, a[2][:, :3]), r"got m0 \[3, 3\], want \[3, 4\]"),
        (lambda a: a.__setitem__(1, a[1].double()), "got x_last torch.float64, want torch.float32"),
        (lambda a: a.__setitem__(5, a[5][:2]), r"got columns \[2, 9\], want \[3, 9\]"),
        (lambda a: a[5].requires_grad_(), "got columns that require grad"),
    ],
)
def test_misfits_are_named(change, message):
    held = [*inputs(3, 4), columns(3)]
    change(held)
    with pytest.raises(ValueError, match=f"^solver_step: {message}"):
        solver_step(*held)


def test_flow_runs_what_the_table_says(monkeypatch):
    """On the CPU the kernel for CUDA is refused; the default is plain torch everywhere."""
    schedule, state = flow.make_schedule("unipc", 4, 5.0), flow.SolverState(*inputs(2, 3, 4)[:4])
    velocity, index = torch.randn(2, 3, 4), torch.tensor([1, 3])
    want = flow.step(schedule, state, velocity, index)
    seen = []
    kernel = lambda *a: seen.append(a[5].shape) or module.reference(*a)  # noqa: E731
    records = dispatch.OPERATIONS["solver_step"]
    monkeypatch.setitem(records, dispatch.CUDA, records[dispatch.CUDA]._replace(forward=kernel))
    assert all(dispatch.default("solver_step", on)[0] == dispatch.REFERENCE for on in ("cuda", "cpu"))
    try:
        dispatch.configure("solver_step=cuda")
        with pytest.raises(ValueError, match="solver_step got cuda on cpu: it"):
            flow.step(schedule, state, velocity, index)
        monkeypatch.setattr(dispatch.extension, "absence", lambda part, device: None)
        got = flow.step(schedule, state, velocity, index)
    finally:
        dispatch.configure("")
    assert seen == [(2, 9)] and all(map(torch.equal, got, want))
