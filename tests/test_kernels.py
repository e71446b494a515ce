"""Every operation and its gradients against its formula, in float64 and in bfloat16."""

import math

import pytest
import torch
from rounding import assert_as_right, error, rounding

from prfl_kernels.attention.op import attention
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, rms_norm
from prfl_kernels.reward_pool.op import reward_pool

EPS = 1e-6
# Float64 sums of at most a few thousand terms in another order: n * 2^-53 with room to spare.
EXACT = dict(rtol=1e-11, atol=1e-11)


def normal(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def norm_formula(x, eps=EPS):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def modulate_formula(x, scale, shift):
    return norm_formula(x) * (1 + scale[:, None]) + shift[:, None]


def layer_norm_formula(x, weight, bias):
    return norm_formula(x) * weight + bias


def rms_formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gated_add_formula(x, y, gate):
    return x + gate[:, None] * y


def attention_formula(q, k, v):
    scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)


def pool_formula(x, u):
    return torch.einsum("bln,blc->bnc", torch.einsum("blc,nc->bln", x, u).softmax(1), x)


def turns(head_dim, grid):
    """e^(i angle) [L, D/2], token by token and pair by pair."""
    pairs = head_dim // 2
    counts = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    table = []
    for frame in range(grid[0]):
        for row in range(grid[1]):
            for column in range(grid[2]):
                angles = [
                    place * 10000.0 ** (-2 * j / (2 * n))
                    for place, n in zip((frame, row, column), counts, strict=True)
                    for j in range(n)
                ]
                table.append(angles)
    angles = torch.tensor(table, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def rope_formula(x, weight, grid, heads):
    n = rms_formula(x, weight).unflatten(-1, (heads, -1))
    z = torch.view_as_complex(n.unflatten(-1, (-1, 2)).contiguous())
    z = z * turns(n.shape[-1], grid)[:, None]
    return torch.view_as_real(z).flatten(-2)


# name: (operation, formula, shapes of its inputs). Odd lengths and widths on purpose.
OPS = {
    "modulate": (modulate, modulate_formula, [(2, 5, 7), (2, 7), (2, 7)]),
    "layer_norm": (layer_norm, layer_norm_formula, [(2, 5, 7), (7,), (7,)]),
    "rms_norm": (rms_norm, rms_formula, [(2, 5, 7), (7,)]),
    "gated_add": (gated_add, gated_add_formula, [(2, 5, 7), (2, 5, 7), (2, 7)]),
    "attention": (attention, attention_formula, [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)]),
    "reward_pool": (reward_pool, pool_formula, [(2, 5, 7), (3, 7)]),
}
ALL = pytest.mark.parametrize("name", OPS)


@ALL
def test_forward_is_the_formula(name):
    op, formula, shapes = OPS[name]
    inputs = [normal(*s) for s in shapes]
    torch.testing.assert_close(op(*inputs), formula(*inputs), **EXACT)


@ALL
def test_gradient_is_that_of_finite_differences(name):
    op, _, shapes = OPS[name]
    assert torch.autograd.gradcheck(op, [normal(*s, grad=True) for s in shapes])


@ALL
def test_strides_do_not_matter(name):
    op, formula, shapes = OPS[name]
    inputs = [normal(*reversed(s)).permute(*reversed(range(len(s)))) for s in shapes]
    torch.testing.assert_close(op(*inputs), formula(*inputs), **EXACT)


@ALL
def test_empty_batch(name):
    op, formula, shapes = OPS[name]
    inputs = [normal(*(0 if i == 0 and len(s) > 2 else n for i, n in enumerate(s))) for s in shapes]
    if name in ("modulate", "gated_add"):
        inputs = [a if a.dim() > 2 else a[:0] for a in inputs]
    assert op(*inputs).shape == formula(*inputs).shape


