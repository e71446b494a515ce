"""Frozen dataclasses from YAML files and overrides: names and types of all fields are checked, and bounds
when they are built (prfl_engine.bounds).

A mistake raises UserError, one line that names the field or the file.
"""

import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from prfl_engine.bounds import UNIONS, describe, hints
from prfl_engine.errors import UserError, check, show
from prfl_engine.inputs import read_lines

MAX_NODES = 10_000
"""Values of the longest configuration, those that aliases repeat included."""


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, no dates, no key twice, and no more values than MAX_NODES."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            line = event.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: got the tag {event.tag}, want plain values")
        return super().compose_node(parent, index)

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values with those that aliases repeat")
        return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out. YAMLError for a key that is there twice, and
    for a node that holds itself."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until its own are counted
        parts = node.value if isinstance(node.value, list) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in parts if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = next((k for k in keys if keys.count(k) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice} twice, want it once")
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _parse(text: str) -> Any:
    """The value of a YAML text; ValueError, with the reason in one line, where there is none."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> dict:
    """The mapping of sections in a file; {} for an empty one."""
    text = "\n".join(read_lines(path, "a YAML configuration"))
    try:
        values = _parse(text)
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    values = {} if values is None else values
    check(isinstance(values, dict), str(path), type(values).__name__, "a mapping of sections")
    return {key: {} if section is None else section for key, section in values.items()}


def override(values: dict, item: str) -> None:
    """Set in a mapping of sections what `item` says: section.field=value, the value in YAML."""
    name, equals, text = item.partition("=")
    parts = name.split(".")
    check(bool(equals) and len(parts) == 2, "override", item, "section.field=value")
    try:
        value = _parse(text)
    except ValueError as error:
        raise UserError(f"{name}: got {show(text)}, want a YAML value ({error})") from None
    section = values.setdefault(parts[0], {})
    check(isinstance(section, dict), parts[0], section, "a mapping of fields")
    section[parts[1]] = value


def from_dict(cls: type, values: Any, name: str) -> Any:
    """Build the dataclass cls from a mapping, checking names and types of all fields."""
    check(isinstance(values, dict), name or "config", values, "a mapping of fields")
    kinds = hints(cls)
    for key in values:
        if key not in kinds:
            where = f"{name}.{key}" if name else str(key)
            raise UserError(f"{where}: unknown field, want one of {', '.join(kinds)}")
    found = {}
    for key, value in values.items():
        where = f"{name}.{key}".lstrip(".")
        try:
            found[key] = _coerce(kinds[key], value, where)
        except _Misfit:
            raise UserError(f"{where}: got {show(value)}, want {describe(kinds[key])}") from None
    return cls(**found)


class _Misfit(Exception):
    """A value is not of a field's type."""


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`; numbers written as text ("5e-6") or as whole floats (5.) are taken."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _coerce(args[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value, name)
    if origin in UNIONS:
        for option in args:
            try:
                return _coerce(option, value, name)
            except _Misfit:
                continue
    elif kind is type(None) and value is None:
        return None
    elif origin is Literal and isinstance(value, str) and value in args:
        return value
    elif origin is tuple:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, list | tuple) and (args[-1] is ... or len(value) == len(args)):
            each = args[:1] * len(value) if args[-1] is ... else args
            return tuple(_coerce(a, v, name) for a, v in zip(each, value, strict=True))
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    elif kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(kind, value)
    raise _Misfit


def _number(kind: type, value: int | float | str) -> int | float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Misfit from None
    if kind is float:
        return number
    if not number.is_integer():
        raise _Misfit
    return value if isinstance(value, int) else int(number)


def plain(value: Any) -> Any:
    """`value` with lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
