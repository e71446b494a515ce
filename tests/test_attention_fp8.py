"""Attention on e4m3 against float64, by bounds of its roundings."""

import math

import pytest
import torch
from e4m3 import CHECKS, E4M3, INSTRUCTION, rounding
from fused import DEVICE, error, needs_triton, normal, strided
from torch.library import opcheck

from prfl_bench.hopper_product import hopper_product
from prfl_kernels import dispatch
from prfl_kernels.attention import fp8 as module
from prfl_kernels.attention.fp8 import attention_fp8, attention_fp8_reference, quantize_values
from prfl_kernels.fp8.e4m3 import quantize_rows

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = pytest.mark.parametrize(
    "batch, queries, keys, heads, dim",
    [
        (2, 70, 200, 2, 64),  # a last block of keys and of queries, both partly filled
        (1, 130, 256, 3, 128),  # whole blocks of keys
        (2, 1, 127, 1, 128),
        (1, 33, 1, 2, 64),  # one key: out is its value
        (1, 257, 385, 1, 64),
    ],
)


def attention_inputs(batch, queries, keys, heads, dim, dtype=F32):
    """((q, k, v), the arguments of attention_fp8)"""
    q, k, v = (normal(batch, n, heads, dim, dtype=dtype) for n in (queries, keys, keys))
    return (q, k, v), quantized(q, k, v)


def quantized(q, k, v):
    return *quantize_rows(q), *quantize_rows(k), *quantize_values(v)


def values_of(v8, v_scale, keys):
    """Values [B, L, H, D] in float64 that v8 stands for."""
    v = module._natural(v8.float()).double() * v_scale.double()[..., None]
    return v[..., :keys].permute(0, 3, 1, 2)


