"""PRFL: process reward feedback learning for video diffusion transformers, in latent space."""

__version__ = "0.1.0"
