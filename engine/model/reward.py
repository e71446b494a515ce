"""The latent reward model: the generator's first blocks, a pooling over all tokens, an MLP head.

    r = sigmoid(MLP(pool(features(x_t, t, text))))          at any timestep t, on noisy latents x_t

Source: PAVRM of PRFL (arXiv 2511.21541). State dicts have the keys of the official files.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine.errors import UserError
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks
from prfl_kernels.exchange import SequenceGroup
from prfl_kernels.jit import wide
from prfl_kernels.linear import linear
from prfl_kernels.reward_pool.op import merge, reward_pool_with_lse


class QueryPool(nn.Module):
    """Mean over learned queries of MultiheadAttention(query, X, X), plus the mean query.

    Computed with the projections folded out of the token dimension (exact; prfl_kernels.reward_pool.op
    and docs/reward.md); with dropout on the attention weights while training, by plain attention.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 1,
        num_heads: int = 8,
        dropout: float = 0.0,
        add_query: bool = True,
    ):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"reward.num_heads: got {num_heads}, want a divisor of the width {dim}")
        self.add_query = add_query
        self.sequence: SequenceGroup | None = None  # the ranks over which the tokens are cut
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        # Holds the parameters under their official names; its forward never runs.
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        nn.init.xavier_uniform_(self.queries)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled vector [B, C], float32 or wider, of features x [B, L, C]: of all ranks' tokens if cut."""
        attn, dtype = self.multihead_attn, wide(x.dtype)
        w_q, w_k, w_v = attn.in_proj_weight.chunk(3)
        b_q, _, b_v = attn.in_proj_bias.chunk(3)  # the key bias drops out of the softmax
        q = self._heads(linear(self.queries.to(dtype), w_q, b_q))  # [H, n, D]
        q = q * q.shape[2] ** -0.5
        if self.training and attn.dropout > 0:
            out = self._dropped(x.to(dtype), q, w_k, w_v, b_v)
        else:
            u = linear(q, w_k.unflatten(0, (attn.num_heads, -1)).mT).transpose(0, 1)  # [n, H, C]
            pooled, lse = reward_pool_with_lse(x, u.flatten(0, 1))
            if self.sequence is not None:
                pooled, _ = merge(self.sequence.stack(pooled), self.sequence.stack(lse))
            pooled = pooled.unflatten(1, u.shape[:2])  # [B, n, H, C]
            # The projections after the pooling are linear, so the mean over queries goes first.
            pooled = pooled.mean(1).transpose(0, 1)  # [H, B, C]
            out = linear(pooled, w_v.unflatten(0, (attn.num_heads, -1))).transpose(0, 1).flatten(1)
            out = out + b_v.to(dtype)
        pooled = linear(out, attn.out_proj.weight, attn.out_proj.bias)
        return pooled + self.queries.mean(0) if self.add_query else pooled

    def _heads(self, x: Tensor) -> Tensor:
        """[..., L, C] as [..., H, L, C / H]."""
        return x.unflatten(-1, (self.multihead_attn.num_heads, -1)).transpose(-3, -2)

    def _dropped(self, x: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, b_v: Tensor) -> Tensor:
        """The mean over the queries [B, C] of plain attention to x [B, L, C] with dropout on its weights;
        q [H, n, D] are the scaled queries."""
        kv = linear(x, w_k), linear(x, w_v, b_v)
        k, v = (self._heads(a).flatten(0, 1) for a in kv)  # [B H, L, D]
        scores = linear(q.repeat(len(x), 1, 1), k)
        weights = F.dropout(scores.softmax(-1), self.multihead_attn.dropout)  # [B H, n, L]
        out = linear(weights, v.mT).mean(1)
        return out.view(len(x), -1)


class TokenPool(nn.Module):
    """The mean of all tokens, or the largest value of every channel; no parameters. A largest value sends its
    gradient to one token."""

    def __init__(self, kind: str):
        """kind: mean or max."""
        super().__init__()
        self.kind = kind
        self.sequence: SequenceGroup | None = None  # the ranks over which the tokens are cut

    def forward(self, x: Tensor) -> Tensor:
        """Pooled vector [B, C], float32 or wider, of features x [B, L, C]: of all ranks' tokens if cut."""
        x = x.to(wide(x.dtype))
        if self.kind == "max":
            largest = x.max(1).values
            return largest if self.sequence is None else self.sequence.stack(largest).max(0).values
        if self.sequence is None:
            return x.mean(1)
        count = x.new_full((1,), x.shape[1])
        return self.sequence.stack(x.sum(1)).sum(0) / self.sequence.stack(count).sum(0)


