"""A prediction as text of 100 columns, and as JSON."""

import itertools
from dataclasses import dataclass

from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.entries import COUNTED, ESTIMATED, MEASURED, PREDICTED, Phase
from prfl_engine.planner.machine import NOT_COUNTED, Machine, machine
from prfl_engine.planner.predict import Memory
from prfl_engine.planner.rates import Measured
from prfl_engine.planner.seconds import ASSUMED
from prfl_engine.planner.sharded import Exchanged, Shards
from prfl_engine.planner.subject import Subject
from prfl_engine.planner.timing import Times

WIDTH = 100
SHORT = {"graded step": "graded", "flow matching": "flow m.", "optimizer": "optim.", "validation": "valid.",
         "checkpoint": "save", REWARD_TRAINING: "reward"}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What `prfl plan` says of one configuration on one kind of machine."""

    subject: Subject
    gpu: Machine
    shards: Shards
    limit: float  # bytes that the peak may have
    memory: Memory
    times: Times
    exchanged: Exchanged
    price: float | None = None  # of a GPU hour
    measured: Measured | None = None  # what the rates of the machine are from

    @property
    def fits(self) -> bool:
        """Whether the largest phase is within the limit."""
        return self.memory.peak.bytes <= self.limit

    def text(self) -> str:
        """For a terminal."""
        parts = (self._head(), self._phases(), self._categories(), self._basis(), self._seconds(),
                 self.measured_lines())
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def _head(self) -> list[str]:
        s, grid = self.subject.setup, "x".join(map(str, self.subject.setup.latent[2:]))
        where = f"{self.shards.size} x {self.gpu.name}"
        if self.shards.many:
            where += f" (sharded over {self.shards.shards}, {self.shards.sequence} for a sample)"
        lines = wrapped(
            f"{self.subject.model}, latents {grid}, {s.tokens // s.latent[0]:,} tokens,"
            f" micro-batches of {s.latent[0]}, on {where}"
        )
        runs = itertools.groupby(kind.name for kind in self.memory.kinds)
        blocks = ", ".join(f"{len(list(run))} x {name}" for name, run in runs)
        if self.memory.plan is not None:
            blocks += f"; reward model: {self.memory.reward.name}"
        lines.append(f"recompute: {blocks}")
        return lines + [f"assumed: {line}" for line in self.subject.assumed]

    def _phases(self) -> list[str]:
        peak, limit = self.memory.peak, self.limit / 1e9
        heads = "".join(f"{how:>11}" for how in (COUNTED, PREDICTED, ESTIMATED))
        lines = [f"{'memory of a GPU, GB (10^9 bytes)':34}{'total':>9}{heads}"]
        for phase in self.memory.phases:
            parts = (phase.bytes, phase.of(COUNTED), phase.of(PREDICTED), phase.of(ESTIMATED))
            total, *rest = (f"{size / 1e9:.2f}" for size in parts)
            lines.append(f"  {phase.name:32}{total:>9}" + "".join(f"{x:>11}" for x in rest))
        left = limit - peak.bytes / 1e9
        verdict = f"fits, {left:.2f} GB left" if self.fits else f"DOES NOT FIT, {-left:.2f} GB too much"
        lines.append(f"largest: {peak.name}, {peak.bytes / 1e9:.2f} of {limit:.2f} GB: {verdict}")
        host = self.memory.host
        each = ", ".join(f"{e.category} {e.bytes / 1e9:.1f}" for e in host.entries)
        lines += wrapped(f"host memory of a process: {host.bytes / 1e9:.1f} GB ({each})")
        lines.append(f"a checkpoint on disk: {self.memory.disk / 1e9:.1f} GB, counted")
        return lines

    def columns(self) -> list[tuple[str, Phase]]:
        """Phases by short names."""
        found = {}
        for phase in self.memory.phases:
            name = "rollout" if phase.name.startswith("rollout, worst") else SHORT.get(phase.name, phase.name)
            if not phase.name.startswith("rollout, mean"):
                found[name] = phase
        return list(found.items())

    def _categories(self) -> list[str]:
        columns = self.columns()
        lines = [f"{'by category, GB':26}" + "".join(f"{name:>8}" for name, _ in columns)]
        for category, sizes in self.categories():
            cells = (f"{size / 1e9:8.2f}" if size else f"{'':8}" for size in sizes)
            lines.append(f"  {category:24}" + "".join(cells).rstrip())
        return lines

    def categories(self) -> list[tuple[str, list[int]]]:
        """Bytes of every category in every one of `columns`."""
        columns = [phase.entries for _, phase in self.columns()]
        names = dict.fromkeys(e.category for entries in columns for e in entries)
        return [(n, [sum(e.bytes for e in entries if e.category == n) for entries in columns]) for n in names]

    def known(self) -> list[tuple[str, str, str]]:
        """(category, how it is known, from what), the first of every category and way."""
        found: dict[tuple[str, str], str] = {}
        for phase in (*self.memory.phases, self.memory.host):
            for e in phase.entries:
                if e.basis:
                    found.setdefault((e.category, e.how), e.basis)
        return [(category, how, basis) for (category, how), basis in found.items()]

    def _basis(self) -> list[str]:
        lines = ["how each is known"]
        lines += [f"  {category:24}{how:11}{basis}" for category, how, basis in self.known()]
        return lines + wrapped(f"not counted: {NOT_COUNTED}")

    def _seconds(self) -> list[str]:
        t = self.times
        heads = f"{'seconds':>10}{'share':>8}{'waits':>9}{'model PFLOP':>14}{'MFU':>7}"
        lines = [f"{'an optimizer step, predicted':28}{heads}"]
        for row in t.rows:
            mfu = f"{row.flops / row.seconds / t.peak:7.0%}" if row.flops else ""
            cells = f"{row.seconds:10.2f}{row.seconds / t.seconds:8.0%}{row.waits:9.2f}"
            lines.append(f"  {row.phase:26}{cells}{row.flops / 1e15:14.2f}{mfu}".rstrip())
        flops = sum(row.flops for row in t.rows)
        lines.append(f"  {'all':26}{t.seconds:10.2f}{'':17}{flops / 1e15:14.2f}{t.mfu:7.0%}")
        sizes = ((name, size / 1e9) for name, size in self.exchanged._asdict().items() if size)
        if each := ", ".join(f"{name.replace('_', ' ')} {size:.2f}" for name, size in sizes):
            lines += wrapped(f"GB that a rank receives in a pass: {each}")
        if t.graded or t.trained:
            an_hour = 3600 / t.per_sample
            what = f"{t.graded:g} graded" if t.graded else f"{t.trained:g}"
            line = f"{what} samples a step: {t.per_sample:.2f} s each, {an_hour:.0f} an hour"
            line += f", {t.per_sample * t.gpus:.1f} GPU seconds each"
            if self.price is not None:
                line += f", at a price of {self.sample_price:.4f} each"
            lines.append(line)
        return lines + wrapped(f"seconds predicted, FLOPs and GB received counted; rates: {self.basis}")

    @property
    def basis(self) -> str:
        """What seconds are predicted from: rates, and what is assumed."""
        setup = self.subject.setup
        found = [self.gpu.basis, *([ASSUMED] if setup.chunk else [])]
        if setup.rollout.cache > 0 and setup.reward_blocks:
            found.append("rollout.cache: as if no step were skipped")
        return "; ".join(found)

    def measured_lines(self) -> list[str]:
        """Measured rates and steps; none without them."""
        return [] if self.measured is None else self.measured.text(machine(self.gpu.name).rates)

    @property
    def sample_price(self) -> float | None:
        """Of a sample; None where no price or no sample is known."""
        hours = self.times.per_sample * self.times.gpus / 3600
        return None if self.price is None or hours == float("inf") else hours * self.price

    def values(self) -> dict:
        """For JSON: bytes, seconds and FLOPs, with how each is known."""
        t, s = self.times, self.subject.setup

        def phase(p: Phase) -> dict:
            return {"name": p.name, "bytes": p.bytes, "entries": [e._asdict() for e in p.entries]}

        return {
            "model": self.subject.model, "latent": list(s.latent), "tokens": s.tokens, "gpu": self.gpu.name,
            "gpus": self.shards.size, "parallel": self.shards._asdict(),
            "assumed": list(self.subject.assumed), "limit": self.limit, "fits": self.fits,
            "peak": self.memory.peak.name, "phases": [phase(p) for p in self.memory.phases],
            "host": phase(self.memory.host), "checkpoint": self.memory.disk,
            "policies": [described(k.policy, k.name) for k in self.memory.kinds],
            "collectives": self.exchanged._asdict(), "seconds": [row._asdict() for row in t.rows],
            "step": t.seconds, "mfu": t.mfu, "graded": t.graded,
            "trained": t.trained,
            "per_sample": t.per_sample if t.graded or t.trained else None,
            "how": {
                "bytes": "see entries", "seconds": PREDICTED, "collectives": COUNTED, "flops": COUNTED,
                "rates": MEASURED if self.measured else "assumed", "checkpoint": COUNTED,
            },
            "price": self.sample_price, "rates": self.gpu.rates._asdict(), "basis": self.basis,
            "measured": None if self.measured is None else {
                "rates": self.measured.rates, "steps": [s._asdict() for s in self.measured.steps]
            },
        }  # fmt: skip


def described(policy: BlockPolicy, name: str) -> dict:
    """A policy as model.recompute takes it, with its name."""
    return {"name": name, "keep": sorted(policy.keep), "offload": sorted(policy.offload)}


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """The text in lines of WIDTH columns."""
    lines: list[str] = []
    for word in text.split():
        if not lines or len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append((indent if lines else "") + word)
        else:
            lines[-1] += f" {word}"
    return lines
