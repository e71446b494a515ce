"""Learned-query pooling of the reward model."""

from prfl_kernels.reward_pool.op import merge, reward_pool, reward_pool_with_lse

__all__ = ["merge", "reward_pool", "reward_pool_with_lse"]
