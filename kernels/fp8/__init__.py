"""e4m3 rows and products."""
