"""Softmax attention by any of several implementations."""
