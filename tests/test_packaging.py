"""The packages' layout, who may import whom, and what pip is asked for."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"prfl_engine": "engine", "prfl_kernels": "kernels", "prfl_bench": "benchmarks"}
FILES = [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob("*.py"))]
# The rooms of the engine, bottom up: a room, or a file that stands in none, imports nothing that comes after
# it. What stands in one line knows nothing of each other. The kernels know nothing of the engine.
ROOMS = [
    {"errors", "__version__", "phases", "restarts", "official_keys"},
    {"bounds", "tensor_files", "shards"},
    {"paths"},
    {"inputs", "failures"},
    {"config_file", "config_models", "config_method", "official_yaml", "files", "gpu"},
    {"config", "seeds", "agree", "checksums"},
    {"interrupt", "metrics", "flow"},
    {"batch", "chain", "exposed"},
    {"model", "media"},
    {"memory", "data", "best_of"},
    {"guidance"},
    {"objectives", "checks"},
    {"optim", "micro_batches"},
    {"checkpoint_shards", "together"},
    {"parallel", "checkpoints"},
    {"rollout", "measurements"},
    {"patch"},
    {"planner", "resume", "validation"},
    {"build"},
    {"loop", "sample"},
    {"convert"},
    {"train", "train_reward"},
    {"encode"},
    {"demo", "tools"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level?) of every import; `from package import x` is package.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = {1: f"prfl_{path.parent.name}"}.get(node.level, "")
            base = ".".join(filter(None, (package, node.module)))
            if base in FOLDERS:
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                names = [base]
        else:
            continue
        found += [(name, id(node) not in lazy) for name in names]
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def test_imports_are_seen(tmp_path):
    file = tmp_path / "engine/x.py"
    file.parent.mkdir()
    file.write_text(
        "import torch.nn\nfrom prfl_engine import chain, flow\n"
        "from prfl_kernels.jit import wide\nfrom .data import A\n"
        "from . import data\ndef f():\n    import flash_attn\n"
    )
    assert imports(file) == [
        ("torch.nn", True),
        ("prfl_engine.chain", True),
        ("prfl_engine.flow", True),
        ("prfl_kernels.jit", True),
        ("prfl_engine.data", True),
        ("prfl_engine.data", True),
        ("flash_attn", False),
    ]


def room(path: Path) -> str:
    """The room of a file of the engine, or the file's own name where it stands in none."""
    first = path.relative_to(ROOT / "engine").parts[0]
    return first.removesuffix(".py")


def test_every_room_has_its_level():
    rooms = {room(path) for path in FILES if path.is_relative_to(ROOT / "engine")} - {"__init__"}
    assert rooms == LEVEL.keys() - {"__version__"}


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "engine")], ids=name)
def test_no_import_goes_up(path):
    here = room(path)
    for module, top in imports(path):
        root, *rest = module.split(".")
        assert root != "prfl_bench" or (here == "cli" and not top), module
        if root == "prfl_engine" and rest and here != "__init__" and rest[0] != here:
            assert LEVEL[rest[0]] < LEVEL[here], module


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "kernels")], ids=name)
def test_the_kernels_need_torch_and_triton_alone(path):
    for module, top in imports(path):
        root = module.split(".")[0]
        known = {"torch", "triton", "prfl_kernels", *sys.stdlib_module_names}
        assert root in known or (not top and "attention" in path.parts and root not in FOLDERS), module


@pytest.mark.parametrize("path", FILES, ids=name)
def test_packages_are_imported_by_their_installed_names(path):
    roots = {module.split(".")[0] for module, _ in imports(path)}
    assert not roots & {"engine", "kernels", "tests", "benchmarks"}


def test_no_module_is_named_after_the_standard_library():
    folders = ("engine", "kernels", "tests", "benchmarks")
    stems = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert not stems & (sys.stdlib_module_names - {"__init__", "__main__"})


