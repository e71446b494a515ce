"""What the compiler made of a Triton kernel: the facts of a cubin and of its PTX, without a GPU.

`compile_calls` compiles every kernel that a function launches, for sm_90a, in exactly the
specialisation that the launcher asks for: the function gets meta tensors and a launch becomes a
warm-up. `facts` reads the result with the cuobjdump and nvdisasm that Triton's wheel carries.
Occupancy is counted as NVIDIA's cuda_occupancy.h does.
"""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from prfl_bench.ledger import timeline
from prfl_kernels.jit import INTERPRETED, triton

CAPABILITY = 90
# Of an SM of an H100: registers, given to warps in units of 256 from four equal parts; warps; blocks;
# bytes of shared memory, of which every block costs 1 KiB more and which come in units of 128.
REGISTERS, REGISTER_UNIT, PARTS = 65536, 256, 4
WARPS, BLOCKS = 64, 32
SHARED, SHARED_SYSTEM, SHARED_UNIT = 233472, 1024, 128
# Counted instructions: tensor-core products (Q: fp8, M at the end: below warp-group size), TMA,
# spills, asynchronous copies, and global accesses.
OPCODES = (
    "HGMMA", "QGMMA", "HMMA", "QMMA", "UTMALDG", "UTMASTG", "LDL", "STL", "LDGSTS", "LDG", "STG",
    "ATOM", "ATOMG", "RED", "REDG",
)  # fmt: skip
WIDE = 16  # bytes a thread, the most that one global access moves


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    tile: dict[str, int]
    compiled: Any  # triton.compiler.CompiledKernel


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm: Triton's own, or the one on PATH."""
    spec = find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec else Path(name)
    path = str(own) if own.is_file() else shutil.which(name)
    if path is None:
        raise ValueError(f"ledger: got no {name}, want it in Triton's wheel or on PATH")
    return path


