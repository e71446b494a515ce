"""What lets modules of a checkout of HY-Video-PRFL be imported where its packages are not installed."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch


class Dict(dict):
    """A mapping whose keys are attributes, as EasyDict and OmegaConf have it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__


def attributes(value: Any) -> Any:
    """A mapping with all mappings in it as Dict."""
    return Dict({k: attributes(v) for k, v in value.items()}) if isinstance(value, dict) else value


class StandIns(MetaPathFinder, Loader):
    """Modules for packages that are not installed; whatever is imported from them is an empty class."""

    NAMES = "easydict", "einops", "omegaconf", "decord", "sklearn", "torchvision", "imageio", "flash_attn"
    """The packages that its trainings import, and whose contents are not used here."""
    CLASSES = {"EasyDict": Dict, "InterpolationMode": types.SimpleNamespace(BICUBIC=3)}

    def __init__(self, *names: str):
        self.names = names or self.NAMES

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """A stand-in for one of these packages, or of NAMES, that nothing else has found."""
        known = name.partition(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """An empty module whose every attribute is a class."""
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return self.CLASSES.get(name) or type(name, (), {})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def standing_in(*names: str) -> Iterator[None]:
    """Inside it these packages can be imported, there or not; afterwards nothing else finds a stand-in."""
    finder = StandIns(*names)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if getattr(m, "__loader__", None) is finder]:
            del sys.modules[name]


class Torch:
    """torch as a module of the checkout sees it, with some functions replaced."""

    def __init__(self, **replaced: Any):
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
