"""Blocks in e4m3: the arithmetic, how far it is from the ordinary one, and which weights it uses."""

import pytest
import torch
import torch.nn.functional as F
from fused import needs_triton
from helpers import relative, tiny_config, tiny_model

from prfl_engine.errors import UserError
from prfl_engine.model.layers import IMAGE_TOKENS
from prfl_engine.rollout import fp8 as fp8_blocks
from prfl_engine.rollout.fp8 import Fp8Blocks
from prfl_kernels import dispatch
from prfl_kernels.qk_norm_rope.rope import cos_sin, rotate

F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
GRID = (2, 3, 5)


def wide_config(model_type="t2v", **fields):
    """The smallest width that e4m3 attention takes: two heads of 64."""
    return tiny_config(model_type, **dict(dim=128, ffn_dim=192, num_heads=2) | fields)


def inputs(config, residual=F32, size=2):
    """(tokens, e, context) of a model's blocks."""
    tokens = torch.randn(size, 30, config.dim).to(residual)
    context = torch.randn(size, 6 + IMAGE_TOKENS * config.image, config.dim)
    return tokens, 0.3 * torch.randn(size, 6, config.dim), context


def run_all(fp8, tokens, e, context):
    """All blocks of the model in e4m3."""
    return fp8(fp8.model.blocks, tokens, e, context, fp8.model.repeats(context), GRID)


# The same arithmetic, from the formulas, in float64 between the roundings.


def rounded(x, dim=-1):
    """x rounded to e4m3 with one scale along `dim`, as float64."""
    scale = (x.double().abs().amax(dim, keepdim=True) / 448).float().double()
    return (x.double() / scale).float().to(E4M3).double() * scale


def linear(layer, x):
    y = rounded(x) @ rounded(layer.weight).T + layer.bias.bfloat16().double()
    return y.to(BF16)


