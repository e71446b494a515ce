"""Which implementation of every operation runs here, and why."""

_OPERATIONS = {
    "modulate": "reference",
    "layer_norm": "reference",
    "gated_add": "reference",
    "gated_add_modulate": "reference",
    "gated_add_norm": "reference",
    "rms_norm": "reference",
    "qk_norm_rope": "reference",
    "attention": "torch sdpa",
    "reward_pool": "reference",
}


def choices() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) of every operation of the package."""
    reasons = {
        "reference": "plain torch; no fused kernel is built into this version",
        "torch sdpa": "torch.nn.functional.scaled_dot_product_attention picks the kernel",
    }
    return [(op, choice, reasons[choice]) for op, choice in _OPERATIONS.items()]
