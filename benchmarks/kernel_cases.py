"""What bench_kernels measures: a line of ENTRIES an operation.

An entry makes inputs for a shape, calls the operation through its public function, and gives a plain
torch formula of the same: the peer in eager and under torch.compile, and in float64 the truth.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from prfl_bench.shapes import Shape
from prfl_engine.model.reward import QueryPool
from prfl_kernels.attention.op import attention
from prfl_kernels.bias_gelu import bias_gelu
from prfl_kernels.jit import wide
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, rms_norm
from prfl_kernels.qk_norm_rope.rope import rope_angles
from prfl_kernels.reward_pool.op import reward_pool
from prfl_kernels.solver_step import solver_step
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights
from prfl_kernels.sublayers.self_attention import modulated_attention

EPS = 1e-6
POOL_HEADS = 8  # of the official reward model, with one learned query


def as_is(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    return inputs


class Entry(NamedTuple):
    """An operation. Every function takes the shape first, and then the tensors."""

    name: str
    op: str  # in prfl_kernels.dispatch, which chooses its back end
    inputs: Callable[[Shape], list[Tensor]]
    call: Callable  # (shape, *inputs) -> outputs, by the public function
    plain: Callable  # (shape, *prepared inputs) -> outputs in plain torch
    wanted: tuple[int, ...] = ()  # inputs to differentiate; none: forward only
    flops: Callable[[Shape], tuple[int, int]] = lambda s: (0, 0)  # of the products, forward and backward
    rate: str = "product"  # which of timing.limits they run at, or "fp8"
    divided: str | None = "tokens"  # what a rank has a share of, or "heads"; None: one rank alone
    reads: Callable = lambda inputs, outputs: inputs  # what the backward has to read
    prepare: Callable = as_is  # from the operation's inputs to those of the peers, untimed
    peers: dict[str, Callable] = {}  # more of them than plain, (shape, *prepared inputs) -> outputs
    # The gate compares with `exact` in float64, and its error with that of `yardstick`. Both are
    # plain by default; they differ where the operation quantises, with decode(*outputs) -> values.
    exact: Callable | None = None
    yardstick: Callable | None = None  # takes the operation's inputs
    decode: Callable = lambda *outputs: outputs


def normed(x: Tensor, scale: Tensor, shift: Tensor, base: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm and its affine part in float32, rounded once."""
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    return (F.layer_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=EPS) * (base + scale) + shift).to(dtype)


