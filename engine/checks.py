"""What PRFL refuses of a configuration alone, in training and in its plan."""

from prfl_engine.config import Config
from prfl_engine.errors import check
from prfl_engine.guidance import check_training

STORED = "lora.base e4m3 or lora.base_place host, whose weights come and go"


def check_prfl(config: Config) -> None:
    """UserError for settings that a generator cannot be trained with."""
    if config.optim.in_backward:
        _check_one_backward(config)
    _check_start(config)
    _check_idle(config)
    check_storage(config)
    storage, want = config.lora.storage, "with lora.rank 0, which trains the weights"
    check(config.lora.rank > 0 or not storage.e4m3, "lora.base", "e4m3", f"same {want}")
    check(config.lora.rank > 0 or not storage.host, "lora.base_place", "host", f"device {want}")
    if config.loss.weight > 0:
        check_training(config)


def check_storage(config: Config) -> None:
    """UserError for what does not go with frozen matrices that come and go (memory.frozen)."""
    c = config
    check_base_idle(c)
    if c.lora.storage.apart:
        want = f"with {STORED}"
        check(not c.model.compile, "model.compile", True, f"false {want}")
        check(not c.rollout.cuda_graph, "rollout.cuda_graph", True, f"false {want}")
        check(c.rollout.precision == "same", "rollout.precision", c.rollout.precision, f"same {want}")
    if c.reward.storage.apart:
        want = "false with reward.weights e4m3 or reward.place host, whose weights come and go"
        check(not c.model.compile, "model.compile", True, want)


def check_base_idle(config: Config) -> None:
    """UserError for idle experts whose matrices are stored apart, so that nothing is left to wait."""
    idle = config.model.idle
    ok = idle == "device" or not config.lora.storage.apart
    check(ok, "model.idle", idle, f"device with {STORED}")


def check_stored(config: Config, why: str) -> None:
    """UserError for frozen matrices that are stored apart, which `why` rules out."""
    c = config
    check(c.lora.base == "same", "lora.base", c.lora.base, f"same {why}")
    check(c.lora.base_place == "device", "lora.base_place", c.lora.base_place, f"device {why}")
    check(c.reward.weights == "same", "reward.weights", c.reward.weights, f"same {why}")
    check(c.reward.place == "device", "reward.place", c.reward.place, f"device {why}")


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