def test_kernels_gives_way_to_an_installed_package_of_that_name(tmp_path):
    assert not (ROOT / "kernels/__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(tmp_path / "kernels/__init__.py")


def test_packages_import_from_another_folder(tmp_path):
    code = "import prfl_engine; print(prfl_engine.__version__)\nfrom prfl_kernels.norm.op import modulate"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+", run.stdout.strip())


USUAL = "/usr/local/cuda"


def run_setup(
    wanted: str = "kept", usual: str = "/nowhere", **environment: str
) -> subprocess.CompletedProcess:
    """Print what setup.py hands to setuptools, or another expression, without building anything; `usual` in
    place of USUAL, where this machine may have a toolkit."""
    code = (
        "import json, setuptools; kept = {}; setuptools.setup = lambda **k: kept.update(k)\n"
        "made = {'__file__': 'setup.py', 'kept': kept}\n"
        f"exec(compile(open('setup.py').read().replace({USUAL!r}, {usual!r}), 'setup.py', 'exec'), made)\n"
        f"print(json.dumps(eval({wanted!r}, made), default=str))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def setup_arguments(**environment: str) -> dict:
    run = run_setup(**environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_source_of_the_extension_is_listed_once():
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    entries = [words for words in lines if words and not words[0].startswith("#")]
    assert {words[0] for words in entries} <= {"isa", "host", "kernel", "python", "python_cuda", "cuda"}
    listed = [words[1] for words in entries if words[0] != "isa"]
    csrc = ROOT / "csrc"
    patterns = ("*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu")
    there = [path.relative_to(csrc).as_posix() for p in patterns for path in csrc.glob(p)]
    assert sorted(listed) == sorted(there)


def test_without_a_compiler_the_package_installs_and_says_so():
    run = run_setup(CXX="no-such-compiler")
    assert json.loads(run.stdout)["ext_modules"] == []
    assert "without compiled kernels" in run.stderr and "no no-such-compiler" in run.stderr
    run = run_setup(CXX="no-such-compiler", PRFL_BUILD_CUDA="1")
    assert run.returncode != 0 and "PRFL_BUILD_CUDA=1" in run.stderr


def toolkit(home: Path, version: str, library: str = "lib") -> Path:
    """A folder that looks like a CUDA toolkit, or like that of pip's wheels."""
    for folder in ("bin", library):
        (home / folder).mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    (home / library / "libcudart_static.a").touch()
    return nvcc


needs_shell = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux alone")


@needs_shell
def test_nvcc_is_found_where_it_is(tmp_path):
    """CUDA_HOME before pip's wheels before PATH before USUAL; what is too old is passed over and named."""
    wheel, home, old = tmp_path / "site/nvidia/cu13", tmp_path / "home", tmp_path / "old"
    nvccs = [toolkit(wheel, "13.0"), toolkit(home, "12.4", "lib64"), toolkit(old, "12.3")]

    def found(**given):
        run = run_setup("find_cuda()", PRFL_BUILD_CUDA="", **given)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    plain = {"CUDA_HOME": "", "PATH": "/nowhere", "PYTHONPATH": ""}
    site = plain | {"PYTHONPATH": str(tmp_path / "site")}
    assert found(**site | {"CUDA_HOME": str(home)})[0] == str(nvccs[1])
    assert found(**site | {"CUDA_HOME": str(old)})[:2] == [str(nvccs[0]), f"{wheel}/lib/libcudart_static.a"]
    if not has_nvcc_wheel():
        assert found(**plain | {"PATH": str(nvccs[1].parent)})[0] == str(nvccs[1])
        assert found(usual=str(home), **plain)[0] == str(nvccs[1])
        why = f"{nvccs[2]} is older than 12.4"
        assert found(**plain | {"CUDA_HOME": str(old)}) == [None, None, why]


def has_nvcc_wheel() -> bool:
    wheels = find_spec("nvidia")
    folders = wheels.submodule_search_locations if wheels else []
    return any(Path(folder, "cu13/bin/nvcc").exists() for folder in folders)


@needs_shell
@pytest.mark.skipif(has_nvcc_wheel(), reason="this environment has an nvcc")
@pytest.mark.skipif(find_spec("pybind11") is None or not shutil.which("g++"), reason="cannot build kernels")
def test_cuda_kernels_asked_for_without_nvcc_are_an_error_that_says_how(tmp_path):
    (tmp_path / "g++").symlink_to(shutil.which("g++"))
    environment = {**os.environ, "PRFL_BUILD_CUDA": "1", "PATH": str(tmp_path), "CUDA_HOME": ""}
    code = (
        f"source = open('setup.py').read().replace({USUAL!r}, '/nowhere')\n"
        "exec(compile(source, 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    arguments = ["build_ext", "-b", str(tmp_path / "b"), "-t", str(tmp_path / "t")]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert run.returncode != 0
    assert "cannot be built: no nvcc 12.4 or newer was found" in run.stderr
    assert "[cuda-build]" in run.stderr and "--no-build-isolation" in run.stderr


def test_pip_is_never_asked_for_apex():
    """PyPI's apex is an unrelated package."""
    found = setup_arguments()
    wanted = [*found["install_requires"], *sum(found["extras_require"].values(), [])]
    for file in ROOT.glob("requirements*.txt"):
        wanted += file.read_text().splitlines()
    assert not [line for line in wanted if re.match(r"\s*apex\b", line)]
    for file in (ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        if file.exists():
            assert not re.search(r"(pip3? install|\$\(PIP\))[^\n]*\sapex\b", file.read_text()), file


def test_requirements_are_exact_and_cover_what_the_package_needs():
    pins = {}
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
                package, _, version = line.partition("==")
                pins[package.lower()] = version
    found = setup_arguments()
    needed = [re.match(r"[\w-]+", r)[0].lower() for r in found["install_requires"]]
    makefile = (ROOT / "Makefile").read_text()
    for package in needed:
        assert package in pins or f"?= {package}==" in makefile, package
    assert found["package_dir"] == FOLDERS
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    names = {folder: package for package, folder in FOLDERS.items()}
    assert set(found["packages"]) == {r.replace(r.split(".")[0], names[r.split(".")[0]], 1) for r in rooms}
