"""Learned-query pooling of the reward model."""
