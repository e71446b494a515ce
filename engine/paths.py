"""Paths that users name."""

import os
import stat
from argparse import Action, ArgumentTypeError
from pathlib import Path

from prfl_engine.bounds import check_path
from prfl_engine.errors import UserError

KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}  # fmt: skip
"""What is no regular file, by its mode."""


def check_file(path: str | Path, want: str) -> Path:
    """The path, if a regular file is there."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, want {want}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {reason(error)}, want {want}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is {KINDS[stat.S_IFMT(mode)]}, want {want}")
    return path


def reason(error: Exception) -> str:
    """What an error says, in one line without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


class Place(Action):
    """An option or argument that is a path. UserError, by its name, for text that cannot be one."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not self.const:
            check_path(values, option_string or self.metavar)
        setattr(namespace, self.dest, values)


def a_path(text: str) -> Path:
    """A path, as `type` of argparse, whose parser exits with 2 for text that cannot be one."""
    try:
        check_path(text, "path")
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None  # of a ValueError the parser would say a_path alone
    return Path(text)
