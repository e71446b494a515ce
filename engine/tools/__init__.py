"""What this machine has, and values to compare with other code."""
