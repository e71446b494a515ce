"""LayerNorm, modulation and gated addition, fused."""

from prfl_kernels.norm.gated_add import (
    gated_add,
    gated_add_modulate,
    gated_add_modulate_fp8,
    gated_add_norm,
    gated_add_norm_fp8,
)
from prfl_kernels.norm.op import layer_norm, modulate, modulate_fp8

__all__ = [
    "gated_add", "gated_add_modulate", "gated_add_modulate_fp8", "gated_add_norm", "gated_add_norm_fp8",
    "layer_norm", "modulate", "modulate_fp8",
]  # fmt: skip
