"""Paths on command lines."""

from argparse import Action
from pathlib import Path

from prfl_engine.bounds import check_path


class Place(Action):
    """An option or argument that is a path. UserError, by its name, for text that cannot be one."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not self.const:
            check_path(values, option_string or self.metavar)
        setattr(namespace, self.dest, values)


def a_path(text: str) -> Path:
    """A path, as `type` of argparse, whose parser exits with 2 for text that cannot be one."""
    check_path(text, "path")
    return Path(text)