def softmax_attention(q, k, v, e4m3=False):
    """[B, L, H, D] in float64; e4m3: weights, 256 for the largest, are rounded to it (keys are one block)."""
    q, k, v = (a.double().transpose(1, 2) for a in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    p = (s - s.amax(-1, keepdim=True)).exp()
    weights = (256 * p).float().to(E4M3).double() / 256 if e4m3 else p
    return (weights @ v / p.sum(-1, keepdim=True)).transpose(1, 2)


def rms(x, weight):
    return x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight


def norm(x, scale, shift):
    return F.layer_norm(x.double(), x.shape[-1:], eps=1e-6) * scale + shift


def emulated(block, x, e, context):
    attn, cross, (first, _, second) = block.self_attn, block.cross_attn, block.ffn
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + e)[:, :, None].unbind(1)
    heads = attn.num_heads

    def split(a):
        return a.unflatten(2, (heads, -1))

    n = norm(x, 1 + scale1, shift1)
    q, k = (split(rms(linear(a, n), w.weight)) for a, w in ((attn.q, attn.norm_q), (attn.k, attn.norm_k)))
    cos, sin = (a[:, None] for a in cos_sin(x.shape[2] // heads, GRID, True, x.device, torch.float64))
    q, k = rounded(rotate(q, cos, sin)), rounded(rotate(k, cos, sin))
    v = rounded(split(linear(attn.v, n)), dim=1)
    a = softmax_attention(q, k, v, e4m3=True).to(BF16).flatten(2)
    x = (x.double() + gate1 * linear(attn.o, a)).to(x.dtype)

    # Ordinary attention to the text, in bfloat16.
    a = cross.attend(linear(cross.q, norm(x, block.norm3.weight, block.norm3.bias)), context, 1)
    s = (x.double() + linear(cross.o, a)).to(x.dtype)

    h = linear(first, norm(s, 1 + scale2, shift2))
    y = linear(second, F.gelu(h.double(), approximate="tanh"))
    return (s.double() + gate2 * y).to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
@pytest.mark.parametrize("residual", [F32, BF16])
def test_the_arithmetic(model_type, residual):
    """What differs is the order of sums in float32 and values that fall to the other side of a rounding for
    it, to bfloat16 (2^-8) and to e4m3 (2^-3 of one in some hundred)."""
    config = wide_config(model_type, num_layers=1)
    model = tiny_model(config)
    blocks, (tokens, e, context) = Fp8Blocks(model), inputs(config, residual)
    blocks.follow()
    got = run_all(blocks, tokens, e, context)
    assert got.dtype == residual
    want = emulated(model.blocks[0], tokens, e, context)
    off = relative(got.double() - tokens.double(), want.double() - tokens.double())
    plain = model.blocks[0](tokens, e, context, 1, GRID)[0]
    moved = relative(want.double() - tokens.double(), plain.double() - tokens.double())
    # Measured a fifth. One of the six products without its rounding would be 1 / sqrt(6) = 0.41 off.
    assert off < moved / 3, (off, moved)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_how_far_it_is_from_the_ordinary_block(model_type):
    """Two roundings of 2.6 % root mean square a product, several products deep: some percent of a branch."""
    config = wide_config(model_type, num_layers=3)
    model = tiny_model(config).set_precision(BF16)
    blocks, (tokens, e, context) = Fp8Blocks(model), inputs(config)
    blocks.follow()
    want = tokens
    for block in model.blocks:
        want = block(want, e, context, 1, GRID)
    got = run_all(blocks, tokens, e, context)
    assert 0.005 < relative(got - tokens, want - tokens) < 0.08


@needs_triton
@pytest.mark.usefixtures("triton")
@torch.no_grad()
def test_on_the_triton_kernels():
    config = wide_config(num_layers=1)
    model, (tokens, e, context) = tiny_model(config), inputs(config, size=1)
    blocks = Fp8Blocks(model)
    dispatch.configure("triton,attention=reference")
    blocks.follow()
    got = run_all(blocks, tokens, e, context)
    dispatch.configure("reference")
    want = run_all(blocks, tokens, e, context)
    assert relative(got - tokens, want - tokens) < 0.01


# The weights.


def outcome(blocks, held):
    return run_all(blocks, *held)


def step(model, how):
    """Move every weight, in one of the ways in which training does."""
    if how == "fused AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in model.parameters():
        if how == "in place":
            with torch.no_grad():
                p.add_(0.05)
        elif how == "data":
            p.data.add_(0.05)
        elif how == "replaced":
            p.data = p.data + 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    "how, version",
    [("fused AdamW", 1), ("fused AdamW", None), ("data", 1), ("in place", 0), ("replaced", 0)],
)
def test_moved_weights_are_quantised_again(how, version):
    """In place and by replacement even where the version was left as it was. Buffers stay where they are."""
    config = wide_config(num_layers=2)
    model, held = tiny_model(config), inputs(config)
    blocks = Fp8Blocks(model)
    blocks.follow(None if version is None else 0)
    before = outcome(blocks, held)
    places = [p.weight.data_ptr() for block in blocks.blocks for p in block.products]
    step(model, how)
    blocks.follow(version)
    got = outcome(blocks, held)
    fresh = Fp8Blocks(model)
    fresh.follow()
    assert torch.equal(got, outcome(fresh, held)) and not torch.equal(got, before)
    assert places == [p.weight.data_ptr() for block in blocks.blocks for p in block.products]


def test_weights_are_quantised_once_a_version(monkeypatch):
    asked = []
    monkeypatch.setattr(fp8_blocks, "weight_of", lambda a: asked.append(a) or a.weight.float())
    blocks = Fp8Blocks(tiny_model(wide_config(num_layers=2)))
    for version, want in ((0, 16), (0, 16), (1, 32), (1, 32), (None, 48), (None, 64)):
        blocks.follow(version)
        assert len(asked) == want  # eight a block: k and v of the text stay ordinary


def test_bytes():
    blocks = Fp8Blocks(tiny_model(wide_config(num_layers=2)))
    blocks.follow()
    values, channels = 6 * 128 * 128 + 2 * 128 * 192, 7 * 128 + 192
    assert blocks.nbytes() == 2 * (values + channels * (4 + 2))


@torch.no_grad()
def test_an_effective_weight_is_quantised_as_a_whole(monkeypatch):
    """As for a low-rank update: W + B A quantised once is not W quantised with an update beside it."""
    config = wide_config(num_layers=1)
    model, held = tiny_model(config), inputs(config)
    update = 0.05 * torch.randn(2, 128)
    q = model.blocks[0].self_attn.q
    plain = fp8_blocks.weight_of
    monkeypatch.setattr(
        fp8_blocks, "weight_of", lambda a: plain(a) + update.T @ update if a is q else plain(a)
    )
    blocks = Fp8Blocks(model)
    blocks.follow()
    got = outcome(blocks, held)
    monkeypatch.undo()
    q.weight.add_(update.T @ update)
    merged = Fp8Blocks(model)
    merged.follow()
    assert torch.equal(got, outcome(merged, held))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"dim": 32}, "rollout.precision: got fp8 with heads of 16, want heads of 64 or 128"),
        ({"ffn_dim": 200}, "rollout.precision: got fp8 with widths 128 and 200, want multiples of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        Fp8Blocks(tiny_model(wide_config(**fields)))
