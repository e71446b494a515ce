"""The three sublayers of a block, each one operation.

The name cross_attention is the function here, not its module: import the module's other names
from prfl_kernels.sublayers.cross_attention.
"""

from prfl_kernels.sublayers.cross_attention import ImageWeights, cross_attention
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights, LowRank
from prfl_kernels.sublayers.self_attention import modulated_attention

__all__ = [
    "AttentionWeights", "FFNWeights", "ImageWeights", "LowRank", "cross_attention", "modulated_attention",
    "modulated_ffn",
]  # fmt: skip
