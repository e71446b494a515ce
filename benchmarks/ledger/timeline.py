"""When the warp groups of an SM keep its tensor cores busy: a simulation of the machine code of a loop.

A warp group is one warp of a quarter of the SM; the four quarters do alike. A warp issues in order, not
before the stall cycles and the scoreboards that the compiler wrote into its instructions allow; one
instruction a cycle leaves a quarter. Products of all groups run one after another as they are issued, and a
wait for products ends when they do. A barrier of the whole block holds a group until all have come; one
that other threads only arrive at passes the turn to issue products from group to group. What is loaded is
there in time.

So a loop that waits for its scores, turns them into weights and only then issues the next product leaves
the tensor cores idle as long as no other group has products for them.
"""

from collections import deque
from typing import NamedTuple

from prfl_bench.ledger import loop_cycles
from prfl_bench.ledger.loop_cycles import (
    ALU,
    ALU_CYCLES,
    MUFU_CYCLES,
    Instruction,
    nest,
    opcode,
    tensor_cycles,
)

# Cycles from issue until a scoreboard tells that a result is there, about what dissections of such GPUs
# measure for shared memory, shuffles and special functions.
LATENCY = 24
_TRIPS = 4  # simulated twice, to leave out how the loop begins


def facts(body: str, groups: int, blocks: int) -> dict:
    """Of a kernel's machine code {"loop": cycles of the pipes for one warp's trip (loop_cycles), "cycles": of
    an SM with `blocks` blocks of so many warp groups that compute}; empty if it has no loop with products.

    Of the cycles `tensor` are those of the tensor cores for a trip of all groups, `trip` is from trip to
    trip, `first` the first one, with nothing to run beside, and `between` what a pass of a loop around the
    loop takes in addition to the trips.
    """
    found = nest(body)
    if not found.loop:
        return {}
    loop = loop_cycles.cycles([one.text for one in found.loop])
    trip, between = _steady(found.loop, groups, blocks), 0.0
    if found.after:
        between = _steady([*found.before, *found.loop * 2, *found.after], groups, blocks) - 2 * trip
    cycles = {
        "tensor": loop["tensor"] * groups * blocks, "trip": trip, "between": between,
        "first": run(found.loop, groups, blocks, 1),
    }  # fmt: skip
    return {"loop": loop, "cycles": cycles}


def _steady(loop: list[Instruction], groups: int, blocks: int) -> float:
    ends = [run(loop, groups, blocks, trips) for trips in (_TRIPS, 2 * _TRIPS)]
    return (ends[1] - ends[0]) / _TRIPS


class _Step(NamedTuple):
    """What the simulation has to know of an instruction."""

    waits: tuple[int, ...]  # for these scoreboards
    sets: tuple[int, ...]  # those of its result and of its operands
    stall: int
    barrier: str  # "turn", "block", or "" where it is among the threads of a warp group, which do alike
    passes: bool  # the turn to the next group
    left: int | None  # groups of products that may run on; None where none are waited for
    pipe: tuple[str, int] | None  # and cycles
    tensor: float  # cycles
    commits: bool  # a group of products


def _steps(loop: list[Instruction]) -> list[_Step]:
    has_turns = any("BAR.ARV" in one.text for one in loop)

    def barrier(text: str) -> str:
        if not text.startswith("BAR.SYNC"):
            return ""
        threads = text.split(",")[1].strip() if "," in text else ""
        if threads == "0x80":
            return ""
        return "turn" if threads and has_turns else "block"

    return [
        _Step(
            waits=tuple(i for i in range(6) if control >> 52 >> i & 1),
            sets=tuple(i for at in (46, 49) if (i := control >> at & 7) != 7),
            stall=max(1, control >> 41 & 15),
            barrier=barrier(text),
            passes=text.split()[text[0] == "@"].startswith("BAR.ARV"),
            left=int(text.split(",")[1], 0) if "WARPGROUP.DEPBAR" in text else None,
            pipe=_pipe(text),
            tensor=tensor_cycles(text),
            commits="gsb0" in text,
        )
        for text, control in loop
    ]


class _Group:
    def __init__(self, block: int, number: int):
        self.block, self.number = block, number
        self.place = 0  # of the next instruction
        self.ready = 0.0  # when it may issue
        self.scoreboards = [0.0] * 8
        self.products = [0.0]  # when the committed groups of products end
        self.end = 0.0  # of the last product issued
        self.barriers = 0  # of the block, passed
        self.turns: deque[float] = deque()  # given and not taken


class _Machine:
    def __init__(self, loop: list[Instruction], groups: int, blocks: int, trips: int):
        self.loop, self.size, self.count = _steps(loop), groups, trips * len(loop)
        self.groups = [_Group(b, g) for b in range(blocks) for g in range(groups)]
        self.free = {"issue": 0.0, "mufu": 0.0, "alu": 0.0, "tensor": 0.0}
        self.arrived: dict[tuple[int, int], list[float]] = {}
        for group in self.groups:
            if group.number == 0:
                group.turns.append(0.0)

    def earliest(self, group: _Group) -> float | None:
        """When the group's next instruction can issue; None while it waits for another group."""
        step = self.loop[group.place % len(self.loop)]
        when = max(group.ready, self.free["issue"])
        for i in step.waits:
            when = max(when, group.scoreboards[i])
        if step.barrier == "turn":
            return max(when, group.turns[0]) if group.turns else None
        if step.barrier == "block":
            arrivals = self.arrived.setdefault((group.block, group.barriers), [])
            if group.number not in (who for who, _ in arrivals):
                arrivals.append((group.number, when))
            return max(when, *(at for _, at in arrivals)) if len(arrivals) == self.size else None
        if step.left is not None:
            when = max(when, group.products[max(0, len(group.products) - 1 - step.left)])
        return max(when, self.free[step.pipe[0]]) if step.pipe else when

    def issue(self, group: _Group, when: float) -> None:
        step = self.loop[group.place % len(self.loop)]
        if step.barrier == "turn":
            group.turns.popleft()
        elif step.barrier == "block":
            group.barriers += 1
        elif step.passes:
            following = (group.number + 1) % self.size
            self.groups[group.block * self.size + following].turns.append(when)
        if step.pipe:
            self.free[step.pipe[0]] = when + step.pipe[1]
        if step.tensor:
            self.free["tensor"] = max(self.free["tensor"], when) + step.tensor
            group.end = self.free["tensor"]
            if step.commits:
                group.products.append(group.end)
        for i in step.sets:
            group.scoreboards[i] = when + LATENCY
        self.free["issue"] = when + 1
        group.ready = when + step.stall
        group.place += 1

    def run(self) -> float:
        last = None
        while waiting := [g for g in self.groups if g.place < self.count]:
            times = ((self.earliest(g), g is not last, i) for i, g in enumerate(waiting))
            ready = [found for found in times if found[0] is not None]
            if not ready:
                raise ValueError("ledger: got warp groups that wait for each other, want a loop that ends")
            when, _, i = min(ready)  # of two at the same time the one that has issued before
            last = waiting[i]
            self.issue(last, when)
        return max(max(g.ready, g.end) for g in self.groups)


def _pipe(text: str) -> tuple[str, int] | None:
    op = opcode(text)
    return ("mufu", MUFU_CYCLES) if op == "MUFU" else ("alu", ALU_CYCLES) if op in ALU else None


def run(loop: list[Instruction], groups: int, blocks: int, trips: int) -> float:
    """Cycles until `blocks` blocks of so many groups have gone through the loop so often."""
    return _Machine(loop, groups, blocks, trips).run()
