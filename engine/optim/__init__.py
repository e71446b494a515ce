"""Optimizers, the update, the learning-rate schedule and the moving average."""
