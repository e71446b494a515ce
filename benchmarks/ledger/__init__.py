"""What the GPU kernels compile to and move, read without a GPU."""
