"""The Wan2.1 video diffusion transformer, text-to-video and image-to-video.

Parameters carry the names of the native checkpoints, so their state dicts load as they are.
Precision is a contract of three dtypes: the weights keep theirs; linear layers and attention
compute in `compute_dtype`; the residual stream is held in `residual_dtype`. Time embedding,
modulation, norms, rotation and head run in float32 (float64 when the weights are float64). Autocast
changes none of it: all products are operations of prfl_kernels.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine import recompute
from prfl_engine.config import UserError
from prfl_engine.layers import IMAGE_TOKENS, Block, Head, ImageEmbedding, Linear, WideLinear
from prfl_engine.recompute import BlockPolicy
from prfl_kernels.jit import wide
from prfl_kernels.linear import linear

# Tokens of a text context are a multiple of this: at most eight shapes for 512, whatever the prompts.
TEXT_MULTIPLE = 64


@dataclass(frozen=True)
class WanConfig:
    """Hyper-parameters of a Wan2.1 transformer, under the names of its config.json."""

    model_type: str = "t2v"  # t2v or i2v
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16  # latent channels; an I2V model has 4 mask and 16 condition channels more
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512  # every text is zero-padded to this many tokens, and all are attended to
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        if self.model_type not in ("t2v", "i2v"):
            raise UserError(f"model_type: got {self.model_type!r}, want t2v or i2v")
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise UserError(
                f"dim: got {self.dim} with {self.num_heads} heads, want a multiple of twice the heads"
            )
        object.__setattr__(self, "patch_size", tuple(self.patch_size))

    @property
    def image(self) -> bool:
        return self.model_type == "i2v"

    @classmethod
    def from_json(cls, path: Path) -> "WanConfig":
        """Read config.json of a native checkpoint; keys that mean nothing here are left alone."""
        if not path.is_file():
            raise UserError(f"{path}: no such file, want the config.json of a Wan transformer")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        return cls.from_values(values, path)

    @classmethod
    def from_values(cls, values: dict, source: Path) -> "WanConfig":
        """The hyper-parameters among `values`, read from `source`."""
        try:
            known = {f.name for f in fields(cls)}
            return cls(**{k: v for k, v in values.items() if k in known})
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{source}: {error}") from None

    def to_json(self, path: Path) -> None:
        path.write_text(json.dumps({"_class_name": "WanModel", **asdict(self)}, indent=2) + "\n")


_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY = dict(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=16, freq_dim=64)
PRESETS = {
    "t2v-1.3b": WanConfig(),
    "t2v-14b": WanConfig(**_14B),
    "i2v-14b-480p": WanConfig("i2v", in_dim=36, **_14B),
    "i2v-14b-720p": WanConfig("i2v", in_dim=36, **_14B),
    "tiny-t2v": WanConfig(**_TINY),
    "tiny-i2v": WanConfig("i2v", in_dim=36, **_TINY),
}


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[B, dim] float64: cosines, then sines, of real-valued timesteps t [B]."""
    half = dim // 2
    freqs = 10000 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class WanTransformer(nn.Module):
    """The transformer, or its first `num_blocks` blocks without head (the trunk of a reward model)."""

    def __init__(self, config: WanConfig, num_blocks: int | None = None, head: bool = True):
        super().__init__()
        c = self.config = config
        self.residual_dtype: torch.dtype | None = None  # None: float32, float64 for float64 weights
        # What blocks keep, put away and compute again: a mode of prfl_engine.recompute, or a policy for all
        # blocks, or one for each.
        self.recompute: str | BlockPolicy | Sequence[BlockPolicy] = "none"
        self.keep = "all"  # with a mode: what the branches of a block keep, a mode of modulated_attention
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            WideLinear(c.freq_dim, c.dim), nn.SiLU(), WideLinear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(
            Block(c.dim, c.ffn_dim, c.num_heads, c.eps, c.image)
            for _ in range(c.num_layers if num_blocks is None else num_blocks)
        )
        self.head = Head(c.dim, math.prod(c.patch_size) * c.out_dim, c.eps) if head else None
        self.img_emb = ImageEmbedding(c.dim) if c.image else None

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

    def set_chunk(self, tokens: int | None) -> "WanTransformer":
        """Let the attention and FFN branches work on that many tokens at a time (None: all). Returns self."""
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

        text [B, n <= text_len, text_dim], clip [B, 257, 1280] for an I2V model; returns [B, S (+ 257), C],
        the image tokens first. S is text_len, or the multiple of 64 above n if that is less. Then the last
        token is one of padding and stands for all that are left out, see `repeats`. Raises UserError for a
        longer text.
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
        return self.config.text_len + 1 - (context.shape[1] - IMAGE_TOKENS * self.config.image)

    def features(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        blocks: int | None = None,
    ) -> Tensor:
        """The residual stream [B, L, C] after the first `blocks` blocks (all if None)."""
        return self._run(x, t, context, condition, blocks)[0]

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, out_dim, T, H, W] in float32 at noisy latents x [B, 16, T, H, W].

        t [B] is the timestep (1000 sigma, any real number), context comes from embed_context,
        condition [B, 20, T, H, W] is the mask and the encoded first frame of an I2V model.
        """
        tokens, e, grid = self._run(x, t, context, condition, None)
        return self.finish(tokens, e, grid)

    def _run(self, x, t, context, condition, blocks):
        tokens, e, e_B6C, grid = self.begin(x, t, condition)
        repeats = self.repeats(context)
        if not torch.is_grad_enabled():
            for block in self.blocks[:blocks]:
                tokens, _ = block(tokens, e_B6C, context, repeats, grid)
        else:
            first, policies, run = [tokens], self.block_policies(blocks), recompute.run_all
            # This frame must not hold what the first block may put away, nor a tuple of *arguments.
            del tokens
            tokens = run(self.blocks[:blocks], policies, first.pop(), e_B6C, context, repeats, grid)
        return tokens, e, grid

    def block_policies(self, blocks: int | None = None) -> list[BlockPolicy]:
        """The policy of each of the first `blocks` blocks (all if None)."""
        count = len(self.blocks[:blocks])
        if not isinstance(self.recompute, str | BlockPolicy):
            return list(self.recompute)[:count]
        one = self.recompute
        return [recompute.named(one, self.keep) if isinstance(one, str) else one] * count

    def begin(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
        """What the blocks take: tokens [B, L, C], the embedding [B, C] of t and its six vectors a block
        adds to its own [B, 6, C], and the grid (frames, rows, columns). Arguments as in forward."""
        c = self.config
        if condition is not None:
            x = torch.cat([x, condition.to(x.dtype)], dim=1)
        if x.shape[1] != c.in_dim:
            raise UserError(
                f"latent: got {x.shape[1]} channels (condition included), want {c.in_dim}"
            )
        tokens, grid = self._patchify(x)
        e = self.time_embedding(sinusoid(t, c.freq_dim))
        return tokens, e, self.time_projection(e).unflatten(1, (6, c.dim)), grid

    def finish(self, tokens: Tensor, e: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The velocity [B, out_dim, T, H, W] from the tokens behind the last block, and what begin gave."""
        return self._unpatchify(self.head(tokens, e), grid)

    def compile_blocks(self, backend: str = "inductor") -> "WanTransformer":
        """Let torch.compile make the code of every block, without graph breaks and for fixed shapes: all
        blocks share it, and another shape, precision or use (with gradient or without, frozen) has its own.
        Blocks with gradient that are computed again in backward stay as they are. Returns self."""
        # Beyond this many torch.compile would raise: shapes of a data set, latents times up to eight of the
        # text, times a handful of uses.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        return self

    def _patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """The strided convolution as one matrix product over the values of every patch."""
        grid = tuple(n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        (f, h, w), (pf, ph, pw) = grid, self.config.patch_size
        x = x.unflatten(2, (f, pf)).unflatten(4, (h, ph)).unflatten(6, (w, pw))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        dtype = self.text_embedding[0].compute_dtype or self.patch_embedding.weight.dtype
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        tokens = linear(x.to(dtype), weight, bias)
        return tokens.to(self.residual_dtype or wide(weight.dtype)), grid

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = patches.unflatten(2, (*self.config.patch_size, self.config.out_dim)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # B, c, f, pf, h, ph, w, pw
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
