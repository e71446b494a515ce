"""What the sublayers share: linear layers and their gradients, with a low-rank update or without, the
gradient of a gate without the sublayer's output, and the choice of what a sublayer saves.

A sublayer ends with x' = x + gate * (a W^T + b), gate [B, N] per sample. From the gradient d of x' and
the un-gated weight gradient G_b = d_b^T a_b of every sample b, in float32,

    da = d (gate * W),   dW = sum_b gate_b * G_b,   db = sum_b gate_b * sum_l d
    d gate_b = rowsum(W * G_b) + b * sum_l d        (gate * scales rows)

so that neither a W^T nor gate * d is needed, and d gate costs a pass over W instead of a product over
all tokens. Exact: d gate_n = sum_l d_ln (sum_k W_nk a_lk + b_n).

That takes a matrix [N, K] of every sample, which short samples do not fill: theirs of at most SHORT tokens
go by token instead (GatedTokens),

    da = (gate * d) W,   dW = (gate * d)^T a,   db = sum gate * d,   d gate_b = sum_l d * (a W^T + b)

Measured on an AMD EPYC of Zen 5, one thread, N x K = 512 x 512, 1,024 tokens in samples of

    tokens               8   16   32   64  128  256
    float32, by sample  201  104   57   32   13   11 ms     by token 15 to 16 ms
    bfloat16, by sample 250  127   51   12  4.4  3.3 ms     by token 4.0 to 4.2 ms

A low-rank update (LoRA, Hu et al. 2021) adds s x A^T B^T to x W^T, A [r, K] and B [N, r]. With u = x A^T,

    dB = s d^T u,   dA = s (d B)^T x,   dx += s (d B) A

u costs L r K and is recomputed in backward, so that a trained update saves x, as a trained W does, and
nothing else; W frozen, its own gradient costs nothing. Under a gate B is gate * B, and with P_b = d_b^T u_b

    dB = s sum_b gate_b * P_b,   d gate_b += s rowsum(B * P_b)

The update is never added to W for a forward in 16 bits: most of it would vanish in the rounding of W,
8 bits from the leading one, where the update of a weight is smaller than that for all of training.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import matmul
from prfl_kernels.jit import wide
from prfl_kernels.matmul import add_product, product
from prfl_kernels.sublayers.chunks import within


class AttentionWeights(NamedTuple):
    """Weights [C, C] and biases [C] of the projections of an attention, norm weights [C]; of any float
    dtype."""

    q: Tensor
    q_bias: Tensor
    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    o: Tensor
    o_bias: Tensor
    norm_q: Tensor
    norm_k: Tensor


SHORT = 64
"""Most tokens of a sample whose gate goes by token (GatedTokens): it is faster up to there, on the CPU."""


class LowRank(NamedTuple):
    """A low-rank update of a weight [N, K], scale * up @ down; of any float dtype."""

    down: Tensor  # A [r, K]
    up: Tensor  # B [N, r]
    scale: float

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A, scale B) in dtype."""
        up = self.up if self.scale == 1 else self.scale * self.up.to(wide(dtype))
        return self.down.to(dtype), up.to(dtype)

    def plus(self, other: "LowRank") -> "LowRank":
        """One update that is the sum of both, of the sum of their ranks."""
        ups = [a.up if a.scale == 1 else a.scale * a.up.to(wide(a.up.dtype)) for a in (self, other)]
        return LowRank(torch.cat([self.down, other.down]), torch.cat(ups, 1), 1.0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank | None = None) -> Tensor:
    """x W^T + b, and the low-rank update, in x.dtype; x [..., K], weight [N, K] and bias [N] of any dtype.

    For use inside an operation; prfl_kernels.linear is this as one.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if low is None:
        return matmul.linear(x, weight, bias)
    down, up = low.factors(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = add_product(matmul.linear(rows, weight, bias), rows @ down.mT, up.mT)
    return y.view(*x.shape[:-1], len(weight))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider, for [M, K] [K, N] or [B, M, K] [B, K, N].

    On CUDA the float32 sum of a product of 16-bit numbers is returned as it is; elsewhere torch has no
    such product and it is rounded to 16 bits on the way.
    """
    if a.is_cuda and a.element_size() == 2:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return product(a, b).to(wide(a.dtype))


