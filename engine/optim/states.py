"""What a saved optimizer state must look like before any of it is used."""

import math
from typing import Any

from torch import Tensor, strided


def check_groups(saved: object, own: list[dict], counters: dict[str, type]) -> None:
    """ValueError unless `saved` is a state_dict with groups as large as `own`, and with these counters."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(saved.get("state"), dict):
        raise ValueError("optimizer: want a dict with a dict 'state' and a list 'param_groups'")
    listed = [g.get("params") if isinstance(g, dict) else None for g in groups]
    sizes = [len(p) if isinstance(p, list) else None for p in listed], [len(g["params"]) for g in own]
    if sizes[0] != sizes[1]:
        raise ValueError(f"optimizer: got groups of {sizes[0]} parameters, want {sizes[1]}")
    unknown = saved["state"].keys() - set(range(sum(sizes[1])))
    if unknown:
        raise ValueError(f"optimizer: got a state of parameter {min(map(str, unknown))}, which there is not")
    for i, group in enumerate(groups):
        for name, kind in counters.items():
            value = group.get(name)
            if type(value) is not kind or (kind is int and value < 0):
                raise ValueError(f"group {i}: {name}: got {value!r}, want a number of updates")


def check_like(name: str, got: object, want: Any) -> None:
    """ValueError, which names the first difference, unless `got` is built of dicts, lists and tensors as
    `want` is: equal keys and lengths, and tensors of the same shape, dtype and strides, on any device."""
    if _summary(got) != _summary(want):
        raise ValueError(f"{name}: got {_summary(got)}, want {_summary(want)}")
    if isinstance(want, Tensor):
        if got.layout != strided or got.stride() != want.stride():
            raise ValueError(
                f"{name}: got a tensor with another layout in memory, want strides {want.stride()}"
            )
        return
    for key, value in want.items() if isinstance(want, dict) else enumerate(want):
        check_like(f"{name}: {key}", got[key], value)


def check_moments(name: str, state: dict[str, Any]) -> None:
    """ValueError, which names the first, unless the floating-point numbers of a parameter's state, or of its
    blocks, are finite, and none but the first moments (exp_avg) negative. Reads every value once."""
    for key, value in state.items():
        if isinstance(value, list):
            for i, block in enumerate(value):
                check_moments(f"{name}: {key}: {i}", block)
        elif value.is_floating_point() and value.numel():
            low, high = (bound.item() for bound in value.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{name}: {key}: holds NaN or infinity, want finite numbers")
            if low < 0 and key != "exp_avg":
                raise ValueError(f"{name}: {key}: holds {low:.3g}, want no negative numbers")


def _summary(value: object) -> str:
    """A value in short: the keys of a dict, the length of a list, dtype and shape of a tensor."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(sorted(map(str, value)))}"
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