def occupancy(registers: int, threads: int, shared: int) -> tuple[int, list[str]]:
    """(resident blocks on an SM, what limits them), of registers a thread and bytes of shared memory."""
    warps = -(-threads // 32)
    by_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = {
        "registers": REGISTERS // PARTS // by_warp * PARTS // warps if registers else BLOCKS,
        "shared": SHARED // (-(-shared // SHARED_UNIT) * SHARED_UNIT + SHARED_SYSTEM),
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    blocks = min(limits.values())
    return blocks, [name for name, limit in limits.items() if limit == blocks]


def accesses(ptx: str) -> dict[int, dict[str, Counter]]:
    """{pointer parameter: {"read" | "written": {bytes a thread: instructions}}} of a kernel's PTX.

    Parameters are numbered among the pointers. An access belongs to the parameter that its address
    is computed from; -1 where that is not one alone.
    """
    entry = ptx[ptx.index(".entry") :]
    pointers = re.findall(r"\.param [^,()]*\.ptr[^,()]* (\w+)", entry[: entry.index("{")])
    sources: dict[str, set[str]] = {}
    for target, rest in re.findall(r"^\s*(?:@!?%p\d+ )?[a-z][\w.:]* *\t?(%rd\d+), (.*);", entry, re.M):
        found = re.findall(r"%rd\d+", rest) + [p for p in re.findall(r"\[(\w+)\]", rest) if p in pointers]
        sources.setdefault(target, set()).update(found)

    def origin(register: str) -> int:
        seen, queue = set(), [register]
        while queue:
            for name in sources.get(queue.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    queue.append(name)
        roots = [i for i, name in enumerate(pointers) if name in seen]
        return roots[0] if len(roots) == 1 else -1

    found: dict[int, dict[str, Counter]] = {}
    plain = r"\b(ld|st)\.global([\w.:]*)[^\[;]*\[ *(%rd\d+)"
    for op, suffix, register in re.findall(plain, entry):
        vector, bits = re.search(r"\.v(\d)", suffix), re.search(r"\.[bfsu](\d+)", suffix)
        width = int(vector[1] if vector else 1) * int(bits[1]) // 8
        side = "read" if op == "ld" else "written"
        found.setdefault(origin(register), {}).setdefault(side, Counter())[width] += 1
    copies = r"cp\.async\.c[ag]\.shared\.global[^\[;]*\[[^\]]*\], *\[ *(%rd\d+)[^\]]*\], *(0x[0-9a-f]+|\d+)"
    for register, width in re.findall(copies, entry):
        found.setdefault(origin(register), {}).setdefault("read", Counter())[int(width, 0)] += 1
    return found


def wide_share(counts: dict) -> float:
    """Share of the bytes that move with 16 bytes a thread, of {bytes a thread: instructions}; 0 of none."""
    sizes = {int(width): int(width) * number for width, number in counts.items()}
    return sum(b for width, b in sizes.items() if width >= WIDE) / max(1, sum(sizes.values()))


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"ledger: {name} failed: {(done.stderr or done.stdout).strip().splitlines()[:1]}")
    return done.stdout


def instructions(sass: str) -> Counter:
    """How often each opcode stands in nvdisasm's text; LDG, STG and LDGSTS of 16 bytes also as X.128."""
    found: Counter = Counter()
    for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass):
        opcode = text.split(".")[0]
        found[opcode] += 1
        if opcode in ("LDG", "STG", "LDGSTS") and ".128" in text:
            found[f"{opcode}.128"] += 1
    return found


def disassembled(file: Path) -> str:
    """The machine code of a cubin with its encoding. -ndf omits an analysis of branches, which the text does
    not show. nvdisasm takes half as long as compiling, so Triton's cache holds what it has printed."""
    words = "nvdisasm", "-ndf", "-c", "-hex"
    if triton is None:
        return _run(*words, str(file))
    key = repr((triton.__version__, words)).encode() + file.read_bytes()
    cache = triton.runtime.cache.get_cache_manager(hashlib.sha256(key).hexdigest())
    held = cache.get_file("kernel.sass")
    return Path(held or cache.put(_run(*words, str(file)), "kernel.sass", binary=False)).read_text()


def facts(launch: Launch) -> dict:
    """Registers, spills, shared memory, occupancy, instructions and access widths of one launch."""
    own = {"kernel": launch.kernel, "grid": list(launch.grid), "tile": launch.tile}
    return own | _facts(launch.compiled)


@contextmanager
def _cubin(compiled: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        yield file


@cache
def resources(compiled: Any) -> dict:
    """What a compiled kernel takes of an SM: registers, stack, shared memory, resident blocks. Takes
    cuobjdump a hundredth of the time that nvdisasm takes for the rest of `facts`; a kernel that spills has
    a stack."""
    metadata = compiled.metadata
    with _cubin(compiled) as file:
        usage = _run("cuobjdump", "-res-usage", str(file))
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if used is None:
        raise ValueError(f"ledger: got no resource usage of {metadata.name} from cuobjdump")
    registers, stack, static, local = map(int, used.groups())
    # cuobjdump counts the 1 KiB that the system keeps for every block.
    shared = max(0, static - SHARED_SYSTEM) + metadata.shared
    threads = 32 * metadata.num_warps
    required = re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"])
    threads = max(threads, int(required[1])) if required else threads  # warp specialisation adds some
    blocks, limits = occupancy(registers, threads, shared)
    return {
        "threads": threads, "stages": metadata.num_stages, "registers": registers, "stack": stack + local,
        "shared": shared, "blocks": blocks, "limited_by": limits,
    }  # fmt: skip


@cache
def _facts(compiled: Any) -> dict:
    """Of a compiled kernel, which Triton makes once for all launches with its specialisation."""
    with _cubin(compiled) as file:
        code = disassembled(file)
    used, counts = resources(compiled), instructions(code)
    signature = compiled.src.signature
    names = [name for name, kind in signature.items() if str(kind).startswith("*")]
    found = accesses(compiled.asm["ptx"])
    named = {
        name: {side: dict(widths) for side, widths in found[i].items()}
        for i, name in zip_longest(range(max(found, default=-1) + 1), names, fillvalue="scratch")
        if i in found
    }
    times = {}
    if used["blocks"] and counts["HGMMA"] + counts["QGMMA"]:
        times = timeline.facts(code, used["threads"] // 128, used["blocks"])
    return times | used | {
        "spills": counts["LDL"] + counts["STL"],
        "instructions": {name: counts[name] for name in counts if name.split(".")[0] in OPCODES},
        "descriptors": [name for name, kind in signature.items() if "tensordesc" in str(kind)],
        "widths": named,
        "unattributed": {side: dict(widths) for side, widths in found.get(-1, {}).items()},
    }  # fmt: skip


class _Hopper:
    """The little of a driver that compiling needs."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _meta(a: Any) -> Any:
    """A fake tensor of any device, which has no data_ptr, as a meta tensor."""
    if isinstance(getattr(a, "base", None), FakeTensor):  # a tensor descriptor
        return dataclasses.replace(a, base=_meta(a.base))
    if not isinstance(a, FakeTensor):
        return a
    with unset_fake_temporarily():
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")


def compile_calls(call: Callable[[], Any]) -> list[Launch]:
    """Every launch that call() makes, compiled for sm_90a and not run."""
    if triton is None:
        raise ValueError("ledger: got no Triton, want it installed")
    if INTERPRETED:
        raise ValueError("ledger: got TRITON_INTERPRET=1, want a process without it")
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    plain = JITFunction.run

    def run(self, *arguments, grid, warmup, **keywords):
        arguments = [_meta(a) for a in arguments]
        compiled = plain(self, *arguments, grid=grid, warmup=True, **keywords)
        tile = {k: v for k, v in keywords.items() if k.startswith("BLOCK")}
        found.append(Launch(self.fn.__name__, () if callable(grid) else tuple(grid), tile, compiled))
        return compiled

    triton.runtime.driver.set_active(_Hopper())  # for good: this process is there to compile
    JITFunction.run = run
    try:
        call()
    finally:
        JITFunction.run = plain
    return found
