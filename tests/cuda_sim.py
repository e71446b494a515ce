"""Builds csrc/cuda as host C++ on csrc/sim, with g++ and NVIDIA's headers, as a Python module."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NAME = "prfl_sim"
# As nvcc does by default, products and sums contract to fused ones.
FLAGS = ["-std=c++17", "-O1", "-mfma", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-DCUSIM"]
# What every source includes and no fault is planted in: compiled once, since it is half of a source's time.
COMMON = '#include "cusim.h"\n#include "hopper.h"\n#include <stdexcept>\n#include <string>\n'


def sources() -> list[str]:
    """The .cu files of csrc/sources.txt."""
    lines = (line.split() for line in (CSRC / "sources.txt").read_text().splitlines())
    return [words[1] for words in lines if words[:1] == ["cuda"]]


def headers() -> Path | None:
    """The folder of cuda_bf16.h: of pip's wheels, or beside the nvcc on PATH."""
    wheels = find_spec("nvidia")
    places = [Path(p, "cu13/include") for p in wheels.submodule_search_locations] if wheels else []
    if nvcc := shutil.which("nvcc"):
        places += [Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    return next((p for p in places if (p / "cuda_bf16.h").exists()), None)


def missing() -> str:
    """Why the simulation cannot be built here; "" if it can."""
    if shutil.which("g++") is None:
        return "no g++"
    if find_spec("pybind11") is None:
        return "pybind11 is missing"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing"
    return "" if headers() else "no CUDA headers: no nvcc on PATH, no nvidia-cuda-runtime wheel"


def _compile(source: Path, target: Path, common: Path | None = None) -> Path:
    """The object of a source that includes `common` first, or without it a precompiled header."""
    import pybind11

    includes = [CSRC, CSRC / "sim", pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *(f"-I{path}" for path in includes), "-isystem", headers()]
    kind = ["-x", "c++-header"] if common is None else ["-include", common, "-x", "c++", "-c"]
    subprocess.run([*command, *kind, source, "-o", target], check=True)
    return target


def _load(objects: list[Path], part: str) -> ModuleType:
    """The module of some objects, linked once. part: of its name, since pybind11 returns the module that it
    has of a name."""
    library = objects[0].with_name(part) / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_name(f".{library.name}-{os.getpid()}")
        subprocess.run(["g++", "-shared", *objects, "-o", made], check=True)
        os.replace(made, library)
    name = f"{part}.{NAME}"
    loader = ExtensionFileLoader(name, str(library))
    module = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


@cache
def _objects() -> dict[str, Path]:
    """{source: object}, compiled once for every state of the sources, whoever asks."""
    files = sorted(p for part in ("*.*", "cpu/*.h", "cuda/**/*.*", "sim/*") for p in CSRC.glob(part))
    state = repr([FLAGS, COMMON, headers(), *((p.name, p.read_text()) for p in files)])
    folder = ROOT / "build" / f"sim-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    names = [*sources(), "sim/bind.cpp", "sim/cusim.cpp", "sim/hopper.cpp"]
    objects = {name: folder / f"{name.replace('/', '-')}.o" for name in names}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            common = folder / "common.h"
            common.write_text(COMMON)
            _compile(common, folder / "common.h.gch")
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda item: _compile(CSRC / item[0], item[1], common), objects.items()))
            _load(list(objects.values()), "whole")
            (folder / "done").touch()
    return objects


def build() -> ModuleType:
    """The module of csrc/sim/bind.cpp."""
    return _load(list(_objects().values()), "whole")


def build_faulty(folder: Path, victim: str, file: str, old: str, new: str) -> ModuleType:
    """The same with one text of csrc/cuda/`file` replaced, which the source `victim` includes or is. It is
    compiled once, like the others."""
    text = (CSRC / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} holds {text.count(old)} times {old!r}, want it once"
    fault = hashlib.sha256(repr((victim, file, old, new)).encode()).hexdigest()[:16]
    faulty = next(iter(_objects().values())).with_name(f"faulty-{fault}.o")
    if not faulty.exists():
        shutil.copytree(CSRC / "cuda", folder / "cuda")
        (folder / "cuda" / file).write_text(text.replace(old, new))
        made = faulty.with_name(f".{faulty.name}-{os.getpid()}")
        _compile(folder / victim, made, faulty.with_name("common.h"))
        os.replace(made, faulty)
    # First, so that of functions that several objects hold the linker takes the faulty one.
    others = (o for name, o in _objects().items() if name != victim)
    return _load([faulty, *others], f"faulty_{fault}")


class Watched:
    """A built module whose launches may access nothing but the tensors that they are given.

    traffic: (bytes read, bytes written) of every tensor of the last call, by its keyword; launches: the
    shapes of what it launched.
    """

    def __init__(self, module: ModuleType):
        self.module = module
        self.traffic: dict[str, tuple[int, int]] = {}
        self.launches: list[tuple[int, ...]] = []

    def give(self, a) -> None:
        """Allow a tensor to the next launch."""
        if a is not None and a.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
            self.module.watch(a.data_ptr(), span * a.element_size())

    def __getattr__(self, name: str):
        found = getattr(self.module, name)
        if not name.endswith(("_forward", "_backward", "_step")):
            return found

        def launch(**arguments):
            try:
                found(**arguments)
                views = {word: a for word, a in arguments.items() if isinstance(a, tuple)}
                self.traffic = {word: self.module.traffic(a[1]) for word, a in views.items()}
                self.launches = self.module.launches()
            finally:
                self.module.unwatch()

        return launch
