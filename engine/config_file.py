"""Frozen dataclasses from YAML files and overrides: names and types of all fields are checked.

A mistake raises UserError, one line that names the field or the file.
"""

import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from prfl_engine.errors import UserError, check


def read_yaml(path: Path) -> dict:
    """The mapping of sections in a file; {} for an empty one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, want a YAML configuration")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    check(isinstance(values, dict), str(path), type(values).__name__, "a mapping of sections")
    for key, section in values.items():
        if section is None:
            values[key] = {}
    return values


def override(values: dict, item: str) -> None:
    """Set in a mapping of sections what `item` says: section.field=value, the value in YAML."""
    name, equals, text = item.partition("=")
    parts = name.split(".")
    check(bool(equals) and len(parts) == 2, "override", item, "section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{name}: got {text!r}, want a YAML value") from None
    section = values.setdefault(parts[0], {})
    check(isinstance(section, dict), parts[0], section, "a mapping of fields")
    section[parts[1]] = value


def from_dict(cls: type, values: Any, name: str) -> Any:
    """Build the dataclass cls from a mapping, checking names and types of all fields."""
    check(isinstance(values, dict), name or "config", values, "a mapping of fields")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            where = f"{name}.{key}" if name else str(key)
            raise UserError(f"{where}: unknown field, want one of {', '.join(known)}")
    return cls(**{k: _coerce(hints[k], v, f"{name}.{k}".lstrip(".")) for k, v in values.items()})


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`; numbers written as text ("5e-6") or as whole floats (5.) are taken."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return from_dict(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(option, value, name)
            except UserError:
                continue
        raise UserError(f"{name}: got {value!r}, want {' or '.join(map(_describe, args))}")
    if kind is types.NoneType and value is None:
        return None
    if origin is Literal and value in args:
        return value
    if origin is tuple:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, list | tuple):
            if args[-1] is ...:
                return tuple(_coerce(args[0], v, name) for v in value)
            if len(value) == len(args):
                return tuple(_coerce(a, v, name) for a, v in zip(args, value, strict=True))
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and (kind is float or number.is_integer()):
            return kind(number) if kind is float or not isinstance(value, int) else value
    raise UserError(f"{name}: got {value!r}, want {_describe(kind)}")


def _describe(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, args))
    if typing.get_origin(kind) is tuple:
        inner = _describe(args[0])
        return f"a list of {inner}" if args[-1] is ... else f"a list of {len(args)} {inner}"
    if kind is types.NoneType:
        return "null"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        kind, str(kind)
    )


def plain(value: Any) -> Any:
    """`value` with lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
