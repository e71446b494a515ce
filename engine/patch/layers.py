"""Somebody else's linear layers and norms, as our own sublayers read them.

A layer is read when its block is called, so a PEFT adapter that was added, switched or merged since counts.
What is more than a weight, a bias and low-rank updates is not understood, and named.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prfl_kernels.linear import linear
from prfl_kernels.qk_norm_rope.op import rms_norm
from prfl_kernels.sublayers.products import LowRank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Layer:
    """A linear layer in the dtype it computes in: what prfl_engine.model.layers.Linear shows of itself."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    low: LowRank | None
    dtype: torch.dtype

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K], in `dtype`."""
        return linear(x.to(self.dtype), self.weight, self.bias, self.low)


@dataclass
class Norm:
    """An RMSNorm over the whole width."""

    weight: Tensor  # [C]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] of x [..., C], in its dtype."""
        return rms_norm(x, self.weight, self.eps)


class Replacement:
    """A forward that took the place of a module's own; `restore` deletes it."""


def hooked(block: nn.Module) -> str | None:
    """Which module inside of a block does more than its class says when it is called: ours never calls it."""
    for name, m in block.named_modules():
        if m is block:
            continue
        if "forward" in vars(m):
            return f"{name}: its forward was replaced (offloading, casting and sequence parallelism do that)"
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return f"{name}: it has hooks, which would not run"
    return None


def unusual(a: Tensor) -> str | None:
    """Why a parameter cannot be read as it is."""
    if a.dtype not in DTYPES:
        return f"it is stored as {str(a.dtype).removeprefix('torch.')}"
    if type(a) not in (nn.Parameter, Tensor, DTensor):
        return f"it is a {type(a).__name__}"
    return None


def sharded(m: nn.Module) -> bool:
    """Whether a layer's weight is not whole here, in a call of its block: FSDP2 has a unit inside of it."""
    return isinstance(getattr(m, "base_layer", m).weight, DTensor)


def not_plain(m: nn.Module, bias: bool = True) -> str | None:
    """Why a module is not a linear layer of a weight and a bias (without one if not `bias`)."""
    replicated = type(m).__name__ == "ReplicatedLinear"  # FastVideo's, which returns (y, None)
    if not replicated and type(m).forward is not nn.Linear.forward:
        return f"it is a {type(m).__name__}, not a plain linear layer"
    if replicated and (m.skip_bias_add or type(m.quant_method).__name__ != "UnquantizedLinearMethod"):
        return "it is quantised, or does not add its bias"
    if (m.bias is not None) != bias:
        return "it has no bias" if bias else "it has a bias"
    return unusual(m.weight) or (unusual(m.bias) if bias else None)


def active(m: nn.Module) -> list[str]:
    """The adapters of a PEFT LoRA layer that add to its result."""
    if m.disable_adapters or m.merged:
        return []
    return [name for name in m.active_adapters if name in m.lora_A]


def not_adapted(m: nn.Module) -> str | None:
    """Why a layer with adapters is not a plain linear layer with low-rank updates."""
    if not isinstance(getattr(m, "lora_A", None), nn.ModuleDict):
        return f"it is a {type(m).__name__}, an adapter that is not PEFT's LoRA"
    if m.disable_adapters and m.merged:
        return "its adapters are merged and disabled"
    for name in active(m):
        if name in getattr(m, "lora_variant", {}) or getattr(m, "use_dora", {}).get(name):
            return f"adapter {name!r} is another kind of LoRA (DoRA)"
        if not isinstance(m.lora_dropout[name], nn.Identity) and m.lora_dropout[name].p > 0:
            return f"adapter {name!r} has dropout (lora_dropout)"
        found = not_plain(m.lora_A[name], False) or not_plain(m.lora_B[name], False)
        if found:
            return f"adapter {name!r}: {found}"
    return None


def complaint(m: nn.Module) -> str | None:
    """Why `read` would not give what a call of the layer computes; None if it does."""
    if hasattr(m, "base_layer"):
        return not_adapted(m) or not_plain(m.base_layer)
    return not_plain(m)


def read(m: nn.Module, dtype: torch.dtype) -> Layer:
    """The layer as it is now, to compute in `dtype`; without a `complaint`."""
    if not hasattr(m, "base_layer"):
        return Layer(m.weight, m.bias, None, dtype)
    return Layer(m.base_layer.weight, m.base_layer.bias, _updates(m), dtype)


def _updates(m: nn.Module) -> LowRank | None:
    """All active updates of a PEFT layer as one."""
    found = [LowRank(m.lora_A[k].weight, m.lora_B[k].weight, float(m.scaling[k])) for k in active(m)]
    if len(found) < 2:
        return found[0] if found else None
    downs, ups = [low.down for low in found], [low.scale * low.up for low in found]
    return LowRank(torch.cat(downs), torch.cat(ups, 1), 1.0)
