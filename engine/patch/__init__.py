"""Our operations under a transformer that somebody else built, in one call.

    report = accelerate(model)    # blocks compute by our sublayers from here on
    print(report)                 # what was replaced, and which calls still run the original code
    restore(model)                # as before

Parameters, state dict, hooks on blocks, checkpoint wrappers, FSDP by blocks and PEFT layers stay as they are.
"""

from prfl_engine.patch.accelerate import accelerate, fp8, report_of, restore, step_cache
from prfl_engine.patch.report import Report
from prfl_engine.patch.reward_pool import fast_reward_pool

__all__ = ["Report", "accelerate", "fast_reward_pool", "fp8", "report_of", "restore", "step_cache"]