def added(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (x.to(wide(x.dtype)) + y * gate[:, None]).to(x.dtype)


def _norm(name: str, call: Callable, vector: Callable, base: float) -> Entry:
    return Entry(
        name, name,
        lambda s: [s.residual_rows(), vector(s), vector(s)],
        lambda s, *inputs: call(*inputs, EPS, s.dtype),
        lambda s, *inputs: normed(*inputs, base, s.dtype),
        wanted=(0, 1, 2),
    )  # fmt: skip


def _gated_norm(name: str, call: Callable, vector: Callable, base: float) -> Entry:
    def plain(s, x, y, gate, scale, shift):
        x = added(x, y, gate)
        return x, normed(x, scale, shift, base, s.dtype)

    return Entry(
        name, name,
        lambda s: [s.residual_rows(), s.rows(), s.modulation(), vector(s), vector(s)],
        lambda s, *inputs: call(*inputs, EPS, s.dtype),
        plain,
        wanted=(0, 1, 2, 3, 4),
    )  # fmt: skip


def _gated_add() -> Entry:
    return Entry(
        "gated_add", "gated_add",
        lambda s: [s.residual_rows(), s.rows(), s.modulation()],
        lambda s, *inputs: gated_add(*inputs),
        lambda s, *inputs: added(*inputs),
        wanted=(0, 1, 2),
        reads=lambda inputs, outputs: inputs[1:],
    )  # fmt: skip


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float32."""
    return F.rms_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=EPS) * weight


def _rms_norm() -> Entry:
    return Entry(
        "rms_norm", "rms_norm",
        lambda s: [s.rows(), s.vector()],
        lambda s, *inputs: rms_norm(*inputs, EPS),
        lambda s, *inputs: _rms(*inputs).to(s.dtype),
        wanted=(0, 1),
    )  # fmt: skip


def qk_inputs(s: Shape) -> list[Tensor]:
    q, k, _ = s.normal(s.batch, s.length, 3 * s.model.width, dtype=s.dtype).chunk(3, dim=-1)
    return [q, k, s.vector(), s.vector()]


def with_angles(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    """... and the cosines and sines [L, 1, D/2], which eager code keeps from call to call."""
    angles = rope_angles(s.head_dim, s.grid)[s.offset :, None]
    return *inputs, *(a.to(s.device, wide(s.dtype)) for a in (angles.cos(), angles.sin()))


def qk_plain(s, q, k, weight_q, weight_k, cos, sin):
    made = []
    for x, weight in ((q, weight_q), (k, weight_k)):
        even, odd = _rms(x, weight).unflatten(-1, (s.model.heads, -1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        made.append(turned.flatten(-2).to(x.dtype))
    return tuple(made)


def _qk_norm_rope() -> Entry:
    return Entry(
        "qk_norm_rope", "qk_norm_rope", qk_inputs,
        lambda s, *inputs: qk_norm_rope(*inputs, s.grid, s.model.heads, EPS, s.offset),
        qk_plain,
        wanted=(0, 1, 2, 3),
        prepare=with_angles,
    )  # fmt: skip


def qkv(s: Shape, cross: bool) -> list[Tensor]:
    keys = s.text if cross else s.tokens
    return [s.normal(s.batch, n, s.heads, s.head_dim, dtype=s.dtype) for n in (s.tokens, keys, keys)]


def attention_plain(s, q, k, v):
    """Two batched products and a softmax in float32 between them."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    p = ((q @ k.mT).to(wide(q.dtype)) * s.head_dim**-0.5).softmax(-1)
    return (p.to(v.dtype) @ v).transpose(1, 2)


def sdpa(s, q, k, v):
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_flops(cross: bool, s: Shape) -> tuple[int, int]:
    product = 2 * s.batch * s.tokens * (s.text if cross else s.tokens) * s.heads * s.head_dim
    return 2 * product, 5 * product


def _attention(kind: str) -> Entry:
    cross = kind == "cross"
    return Entry(
        f"attention, {kind}", "attention",
        lambda s: qkv(s, cross),
        lambda s, *inputs: attention(*inputs),
        attention_plain,
        wanted=(0, 1, 2),
        flops=partial(attention_flops, cross),
        divided="heads",
        reads=lambda inputs, outputs: [*inputs, *outputs],
        peers={"sdpa": sdpa},
    )  # fmt: skip


def _reward_pool() -> Entry:
    def plain(s, x, u):
        x = x.to(wide(x.dtype))
        return (x @ u.T).softmax(1).transpose(1, 2) @ x

    def flops(s):
        product = 2 * s.batch * s.length * s.model.width * POOL_HEADS
        return 2 * product, 4 * product

    return Entry(
        "reward_pool", "reward_pool",
        lambda s: [s.residual_rows(), s.normal(POOL_HEADS, s.model.width) * s.model.width**-0.5],
        lambda s, *inputs: reward_pool(*inputs),
        plain,
        wanted=(0, 1),
        flops=flops,
    )  # fmt: skip


@cache
def _pool(width: int) -> QueryPool:
    with torch.device("meta"):  # the parameters come as inputs
        return QueryPool(width, 1, POOL_HEADS)


def _query_pool() -> Entry:
    """The reward model's pooling as a module, its projections folded, beside what
    torch.nn.MultiheadAttention calls; weights frozen as in a PRFL step."""

    def inputs(s):
        shapes = [p.shape for p in _pool(s.model.width).parameters()]
        weights = [s.normal(*shape, dtype=s.dtype) * s.model.width**-0.5 for shape in shapes]
        return [s.residual_rows(), *weights]

    def call(s, x, *weights):
        pool = _pool(s.model.width)
        names = [name for name, _ in pool.named_parameters()]
        return functional_call(pool, dict(zip(names, weights, strict=True)), (x,))

    def plain(s, x, queries, w_in, b_in, w_out, b_out):
        x = x.to(s.dtype).transpose(0, 1)  # [L, B, C]
        asked = queries[:, None].expand(-1, x.shape[1], -1)
        pooled, _ = F.multi_head_attention_forward(
            asked, x, x, s.model.width, POOL_HEADS, w_in, b_in, None, None, False, 0.0, w_out, b_out,
            need_weights=False,
        )  # fmt: skip
        return pooled.mean(0) + queries.mean(0)

    def flops(s):  # of the pooling; the rest does not grow with the tokens
        product = 2 * s.batch * s.length * s.model.width * POOL_HEADS
        return 2 * product, 3 * product

    return Entry("query_pool", "reward_pool", inputs, call, plain, wanted=(0,), flops=flops)


def _bias_gelu() -> Entry:
    return Entry(
        "bias_gelu", "bias_gelu",
        lambda s: [s.normal(s.batch, s.length, s.model.ffn, dtype=s.dtype), s.normal(s.model.ffn)],
        lambda s, *inputs: bias_gelu(*inputs),
        lambda s, h, bias: F.gelu(h.to(wide(h.dtype)) + bias, approximate="tanh").to(h.dtype),
        wanted=(0, 1),
    )  # fmt: skip


def _solver_step() -> Entry:
    """The latent, 16 channels of 4 values a token, in float32; a velocity in dtype."""

    def inputs(s):
        state, columns = wide(s.residual), s.normal(s.batch, 9, dtype=wide(s.residual))
        x, *rest = (s.normal(s.batch, 64, s.tokens, dtype=state) for _ in range(4))
        return [x, *rest, s.normal(s.batch, 64, s.tokens, dtype=s.dtype), columns]

    def plain(s, x, x_last, m0, m1, velocity, columns):
        sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0 = columns.T[..., None, None]
        m_t = x - sigma * velocity
        x_c = a_x * x + a_l * x_last + a_0 * m0 + a_1 * m1 + a_t * m_t
        return b_x * x_c + b_t * m_t + b_0 * m0, x_c, m_t

    return Entry(
        "solver_step", "solver_step", inputs, lambda s, *inputs: solver_step(*inputs), plain,
        wanted=(0, 1, 2, 3, 4), divided=None, reads=lambda inputs, outputs: inputs[5:],
    )  # fmt: skip


def _weight(s: Shape, rows: int, columns: int) -> list[Tensor]:
    """A linear layer's weight and bias."""
    return [s.normal(rows, columns) * columns**-0.5, s.normal(rows)]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _modulated_attention() -> Entry:
    """Everything kept, whichever attention is asked for."""

    def inputs(s):
        width = s.model.width
        weights = [a for _ in range(4) for a in _weight(s, width, width)]
        return [s.residual_rows(), *(s.modulation() for _ in range(3)), *weights, s.vector(), s.vector()]

    def call(s, x, shift, scale, gate, *weights):
        rest = (AttentionWeights(*weights), s.grid, s.model.heads, EPS, s.offset)
        return modulated_attention(x, shift, scale, gate, *rest, dtype=s.dtype)[0]

    def plain(s, x, shift, scale, gate, *rest):
        w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm_q, norm_k, *angles = rest
        n = normed(x, scale, shift, 1.0, s.dtype)
        q, k = qk_plain(s, _linear(n, w_q, b_q), _linear(n, w_k, b_k), norm_q, norm_k, *angles)
        out = sdpa(s, q, k, _linear(n, w_v, b_v).unflatten(-1, (s.model.heads, -1)))
        return added(x, _linear(out.flatten(2), w_o, b_o), gate)

    def flops(s):
        work = 8 * s.length * s.model.width**2 * s.batch
        forward, backward = attention_flops(False, s)
        return work + forward, 2 * work + backward

    return Entry(
        "modulated_attention", "attention", inputs, call, plain, tuple(range(14)), flops,
        divided=None, prepare=with_angles,
    )  # fmt: skip


def _modulated_ffn() -> Entry:
    """Everything kept, whichever bias_gelu is asked for."""

    def inputs(s):
        width, _, ffn = s.model
        weights = [*_weight(s, ffn, width), *_weight(s, width, ffn)]
        return [s.residual_rows(), s.rows(), *(s.modulation() for _ in range(3)), *weights]

    def plain(s, x, y, shift, scale, gate, w1, b1, w2, b2):
        x = (x.to(wide(x.dtype)) + y).to(x.dtype)
        h = _linear(normed(x, scale, shift, 1.0, s.dtype), w1, b1)
        return added(x, _linear(F.gelu(h, approximate="tanh"), w2, b2), gate)

    def flops(s):
        work = 4 * s.batch * s.length * s.model.width * s.model.ffn
        return work, 2 * work

    return Entry(
        "modulated_ffn", "bias_gelu", inputs,
        lambda s, *a: modulated_ffn(*a[:5], FFNWeights(*a[5:]), EPS, s.dtype),
        plain, tuple(range(9)), flops,
    )  # fmt: skip


ENTRIES = (
    _norm("modulate", modulate, Shape.modulation, 1.0),
    _norm("layer_norm", layer_norm, Shape.vector, 0.0),
    _gated_add(),
    _gated_norm("gated_add_modulate", gated_add_modulate, Shape.modulation, 1.0),
    _gated_norm("gated_add_norm", gated_add_norm, Shape.vector, 0.0),
    _rms_norm(),
    _qk_norm_rope(),
    _attention("self"),
    _attention("cross"),
    _reward_pool(),
    _query_pool(),
    _bias_gelu(),
    _solver_step(),
    _modulated_attention(),
    _modulated_ffn(),
)
