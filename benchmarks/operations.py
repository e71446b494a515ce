"""The one list of operations: the benchmark, the kernel ledger, `prfl tune` and the self-test read it.

A line in OPERATIONS is all that a new operation needs. It makes inputs for a shape, calls the operation
through its public function, and gives a plain torch formula of the same: the peer in eager and under
torch.compile, and in float64 the truth. Where Triton has kernels for it, `launch` and `backward` call
their launchers, which the ledger and `prfl tune` do on meta tensors too.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from prfl_bench import formulas, shapes
from prfl_bench.formulas import quantized
from prfl_bench.shapes import Shape
from prfl_engine.model.reward import QueryPool
from prfl_kernels import bias_gelu
from prfl_kernels.attention import fp8 as attention_fp8
from prfl_kernels.attention import triton_kernels as attention_triton
from prfl_kernels.attention.op import attention
from prfl_kernels.fp8 import quantize as quantize_fp8
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.fp8.linear import fp8_linear, quantize_weight
from prfl_kernels.jit import wide
from prfl_kernels.norm import op as norm
from prfl_kernels.norm import triton_kernels as norm_triton
from prfl_kernels.norm.gated_add import (
    gated_add,
    gated_add_modulate,
    gated_add_modulate_fp8,
    gated_add_norm,
    gated_add_norm_fp8,
)
from prfl_kernels.qk_norm_rope import op as norm_rope
from prfl_kernels.qk_norm_rope import triton_kernels as norm_rope_triton
from prfl_kernels.reward_pool import op as reward_pool
from prfl_kernels.reward_pool import triton_kernels as pool_triton
from prfl_kernels.solver_step import solver_step
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights
from prfl_kernels.sublayers.self_attention import modulated_attention

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6
POOL_HEADS = 8  # of the official reward model, with one learned query


def as_is(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    return inputs


class Launch(NamedTuple):
    """A pass of an operation, forward or backward, by the launcher of its Triton kernels."""

    op: str
    kind: str  # bound by memory, or "attention": matrix products with tiles to check
    streams: tuple[torch.dtype, ...]  # dtypes of the residual stream to see; one where it does not matter
    inputs: Callable[[Shape], Sequence[Tensor | None]]
    run: Callable  # (shape, *inputs) -> outputs, None allowed

    def bind(self, s: Shape) -> Callable[[], list[Tensor | None]]:
        """A function that launches on inputs made now, the same in every call, and returns them and the
        outputs."""
        inputs = self.inputs(s)
        return lambda: [*inputs, *self.run(s, *inputs)]


class Operation(NamedTuple):
    """Every function takes the shape first, and then the tensors."""

    name: str
    op: str  # in prfl_kernels.dispatch, which chooses its back end
    inputs: Callable[[Shape], Sequence[Tensor]]
    call: Callable | None  # (shape, *inputs) -> outputs, by the public function; None: a part of another one
    plain: Callable | None  # (shape, *prepared inputs) -> outputs in plain torch
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
    # By the launchers of Triton kernels: (shape, *inputs) -> outputs, and for the backward its inputs first.
    launch: Callable | None = None
    backward: tuple[Callable, Callable] | None = None
    kind: str = "memory"
    streams: tuple[torch.dtype, ...] = (F32, BF16)

    def launches(self) -> Iterator[Launch]:
        if self.launch:
            yield Launch(self.name, self.kind, self.streams, self.inputs, self.launch)
        if self.backward:
            yield Launch(f"{self.name} backward", self.kind, self.streams, *self.backward)


def _norm(name: str, call: Callable, vector: Callable, base: float) -> Operation:
    def launch_backward(s, dn, x, scale, stats):
        return norm.backward(norm_triton.backward, dn, None, x, None, None, scale, stats, base, True, None)

    return Operation(
        name, name,
        lambda s: [s.residual_rows(), vector(s), vector(s)],
        lambda s, *inputs: call(*inputs, EPS, s.dtype),
        lambda s, *inputs: formulas.layer_norm(*inputs, base, EPS, s.dtype),
        wanted=(0, 1, 2),
        launch=lambda s, x, *ab: norm.forward(norm_triton.forward, x, None, None, *ab, base, EPS, s.dtype),
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
        launch=lambda s, x, *ab: norm.forward(norm_triton.forward, x, None, None, *ab, 1.0, EPS, E4M3),
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
        launch=lambda s, *inputs: norm.forward(norm_triton.forward, *inputs, base, EPS, s.dtype),
        backward=(
            backward_inputs,
            lambda s, *inputs: norm.backward(norm_triton.backward, *inputs, base, True, s.dtype),
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
        launch=lambda s, *inputs: norm.forward(norm_triton.forward, *inputs, base, EPS, E4M3),
    )  # fmt: skip


def _gated_add() -> Operation:
    def launch_backward(s, dsum, y, gate):
        return norm.backward(norm_triton.backward, None, dsum, None, y, gate, None, None, 0.0, False, s.dtype)

    return Operation(
        "gated_add", "gated_add",
        lambda s: [s.residual_rows(), s.rows(), s.modulation()],
        lambda s, *inputs: gated_add(*inputs),
        lambda s, *inputs: formulas.gated_add(*inputs),
        wanted=(0, 1, 2),
        reads=lambda inputs, outputs: inputs[1:],
        launch=lambda s, *inputs: norm.forward(norm_triton.forward, *inputs, None, None, 0.0, 0.0, None),
        backward=(lambda s: [s.residual_rows(), s.rows(), s.modulation()], launch_backward),
    )  # fmt: skip


def _rms_norm() -> Operation:
    def launch(s, x, weight):
        inputs = x, None, weight, None, None
        (out, _), _, rstd = norm_rope.forward(norm_rope_triton.forward, *inputs, 1, EPS, 0)
        return out, rstd

    def launch_backward(s, dn, x, weight, rstd):
        dx, _, dweight = norm_rope.backward(
            norm_rope_triton.backward, dn, None, x, None, weight, None, rstd, None, 1, 0, True
        )
        return dx, dweight[0]

    return Operation(
        "rms_norm", "rms_norm",
        lambda s: [s.rows(), s.vector()],
        lambda s, *inputs: norm_rope.rms_norm(*inputs, EPS),
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


def _with_rotation(s: Shape, *inputs: Tensor) -> Sequence[Tensor]:
    """... and the cosines and sines, which eager code keeps from call to call."""
    tables = formulas.rotation(s.head_dim, s.grid, s.offset, s.length, s.device, wide(s.dtype))
    return *inputs, *tables


def _qk_plain(s, q, k, weight_q, weight_k, *tables):
    pairs = (q, weight_q), (k, weight_k)
    return tuple(formulas.norm_rope(a, weight, s.model.heads, *tables, EPS) for a, weight in pairs)


def _qk_launch(s, *inputs, fp8: bool = False):
    made = norm_rope.forward(norm_rope_triton.forward, *inputs, s.grid, s.model.heads, EPS, s.offset, fp8)
    return *made[0], *made[1], made[2]


def _qk_norm_rope() -> Operation:
    def backward_inputs(s):
        gradients = [s.rows().unflatten(2, (s.model.heads, -1)) for _ in range(2)]
        return [*gradients, *_qk_inputs(s), s.statistics(2, s.batch, s.length)]

    return Operation(
        "qk_norm_rope", "qk_norm_rope", _qk_inputs,
        lambda s, *inputs: norm_rope.qk_norm_rope(*inputs, s.grid, s.model.heads, EPS, s.offset),
        _qk_plain,
        wanted=(0, 1, 2, 3),
        prepare=_with_rotation,
        launch=_qk_launch,
        backward=(
            backward_inputs,
            lambda s, *inputs: norm_rope.backward(
                norm_rope_triton.backward, *inputs, s.grid, s.model.heads, s.offset, True
            ),
        ),
        streams=(BF16,),
    )  # fmt: skip


def _qk_norm_rope_fp8() -> Operation:
    def plain(s, q, k, *rest):
        (q, scale_q), (k, scale_k) = map(quantized, _qk_plain(s, q.float(), k.float(), *rest))
        return q, k, scale_q, scale_k

    return Operation(
        "qk_norm_rope_fp8", "qk_norm_rope", _qk_inputs,
        lambda s, *inputs: norm_rope.qk_norm_rope_fp8(*inputs, s.grid, s.model.heads, EPS, s.offset),
        plain,
        prepare=_with_rotation,
        exact=_qk_plain,
        decode=lambda q, k, *scales: [
            a.double() * scale[..., None] for a, scale in zip((q, k), scales, strict=True)
        ],
        launch=partial(_qk_launch, fp8=True),
        streams=(BF16,),
    )  # fmt: skip


def _qkv(s: Shape, cross: bool) -> list[Tensor]:
    keys = s.text if cross else s.tokens
    return [s.per_head(), s.per_head(keys), s.per_head(keys)]


def _attention_flops(cross: bool, s: Shape) -> tuple[int, int]:
    product = 2 * s.batch * s.tokens * (s.text if cross else s.tokens) * s.heads * s.head_dim
    return 2 * product, 5 * product


def _attention(kind: str) -> Operation:
    cross = kind == "cross"

    def backward_inputs(s):
        lse = s.statistics(s.batch, s.heads, s.tokens)
        return [s.per_head(), None, *_qkv(s, cross), s.per_head(), lse]

    return Operation(
        f"attention, {kind}", "attention",
        lambda s: _qkv(s, cross),
        lambda s, *inputs: attention(*inputs),
        lambda s, *inputs: formulas.attention(*inputs),
        wanted=(0, 1, 2),
        flops=partial(_attention_flops, cross),
        divided="heads",
        reads=lambda inputs, outputs: [*inputs, *outputs],
        peers={"sdpa": lambda s, *inputs: formulas.sdpa(*inputs)},
        launch=lambda s, *inputs: attention_triton.forward(*inputs, s.head_dim**-0.5),
        backward=(backward_inputs, lambda s, *a: attention_triton.backward(*a, s.head_dim**-0.5)),
        kind="attention",
        streams=(BF16,),
    )  # fmt: skip


def _attention_fp8(kind: str) -> Operation:
    """Beside attention in dtype on the same values."""
    cross = kind == "cross"

    def inputs(s):
        q, k, v = _qkv(s, cross)
        return [*quantized(q), *quantized(k), *attention_fp8.quantize_values(v)]

    def values(s, q, q_scale, k, k_scale, v, v_scale):
        v = attention_fp8._natural(v.to(s.dtype))[..., : k.shape[1]] * v_scale[..., None]
        return [(a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in ((q, q_scale), (k, k_scale))] + [
            v.permute(0, 3, 1, 2).to(s.dtype).contiguous()
        ]

    def yardstick(s, *inputs):
        return attention_fp8.attention_fp8_reference(*inputs, s.head_dim**-0.5)[0].bfloat16()

    return Operation(
        f"attention_fp8, {kind}", "attention_fp8", inputs,
        lambda s, *inputs: attention_fp8.attention_fp8(*inputs)[0],
        lambda s, *inputs: formulas.attention(*inputs),
        flops=partial(_attention_flops, cross),
        rate="fp8",
        divided="heads",
        prepare=values,
        peers={"sdpa": lambda s, *inputs: formulas.sdpa(*inputs)},
        yardstick=yardstick,
        launch=lambda s, *inputs: attention_fp8.launch_forward(*inputs, s.head_dim**-0.5),
        kind="attention",
        streams=(BF16,),
    )  # fmt: skip


def _quantize_values() -> Operation:
    """A part of attention_fp8."""

    def inputs(s):
        v = s.projected()[2].unflatten(2, (s.model.heads, -1))
        return [v, s.statistics(s.batch, s.model.heads, s.head_dim)]

    def launch(s, v, inverse):
        return [attention_fp8.launch_quantize(v, inverse, attention_fp8.padded_length(s.length))]

    return Operation(
        "quantize_values", "attention_fp8", inputs, None, None, launch=launch, streams=(BF16,)
    )


def _reward_pool() -> Operation:
    def flops(s):
        product = 2 * s.batch * s.length * s.model.width * POOL_HEADS
        return 2 * product, 4 * product

    def inputs(s):
        return [s.residual_rows(), s.normal(POOL_HEADS, s.model.width) * s.model.width**-0.5]

    def backward_inputs(s):
        sums = [s.statistics(s.batch, POOL_HEADS) for _ in range(2)]
        scores = s.normal(s.batch, s.length, POOL_HEADS)
        return [s.normal(s.batch, POOL_HEADS, s.model.width), sums[0], *inputs(s), scores, sums[1]]

    return Operation(
        "reward_pool", "reward_pool", inputs,
        lambda s, *inputs: reward_pool.reward_pool(*inputs),
        lambda s, *inputs: formulas.reward_pool(*inputs),
        wanted=(0, 1),
        flops=flops,
        launch=lambda s, *inputs: reward_pool.forward(pool_triton.forward, *inputs),
        backward=(backward_inputs, lambda s, *a: reward_pool.backward(pool_triton.backward, *a, True, True)),
    )  # fmt: skip


@cache
def _pool(width: int) -> QueryPool:
    with torch.device("meta"):  # the parameters come as inputs
        return QueryPool(width, 1, POOL_HEADS)


def _query_pool() -> Operation:
    """The reward model's pooling as a module, its projections folded, beside what
    torch.nn.MultiheadAttention calls; weights frozen as in a PRFL step."""

    def inputs(s):
        sizes = [p.shape for p in _pool(s.model.width).parameters()]
        weights = [s.normal(*size, dtype=s.dtype) * s.model.width**-0.5 for size in sizes]
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

    return Operation("query_pool", "reward_pool", inputs, call, plain, wanted=(0,), flops=flops)


def _bias_gelu() -> Operation:
    return Operation(
        "bias_gelu", "bias_gelu",
        lambda s: [s.hidden(), s.normal(s.model.ffn)],
        lambda s, *inputs: bias_gelu.bias_gelu(*inputs),
        lambda s, *inputs: formulas.bias_gelu(*inputs),
        wanted=(0, 1),
        launch=lambda s, *inputs: [bias_gelu.forward(bias_gelu.triton_forward, *inputs)],
        backward=(
            lambda s: [s.hidden(), s.hidden(), s.normal(s.model.ffn)],
            lambda s, *inputs: bias_gelu.backward(bias_gelu.triton_backward, *inputs, True),
        ),
        streams=(BF16,),
    )  # fmt: skip


def _quantize_fp8(gelu: bool) -> Operation:
    """What comes out of attention, or out of the FFN's first product, as rows of e4m3."""

    def values(s, x):
        return F.gelu(x.to(wide(x.dtype)), approximate="tanh") if gelu else x

    return Operation(
        "quantize_fp8" + ", gelu" * gelu, "quantize_fp8",
        lambda s: [s.hidden() if gelu else s.rows()],
        lambda s, x: quantize_fp8.quantize_fp8(x, gelu),
        lambda s, x: quantized(values(s, x)),
        exact=values,
        decode=lambda out, scale: [out.double() * scale[..., None]],
        launch=lambda s, x: quantize_fp8.triton_forward(x, gelu),
        streams=(BF16,),
    )  # fmt: skip


