"""q, k and v of self-attention by heads: those that are here, or as a cut sequence exchanges them."""

from collections.abc import Iterable

from torch import Tensor

from prfl_kernels.attention.op import attend
from prfl_kernels.exchange import all_keys, to_heads, to_tokens


def heads(v, settings):
    """v [B, L, C], or as exchanged, by heads."""
    return v.unflatten(2, (settings.num_heads, -1)) if v.dim() == 3 else v


def exchanged(have: dict[str, Tensor], names: Iterable[str], settings) -> dict[str, Tensor]:
    """Those of q, k and v in `names` as attention reads them: all tokens of the heads of this rank."""
    names = list(names)
    if not settings.parts or not names:
        return {}
    made = to_heads([heads(have[name], settings) for name in names], settings.parts, settings.group)
    return dict(zip(names, made, strict=True))


def keys(k, v, settings) -> list[Tensor]:
    """k and v as attention reads them, those of all tokens."""
    found = [k, heads(v, settings)]
    return all_keys(found, settings.far, settings.far_group) if settings.far else found


def attended(have: dict[str, Tensor], settings) -> dict[str, Tensor]:
    """Attention's output for the tokens here, and its log-sum-exp."""
    out, lse = attend(have["q"], *keys(have["k"], have["v"], settings))
    if settings.parts:
        (out,) = to_tokens([out], settings.parts, settings.group)
    return {"out": out, "lse": lse}
