"""Triton's tile choices: the candidates of `prfl tune`, and which are to become the constants."""

from functools import cache

from prfl_bench import tune
from prfl_bench.accept.costs import TRITON
from prfl_bench.accept.row import FAILED, RAN, REFUSED, Context, Outcome, Row
from prfl_kernels import jit

MODEL, TOKENS, SMALL_TOKENS = "14B", 32760, 40
# Kernels by what a step spends in them.
GROUPS = {
    "attention": ("attention forward", "attention keys", "attention queries"),
    "norms": ("add_norm", "qk_norm_rope"),
    "others": ("reward_pool", "bias_gelu", "attention_fp8"),
}
WORTH = 0.02  # a candidate becomes the constant if it is faster by more than that


@cache
def choices(small: bool) -> dict[str, tuple]:
    """{name: what `tune.choices` gives} of every choice; in the small form of one tiny launch a kernel."""
    models, tokens = (["1.3B"], SMALL_TOKENS) if small else ([MODEL], TOKENS)
    found = {
        f"{one.kernel} {one.key}": (name, bind, one) for name, bind, one in tune.choices(models, [tokens], 1)
    }
    if not small:
        return found
    kernels: dict[str, str] = {}
    for name, (_, _, one) in found.items():
        kernels.setdefault(one.kernel, name)
    return {name: found[name] for name in kernels.values()}


def names(device: str, group: str) -> list[str]:
    if jit.absence(device):
        return [""]
    return [name for name in choices(device == "cpu") if name.startswith(GROUPS[group])] or [""]


def run(context: Context) -> Outcome:
    """Seconds of every candidate of a choice; the refused ones give another result or do not fit."""
    if not context.part:
        why = jit.absence(context.device)
        return Outcome(REFUSED, f"Triton {why}" if why else "no choice of these kernels here")
    _, bind, one = choices(context.small)[context.part]
    timer = (lambda call: 1.0) if context.small else tune.device_seconds
    times = tune.measure(bind(context.device), one, timer)
    ran = {candidate: seconds for candidate, seconds in times.items() if seconds is not None}
    if one.default not in ran:
        return Outcome(FAILED, f"the default {one.default} does not run")
    best = min(ran, key=ran.__getitem__)
    gain = ran[one.default] / ran[best] - 1
    kept = best if gain > WORTH else one.default
    rows = [{"tile": list(c), "ms": None if t is None else 1e3 * t} for c, t in times.items()]
    told = (
        f"default {one.default}"
        if kept == one.default
        else f"{best} is {100 * gain:.0f} % faster than {one.default}"
    )
    values = {
        "kernel": one.kernel,
        "key": list(one.key),
        "default": list(one.default),
        "best": list(kept),
        "rows": rows,
    }
    return Outcome(RAN, told, values | {"timed": not context.small})


def row(group: str) -> Row:
    count = {"attention": 6, "norms": 20, "others": 8}[group]
    return Row(
        f"tiles/{group}",
        run,
        count * 4 * (TRITON + 1),
        4,
        parts=lambda device: names(device, group),
        environment={"TRITON_INTERPRET": "1"},
    )