class Sums(dict[str, Tensor]):
    """Sums over pieces of the tokens by name, in float32 or wider."""

    def add(self, name: str, part: Tensor) -> None:
        """Add `part`; the first is taken as it is, and written to by the next."""
        if name in self:
            self[name] += part
        else:
            self[name] = part

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add wide_product(a, b)."""
        if name in self and a.dtype == self[name].dtype:
            add_product(self[name], a, b)
        else:
            self.add(name, wide_product(a, b))


class Product:
    """The gradients of `linear`, piece by piece: those asked for of (W and b) and of (A and B)."""

    def __init__(self, low: LowRank | None, wants: bool, wants_low: bool):
        self.low, self.wants, self.wants_low, self.sums = low, wants, wants_low, Sums()

    @property
    def trained(self) -> bool:
        """Whether a gradient of a parameter is asked for, which takes x."""
        return self.wants or self.wants_low

    def backward(
        self,
        d: Tensor,
        x: Tensor | None,
        weight: Tensor,
        dx: Tensor | None = None,
        bias: bool = True,
        wants_x: bool = True,
    ) -> Tensor | None:
        """Adds the gradient of x to dx [M, K], which is made if it is None, and those of the parameters to
        the sums. d [..., N]; x [..., K], not needed where nothing is trained; bias False leaves out db, and
        wants_x False dx. A weight of every group [G, N, K] takes d [G, M, N] and x [G, M, K]."""
        if weight.dim() == 2:
            d, x = d.reshape(-1, d.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
        if self.wants:
            self.sums.add_product("weight", d.mT, x)
            if bias:
                self.sums.add("bias", d.sum(0, dtype=wide(d.dtype)))
        if wants_x:
            matrix = weight.to(d.dtype)
            dx = product(d, matrix) if dx is None else add_product(dx, d, matrix)
        if self.low is not None:
            down, up = self.low.factors(d.dtype)
            du = d @ up
            if self.wants_low:
                self.sums.add_product("up", d.mT, x @ down.mT)
                self.sums.add_product("down", du.mT, x)
            if wants_x:
                add_product(dx, du, down)
        return dx

    def gradients(self, name: str) -> dict[str, Tensor]:
        """What was asked for, under NAME, NAME_bias, NAME_down and NAME_up; float32 or wider."""
        found = {name if k == "weight" else f"{name}_{k}": a for k, a in self.sums.items()}
        if self.wants_low:
            found[f"{name}_up"] *= self.low.scale
        return found


class GatedProduct:
    """The gradients of gate * linear(a, ...), piece by piece: d [B, L, N], gate [B, N] and a [B, L, K].

    Of two gates [B, 2, N] see GatedProducts.
    """

    def __init__(
        self, gate: Tensor, weight: Tensor, bias: Tensor, low: LowRank | None, dtype: torch.dtype,
        wants: bool, wants_gate: bool, wants_low: bool,
    ):  # fmt: skip
        """wants: dW and db; dtype is that of d. d gate is made of the weight gradient of every sample."""
        self.gate, self.weight, self.bias, self.low = gate, weight, bias, low
        self.wants, self.wants_gate, self.wants_low = wants, wants_gate, wants_low
        self.wants_up = low is not None and (wants_low or wants_gate)
        self.sums, rows = Sums(), gate.to(wide(dtype))[..., None]
        self._weight = (rows * weight).to(dtype)  # [B, N, K]
        if low is not None:
            self._down, self._up = low.down.to(dtype), (rows * (low.scale * low.up)).to(dtype)

    def input_gradient(self, d: Tensor) -> Tensor:
        """da [B, L, K] in d.dtype."""
        da = product(d, self._weight)
        if self.low is not None:
            da.view(-1, da.shape[2]).addmm_(product(d, self._up).flatten(0, 1), self._down)
        return da

    def add(self, d: Tensor, a: Tensor) -> None:
        """Add what a piece gives to the gradients of gate and parameters."""
        if self.wants or self.wants_gate:
            self.sums.add_product("weight", d.mT, a)
            self.sums.add("total", d.sum(1, dtype=wide(d.dtype)))
        if self.wants_up:
            self.sums.add_product("up", d.mT, a @ self._down.mT)
        if self.wants_low:
            self.sums.add_product("down", product(d, self._up).flatten(0, 1).mT, a.flatten(0, 1))

    def gradients(self, name: str) -> dict[str, Tensor]:
        """What was asked for, under NAME, NAME_bias, gate, NAME_down and NAME_up; ends the sums."""
        found, sums, low = {}, self.sums, self.low
        if self.wants_gate:
            found["gate"] = (sums["weight"] * self.weight).sum(2) + self.bias * sums["total"]
            if low is not None:
                found["gate"] += low.scale * (sums["up"] * low.up).sum(2)
        if self.wants:
            product, total = sums.pop("weight"), sums["total"]
            gate = self.gate.to(total.dtype)
            product *= gate[..., None]
            found[name] = product[0] if len(product) == 1 else product.sum(0)
            found[f"{name}_bias"] = (gate * total).sum(0)
        if self.wants_low:
            up = sums["up"]
            found[f"{name}_up"] = low.scale * (self.gate.to(up.dtype)[..., None] * up).sum(0)
            found[f"{name}_down"] = sums["down"]
        return found


class GatedTokens:
    """What GatedProducts gives, from gate * d and a W^T of every token: for short samples, where d_b^T a_b of
    every sample costs more than these. One product serves both gates."""

    def __init__(
        self, gate: Tensor, boundary: int, weight: Tensor, bias: Tensor, low: LowRank | None,
        dtype: torch.dtype, wants: bool, wants_gate: bool, wants_low: bool,
    ):  # fmt: skip
        """As GatedProducts and GatedProduct."""
        self.gates = _gates(gate.to(wide(dtype)))
        self.boundary, self.weight, self.bias, self.wants_gate = boundary, weight, bias, wants_gate
        self.product, self.inputs = Product(low, wants, wants_low), Product(low, False, False)
        self.gate_sums: Tensor | None = None  # [B, N] or [B, 2, N]

    def input_gradient(self, d: Tensor, at: slice) -> Tensor:
        """da [B, L, K] in d.dtype, of the tokens `at`."""
        da = self.inputs.backward(self._gated(d, at), None, self.weight)
        return da.view(*d.shape[:2], self.weight.shape[1])

    def add(self, d: Tensor, a: Tensor, at: slice) -> None:
        """Add what the tokens `at` give to the gradients of gate and parameters."""
        if self.product.trained:
            self.product.backward(self._gated(d, at), a, self.weight, wants_x=False)
        if self.wants_gate:
            y = linear(a, self.weight, self.bias, self.product.low).to(wide(d.dtype)).mul_(d)
            sums = [y[:, part].sum(1) for part in self._parts(at)]
            part = sums[0] if len(sums) == 1 else torch.stack(sums, 1)
            self.gate_sums = part if self.gate_sums is None else self.gate_sums.add_(part)

    def _parts(self, at: slice) -> list[slice]:
        """Of a piece, the tokens `at`, those of every gate."""
        n = within(self.boundary, at)
        return [slice(None)] if len(self.gates) == 1 else [slice(n), slice(n, None)]

    def _gated(self, d: Tensor, at: slice) -> Tensor:
        """gate * d, rounded once: a rounded gate errs alike in all tokens, so sums would not average it."""
        made = torch.empty(d.shape, dtype=d.dtype, device=d.device)
        for gate, part in zip(self.gates, self._parts(at), strict=True):
            torch.mul(gate[:, None], d[:, part], out=made[:, part])
        return made

    def gradients(self, name: str) -> dict[str, Tensor]:
        """As those of GatedProduct."""
        gate = {} if self.gate_sums is None else {"gate": self.gate_sums}
        return self.product.gradients(name) | gate


class GatedProducts:
    """GatedProduct with a gate [B, N], or with two [B, 2, N]: tokens before `boundary` take the first, the
    others the second. A piece says which tokens it has."""

    def __init__(self, gate: Tensor, boundary: int, *rest):
        """rest: as GatedProduct takes it."""
        self.boundary, self.sides = boundary, [GatedProduct(a, *rest) for a in _gates(gate)]

    def input_gradient(self, d: Tensor, at: slice) -> Tensor:
        """da [B, L, K] in d.dtype, of the tokens `at`."""
        made = [side.input_gradient(part) for side, part in self._parts(d, at)]
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def add(self, d: Tensor, a: Tensor, at: slice) -> None:
        """Add what the tokens `at` give to the gradients of gate and parameters."""
        for (side, d_part), (_, a_part) in zip(self._parts(d, at), self._parts(a, at), strict=True):
            side.add(d_part, a_part)

    def _parts(self, a: Tensor, at: slice) -> list[tuple[GatedProduct, Tensor]]:
        """The tokens `at` of a by their gate; gates without any are left out."""
        if len(self.sides) == 1:
            return [(self.sides[0], a)]
        first, second = self.sides
        n = within(self.boundary, at)
        return [(first, a[:, :n])] * (n > 0) + [(second, a[:, n:])] * (n < a.shape[1] or not n)

    def gradients(self, name: str) -> dict[str, Tensor]:
        """As those of GatedProduct; ends the sums."""
        made = [side.gradients(name) if side.sums else {} for side in self.sides]
        if len(made) == 1:
            return made[0]
        sums, gates = Sums(), [a.pop("gate", None) for a in made]
        for k, a in (pair for gradients in made for pair in gradients.items()):
            sums.add(k, a)
        some = next((a for a in gates if a is not None), None)
        if some is not None:
            zero = torch.zeros_like(some)  # of a gate that no token here takes
            sums["gate"] = torch.stack([zero if a is None else a for a in gates], 1)
        return sums


def _gates(gate: Tensor) -> tuple[Tensor, ...]:
    """One gate [B, N], or the two of [B, 2, N]."""
    return (gate,) if gate.dim() == 2 else gate.unbind(1)


def gated_products(length: int, *rest) -> GatedProducts | GatedTokens:
    """The gradients of a gated product for samples of `length` tokens; rest: as both take it."""
    return (GatedTokens if length <= SHORT else GatedProducts)(*rest)


def low_rank(down: Tensor | None, up: Tensor | None, scale: float) -> LowRank | None:
    """An update as the schema of an operation carries it, None where there is none."""
    return None if down is None else LowRank(down, up, scale)


def low_rank_names(names: Iterable[str]) -> list[str]:
    """How an operation names the updates of the weights `names`: NAME_down and NAME_up of each."""
    return [f"{name}_{end}" for name in names for end in ("down", "up")]


def low_ranks(inputs: NamedTuple, names: Sequence[str], scales: Sequence[float]) -> list[LowRank | None]:
    """The updates of the weights NAME, which `inputs` of an operation has as NAME_down and NAME_up."""
    parts = _updates(names)(inputs)
    return [low_rank(*parts[2 * i : 2 * i + 2], scale) for i, scale in enumerate(scales)]


@cache
def _updates(names: Sequence[str]) -> attrgetter:
    return attrgetter(*low_rank_names(names))


def flattened(
    op: str, low: Mapping[str, LowRank] | None, names: Sequence[str]
) -> tuple[list[Tensor | None], list[float]]:
    """Updates by the name of their weight as a schema carries them: (A, B of each in turn, their scales).
    ValueError for a name that is not among `names`."""
    low = low or {}
    if not set(low) <= set(names):
        raise ValueError(f"{op}: got low-rank updates of {sorted(low)}, want some of {', '.join(names)}")
    parts = sum(([low[k].down, low[k].up] if k in low else [None, None] for k in names), [])
    return parts, [low[k].scale if k in low else 1.0 for k in names]


def ready(weights: tuple[Tensor, ...], dtype: torch.dtype, found: list[slice]) -> tuple[Tensor, ...]:
    """The weights in dtype where several pieces use them; one piece converts each as it comes."""
    return weights if len(found) == 1 else tuple(a.to(dtype) for a in weights)


def saved_names(op: str, modes: dict[str, tuple[str, ...]], keep: str | Collection[str]) -> Collection[str]:
    """The names that a mode stands for, or the names themselves; ValueError for what is neither."""
    names = modes.get(keep, ()) if isinstance(keep, str) else keep
    if keep not in modes if isinstance(keep, str) else not set(keep) <= set(modes["all"]):
        raise ValueError(f"{op}: got keep {keep!r}, want one of {', '.join(modes)} or of {modes['all']}")
    return names
