"""Prints a kernel that must spill, every tile choice of `prfl tune` that spills or does not fit an SM, and
then "done". For sm_90a: a script without TRITON_INTERPRET, which test_tuning runs."""

import torch

from prfl_bench import tune
from prfl_bench.ledger import sass
from prfl_kernels import tuning
from prfl_kernels.jit import jit, tl

RICHEST = {"yn", "npyg", "qk", "qkp"}  # the forms of the norms that hold most
KERNELS = {"attention keys": "_keys_kernel", "attention queries": "_queries_kernel"}


@jit
def _spilling(x_ptr, BLOCK: tl.constexpr):
    """A warp holds 256 values a thread until their sum is there, in 32 registers."""
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    tl.store(x_ptr + o, x * tl.sum(x, 0))


def compiled(call, chosen):
    with tuning.hooked(lambda kernel, key, default: chosen.get((kernel, key), default)):
        return sass.compile_calls(call)


def launches():
    """(what it is, the launch) of every candidate's kernels at the width where registers are fewest."""
    x = torch.empty(8192, device="meta")
    for launch in sass.compile_calls(lambda: _spilling[(1,)](x, BLOCK=8192, num_warps=1, maxnreg=32)):
        yield "", launch
    for name, bind, one in tune.choices(["14B"], [32760], 1):
        norm = one.kernel.startswith(("add_norm", "qk_norm_rope"))
        if "cross" in name or (norm and not RICHEST & set(one.key)):
            continue
        wanted = {KERNELS.get(one.kernel), "_forward", "_backward", "_forward_kernel"}
        for candidate in one.candidates[1:]:
            if norm and candidate[0] == one.default[0]:
                continue  # another number of runs is no other code
            chosen = {(one.kernel, one.key): candidate}
            for launch in compiled(bind("meta"), chosen):
                if launch.kernel in wanted:
                    yield f"{one} {candidate} ", launch


if __name__ == "__main__":
    for what, launch in launches():
        used = sass.resources(launch.compiled)
        if used["stack"] or not used["blocks"]:
            numbers = {name: used[name] for name in ("registers", "stack", "shared", "blocks")}
            print(f"{what}{launch.kernel} {numbers}")
    print("done")
