"""Memory of a GPU in a PRFL step of the official code's settings, and of RGB ReFL, predicted.

The official code trains float32 weights under FSDP1 and bfloat16 autocast. A block is written here in plain
torch with the same operations in the same precision, and what its recomputation and its backward hold is
counted on tensors without values; so are all activations of the decoder of diffusers' AutoencoderKLWan, which
RGB ReFL differentiates. What stands follows from the shapes of the parameters, what FSDP1 gathers from the
order in which it does so. Not counted: fragments of the allocator, what NCCL takes.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.model.wan import PRESETS, WanConfig
from prfl_engine.planner.machine import CONTEXT
from prfl_engine.planner.setup import ROUND, Setup
from prfl_engine.planner.standing import Parameter, models_of

CONFIG = PRESETS["t2v-14b"]
RANKS = 4  # of a sample
REWARD_BLOCKS = 8
LOW, WIDE = torch.bfloat16, torch.float32
DEVICE = "meta"


class Part(NamedTuple):
    """Bytes of a GPU in the largest moment of a step."""

    name: str
    bytes: float
    basis: str


def prfl(latent: tuple[int, int, int], gpus: int) -> list[Part]:
    """In the backward of the last block of the reward model, before which all blocks have saved their
    inputs."""
    tokens = math.prod(latent) // 4
    block, ends = _sizes("reward")
    saved = 4 * CONFIG.dim * tokens // RANKS
    return [
        *_trained(gpus), *_passed(tokens),
        Part("reward model", 4 * (REWARD_BLOCKS * block + ends) / gpus, "float32, shards"),
        Part("its gradients", 4 * REWARD_BLOCKS * block / gpus, "its blocks are trained by no optimizer"),
        Part("its root", 4 * ends, "FSDP1 keeps it gathered until the backward"),
        Part("its pooling and head", 4 * _head_values(), "float32, on every GPU"),
        Part("its saved inputs", REWARD_BLOCKS * saved, "every block recomputed"),
    ]  # fmt: skip


def rgb(latent: tuple[int, int, int], gpus: int, frames: int) -> list[Part]:
    """RGB ReFL with the first latent frames decoded, so many: the larger of two moments, the decoder's, with
    the saved inputs of the generator, and the backward of its last block. The reward model of the pixels,
    which is not known, is left out."""
    tokens = math.prod(latent) // 4
    decoder = Part("decoder", decoder_bytes((frames, *latent[1:]), LOW), "saved and temporary, bfloat16")
    trained, passed = _trained(gpus), _passed(tokens)
    decoding = [*trained, *(p for p in passed if p.name not in ("block", "gathered blocks")), decoder]
    return max([*trained, *passed], decoding, key=total)


def total(parts: list[Part]) -> float:
    """Bytes of all."""
    return sum(part.bytes for part in parts)


def _trained(gpus: int) -> list[Part]:
    block, ends = _sizes("generator")
    values = CONFIG.num_layers * block + ends
    return [
        Part("weights", 4 * values / gpus, "float32, shards"),
        Part("gradients", 4 * values / gpus, "float32, shards"),
        Part("AdamW", 8 * values / gpus, "float32, shards"),
        Part("VAE", 4 * _vae_values(), "float32, on every GPU"),
        Part("CUDA context", CONTEXT, "assumed 0.6 GB"),
    ]


def _passed(tokens: int) -> list[Part]:
    block, ends = _sizes("generator")
    saved = 4 * CONFIG.dim * tokens // RANKS
    return [
        Part("root", 4 * ends, "FSDP1 keeps it gathered until the backward"),
        Part("gathered blocks", 4 * 4 * block, "this and the next, the gradient of this and of the last"),
        Part("saved inputs", CONFIG.num_layers * saved, "every block recomputed"),
        Part("block", block_bytes(tokens, RANKS), "recomputed and backward, plain torch under autocast"),
    ]


@cache
def _sizes(model: str) -> tuple[int, int]:
    """Values of a block, and of all else of the transformer."""
    found: list[Parameter] = getattr(models_of(Setup(CONFIG, (1, 16, 1, 2, 2))), model)
    trunk = [p for p in found if not p.name.startswith(("pool.", "mlp."))]
    sizes = [(p.name, math.prod(p.shape)) for p in trunk]
    block = sum(n for name, n in sizes if "blocks.0." in name)
    return block, sum(n for name, n in sizes if "blocks.0." not in name)


def _head_values() -> int:
    found = models_of(Setup(CONFIG, (1, 16, 1, 2, 2))).reward
    return sum(math.prod(p.shape) for p in found if p.name.startswith(("pool.", "mlp.")))


class _Exchange(torch.autograd.Function):
    """Heads for tokens over the ranks of a sample, and back: allocations of the copies before and after the
    collective and of its result."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        sent = x.clone()
        received = torch.empty_like(sent)
        del sent
        return received.clone().view(shape)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(d, ctx.shape), None


