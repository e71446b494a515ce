"""LayerNorm, modulation and gated addition, fused."""
