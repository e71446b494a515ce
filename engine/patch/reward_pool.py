"""The official reward model's QueryAttention by our pooling, which never makes keys and values of tokens."""

import torch
from torch import Tensor, nn

from prfl_engine.errors import UserError
from prfl_engine.model.reward import QueryPool
from prfl_engine.patch.layers import Replacement, hooked


class _View:
    """A QueryAttention with the code of our QueryPool."""

    __call__, _heads, _dropped = QueryPool.forward, QueryPool._heads, QueryPool._dropped
    sequence, add_query = None, False

    def __init__(self, module: nn.Module):
        self.queries, self.multihead_attn, self.training = (
            module.queries, module.multihead_attn, module.training,
        )  # fmt: skip


class PoolForward(Replacement):
    """The forward of a patched QueryAttention."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: Tensor, e: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """What the module's own forward returns for features x [B, L, C]; the original code takes other
        shapes, and e."""
        m = self.module
        if x.dim() != 3 or e is not None:
            return type(m).forward(m, x, e, text)
        pooled, device = _View(m)(x), x.device.type
        on = torch.is_autocast_enabled(device)
        pooled = pooled.to(torch.get_autocast_dtype(device) if on else x.dtype)
        return pooled + m.queries.expand(len(x), -1, -1) if m.return_type == "query" else pooled


def fast_reward_pool(module: nn.Module) -> None:
    """Let a QueryAttention of HY-Video-PRFL, or the one inside of a module, compute by our pooling.

    Its parameters stay. Results are of the dtype that they had. prfl_engine.patch.restore undoes it. Raises
    UserError, with nothing changed, without exactly one, for its options layer_norm and product_text, and for
    one with hooks inside.
    """
    names = "queries", "multihead_attn", "return_type", "layer_norm", "product_text"
    found = [m for m in module.modules() if all(hasattr(m, k) for k in names)]
    if len(found) != 1:
        kind = type(module).__name__
        raise UserError(f"reward pool: got {len(found)} QueryAttention in a {kind}, want one")
    pool, attn = found[0], found[0].multihead_attn
    if pool.layer_norm or pool.product_text:
        raise UserError("reward pool: got layer_norm or product_text, want a QueryAttention without")
    if "forward" in vars(pool):
        raise UserError("reward pool: its forward was replaced already")
    plain = attn.batch_first and attn.bias_k is None and not attn.add_zero_attn
    if type(attn) is not nn.MultiheadAttention or attn.in_proj_bias is None or not plain:
        raise UserError("reward pool: its attention is no MultiheadAttention as HY-Video-PRFL makes it")
    if why := hooked(pool):
        raise UserError(f"reward pool: {why}")
    pool.forward = PoolForward(pool)
