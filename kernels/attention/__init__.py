"""Softmax attention by any of several implementations."""

from prfl_kernels.attention.op import attention, attention_with_lse

__all__ = ["attention", "attention_with_lse"]
