"""The fastest memory policies that fit a byte budget."""
