"""What PRFL refuses of a configuration alone, in training and in its plan."""

from prfl_engine.config import Config
from prfl_engine.errors import check
from prfl_engine.guidance import check_training
from prfl_engine.official_yaml import OFFICIAL

STORED = "lora.base e4m3 or lora.base_place host, whose weights come and go"


def check_prfl(config: Config) -> None:
    """UserError for settings that a generator cannot be trained with."""
    if config.optim.in_backward:
        _check_one_backward(config)
    _check_start(config)
    _check_idle(config)
    _check_losses(config)
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
    check_reward_storage(c)


def check_reward_storage(config: Config) -> None:
    """UserError for what does not go with a reward model whose frozen matrices come and go."""
    ok = not config.reward.storage.apart or not config.model.compile
    want = "false with reward.weights e4m3 or reward.place host, whose weights come and go"
    check(ok, "model.compile", True, want)


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


def _check_losses(config: Config) -> None:
    """UserError for what the losses do not use, or do not go with."""
    c, loss, r = config, config.loss, config.rollout
    if loss.weight == 0:
        want = "with loss.weight 0"
        c.reward.check_one(want)
        check(r.lora is None, "rollout.lora", r.lora, f"null {want}")
        if c.reward.path is None:
            want += " and no reward.path"
            check(not c.reward.storage.e4m3, "reward.weights", "e4m3", f"same {want}")
            check(not c.reward.storage.host, "reward.place", "host", f"device {want}")
    stop, many = c.train.stop_anchor, c.model.boundary
    want = "null without loss.anchor and loss.anchor_every"
    check(stop is None or loss.anchored, "train.stop_anchor", stop, want)
    if loss.anchored and c.lora.rank:
        place = loss.anchor_place
        check(place == "device", "loss.anchor_place", place, "device with LoRA: there is no copy")
    ok = many is None or c.lora.rank > 0 or not loss.anchored
    check(ok, "model.boundary", many, "null, or LoRA, with loss.anchor: the copy is of one model")
    if loss.split:
        want = "same with loss.split: weights are quantised once in an optimizer step"
        check(r.precision == "same", "rollout.precision", r.precision, want)


def unused(config: Config) -> list[str]:
    """What to note of fields that are set and that a training of a generator does not read: a line for each
    reason. Such a run may be another one with a single field changed, as a control without rewards is."""
    c, loss, r = config, config.loss, config.rollout
    drift = "rollout.probe_every rollout.max_drift"
    found = {}
    if loss.weight == 0:
        found["with loss.weight 0"] = _set(
            c, f"rollout.mode rollout.pool rollout.pool_place rollout.stride rollout.range rollout.samples "
            f"rollout.one_index rollout.precision rollout.cache rollout.cuda_graph {drift} rollout.guidance "
            "rollout.seeds rollout.seeds_step rollout.seeds_keep chain.window chain.detach_input "
            "chain.guidance chain.unconditional loss.form loss.target",
        )  # fmt: skip
    else:
        if r.mode == "fresh" and r.precision == "same" and r.cache == 0 and r.lora is None:
            found["with fresh rollouts by the generator as it is"] = _set(c, drift)
        if c.chain.window == 1:
            found["with chain.window 1"] = _set(c, "chain.detach_input")
        if loss.form != "hinge":
            found[f"with loss.form {loss.form}"] = _set(c, "loss.target")
    for more in c.reward.more:
        if more.form != "hinge" and more.target != type(more).target:
            found[f"with its form {more.form}"] = [f"reward.more {more.name}.target"]
    if c.lora.rank == 0:
        official = list(c.lora.targets) == OFFICIAL["lora.targets"]  # of its files and train.compat, always
        found["with lora.rank 0"] = _set(c, "lora.alpha" if official else "lora.alpha lora.targets")
    return [f"{' and '.join(names)}: {why} this changes nothing" for why, names in found.items() if names]


def _set(config: Config, names: str) -> list[str]:
    """Those of the fields SECTION.FIELD that have another value than by default."""
    usual, found = Config(), []
    for name in names.split():
        section, field = name.split(".")
        own, default = (getattr(getattr(c, section), field) for c in (config, usual))
        found += [name] if own != default else []
    return found


def _check_start(config: Config) -> None:
    """UserError for chains that one model alone cannot begin."""
    high, start = config.rollout.sigma_range[1], config.rollout.start
    want = f"data: model.path is one model, used below rollout.sigma_range's {high:g} alone"
    check(config.model.boundary is not None or high == 1 or start == "data", "rollout.start", start, want)
