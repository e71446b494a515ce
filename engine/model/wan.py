"""The video diffusion transformer of Wan2.1 and Wan2.2: text-to-video, image-to-video, and TI2V, both in one.

Parameters carry the names of the native checkpoints, so their state dicts load as they are.
Precision is a contract of three dtypes: the weights keep theirs; linear layers and attention
compute in `compute_dtype`; the residual stream is in `residual_dtype`. Time embedding,
modulation, norms, rotation and head run in float32 (float64 when the weights are float64). Autocast
changes none of it: all products are operations of prfl_kernels.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine.bounds import Section, Within, hints
from prfl_engine.errors import UserError, check, named
from prfl_engine.model.layers import (
    IMAGE_TOKENS,
    Block,
    Head,
    ImageEmbedding,
    Linear,
    WideLinear,
    first_tokens,
)
from prfl_kernels.exchange import SequenceGroup, gather
from prfl_kernels.jit import wide
from prfl_kernels.linear import linear
from prfl_kernels.qk_norm_rope.rope import Grid

# Tokens of a text context are a multiple of this: at most eight shapes for 512, whatever the prompts.
TEXT_MULTIPLE = 64
TI2V_CHANNELS = 48  # latents of Wan2.2's VAE, which no other Wan model has
Width = Annotated[int, Within(1, 2**18)]
Patch = Annotated[int, Within(1, 64)]


@dataclass(frozen=True)
class WanConfig(Section, name=""):
    """Hyper-parameters of a Wan transformer, under the names of its config.json, which has no `clip`: whether
    there is a CLIP branch is seen from the weights.

    A ti2v model makes videos from a text, as t2v, or from a text and a first latent frame, which needs no
    channels of its own: it takes the place of the first frame of the latents.
    """

    model_type: Literal["t2v", "i2v", "ti2v"] = "t2v"
    dim: Width = 1536
    ffn_dim: Width = 8960
    num_heads: Width = 12
    num_layers: Annotated[int, Within(0, 10_000)] = 30
    in_dim: Width = 16  # latent channels; an I2V model has 4 mask and 16 condition channels more
    out_dim: Width = 16
    text_dim: Width = 4096
    text_len: Width = 512  # every text is zero-padded to this many tokens, and all are attended to
    freq_dim: Width = 256
    patch_size: tuple[Patch, Patch, Patch] = (1, 2, 2)
    eps: Annotated[float, Within(1e-12, 1)] = 1e-6
    clip: bool | None = None  # whether CLIP tokens are attended to; None: in an I2V model, as in Wan2.1

    def __post_init__(self):
        super().__post_init__()
        check(
            self.dim % (2 * self.num_heads) == 0, "dim", self.dim,
            f"a multiple of twice the {self.num_heads} heads",
        )  # fmt: skip
        check(self.freq_dim % 2 == 0, "freq_dim", self.freq_dim, "an even number")
        if self.clip is None:
            object.__setattr__(self, "clip", self.image)
        check(self.image or not self.clip, "clip", self.clip, "false with model_type t2v")
        if self.model_type == "ti2v":
            check(self.in_dim == self.out_dim, "in_dim", self.in_dim, f"out_dim, {self.out_dim} (ti2v)")
            check(self.patch_size[0] == 1, "patch_size", self.patch_size, "patches of one frame (ti2v)")

    @property
    def image(self) -> bool:
        """Whether the model takes CLIP features, and a first frame in channels of its own (I2V)."""
        return self.model_type == "i2v"

    @classmethod
    def from_values(cls, values: Any, source: Path) -> "WanConfig":
        """The hyper-parameters among `values`, read from `source`."""
        check(isinstance(values, dict), str(source), values, "a mapping of a Wan transformer's fields")
        with named(str(source)):
            known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in hints(cls)}
            return cls(**known)

    def to_json(self, path: Path) -> None:
        """Write config.json of a native checkpoint."""
        values = {name: value for name, value in asdict(self).items() if name != "clip"}
        path.write_text(json.dumps({"_class_name": "WanModel", **values}, indent=2) + "\n")


_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY = dict(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=16, freq_dim=64)
PRESETS = {
    "t2v-1.3b": WanConfig(),
    "t2v-14b": WanConfig(**_14B),
    "i2v-14b-480p": WanConfig("i2v", in_dim=36, **_14B),
    "i2v-14b-720p": WanConfig("i2v", in_dim=36, **_14B),
    **{f"t2v-a14b-{expert}": WanConfig(**_14B) for expert in ("high", "low")},
    **{f"i2v-a14b-{e}": WanConfig("i2v", in_dim=36, clip=False, **_14B) for e in ("high", "low")},
    "ti2v-5b": WanConfig("ti2v", 3072, 14336, 24, 30, in_dim=48, out_dim=48),
    "tiny-t2v": WanConfig(**_TINY),
    "tiny-i2v": WanConfig("i2v", in_dim=36, **_TINY),
    "tiny-i2v-a14b": WanConfig("i2v", in_dim=36, clip=False, **_TINY),
    "tiny-ti2v": WanConfig("ti2v", in_dim=48, out_dim=48, **_TINY),
    "demo": WanConfig("ti2v", **_TINY | dict(text_len=8, in_dim=64, out_dim=64, patch_size=(1, 1, 1))),
}


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[B, dim] float64: cosines, then sines, of real-valued timesteps t [B]."""
    half = dim // 2
    freqs = 10000 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def with_first_frame(x: Tensor, frame: Tensor) -> Tensor:
    """x [B, C, T, H, W] with its first frame replaced by frame [B, C, 1, H, W], in the dtype of x."""
    return torch.cat([frame.to(x.dtype), x[:, :, 1:]], dim=2)


