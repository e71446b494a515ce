"""What nvcc makes of a file of csrc/cuda for sm_90a, for the ledger and for tests. Needs no GPU.

Registers, stack and instructions come from the cubin, widths of accesses from the PTX, where a pointer is
a member of the struct that is the kernel's first parameter. Kernels with warp-group products also have
the registers that their warp groups take and the cycles of their hot loop (timeline).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prfl_bench.ledger import sass, timeline

CSRC = Path(__file__).resolve().parents[2] / "csrc/cuda"
FLAGS = ["-std=c++17", "-O3", "-arch=sm_90a", "-Xptxas", "-v", f"-I{CSRC.parent}"]
OPCODES = (*sass.OPCODES, "UBLKCP", "LDSM", "USETMAXREG")

# In the order of the pointers in the launchers' structs.
POOL_FORWARD = "x u pooled lse scores top total acc"
POOL_BACKWARD = "x u dpooled scores lse delta dx part"
NORM_FORWARD = "x y gate scale shift total n quant mean rstd"
NORM_BACKWARD = "dn dsum x y gate scale mean rstd dx dy part"
QK_FORWARD = "q k weight_q weight_k out_q out_k quant_q quant_k rstd_q rstd_k cos sin"
QK_BACKWARD = "dout_q dout_k q k weight_q weight_k rstd_q rstd_k dq dk part cos sin"
SOLVER = "x x_last m0 m1 velocity columns x_next x_c m_t"
ATTENTION = "lse q_scale k_scale v_scale"  # q, k, v and out are reached by tensor maps, before these
NAMES = {
    "pool_forward": POOL_FORWARD, "pool_merge": POOL_FORWARD, "pool_backward": POOL_BACKWARD,
    "norm_forward_kernel": NORM_FORWARD, "norm_backward_kernel": NORM_BACKWARD,
    "qk_forward_kernel": QK_FORWARD, "qk_backward_kernel": QK_BACKWARD, "solver_step_kernel": SOLVER,
    "attention_hopper_kernel": ATTENTION,
}  # fmt: skip
# Offsets of pointers that do not stand at the struct's begin.
_OFFSETS = {
    "qk_forward_kernel": {"cos": 136, "sin": 144},
    "qk_backward_kernel": {"cos": 176, "sin": 184},
    "attention_hopper_kernel": {"lse": 512, "q_scale": 520, "k_scale": 528, "v_scale": 536},
}


class Code(NamedTuple):
    """The texts of a compiled file; bodies and entries by mangled name."""

    usage: str  # of registers and stack, from cuobjdump
    bodies: dict[str, str]  # machine code
    entries: dict[str, str]  # PTX
    messages: str  # of nvcc and ptxas


def absence() -> str:
    """Why the CUDA kernels cannot be compiled here; "" if they can."""
    if not CSRC.is_dir():
        return "the package was installed without its csrc"
    return "" if shutil.which("nvcc") else "no nvcc on PATH"


@cache
def build(source: str) -> Code:
    """csrc/cuda/`source`.cu, compiled once for a state of csrc and nvcc: the texts stay in build/nvcc.
    ValueError without nvcc, or if it fails."""
    if why := absence():
        raise ValueError(f"ledger: got {why}, want nvcc and csrc/cuda")
    file = CSRC.parents[1] / "build/nvcc" / f"{source}-{_state()}.json"
    if file.is_file():
        return Code(**json.loads(file.read_text()))
    made = _build(source)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
        json.dump(made._asdict(), part)
    os.replace(part.name, file)
    for old in set(file.parent.glob(f"{source}-*.json")) - {file}:
        old.unlink(missing_ok=True)
    return made


@cache
def _state() -> str:
    """A name for what a compilation depends on."""
    sources = sorted(p for p in CSRC.parent.rglob("*.*") if p.is_file())
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    text = repr([FLAGS, version, *((str(p), p.read_text()) for p in sources)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(source: str) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, f"{source}.cubin")
        command = ["nvcc", *FLAGS, "-cubin", "-keep", "-keep-dir", folder, str(CSRC / f"{source}.cu")]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"ledger: nvcc failed: {done.stderr.strip().splitlines()[:1]}")
        usage = sass._run("cuobjdump", "-res-usage", str(made))
        code = sass.disassembled(made)
        ptx = made.with_suffix(".ptx").read_text()
    bodies = re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.section|^\t\.section|\Z)", code, re.M | re.S)
    entries = re.findall(r"\.entry (\w+)\((.*?)(?=^\.(?:visible|entry)|\Z)", ptx, re.M | re.S)
    return Code(usage, dict(bodies), dict(entries), done.stderr)


@cache
def compiled(source: str) -> dict[str, dict]:
    """{kernel with its template arguments, as c++filt writes it: the facts} of csrc/cuda/`source`.cu."""
    code, found = build(source), {}
    used = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for mangled, *numbers in re.findall(used, code.usage):
        name, body = demangled(mangled), code.bodies[mangled]
        registers, stack, local = map(int, numbers)
        counts = sass.instructions(body)
        threads = re.search(r"\.maxntid (\d+)", code.entries[mangled])
        found[name] = {
            "registers": registers, "stack": stack + local, "spills": counts["LDL"] + counts["STL"],
            "instructions": {op: n for op, n in counts.items() if op.split(".")[0] in OPCODES},
            "most_threads": int(threads[1]) if threads else 1024,
            "widths": _widths(name.split("<")[0], code.entries[mangled]),
        }  # fmt: skip
        if counts["HGMMA"] + counts["QGMMA"]:
            groups = re.findall(r"USETMAXREG\S*\s+(?:UP\w, )?(\w+)", body)
            found[name]["warp_groups"] = sorted(int(n, 0) for n in groups)
            found[name] |= timeline.facts(body, groups=found[name]["most_threads"] // 128 - 1, blocks=1)
    return found


def demangled(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    plain = re.sub(r"\(anonymous namespace\)::|prfl::cuda::|(?<=>) (?=>)", "", done.stdout)
    return re.search(r"(\w+(?:<[^(]*>)?)\(", plain)[1]


def _widths(kernel: str, entry: str) -> dict[str, dict[str, dict[int, int]]]:
    """{argument: {"read" | "written": {bytes a thread: instructions}}}, the pointers being members of
    the struct that is the kernel's first parameter."""
    apart = _OFFSETS.get(kernel, {})
    begin = [name for name in NAMES[kernel].split() if name not in apart]
    offsets = {8 * i: name for i, name in enumerate(begin)} | {at: name for name, at in apart.items()}
    body = _named_members(entry[entry.index("{") :])
    pointers = ", ".join(f".param .u64 .ptr .align 1 p{at}" for at in offsets)
    found = sass.accesses(f".entry k({pointers}) {body}")
    names = list(offsets.values())
    return {names[i]: {side: dict(n) for side, n in found[i].items()} for i in found if i >= 0}


def _named_members(body: str) -> str:
    """PTX in which every member of the first parameter is a parameter of its own, p OFFSET."""
    bases = {name: 0 for name in re.findall(r"mov\.b64 *\t(%rd\d+), \w+_param_0;", body)}
    for target, source, step in re.findall(r"add\.s64 *\t(%rd\d+), (%rd\d+), (-?\d+);", body):
        if source in bases:
            bases[target] = bases[source] + int(step)

    known = "|".join((*map(re.escape, bases), r"\w+_param_0"))
    member = re.compile(rf"(?<=\[)({known})(?:\+(-?\d+))?(?=\])")
    lines = []
    for line in body.splitlines():
        if "ld.param" in line:
            line = member.sub(lambda m: f"p{bases.get(m[1], 0) + int(m[2] or 0)}", line)
            if pair := re.match(r"(.*)ld\.param\.v2\.[bu]64 *\t\{(%rd\d+), (%rd\d+)\}, \[p(\d+)\];", line):
                lines += [f"ld.param.u64 \t{pair[2 + i]}, [p{int(pair[4]) + 8 * i}];" for i in range(2)]
                continue
        lines.append(line)
    return "\n".join(lines)
