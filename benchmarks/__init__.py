"""Measurements, and the tools that read what the kernels compile to; installed as prfl_bench."""