def exact(q, k, v, scale=None):
    """(out, lse, attention applied to |v|, sum of |v| over the sum of exp(s - max)) in float64."""
    q, k, v = (a.double().transpose(1, 2) for a in (q, k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    top = p.amax(-1, keepdim=True)  # 1 / sum of exp(s - max)
    found = p @ v, p @ v.abs(), top * v.abs().sum(-2, keepdim=True)
    out, spread, floor = (a.transpose(1, 2) for a in found)
    return out, lse, spread, floor


def assert_within_rounding(arguments, scale=None):
    """attention_fp8 against float64 of the values that its e4m3 inputs stand for."""
    q8, q_scale, k8, k_scale, v8, v_scale = arguments
    q = q8.double() * q_scale.double()[..., None]
    k = k8.double() * k_scale.double()[..., None]
    v = values_of(v8, v_scale, k8.shape[1])
    want, want_lse, spread, floor = exact(q, k, v, scale)
    out, lse = attention_fp8(*arguments, scale)
    assert out.dtype == BF16 and lse.dtype == F32 and not out.isnan().any()
    # A score is a sum of D products, scaled, less the maximum, in float32.
    factor = q8.shape[-1] ** -0.5 if scale is None else scale
    sizes = (q.abs().transpose(1, 2) @ k.abs().transpose(1, 2).mT).amax().item() * factor
    score = sizes * ((q8.shape[-1] + 8) * 2**-24 + INSTRUCTION) + 2**-20
    assert (lse - want_lse).abs().max().item() <= 2 * score
    # p is rounded to e4m3 as 256 p; its scores move every weight by at most e^(2 score) - 1.
    limit = (2**-4 + INSTRUCTION + math.expm1(4 * score)) * spread + 2**-18 * floor
    limit = limit * (1 + 2**-8) + 2**-8 * want.abs() + 1e-30
    assert ((out.double() - want).abs() <= limit).all()


def test_two_levels_matter_at_long_length():
    """Values with a mean, 20,000 keys: kept in the tensor core, the sum outgrows its 14 bits."""
    q, k, v = normal(1, 8, 1, 64).cpu(), normal(1, 20000, 1, 64).cpu(), normal(1, 20000, 1, 64).cpu() + 1
    with torch.no_grad():
        arguments = quantized(q, k, v)
    want = exact(q, k, v)[0]
    plain, two, one = (
        error(attention_fp8_reference(*arguments, 64**-0.5, *how)[0], want)
        for how in ((), (hopper_product, True), (hopper_product, False))
    )
    assert two < 1.5 * plain and one > 20 * two


@needs_triton
@pytest.mark.usefixtures("triton")
class TestTriton:
    @pytest.mark.parametrize("length", [1, 128, 300])
    @pytest.mark.parametrize("dim, dtype", [(64, BF16), (128, F32)])
    def test_values(self, length, dim, dtype):
        v = normal(2, length, 3, dim, dtype=dtype)
        v[1, :, 0, 5], v[0, 0, 1, 2] = 0.0, 1e4
        v8, scale = quantize_values(v)
        assert v8.shape == (2, 3, dim, -(-length // 128) * 128) and scale.shape == (2, 3, dim)
        assert scale[1, 0, 5] == 1 and (v8.float().abs().amax(-1)[scale != 1] == 448).all()
        assert not module._natural(v8.float())[..., length:].any()
        limit = rounding(v.double(), scale[:, None].double())
        assert ((values_of(v8, scale, length) - v.double()).abs() <= limit).all()
        dispatch.configure("reference")
        want, want_scale = quantize_values(v)
        assert torch.equal(v8.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scale, want_scale)

    def test_order_of_keys(self):
        order = module._interleaved(torch.arange(32.0))
        assert order[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
        assert torch.equal(order[16:], order[:16] + 16)
        assert torch.equal(module._natural(order), torch.arange(32.0))

    @SHAPES
    def test_error_is_that_of_rounding(self, batch, queries, keys, heads, dim):
        assert_within_rounding(attention_inputs(batch, queries, keys, heads, dim)[1])

    @SHAPES
    def test_emulation_is_the_same(self, batch, queries, keys, heads, dim):
        """Weights on a boundary of e4m3 may fall to either side, by 2^-3 of one in some thousands."""
        _, arguments = attention_inputs(batch, queries, keys, heads, dim)
        out, lse = attention_fp8(*arguments)
        want, want_lse = attention_fp8_reference(*arguments, dim**-0.5)
        assert error(out, want.to(BF16)) < 1e-4 + INSTRUCTION
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5 + 64 * INSTRUCTION)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_error_against_attention_before_quantisation(self, dim):
        """Rounding to e4m3 moves a value by r = 2.6 % root mean square: a step of 2^-3 over sqrt(12),
        by a mean of 1.4 steps of 8. Scores of deviation 1 move by sqrt(2) r; with p and v that is
        sqrt(2 + 1 + 1) r = 5.2 % of an average of independent values."""
        (q, k, v), arguments = attention_inputs(1, 128, 512, 1, dim)
        assert error(attention_fp8(*arguments)[0], exact(q, k, v)[0]) < 1.2 * 0.052

    def test_zero_rows_and_outliers(self):
        (q, k, v), _ = attention_inputs(1, 40, 150, 2, 64)
        q[0, 3], k[0, :, 1], v[0, :, 0, 7] = 0.0, 0.0, 0.0
        q[0, 5, 0, 1], k[0, 140, 0, 2], v[0, 9, 1, 3] = 30.0, -50.0, 1e4
        arguments = quantized(q, k, v)
        assert_within_rounding(arguments)
        out, lse = attention_fp8(*arguments)
        # Equal scores: the mean of the values, the logarithm of their number.
        assert (lse[0, :, 3] - math.log(150)).abs().max() < 1e-5
        mean = values_of(arguments[4], arguments[5], 150).mean(1)
        assert (out[0, 3].double() - mean).abs().max() <= mean.abs().max() * 2**-8
        assert not out[..., 0, 7].any()

    def test_large_scores_do_not_overflow(self):
        """Scores of thousands, falling and rising with the block: one key takes all the weight."""
        (q, k, v), arguments = attention_inputs(1, 20, 300, 1, 64)
        out, lse = attention_fp8(*arguments, 500.0)
        best = (arguments[0].double() * arguments[1][..., None])[0, :, 0] @ (
            arguments[2].double() * arguments[3][..., None]
        )[0, :, 0].T
        assert lse.isfinite().all()
        gap = best.topk(2).values * 500
        clear = gap[:, 0] - gap[:, 1] > 40
        want = values_of(arguments[4], arguments[5], 300)[0, :, 0][best.argmax(1)]
        assert clear.sum() > 10
        assert ((out[0, :, 0].double() - want).abs() <= 2**-8 * want.abs())[clear].all()

    def test_strides_do_not_matter(self):
        (q, k, v), arguments = attention_inputs(2, 20, 140, 2, 64)
        want = attention_fp8(*arguments)
        assert all(map(torch.equal, attention_fp8(*(strided(a) for a in arguments)), want))
        turned = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in arguments]
        assert all(map(torch.equal, attention_fp8(*turned), want))
        for other in (strided(v), v.transpose(1, 2).contiguous().transpose(1, 2), v.mT.contiguous().mT):
            v8, scale = quantize_values(other)
            assert torch.equal(v8.view(torch.uint8), arguments[4].view(torch.uint8))
            assert torch.equal(scale, arguments[5])

    def test_runs_are_bit_identical(self):
        _, arguments = attention_inputs(1, 130, 200, 2, 64)
        assert all(map(torch.equal, attention_fp8(*arguments), attention_fp8(*arguments)))

    @pytest.mark.parametrize("batch, queries", [(0, 5), (2, 0)])
    def test_empty_input(self, batch, queries):
        out, lse = attention_fp8(*attention_inputs(batch, queries, 7, 2, 64)[1])
        assert out.shape == (batch, queries, 2, 64) and lse.shape == (batch, 2, queries)

    @pytest.mark.parametrize("op", ["attention_fp8", "quantize_values"])
    def test_registration(self, op):
        (q, k, v), arguments = attention_inputs(1, 9, 20, 2, 64)
        inputs = (*arguments, 0.125) if op == "attention_fp8" else (v,)
        opcheck(getattr(torch.ops.prfl, op).default, inputs, test_utils=CHECKS)

    def test_no_graph_break(self):
        (q, k, v), _ = attention_inputs(1, 9, 20, 2, 64)

        def run(q, k, v):
            return attention_fp8(*quantized(q, k, v))

        got = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
        assert all(map(torch.equal, got, run(q, k, v)))


def test_attention_in_plain_torch():
    """What runs where Triton does not."""
    dispatch.configure("reference")
    assert_within_rounding(attention_inputs(2, 30, 200, 2, 64)[1])
    dispatch.configure("")


def test_no_gradient():
    (q, k, v), arguments = attention_inputs(1, 3, 4, 1, 64)
    with pytest.raises(ValueError, match="quantize_values: got an input that requires grad"):
        quantize_values(v.requires_grad_())
    with pytest.raises(ValueError, match="attention_fp8: got an input that requires grad"):
        attention_fp8(arguments[0], arguments[1].requires_grad_(), *arguments[2:])


@pytest.mark.parametrize(
    "index, replacement, named",
    [
        (0, torch.zeros(1, 9, 2, 64), "torch.float32"),
        (1, torch.ones(1, 9), "q_scale"),
        (2, torch.zeros(1, 20, 1, 64).to(E4M3), "k8"),
        (2, torch.zeros(1, 0, 2, 64).to(E4M3), "no keys"),
        (3, torch.ones(1, 2, 20), "k_scale"),
        (4, torch.zeros(1, 2, 64, 20).to(E4M3), "v8"),
        (5, torch.ones(1, 2), "v_scale"),
        (0, torch.zeros(1, 9, 2, 96).to(E4M3), "head dim 96"),
    ],
)
def test_attention_names_misfits(index, replacement, named):
    arguments = list(attention_inputs(1, 9, 20, 2, 64)[1])
    arguments[index] = replacement.to(DEVICE)
    with pytest.raises(ValueError, match=named):
        attention_fp8(*arguments)


@pytest.mark.parametrize("shape, named", [((1, 5, 2, 96), "head dim 96"), ((1, 0, 2, 64), "no keys")])
def test_values_name_misfits(shape, named):
    with pytest.raises(ValueError, match=named):
        quantize_values(torch.zeros(shape, device=DEVICE))