class _Flash(torch.autograd.Function):
    """Attention that saves its inputs, its output and float32 sums, with a float32 dQ in its backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=WIDE)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        wide = torch.empty_like(q, dtype=WIDE)
        return wide.to(q.dtype), torch.empty_like(k), torch.empty_like(v)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(LOW), weight.to(LOW))  # as autocast does


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as published: float32 inside, rounded, times a float32 weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE in complex128 and back to float32, through a list of one sample."""
    pairs = torch.view_as_complex(x[0].double().reshape(*x.shape[1:3], -1, 2))
    turned = torch.view_as_real(pairs * angles).flatten(2)
    return torch.stack([torch.cat([turned, x[0, :0]])]).float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = [a.flatten(0, 1).to(LOW) for a in (q, k, v)]
    return _Flash.apply(*low).view(*q.shape[:2], -1, q.shape[-1]).to(q.dtype)


@cache
def block_bytes(tokens: int, ranks: int, config: WanConfig = CONFIG) -> int:
    """Most bytes that forward and backward of a block hold in addition to its weights, their gradients and
    its input."""
    c, f, heads, n = config.dim, config.ffn_dim, config.num_heads, tokens // ranks
    head = c // heads
    with torch.device(DEVICE):
        names = ("q", "k", "v", "o", "cq", "ck", "cv", "co")
        w = {name: torch.empty(c, c, requires_grad=True) for name in names}
        w |= {name: torch.empty(c, requires_grad=True) for name in ("nq", "nk", "ncq", "nck", "n3")}
        up, down = torch.empty(f, c, requires_grad=True), torch.empty(c, f, requires_grad=True)
        x = torch.empty(1, n, c, requires_grad=True)
        e = torch.empty(6, 1, 1, c, requires_grad=True)
        context = torch.empty(1, config.text_len, c, dtype=LOW, requires_grad=True)
        angles = torch.empty(n, 1, head // 2, dtype=torch.complex128)
        leaves = [*w.values(), up, down, x, e, context]
        for a in leaves:
            a.grad = torch.empty_like(a)
    live = LiveBytes(ROUND)
    live.add([*leaves, *(a.grad for a in leaves), angles])
    before = live.now

    def split(a: Tensor) -> Tensor:
        return a.view(1, -1, heads, head)

    def cut(a: Tensor) -> Tensor:
        return _Exchange.apply(a, (1, tokens, heads // ranks, head))

    def modulated(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(a, (c,)) * (1 + scale) + shift

    def block() -> Tensor:
        y = modulated(x, e[1], e[0])
        q, k = (split(_norm(_linear(y, w[m]), w[f"n{m}"])) for m in "qk")
        v = split(_linear(y, w["v"]))
        q, k = _rotate(q, angles), _rotate(k, angles)
        out = _attend(cut(q), cut(k), cut(v))
        out = _Exchange.apply(out, (1, n, heads, head)).flatten(2)
        h = x + _linear(out, w["o"]) * e[2]
        q = split(_norm(_linear(F.layer_norm(h, (c,), w["n3"]), w["cq"]), w["ncq"]))
        k = split(_norm(_linear(context, w["ck"]), w["nck"]))
        h = h + _linear(_attend(q, k, split(_linear(context, w["cv"]))).flatten(2), w["co"])
        y = F.gelu(_linear(modulated(h, e[4], e[3]), up), approximate="tanh")
        return h + _linear(y, down) * e[5]

    with live:
        out = block()
        d = torch.empty_like(out)
        out.backward(d)
    return live.peak - before


@cache
def decoder_bytes(latent: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Most bytes of a decode of so many latent frames and of its backward, in addition to the weights, which
    are frozen. Attention inside the decoder is taken for one that saves no weights."""
    with torch.device("meta"):
        model = _decoder().to(dtype).requires_grad_(False)
        z = torch.empty(1, 16, *latent, dtype=dtype, requires_grad=True)
    live = LiveBytes(ROUND)
    live.add([*model.parameters(), z])
    before = live.now
    with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v: _Flash.apply(q, k, v)), live:
        image = model.decode(z).sample
        image.backward(torch.empty_like(image))
    return live.peak - before


def _decoder() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan  # whose default configuration is Wan2.1's

    return AutoencoderKLWan()


@cache
def _vae_values() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _decoder().parameters())


CASES: dict[str, Callable[[tuple[int, int, int], int], list[Part]]] = {
    "PRFL, 81 frames": prfl,
    "RGB ReFL, first frame": lambda latent, gpus: rgb(latent, gpus, 1),
    "RGB ReFL, 81 frames": lambda latent, gpus: rgb(latent, gpus, latent[0]),
}