def with_gradients(function, inputs, seed=0):
    """Output and the gradients of a fixed random projection of it."""
    inputs = [a.detach().requires_grad_() for a in inputs]
    out = function(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


# The same shapes as in a model: many rows and a real width, so that rounding averages out.
WIDE = {
    "modulate": [(2, 33, 192), (2, 192), (2, 192)],
    "layer_norm": [(2, 33, 192), (192,), (192,)],
    "rms_norm": [(2, 33, 192), (192,)],
    "gated_add": [(2, 33, 192), (2, 33, 192), (2, 192)],
    "attention": [(2, 33, 3, 64), (2, 47, 3, 64), (2, 47, 3, 64)],
    "reward_pool": [(2, 33, 192), (3, 192)],
}


@ALL
def test_bfloat16_error_is_at_most_twice_that_of_plain_torch(name):
    op, formula, _ = OPS[name]
    inputs = [normal(*s, dtype=torch.bfloat16) for s in WIDE[name]]
    exact = with_gradients(formula, [a.double() for a in inputs])
    plain = with_gradients(formula, inputs)
    ours = with_gradients(op, inputs)
    for got, low, want in zip(ours, plain, exact, strict=True):
        assert_as_right(got, want, low, rounding(192))


@pytest.mark.parametrize("op", [modulate, layer_norm], ids=["modulate", "layer_norm"])
def test_norms_round_once_to_out_dtype(op):
    x = normal(2, 5, 96, dtype=torch.float32)
    affine = (2, 96) if op is modulate else (96,)
    a, b = (normal(*affine, dtype=torch.float32) for _ in range(2))
    out = op(x, a, b, EPS, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, op(x, a, b, EPS).bfloat16())


@pytest.mark.parametrize("name", ["modulate", "layer_norm", "rms_norm"])
def test_norms_of_bfloat16_round_once(name):
    """The stream in bfloat16, the affine part in float32, as in a model."""
    op, formula, _ = OPS[name]
    x = normal(2, 33, 192, dtype=torch.bfloat16)
    affine = [normal(*s, dtype=torch.float32) for s in WIDE[name][1:]]
    want = formula(x.double(), *(a.double() for a in affine))
    out = op(x, *affine)
    assert out.dtype == torch.bfloat16
    # Half an ULP is 2^-8 of the value at most; sums near zero keep the float32 error of their
    # terms, some roundings of 2^-24 on values of up to about 10.
    assert ((out.double() - want).abs() <= 2**-8 * want.abs() + 1e-5).all()


def test_gated_add_without_gate_is_a_sum():
    x, y = normal(2, 5, 7), normal(2, 5, 7)
    assert torch.equal(gated_add(x, y), x + y)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_gated_add_keeps_the_dtype_of_the_stream_and_rounds_once(stream):
    x, y = normal(2, 5, 64, dtype=stream), normal(2, 5, 64, dtype=torch.bfloat16)
    gate = normal(2, 64, dtype=torch.float32)
    out = gated_add(x, y, gate)
    assert out.dtype == stream
    want = gated_add_formula(x.double(), y.double(), gate.double())
    # Half an ULP of the result, and that of the float32 sum and product before it.
    ulp = torch.finfo(stream).eps
    near = (out.double() - want).abs() <= (ulp / 2 + 2**-23) * want.abs() + 2**-22
    assert near.all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fused", [gated_add_modulate, gated_add_norm], ids=["modulate", "norm"])
def test_fused_forms_are_their_parts(fused, gated):
    dtype = torch.float64
    affine = (2, 7) if fused is gated_add_modulate else (7,)
    second = modulate if fused is gated_add_modulate else layer_norm
    inputs = [normal(2, 5, 7, dtype=dtype, grad=True) for _ in range(2)]
    inputs += [normal(2, 7, grad=True) if gated else None]
    inputs += [normal(*affine, grad=True) for _ in range(2)]
    leaves = [a for a in inputs if a is not None]
    got = fused(*inputs)
    x = gated_add(*inputs[:3])
    want = x, second(x, *inputs[3:])
    torch.testing.assert_close(got, want, **EXACT)
    weights = [normal(2, 5, 7), normal(2, 5, 7)]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, weights),
        torch.autograd.grad(want, leaves, weights),
        **EXACT,
    )


GRIDS = [(1, 1, 1), (3, 5, 7), (5, 3, 1)]


