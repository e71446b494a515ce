"""What a kernel's hot loop costs on the pipes of an H100, from its machine code, without a GPU.

A trip of the loop by one warp takes each pipe of its quarter of an SM some cycles: the tensor cores
(2048 multiply-adds a cycle and SM in 16 bits, 4096 in 8), the issue slot (one instruction a cycle),
the special functions (4 lanes a cycle: exponentials) and the half-rate integer and comparison pipe (16
lanes). Warps of one quarter add up, so the ratios tell which pipe binds when everything overlaps.
Latencies and memory are not counted. Rates: CUDA C++ Programming Guide, arithmetic throughput at 9.0.
"""

import re
from collections import Counter

MUFU_CYCLES, ALU_CYCLES = 8, 2  # of a warp
ALU = (
    "FMNMX", "F2FP", "F2F", "FSEL", "FSETP", "SEL", "ISETP", "PLOP3", "LOP3", "SHF", "PRMT", "LEA", "IADD3",
    "VIADD",
)  # fmt: skip
WGMMA = re.compile(r"([HQ])GMMA\.(\d+)x(\d+)x(\d+)")


def cycles(loop: list[str]) -> dict[str, float]:
    """Cycles of each pipe for one warp's trip through a loop; for `tensor`, of its warp group."""
    counts = Counter(_opcode(text) for text in loop)
    products = WGMMA.findall(" ".join(loop))
    return {
        "tensor": sum(int(m) * int(n) * int(k) / (4096 if q == "Q" else 2048) for q, m, n, k in products),
        "issue": len(loop),
        "mufu": counts["MUFU"] * MUFU_CYCLES,
        "alu": sum(counts[name] for name in ALU) * ALU_CYCLES,
    }


def _opcode(text: str) -> str:
    return re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text)[1]


def hot_loop(sass: str) -> list[str]:
    """The loop with the most tensor-core work that has no loop with such work inside; empty if there is none.

    A branch back to t from i makes a loop of everything that reaches i without passing t, unless the
    kernel's start does: blocks that wait for a barrier stand behind the code and jump back, too.
    """
    code, labels = [], {}
    for label, text in re.findall(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?);)", sass, re.M):
        if label:
            labels[label] = len(code)
        else:
            code.append(text)
    before: list[list[int]] = [[] for _ in code]
    backward = []
    for i, text in enumerate(code):
        op, conditional = _opcode(text), text.startswith("@") or re.search(r"BRA\S* !?U?P\d", text)
        target = re.search(r"`\((\.L_x_\d+)\)", text) if op == "BRA" else None
        if target and labels[target[1]] < len(code):
            before[labels[target[1]]].append(i)
            if labels[target[1]] <= i:
                backward.append((i, labels[target[1]]))
        if (conditional or op not in ("BRA", "EXIT", "RET")) and i + 1 < len(code):
            before[i + 1].append(i)
    loops: dict[int, set[int]] = {}
    for last, first in backward:
        body, queue = {first}, [last]
        while queue:
            i = queue.pop()
            if i not in body:
                body.add(i)
                queue.extend(before[i])
        if 0 not in body:
            loops.setdefault(first, set()).update(body)

    products = {i for i, text in enumerate(code) if _opcode(text) in ("HGMMA", "QGMMA")}
    inner = [b for b in loops.values() if not any(other < b and other & products for other in loops.values())]
    best = max(inner, key=lambda body: (len(body & products), -len(body)), default=set())
    return [code[i] for i in sorted(best)]
