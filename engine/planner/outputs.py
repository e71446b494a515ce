"""What `prfl plan` prints and writes, from a cache where it has been made before.

An entry's name is a hash of everything that it depends on: the configuration, its overrides and options, what
was found of models and data, measured rates and costs, the sources of the engine and its kernels, and the
versions of Python and torch. So no entry can be stale; what changes has another name. Entries lie in
$XDG_CACHE_HOME/prfl/plan (~/.cache/prfl/plan), the newest KEEP of them.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

import prfl_engine
import prfl_kernels
from prfl_engine.bounds import check_path
from prfl_engine.config import load_config, read_config
from prfl_engine.errors import check
from prfl_engine.files import write_whole
from prfl_engine.inputs import check_out
from prfl_engine.metrics import note
from prfl_engine.planner import rates
from prfl_engine.planner.command import Options, machine_of, predict, subject_of
from prfl_engine.planner.report import Prediction

KEEP = 200
SUFFIX = {"html": ".html", "picture": ".png"}


def folder() -> Path:
    """Where entries lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prfl" / "plan"


def check_name(option: str, name: str) -> Path:
    """A file to write. UserError for another suffix, and for a folder that is not here."""
    check_path(name, f"--{option}")
    path, suffix = Path(name), SUFFIX[option]
    check(path.suffix == suffix, f"--{option}", name, f"a name that ends with {suffix}")
    check(path.parent.is_dir() and not path.is_dir(), f"--{option}", name, "a name in a folder that is here")
    check_out(path.parent, f"--{option}")
    return path


def sources() -> str:
    """A hash of the sources of the engine and its kernels."""
    found = hashlib.sha256()
    for package in (prfl_engine, prfl_kernels):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def key(path: str, overrides: Sequence[str], options: Options, searching: bool) -> str:
    """The name of an entry. UserError where the configuration is a mistake that is seen without dry runs."""
    gpu, count = machine_of(options)
    config, _ = read_config(path, overrides, count)
    found = [
        Path(path).stem, config.to_yaml(), tuple(overrides), options, searching, gpu, sources(),
        subject_of(config, path, count, options), platform.python_version(), torch.__version__,
        os.environ.get("PRFL_KERNELS", ""),
    ]  # fmt: skip
    if searching:  # where it says which overrides change the file
        found.append(Path(path).read_text())
    if options.rates is not None:
        found.append(rates.read(options.rates))
    if config.model.costs is not None and Path(config.model.costs).is_file():
        found.append(Path(config.model.costs).read_text())
    return hashlib.sha256(repr(found).encode()).hexdigest()


class Outputs:
    """The outputs of one command: "text" and "json" of a prediction or a search, "html" and "picture" of a
    prediction, or of the last row of a search."""

    def __init__(self, path: str, overrides: Sequence[str], options: Options, searching: bool, cached: bool):
        """cached: whether the cache is read and written."""
        self.path, self.overrides, self.options, self.searching = path, tuple(overrides), options, searching
        load_config(path, overrides, world=machine_of(options)[1])  # names keys without meaning, once
        self.key = key(path, overrides, options, searching) if cached else None

    def __call__(self, name: str) -> bytes:
        """An output, UTF-8 or PNG."""
        make: dict[str, Callable[[], bytes]] = {
            "text": lambda: self._made.text().encode(),
            "json": lambda: json.dumps(self._made.values(), indent=2).encode(),
            "html": self._html, "picture": self._picture,
        }  # fmt: skip
        if self.key is None:
            return make[name]()
        entry = folder() / f"{self.key}.{name}"
        if entry.is_file():
            return entry.read_bytes()
        made = make[name]()
        self._write(entry, made)
        return made

    @cached_property
    def _made(self):
        if not self.searching:
            return predict(self.path, self.overrides, self.options)
        from prfl_engine.planner.pareto import search

        return search(self.path, self.overrides, self.options)

    @property
    def _shown(self) -> tuple[Prediction, Prediction]:
        """The prediction of a page or picture, and that of the paper's settings on as many GPUs."""
        from prfl_engine.planner.official import official

        if not self.searching:
            return self._made, official(self.path, self.overrides, self.options)
        overrides, row = self._made.rows[-1]
        gpus, nodes = row.shards.size, None
        if self.options.nodes is not None:
            nodes = max(1, gpus // row.gpu.per_node)
        options = self.options._replace(gpus=gpus, nodes=nodes)
        return row, official(self.path, (*self.overrides, *overrides), options)

    def _html(self) -> bytes:
        from prfl_engine.planner.page import html

        return html(*self._shown, self._made if self.searching else None).encode()

    def _picture(self) -> bytes:
        from prfl_engine.planner.picture import draw

        return draw(*self._shown)

    @staticmethod
    def _write(entry: Path, content: bytes) -> None:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_whole(entry, content)
            entries = sorted(entry.parent.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
            for old in entries[KEEP:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            note(f"the plan is not cached: {error}")
