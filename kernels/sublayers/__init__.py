"""The three sublayers of a block, each one operation."""