def rope_inputs(head_dim, grid, heads=3, batch=2, dtype=torch.float64):
    length, width = math.prod(grid), heads * head_dim
    return (
        *(normal(batch, length, width, dtype=dtype) for _ in range(2)),
        *(normal(width, dtype=dtype) for _ in range(2)),
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_qk_norm_rope_is_a_complex_rotation_after_an_rms_of_the_whole_width(head_dim, grid):
    q, k, weight_q, weight_k = rope_inputs(head_dim, grid)
    got = qk_norm_rope(q, k, weight_q, weight_k, grid, 3, EPS)
    want = rope_formula(q, weight_q, grid, 3), rope_formula(k, weight_k, grid, 3)
    torch.testing.assert_close(got, want, **EXACT)


def test_rope_by_hand():
    """Width 12 has six pairs: two turn with the frame, two with the row, two with the column."""
    x = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64).expand(1, 24, 12)
    one = torch.ones(12, dtype=torch.float64)
    out, _ = qk_norm_rope(x, x, one, one, (2, 3, 4), 1, 0.0)
    token = out[0, (1 * 3 + 2) * 4 + 3, 0] / out[0, 0, 0, 0]  # frame 1, row 2, column 3
    angles = [1.0, 0.01, 2.0, 0.02, 3.0, 0.03]
    want = torch.tensor([f(a) for a in angles for f in (math.cos, math.sin)], dtype=torch.float64)
    torch.testing.assert_close(token, want, **EXACT)


def test_rms_runs_over_all_heads():
    q, k, weight_q, weight_k = rope_inputs(32, (1, 2, 2))
    louder = q.clone()
    louder[..., 64:] *= 10
    before, _ = qk_norm_rope(q, k, weight_q, weight_k, (1, 2, 2), 3)
    after, _ = qk_norm_rope(louder, k, weight_q, weight_k, (1, 2, 2), 3)
    assert (after[..., 0, :].norm() < 0.5 * before[..., 0, :].norm()).item()


@pytest.mark.parametrize("offset, length", [(0, 40), (40, 30), (70, 35), (104, 1)])
def test_a_shard_is_a_slice_of_the_whole(offset, length):
    grid = (3, 5, 7)
    q, k, weight_q, weight_k = rope_inputs(32, grid)
    whole = qk_norm_rope(q, k, weight_q, weight_k, grid, 3)
    part = slice(offset, offset + length)
    shard = qk_norm_rope(q[:, part], k[:, part], weight_q, weight_k, grid, 3, EPS, offset)
    for got, want in zip(shard, whole, strict=True):
        torch.testing.assert_close(got, want[:, part], **EXACT)


def test_qk_norm_rope_of_slices_of_one_projection():
    grid = (2, 3, 5)
    qkv = normal(2, 30, 3 * 96)
    q, k = qkv[..., :96], qkv[..., 96:192]
    weight = normal(2, 96)
    got = qk_norm_rope(q, k, *weight, grid, 3)
    want = rope_formula(q, weight[0], grid, 3), rope_formula(k, weight[1], grid, 3)
    torch.testing.assert_close(got, want, **EXACT)


def test_qk_norm_rope_gradients():
    q, k, weight_q, weight_k = (a.requires_grad_() for a in rope_inputs(8, (2, 1, 3), 2, 1))
    assert torch.autograd.gradcheck(
        lambda *a: qk_norm_rope(*a, (2, 1, 3), 2), (q, k, weight_q, weight_k)
    )


def test_qk_norm_rope_error_in_bfloat16():
    grid, heads = (3, 5, 7), 3
    q, k, weight_q, weight_k = rope_inputs(64, grid, heads, dtype=torch.bfloat16)

    def plain(x, weight):
        n = rms_formula(x, weight).unflatten(-1, (heads, -1))
        even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
        z = turns(n.shape[-1], grid)[:, None]
        cos, sin = z.real.to(x.dtype), z.imag.to(x.dtype)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def ours(x, weight):
        return qk_norm_rope(x, k, weight, weight_k, grid, heads)[0]

    exact = with_gradients(
        lambda x, w: rope_formula(x, w, grid, heads), [q.double(), weight_q.double()]
    )
    low, got = with_gradients(plain, [q, weight_q]), with_gradients(ours, [q, weight_q])
    for g, p, want in zip(got, low, exact, strict=True):
        assert_as_right(g, want, p, rounding(192))


def test_angles_stay_exact_far_into_a_sequence():
    """Float32 angles are off by up to 6e-5 (1000 * 2^-24) at the last frames of a long video."""
    grid = (1000, 1, 1)
    q, k, weight_q, weight_k = rope_inputs(32, grid, 1, 1, torch.float32)
    got, _ = qk_norm_rope(q, k, weight_q, weight_k, grid, 1)
    want = rope_formula(q.double(), weight_q.double(), grid, 1)
    # Roundings of values of size |want| and of the sum of 32 squares, none of them of the angle.
    assert error(got, want) <= rounding(32)


def test_reward_pool_returns_float32_for_bfloat16():
    assert reward_pool(normal(1, 3, 8, dtype=torch.bfloat16), normal(2, 8)).dtype == torch.float32