def _fp8_linear() -> Operation:
    """The FFN's first projection, beside the linear layer in dtype on the same values."""

    def inputs(s):
        weight = s.normal(s.model.ffn, s.model.width) * s.model.width**-0.5
        return [*quantized(s.rows()), *quantize_weight(weight), s.normal(s.model.ffn)]

    def values(s, x, x_scale, w, w_scale, bias):
        pairs = (x, x_scale), (w, w_scale)
        return [*((a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in pairs), bias.to(s.dtype)]

    return Operation(
        "fp8_linear", "fp8_linear", inputs,
        lambda s, *inputs: fp8_linear(*inputs, s.dtype),
        lambda s, *inputs: F.linear(*inputs),
        flops=lambda s: (2 * s.batch * s.length * s.model.width * s.model.ffn, 0),
        rate="fp8",
        prepare=values,
    )  # fmt: skip


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
        rest = (AttentionWeights(*weights), s.grid, s.model.heads, EPS, s.offset)
        return modulated_attention(x, shift, scale, gate, *rest, dtype=s.dtype)[0]

    def plain(s, x, shift, scale, gate, *rest):
        w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm_q, norm_k, *tables = rest
        n = formulas.layer_norm(x, scale, shift, 1.0, EPS, s.dtype)
        q, k, v = (formulas.linear(n, *layer) for layer in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        q, k = _qk_plain(s, q, k, norm_q, norm_k, *tables)
        out = formulas.sdpa(q, k, v.unflatten(-1, (s.model.heads, -1)))
        return formulas.gated_add(x, formulas.linear(out.flatten(2), w_o, b_o), gate)

    def flops(s):
        work = 8 * s.length * s.model.width**2 * s.batch
        forward, backward = _attention_flops(False, s)
        return work + forward, 2 * work + backward

    return Operation(
        "modulated_attention", "attention", inputs, call, plain, tuple(range(14)), flops,
        divided=None, prepare=_with_rotation,
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
        lambda s, *a: modulated_ffn(*a[:5], FFNWeights(*a[5:]), EPS, s.dtype),
        plain, tuple(range(9)), flops,
    )  # fmt: skip


OPERATIONS = (
    _norm("modulate", norm.modulate, Shape.modulation, 1.0),
    _norm("layer_norm", norm.layer_norm, Shape.vector, 0.0),
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
    # On e4m3 values, gated by what they stand for.
    _modulate_fp8(),
    _gated_norm_fp8("gated_add_modulate", gated_add_modulate_fp8, Shape.modulation, 1.0),
    _gated_norm_fp8("gated_add_norm", gated_add_norm_fp8, Shape.vector, 0.0),
    _quantize_fp8(gelu=False),
    _quantize_fp8(gelu=True),
    _qk_norm_rope_fp8(),
    _fp8_linear(),
    _quantize_values(),
    _attention_fp8("self"),
    _attention_fp8("cross"),
)
LAUNCHES = tuple(launch for operation in OPERATIONS for launch in operation.launches())


def cases(quick: bool, launches: Sequence[Launch] = LAUNCHES) -> list[tuple[Launch, Shape]]:
    """Every launch at every shape of Wan2.1, on meta tensors; quick: at 32,760 tokens alone."""
    return [
        (launch, shapes.wan(model, tokens, stream))
        for tokens in shapes.DEFAULT[: 1 if quick else None]
        for model in shapes.MODELS
        for launch in launches
        for stream in launch.streams
    ]
