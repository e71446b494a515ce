"""Builds csrc/cuda as host C++ on csrc/sim, with g++ and NVIDIA's headers, as a Python module."""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


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
    return "" if headers() else "no CUDA headers: no nvcc on PATH, no nvidia-cuda-runtime wheel"


class Watched:
    """A built module whose launches may access nothing but the tensors that they are given.

    traffic: {argument: (bytes read, bytes written)} of the last launch, in the order of `_view` calls.
    """

    def __init__(self, module: ModuleType):
        self.module = module
        self.given: list[int] = []
        self.traffic: list[tuple[int, int]] = []

    def give(self, a) -> None:
        """Allow a tensor to the next launch."""
        self.given.append(0 if a is None else a.data_ptr())
        if a is not None and a.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
            self.module.watch(a.data_ptr(), span * a.element_size())

    def __getattr__(self, name: str):
        found = getattr(self.module, name)
        if not name.endswith(("_forward", "_backward", "_step")):
            return found

        def launch(*arguments):
            try:
                found(*arguments)
                count = self.module.traffic
                self.traffic = [(count(p, False), count(p, True)) if p else (0, 0) for p in self.given]
            finally:
                self.module.watch(0, 0)
                self.given = []

        return launch


def compiler(*includes: str | Path) -> list:
    """g++ as it compiles for cusim."""
    # As nvcc does by default, products and sums contract to fused ones.
    flags = ["-std=c++17", "-O2", "-mfma", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-DCUSIM"]
    flags += ["-Wno-psabi"]  # a note on parameters of 128 bytes' alignment
    return ["g++", *flags, *(f"-I{path}" for path in includes), "-isystem", headers()]


@cache
def simulation() -> ModuleType:
    """The module of all kernels, built once a process."""
    with TemporaryDirectory() as folder:
        return build(Path(folder), "prfl_sim")


def build(folder: Path, name: str, csrc: Path = CSRC) -> ModuleType:
    """The module `name`, made in `folder` from the sources in csrc."""
    import pybind11

    command = compiler(csrc, csrc / "sim", pybind11.get_include(), sysconfig.get_path("include"))
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    jobs = [(["-O1"], source) for source in ("bind_cuda.cpp", "sim/module.cpp")]
    jobs += [([], source) for source in ("sim/cusim.cpp", *sources())]

    def compiled(job) -> Path:
        options, source = job
        target = folder / (Path(source).name + ".o")
        line = [*command, *options, f"-DPRFL_MODULE={name}", "-x", "c++", "-c", csrc / source, "-o", target]
        subprocess.run(line, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    loader = ExtensionFileLoader(name, str(library))
    module = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
