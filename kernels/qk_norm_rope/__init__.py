"""RMSNorm and rotary embedding of queries and keys."""

from prfl_kernels.qk_norm_rope.op import qk_norm_rope, qk_norm_rope_fp8, rms_norm
from prfl_kernels.qk_norm_rope.rope import Grid

__all__ = ["Grid", "qk_norm_rope", "qk_norm_rope_fp8", "rms_norm"]
