"""Packaging. `engine/` installs as prfl_engine, `kernels/` as prfl_kernels, `benchmarks/` as prfl_bench.

`kernels/` has no __init__.py on purpose: with one, anything started in the repository's root would
import that folder when it asks for Hugging Face's `kernels` package. A plain namespace folder on
sys.path gives way to an installed package of the same name.

prfl_kernels._C holds the compiled kernels of csrc/ (listed in csrc/sources.txt): those for the CPU
wherever there is a C++ compiler, those for CUDA where there is nvcc 12.4 or newer (CUDA_HOME, the pip
packages of the extra cuda-build, PATH, /usr/local/cuda). PRFL_BUILD_CUDA=1 insists on them, =0 leaves
them out. CXX is the C++ compiler, CXXFLAGS more flags for it.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "engine/__init__.py").read_text())[1]
TRITON = "triton; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"

CXX = shlex.split(os.environ.get("CXX", "g++"))
# gcc 12 warns of its own AVX-512 intrinsics (its bug 105593), and clang of the name of that warning.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall",
             "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # fmt: skip
MORE_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Code for the H100; the PTX is for what comes after it.
CUDA_ARCHITECTURES = {"sm_90a": "arch=compute_90a,code=sm_90a", "ptx_90": "arch=compute_90,code=compute_90"}


FOLDERS = {"engine": "prfl_engine", "kernels": "prfl_kernels", "benchmarks": "prfl_bench"}


def rooms(folder: str, package: str) -> list[str]:
    """The package of a folder and those of its rooms, which are the subfolders with an __init__.py."""
    inside = sorted(path.parent.name for path in (ROOT / folder).glob("*/__init__.py"))
    return [package, *(f"{package}.{name}" for name in inside)]


def sources(kind: str) -> list[list[str]]:
    """The entries of one kind in csrc/sources.txt, each split into words."""
    lines = (line.split("#")[0].split() for line in (CSRC / "sources.txt").read_text().splitlines())
    return [words[1:] for words in lines if words and words[0] == kind]


def version(command: list[str], pattern: str) -> tuple[int, ...]:
    """What a compiler says its version is; () if it cannot be run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = re.search(pattern, run.stdout)
    return tuple(int(n) for n in found[1].split(".")) if found else ()


def compiles(flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*CXX, *flags, "-c", source, "-o", Path(folder, "a.o")]
        return subprocess.run(command, capture_output=True).returncode == 0


def no_extension() -> str:
    """Why prfl_kernels._C cannot be built here; "" if it can."""
    if sys.platform != "linux":
        return f"it is written for Linux, this is {sys.platform}"
    found = version([*CXX, "-dumpfullversion", "-dumpversion"], r"([\d.]+)")
    if not found or (found < (9,) and "clang" not in CXX[0]):
        name = f"{CXX[0]} {'.'.join(map(str, found))}" if found else f"no {CXX[0]}"
        return f"it takes g++ 9 or newer, here is {name}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing (python3-dev)"
    return "" if find_spec("pybind11") else "pybind11 is missing"


def find_cuda() -> tuple[Path | None, Path | None, str]:
    """(nvcc, libcudart_static.a, "") or (None, None, why not)."""
    if os.environ.get("PRFL_BUILD_CUDA") == "0":
        return None, None, "PRFL_BUILD_CUDA=0 when it was installed"
    if not sources("cuda"):
        return None, None, "there are none"
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if (wheel := find_spec("nvidia")) is not None:
        homes += [Path(folder, "cu13") for folder in wheel.submodule_search_locations]
    if (path := shutil.which("nvcc")) is not None:
        homes.append(Path(path).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    why = "no nvcc 12.4 or newer was found when it was installed"
    for home in homes:
        nvcc = home / "bin/nvcc"
        found = version([str(nvcc), "--version"], r"release (\d+\.\d+)")
        libraries = [home / folder / "libcudart_static.a" for folder in ("lib64", "lib")]
        library = next((path for path in libraries if path.exists()), None)
        if found >= (12, 4) and library is not None:
            return nvcc, library, ""
        if found:
            what = "has no libcudart_static.a" if found >= (12, 4) else "is older than 12.4"
            why = f"{nvcc} {what}"
    return None, None, why


def fresh(target: Path, command: str) -> bool:
    """Whether target was made by this command from what it is made from now, as -MMD wrote down."""
    notes, depends = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and depends.exists() and notes.exists() and notes.read_text() == command):
        return False
    _, _, names = depends.read_text().replace("\\\n", " ").partition(":")
    made = target.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in names.split())