class Precision(NamedTuple):
    """The dtypes of a model: of its weights, of linear layers and attention, of the residual stream."""

    weights: torch.dtype
    compute: torch.dtype
    residual: torch.dtype


RunBlocks = Callable[[Sequence[Block], Tensor, Tensor, Tensor, int, Grid], Tensor]
"""Runs blocks one after another: (blocks, tokens [B, L, C], e as Block.forward takes it, context [B, S, C],
repeats, grid) to tokens [B, L, C]. Whoever calls one must not hold the first tokens: a policy may have to
free them."""


def plain_blocks(
    blocks: Sequence[Block], tokens: Tensor, e_B6C: Tensor, context: Tensor, repeats: int, grid: Grid
) -> Tensor:
    """The blocks as they are: the backward finds everything saved. A `RunBlocks`."""
    for block in blocks:
        tokens = block(tokens, e_B6C, context, repeats, grid)
    return tokens


class WanTransformer(nn.Module):
    """The transformer, or its first `num_blocks` blocks without head (the trunk of a reward model)."""

    def __init__(self, config: WanConfig, num_blocks: int | None = None, head: bool = True):
        super().__init__()
        c = self.config = config
        self.sequence: SequenceGroup | None = None  # the ranks over which the tokens are cut
        self.residual_dtype: torch.dtype | None = None  # None: float32, float64 for float64 weights
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            WideLinear(c.freq_dim, c.dim), nn.SiLU(), WideLinear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(
            Block(c.dim, c.ffn_dim, c.num_heads, c.eps, c.clip)
            for _ in range(c.num_layers if num_blocks is None else num_blocks)
        )
        self.head = Head(c.dim, math.prod(c.patch_size) * c.out_dim, c.eps) if head else None
        self.img_emb = ImageEmbedding(c.dim) if c.clip else None

    def set_precision(
        self,
        compute_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> "WanTransformer":
        """Choose the dtype of linear layers and attention (None: that of the weights) and of the
        residual stream (None: float32, or float64 for float64 weights). Returns self."""
        self.residual_dtype = residual_dtype
        for module in self.modules():
            if isinstance(module, Linear):
                module.compute_dtype = compute_dtype
        return self

    @property
    def precision(self) -> Precision:
        """The dtypes that `set_precision` and the weights give."""
        weights = self.patch_embedding.weight.dtype
        return Precision(weights, self.text_embedding[0].dtype, self.residual_dtype or wide(weights))

    def set_chunk(self, tokens: int | None) -> "WanTransformer":
        """Let the attention and FFN sublayers work on that many tokens at a time (None: all). Returns
        self."""
        for block in self.blocks:
            block.chunk = tokens
        return self

    def init_weights(self, generator: torch.Generator | None = None) -> "WanTransformer":
        """Random weights as the official code draws them (the output projection is zero)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith("modulation"):
                nn.init.normal_(p, std=self.config.dim**-0.5, generator=generator)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(p.flatten(1), generator=generator)
        if self.img_emb is not None:
            for norm in (self.img_emb.proj[0], self.img_emb.proj[4]):
                nn.init.ones_(norm.weight)
        if self.head is not None:
            nn.init.zeros_(self.head.head.weight)
        return self

    def embed_context(self, text: Tensor, clip: Tensor | None = None) -> Tensor:
        """Context tokens of a sample, the same at every timestep.

        text [B, n <= text_len, text_dim], clip [B, 257, 1280] for a model with a CLIP branch; returns
        [B, S (+ 257), C], the image tokens first. S is text_len, or the multiple of 64 above n if that is
        less. Then the last token is a padding token and represents all that are left out, see `repeats`.
        Raises UserError for a longer text.
        """
        n, whole = text.shape[1], self.config.text_len
        if n > whole:
            raise UserError(f"text: got {n} tokens, want at most {whole}")
        length = min(whole, (n // TEXT_MULTIPLE + 1) * TEXT_MULTIPLE)
        context = self.text_embedding(F.pad(text, (0, 0, 0, length - n)))
        return context if clip is None else torch.cat([self.img_emb(clip), context], dim=1)

    def repeats(self, context: Tensor) -> int:
        """How many tokens of the text, padded to text_len, the last one of a context stands for.

        All tokens of padding are one vector, so in every block their keys are equal, and their values: in a
        softmax one key that counts that often is the same, in all gradients too.
        """
        return self.config.text_len + 1 - (context.shape[1] - IMAGE_TOKENS * self.config.clip)

    def features(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        blocks: int | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """The residual stream [B, L, C] after the first `blocks` blocks (all if None), of the tokens of this
        rank if the sequence is cut; see forward."""
        return self._run(x, t, context, condition, (blocks,), run_blocks)[0].pop()

    def layers(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None,
        ends: Sequence[int],
        run_blocks: RunBlocks = plain_blocks,
    ) -> list[Tensor]:
        """`features` after each of so many blocks, in rising order."""
        return self._run(x, t, context, condition, ends, run_blocks)[0]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """Velocity [B, out_dim, T, H, W] in float32 at noisy latents x [B, out_dim, T, H, W].

        t [B] is the timestep (1000 sigma, any real number), on any device, context comes from embed_context,
        condition [B, 20, T, H, W] is the mask and the encoded first frame of an I2V model. Of a ti2v model it
        is the first latent frame [B, out_dim, 1, H, W] or None: it takes the place of that in x, its tokens
        have timestep 0, and its velocity is 0. run_blocks decides how the blocks run: plainly, under
        memory policies, in fp8, from a cache, as a CUDA graph.
        """
        found, e, grid = self._run(x, t, context, condition, (None,), run_blocks)
        two = e.dim() == 3
        patches = self.head(found.pop(), e, first_tokens(grid, self.sequence) if two else 0)
        if self.sequence is not None:
            patches = gather(patches, self.sequence.cut(math.prod(grid)))
        velocity = self._unpatchify(patches, grid)
        return with_first_frame(velocity, torch.zeros_like(velocity[:, :, :1])) if two else velocity

    def _run(self, x, t, context, condition, ends, run_blocks):
        """(tokens after each of `ends` blocks, embedding [B, C] of t, or [B, 2, C] of 0 and t, grid of
        patches)."""
        c = self.config
        if c.model_type == "ti2v" and condition is not None:
            if condition.shape != (want := x[:, :, :1].shape):
                raise UserError(f"condition: got {list(condition.shape)}, want the first frame {list(want)}")
            x, t = with_first_frame(x, condition), torch.stack([torch.zeros_like(t), t], 1)
        elif condition is not None:
            x = torch.cat([x, condition.to(x.dtype)], dim=1)
        if x.shape[1] != c.in_dim:
            raise UserError(f"latent: got {x.shape[1]} channels (condition included), want {c.in_dim}")
        tokens, grid = self._patchify(x)
        t = t.to(x.device, non_blocking=True)
        e = self.time_embedding(sinusoid(t.flatten(), c.freq_dim)).view(*t.shape, c.dim)
        vectors = self.time_projection(e).unflatten(-1, (6, c.dim))
        held, repeats, found = [tokens], self.repeats(context), []
        del tokens  # this frame must not hold what the first block may offload, nor a tuple of *arguments
        for start, end in zip((0, *ends), ends, strict=False):
            found.append(run_blocks(self.blocks[start:end], held.pop(), vectors, context, repeats, grid))
            held.append(found[-1])
        return found, e, grid

    def compile_blocks(self, backend: str = "inductor") -> "WanTransformer":
        """Let torch.compile make the code of every block, without graph breaks and for fixed shapes: all
        blocks share it, and another shape, precision or use (with gradient or without, frozen) has its own.
        Blocks with gradient that are recomputed in backward stay as they are. Returns self."""
        # Beyond this many torch.compile would raise: shapes of a data set, latents times up to eight of the
        # text, times a handful of uses.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        for block in self.blocks:
            block.compiled = torch.compile(Block.sublayers, fullgraph=True, dynamic=False, backend=backend)
        return self

    def _patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """The strided convolution as one matrix product over the values of every patch."""
        grid = tuple(n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        (f, h, w), (pf, ph, pw) = grid, self.config.patch_size
        x = x.unflatten(2, (f, pf)).unflatten(4, (h, ph)).unflatten(6, (w, pw))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        if self.sequence is not None:
            x = x[:, self.sequence.cut(math.prod(grid)).span]
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        tokens = linear(x.to(self.precision.compute), weight, bias)
        return tokens.to(self.precision.residual), grid

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = patches.unflatten(2, (*self.config.patch_size, self.config.out_dim)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # B, c, f, pf, h, ph, w, pw
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
