"""What PRFL refuses of a configuration alone, in training and in its plan."""

from prfl_engine.config import Config
from prfl_engine.errors import check
from prfl_engine.guidance import check_training


def check_prfl(config: Config) -> None:
    """UserError for settings that a generator cannot be trained with."""
    if config.optim.in_backward:
        _check_one_backward(config)
    _check_start(config)
    _check_idle(config)
    if config.loss.weight > 0:
        check_training(config)


def _check_one_backward(config: Config) -> None:
    """UserError where an optimizer step has more than one backward."""
    c, want = config, "with optim.in_backward: one backward in an optimizer step"
    both = c.loss.weight > 0 and c.loss.sft_weight > 0
    check(not both or c.loss.alternate, "loss.alternate", c.loss.alternate, f"true or one loss alone {want}")
    check(not c.loss.split, "loss.split", True, f"false {want}")
    if c.loss.weight > 0:
        check(c.rollout.samples == 1, "rollout.samples", c.rollout.samples, f"1 {want}")
        check(c.chain.window == 1, "chain.window", c.chain.window, f"1 {want}")
        halves = c.chain.unconditional
        check(halves == "detached", "chain.unconditional", halves, f"detached {want}")


def _check_idle(config: Config) -> None:
    """UserError for blocks that cannot wait on the host: those of a whole expert that is trained stay."""
    moves = config.lora.rank > 0 or not all(config.trained_experts or ())
    want = "device where both experts are trained whole: none of their blocks is frozen"
    check(config.model.idle == "device" or moves, "model.idle", config.model.idle, want)


def _check_start(config: Config) -> None:
    """UserError for chains that one model alone cannot begin."""
    high, start = config.rollout.sigma_range[1], config.rollout.start
    want = f"data: model.path is one model, used below rollout.sigma_range's {high:g} alone"
    check(config.model.boundary is not None or high == 1 or start == "data", "rollout.start", start, want)