def compile_one(command: list, source: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    line = [*map(str, command), "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(CSRC / source)]
    line += ["-o", str(target)]
    if not fresh(target, shlex.join(line)):
        print(shlex.join(line), flush=True)
        subprocess.run(line, check=True)
        target.with_suffix(".cmd").write_text(shlex.join(line))
    return target


class Build(build_ext):
    """All objects at once on all cores, unchanged ones kept; then one link."""

    def build_extension(self, extension: Extension) -> None:
        nvcc, cudart, why = find_cuda()
        if nvcc is None and os.environ.get("PRFL_BUILD_CUDA") == "1":
            raise SystemExit(
                f"PRFL_BUILD_CUDA=1, but the CUDA kernels cannot be built: {why}; the packages of the extra "
                "[cuda-build] bring one, to be installed first, and this then with --no-build-isolation"
            )
        jobs = [*self.cuda_jobs(nvcc), *self.cpu_jobs(nvcc, why)]  # the longest first
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: compile_one(*job), jobs))
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["-ldl", "-lpthread"] if nvcc is None else [cudart, "-lrt", "-ldl", "-lpthread"]
        line = [*CXX, *MORE_FLAGS, "-shared", "-o", out, *objects, *libraries, "-Wl,--exclude-libs,ALL"]
        print(shlex.join(map(str, line)), flush=True)
        subprocess.run(line, check=True)

    def cpu_jobs(self, nvcc: Path | None, why: str):
        import pybind11

        x86 = platform.machine() in ("x86_64", "AMD64")
        wanted = [entry for entry in sources("isa") if x86 or not entry[1:]]
        isas = [entry for entry in wanted if compiles(entry[1:])]
        left_out = " ".join(name for name, *flags in wanted if [name, *flags] not in isas)
        have = [f"-DPRFL_HAVE_{name.upper()}" for name, *_ in isas]
        includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        built = " ".join(CUDA_ARCHITECTURES) if nvcc is not None else ""
        facts = [f'-DPRFL_ISAS_LEFT_OUT="{left_out}"']
        facts += [f'-DPRFL_CUDA_ARCHITECTURES="{built}"', f'-DPRFL_CUDA_REASON="{why}"']
        if nvcc is not None:
            facts += ["-DPRFL_CUDA", f"-I{nvcc.parent.parent / 'include'}"]
        for (source,) in sources("host"):
            yield [*CXX, *CXX_FLAGS, *MORE_FLAGS, *have, f"-I{CSRC}"], source, self.object(source)
        for name, *flags in isas:
            for (source,) in sources("kernel"):
                command = [*CXX, *CXX_FLAGS, *MORE_FLAGS, *flags, f"-DPRFL_ISA={name}", f"-I{CSRC}"]
                yield command, source, self.object(source, name)
        for (source,) in sources("python") + (sources("python_cuda") if nvcc is not None else []):
            # Binding code is neither hot nor quick to compile.
            yield [*CXX, *CXX_FLAGS, *MORE_FLAGS, "-O1", *includes, *facts], source, self.object(source)

    def cuda_jobs(self, nvcc: Path | None):
        if nvcc is None:
            return
        codes = [word for code in CUDA_ARCHITECTURES.values() for word in ("-gencode", code)]
        for (source,) in sources("cuda"):
            yield [nvcc, *NVCC_FLAGS, *codes, f"-I{CSRC}"], source, self.object(source)

    def object(self, source: str, isa: str = "host") -> Path:
        # pip gives a new build_temp every time; what is kept here is compiled once.
        kind = sys.implementation.cache_tag + "-sanitized" * any("-fsanitize" in flag for flag in MORE_FLAGS)
        return ROOT / "build" / f"objects-{kind}" / isa / f"{source}.o"


missing = no_extension()
if missing and os.environ.get("PRFL_BUILD_CUDA") == "1":
    raise SystemExit(f"PRFL_BUILD_CUDA=1, but prfl_kernels._C cannot be built: {missing}")
if missing:
    print(f"prfl: without compiled kernels, plain torch runs instead: {missing}", file=sys.stderr)

setup(
    name="prfl",
    version=VERSION,
    description="Process reward feedback learning for video diffusion transformers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[name for folder, package in FOLDERS.items() for name in rooms(folder, package)],
    package_dir={package: folder for folder, package in FOLDERS.items()},
    ext_modules=[] if missing else [Extension("prfl_kernels._C", [])],
    cmdclass={"build_ext": Build},
    install_requires=[
        "torch>=2.9",
        TRITON,
        "safetensors",
        "numpy",
        "PyYAML",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "pillow",
        "av",
    ],
    extras_require={
        # xformers asks for torch >= 2.10. FlashAttention 2 (flash-attn) has no wheel and compiles
        # for an hour, FlashAttention 3 is not on PyPI at all, and NVIDIA's apex is not the package
        # of that name there: none of the three is forced, `prfl doctor` says how to get each.
        "gpu": ["nvidia-ml-py", "xformers"],
        # nvcc without a CUDA toolkit; then PRFL_BUILD_CUDA=1 pip install --no-build-isolation
        "cuda-build": ["cuda-toolkit[nvcc,cudart,cccl]==13.0.*", "pybind11", "setuptools>=77"],
        "fa4": ["flash-attn-4>=4.0.0b1"],  # prereleases only, so the bound has to name one
        "wan": ["diffusers>=0.33", "transformers>=4.56", "ftfy"],
        "lora": ["peft"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],  # what `make docs` builds the pages with
        "lowmem": ["torchao"],  # the 8-bit numbers of optim.name=adamw8bit
        "dev": [
            "pytest", "pytest-xdist", "ruff", "hypothesis", "ninja", "pybind11", "diffusers", "peft",
        ],
    },
    entry_points={"console_scripts": ["prfl = prfl_engine.cli:main"]},
)
