"""What a kernel's hot loop costs on the pipes of an H100, from its machine code, without a GPU.

A trip of the loop by one warp takes each pipe of its quarter of an SM some cycles: the tensor cores (2048
multiply-adds a cycle and SM in 16 bits, 1024 in tf32, 4096 in 8 bits), the issue slot (one instruction a
cycle), the special functions (4 lanes a cycle: exponentials) and the half-rate integer and comparison pipe
(16 lanes). Warps of one quarter add up, so the ratios tell which pipe binds when everything overlaps;
timeline says what does. Memory is not counted. Rates: CUDA C++ Programming Guide, arithmetic throughput at
9.0.
"""

import re
from collections import Counter
from typing import NamedTuple

MUFU_CYCLES, ALU_CYCLES = 8, 2  # of a warp
ALU = (
    "FMNMX", "F2FP", "F2F", "FSEL", "FSETP", "SEL", "ISETP", "PLOP3", "LOP3", "SHF", "PRMT", "LEA", "IADD3",
    "VIADD",
)  # fmt: skip
WGMMA = re.compile(r"([HQ])GMMA\.(\d+)x(\d+)x(\d+)(\.F32\.TF32)?")
_LINE = re.compile(
    r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?);"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/)?)",
    re.M,
)


class Instruction(NamedTuple):
    text: str
    control: int = 0  # of the encoding's upper half, where nvdisasm -hex prints it


class Nest(NamedTuple):
    """The hot loop, and what stands before and after it in a loop around it that has products of its own."""

    loop: list[Instruction]
    before: list[Instruction]
    after: list[Instruction]


def tensor_cycles(text: str) -> float:
    """Cycles of the tensor cores for one instruction of a warp group; 0 if it is no product."""
    product = WGMMA.search(text)
    if product is None:
        return 0.0
    kind, m, n, k, tf32 = product.groups()
    return int(m) * int(n) * int(k) / (4096 if kind == "Q" else 1024 if tf32 else 2048)


def cycles(loop: list[str]) -> dict[str, float]:
    """Cycles of each pipe for one warp's trip through a loop; for `tensor`, of its warp group."""
    counts = Counter(opcode(text) for text in loop)
    return {
        "tensor": sum(map(tensor_cycles, loop)),
        "issue": len(loop),
        "mufu": counts["MUFU"] * MUFU_CYCLES,
        "alu": sum(counts[name] for name in ALU) * ALU_CYCLES,
    }


def opcode(text: str) -> str:
    return re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text)[1]


def hot_loop(sass: str) -> list[str]:
    """The loop with the most tensor-core work that has no loop with such work inside; empty without one."""
    code, _, loops = _loops(sass)
    inner, _ = _hottest(code, loops)
    return [code[i].text for i in sorted(inner)]


def nest(sass: str) -> Nest:
    """The hot loop and the loop around it on their shortest way with all products: no code that waits for a
    barrier, which stands behind and jumps back, and none that a branch can leave out."""
    code, labels, loops = _loops(sass)
    inner, ends = _hottest(code, loops)
    if not inner:
        return Nest([], [], [])

    def products(body: set[int]) -> set[int]:
        return {i for i in body if tensor_cycles(code[i].text)}

    def line(body: set[int], ends: set[int]) -> list[int]:
        last = min(i for i in ends if i > max(products(body)))
        found, i = [], min(body)
        while i <= last:
            found.append(i)
            to = _target(code[i].text, labels)
            i = to if to is not None and i < to <= last and not products(set(range(i, to))) else i + 1
        return found

    loop, before, after = line(inner, ends), [], []
    around = [(b, e) for b, e in loops if inner < b and products(inner) < products(b)]
    if around:
        outer = line(*min(around, key=lambda one: len(one[0])))
        before = [i for i in outer if i < loop[0]]
        after = [i for i in outer if i > loop[-1]]
    return Nest(*([code[i] for i in part] for part in (loop, before, after)))


def _hottest(code: list[Instruction], loops: list[tuple[set[int], set[int]]]) -> tuple[set[int], set[int]]:
    products = {i for i, one in enumerate(code) if tensor_cycles(one.text)}
    hot = [(body, ends) for body, ends in loops if body & products]
    inner = [one for one in hot if not any(other < one[0] for other, _ in hot)]
    return max(inner, key=lambda one: (len(one[0] & products), -len(one[0])), default=(set(), set()))


def _target(text: str, labels: dict[str, int]) -> int | None:
    """Where a branch goes; None of other instructions."""
    target = re.search(r"`\((\.L_x_\d+)\)", text) if opcode(text) == "BRA" else None
    return labels[target[1]] if target else None


def _loops(sass: str) -> tuple[list[Instruction], dict[str, int], list[tuple[set[int], set[int]]]]:
    """(all instructions, places of the labels, of every loop those that belong to it and those that jump back
    to its first one).

    A branch back to t from i makes a loop of everything that reaches i without passing t, unless the
    kernel's start does: blocks that wait for a barrier stand behind the code and jump back, too.
    """
    code, labels = [], {}
    for label, text, control in _LINE.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            code.append(Instruction(text, int(control or "0", 16)))
    before: list[list[int]] = [[] for _ in code]
    backward = []
    for i, (text, _) in enumerate(code):
        op, conditional = opcode(text), text.startswith("@") or re.search(r"BRA\S* !?U?P\d", text)
        target = _target(text, labels)
        if target is not None and target < len(code):
            before[target].append(i)
            if target <= i:
                backward.append((i, target))
        if (conditional or op not in ("BRA", "EXIT", "RET")) and i + 1 < len(code):
            before[i + 1].append(i)
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for last, first in backward:
        body, queue = {first}, [last]
        while queue:
            i = queue.pop()
            if i not in body:
                body.add(i)
                queue.extend(before[i])
        if 0 not in body:
            found, ends = loops.setdefault(first, (set(), set()))
            found.update(body)
            ends.add(last)
    return code, labels, list(loops.values())