POOLS = ("query", "mean", "max")


def make_pool(
    kind: str,
    dim: int,
    num_queries: int = 1,
    num_heads: int = 8,
    dropout: float = 0.0,
    add_query: bool = True,
) -> "QueryPool | TokenPool":
    """A pooling of POOLS; the numbers are those of the query pooling."""
    return QueryPool(dim, num_queries, num_heads, dropout, add_query) if kind == "query" else TokenPool(kind)


class MLP(nn.Module):
    """C -> 1024 -> 512 -> 1 with ReLU; float32 at least."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(dim, 1024), nn.Linear(1024, 512), nn.Linear(512, 1)
        for fc in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1] of x [B, C]."""
        for fc in (self.fc1, self.fc2):
            x = linear(x, fc.weight, fc.bias).relu()
        return linear(x, self.fc3.weight, self.fc3.bias)


class RewardModel(nn.Module):
    """Scores noisy latents. `transformer` is a WanTransformer without head."""

    def __init__(
        self,
        transformer: WanTransformer,
        pool: QueryPool | TokenPool,
        feature_layer: int | Sequence[int],
    ):
        """feature_layer: the blocks, counted from 1, after which features are pooled; several in rising
        order."""
        super().__init__()
        self.layers = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
        if not 1 <= self.layers[0] <= self.layers[-1] <= len(transformer.blocks):
            raise UserError(
                f"reward.feature_layer: got {feature_layer}, "
                f"want 1 to the {len(transformer.blocks)} blocks of the reward model"
            )
        self.transformer, self.pool = transformer, pool
        self.mlp = MLP(transformer.config.dim)

    @property
    def feature_layer(self) -> int:
        """The last block that runs, counted from 1."""
        return self.layers[-1]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        clip: Tensor | None = None,
        condition: Tensor | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """Logits [B], float32 or wider; the reward is their sigmoid.

        x [B, 16, T, H, W], t [B], text [B, n, text_dim]; for an I2V model clip [B, 257, 1280] and
        condition [B, 20, T, H, W].
        """
        return self.score(x, t, self.embed_context(text, clip), condition, run_blocks)

    def embed_context(self, text: Tensor, clip: Tensor | None = None) -> Tensor:
        """The context tokens [B, S, C] of the transformer, without image tokens where it has no branch for
        them."""
        return self.transformer.embed_context(text, clip if self.transformer.config.clip else None)

    def score(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        run_blocks: RunBlocks = plain_blocks,
    ) -> Tensor:
        """Logits [B] as above, with the context tokens of embed_context. A T2V model takes no condition:
        what a first frame adds to a generator is left out."""
        condition = None if self.transformer.config.model_type == "t2v" else condition
        return self.mlp(self._pooled(x, t, context, condition, run_blocks)).squeeze(1)

    def _pooled(self, x, t, context, condition, run_blocks) -> Tensor:
        """One vector [B, C]: that of the feature layer, or of several the mean, by max the largest values."""
        if len(self.layers) == 1:
            return self.pool(self.transformer.features(x, t, context, condition, self.layers[0], run_blocks))
        found = self.transformer.layers(x, t, context, condition, self.layers, run_blocks)
        vectors = torch.stack([self.pool(features) for features in found])
        largest = isinstance(self.pool, TokenPool) and self.pool.kind == "max"
        return vectors.max(0).values if largest else vectors.mean(0)

    def freeze(self) -> "RewardModel":
        """Evaluation mode, and no gradient to any weight from here on. Returns self."""
        return self.eval().requires_grad_(False)


EMBEDDINGS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb")


def freeze_embeddings(transformer: WanTransformer) -> None:
    """No gradient to the embeddings of patches, text, time and image from here on."""
    for name in EMBEDDINGS:
        if (part := getattr(transformer, name)) is not None:
            part.requires_grad_(False)
