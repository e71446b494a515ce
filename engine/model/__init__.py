"""The Wan transformer, the reward model, their adapters and files."""
