"""All operations: importing this module has every one register its implementations with `dispatch`."""

# ruff: noqa: F401, I001  -- in the order in which `prfl doctor` lists them
import prfl_kernels.norm.triton_kernels
import prfl_kernels.qk_norm_rope.triton_kernels
import prfl_kernels.bias_gelu
import prfl_kernels.attention.op
import prfl_kernels.reward_pool.op
import prfl_kernels.fp8.linear
import prfl_kernels.fp8.quantize
import prfl_kernels.attention.fp8
import prfl_kernels.solver_step
