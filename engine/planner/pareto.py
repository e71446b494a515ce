"""`prfl plan --search`: the fastest settings that fit on every number of GPUs.

Tried are all combinations of: ranks of a sample, copies of the weights, what blocks save, dtype of weights
and mode of the optimizer, fresh rollouts or chains that persist, graded steps of a rollout, resident weights,
fp8 rollouts. Everything else stays as configured. Bytes of blocks come from one dry run for every policy,
dtype and cut; the settings that win are predicted in full afterwards, and the next best is taken where they
do not fit.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prfl_engine.config import Config, RolloutConfig, load_config
from prfl_engine.errors import UserError
from prfl_engine.memory.policy import of_config
from prfl_engine.planner.command import Options, layout, machine_of, of_subject
from prfl_engine.planner.machine import Machine
from prfl_engine.planner.plan import Kind, make_kind
from prfl_engine.planner.predict import memory
from prfl_engine.planner.report import WIDTH, Prediction, wrapped
from prfl_engine.planner.setup import Setup
from prfl_engine.planner.sharded import Exchanged, Shards, exchanged_bytes
from prfl_engine.planner.standing import models_of
from prfl_engine.planner.subject import Subject, find
from prfl_engine.planner.timing import times
from prfl_kernels.attention.fp8 import HEAD_DIMS

MOST = 64  # GPUs, where --gpus does not say
AHEAD = 12  # candidates of a number of GPUs that are predicted in full before it is given up
FOR_ROLLOUTS = {"rollout.precision=fp8", "parallel.resident=true"}
POLICIES = (
    "model.recompute=none", "model.recompute=attention", "model.recompute=full",
    "model.recompute={keep: [], offload: [attention, input]}",
    "model.recompute={keep: [attention], offload: [input]}",
)  # fmt: skip
BRAIN = "model.weights_dtype=bfloat16"
OPTIMIZERS = (
    ("model.weights_dtype=float32",),
    (BRAIN, "optim.rounding=master"),
    (BRAIN, "optim.rounding=stochastic", "optim.name=adamw8bit"),
    (BRAIN, "optim.rounding=stochastic", "optim.offload=states"),
    (BRAIN, "optim.rounding=stochastic", "optim.offload=all"),
)
CHAINS = tuple(
    (f"rollout.mode={mode}", f"rollout.samples={k}") for mode in ("fresh", "persistent") for k in (1, 4)
)
Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """Settings, and what they are predicted at without a dry run of their own."""

    overrides: Overrides
    config: Config
    gpus: int
    seconds: float  # a graded sample
    bytes: int


@dataclass(frozen=True)
class Found:
    """The fastest settings of every number of GPUs that is faster than all smaller ones, in full."""

    rows: tuple[tuple[Overrides, Prediction], ...]
    neighbours: tuple[tuple[str, Candidate], ...]  # of the last row, with one setting changed
    tried: int

    def text(self) -> str:
        """For a terminal: a table, a line of overrides for each, and what other settings would change."""
        head = f"{'GPUs':>5}{'s a graded sample':>19}{'GPU s':>9}{'an hour':>9}"
        head += f"{'largest, GB':>13}{'host, GB':>10}"
        lines = [f"{self.tried:,} settings tried; predicted, fastest that fit:", head]
        for _, p in self.rows:
            t = p.times
            lines.append(
                f"{t.gpus:5}{t.per_sample:19.2f}{t.per_sample * t.gpus:9.1f}{3600 / t.per_sample:9.0f}"
                f"{p.memory.peak.bytes / 1e9:13.1f}{p.memory.host.bytes / 1e9:10.1f}"
            )
        lines.append("")
        for overrides, p in self.rows:
            quoted = (f"'{o}'" if " " in o else o for o in overrides)
            lines += wrapped(f"{p.times.gpus}: {' '.join(quoted)}")
        if self.neighbours:
            best = self.rows[-1][1]
            lines += ["", f"what another setting would change on {best.times.gpus} GPUs"]
            for change, c in self.neighbours:
                change = change if len(change) < 58 else change[:55] + "..."
                here = f"{c.seconds / best.times.per_sample - 1:+8.0%} time"
                size = f"{(c.bytes - best.memory.peak.bytes) / 1e9:+9.1f} GB"
                line = f"  {change:58}{here}{size}{'' if c.bytes <= best.limit else '  too much'}"
                lines.append(line[:WIDTH])
        return "\n".join(lines)

    def values(self) -> dict:
        """For JSON."""
        return {
            "tried": self.tried,
            "rows": [{"overrides": list(o), **p.values()} for o, p in self.rows],
            "neighbours": [
                {"change": change, "seconds": c.seconds, "bytes": c.bytes} for change, c in self.neighbours
            ],
        }


class Search:
    """The candidates of a configuration on a machine."""

    def __init__(self, path: str, given: Sequence[str], options: Options):
        self.path, self.given, self.options = path, tuple(given), options
        most = options.gpus if options.gpus > 1 else MOST
        self.gpu, self.most = machine_of(options._replace(gpus=most))
        self.kinds: dict[object, Kind] = {}
        self.exchanges: dict[object, Exchanged] = {}
        base = load_config(path, given)
        model = find(base, path, options.latent, options.model).setup.config
        self.heads, self.head_dim = model.num_heads, model.dim // model.num_heads

    def candidates(self, gpus: int) -> Iterator[Candidate]:
        """All settings on so many GPUs that are no mistake."""
        for parts in itertools.product(self._layouts(gpus), POLICIES, OPTIMIZERS, CHAINS, self._more(gpus)):
            ranks, policy, *rest = parts
            if "rollout.mode=persistent" in rest[1] and FOR_ROLLOUTS & {*rest[2]}:
                continue
            overrides = (*ranks, policy, *itertools.chain.from_iterable(rest))
            if (made := self.candidate(gpus, overrides)) is not None:
                yield made

    def candidate(self, gpus: int, overrides: Overrides) -> Candidate | None:
        """These settings; None where they are a mistake."""
        try:
            config = load_config(self.path, (*self.given, *overrides))
            shards = layout(config, self.gpu, gpus)
            subject = find(config, self.path, self.options.latent, self.options.model)
        except UserError:
            return None
        setup = replace(subject.setup, validation=None)
        kind = self._kind(config, setup)
        models = models_of(setup, shards.shards)
        made = memory(config, setup, self.gpu, shards, kind)
        moved = self._moved(setup, shards, kind)
        took = times(config, subject.setup, made.kinds, kind, models, self.gpu, shards, moved)
        return Candidate(overrides, config, gpus, took.per_sample, made.peak.bytes)

    def _kind(self, config: Config, setup: Setup) -> Kind:
        """Its blocks, with the states of a plain rollout."""
        plain = replace(setup, rollout=RolloutConfig(), pool=0, drawn=0)
        policy = of_config(config.model)
        if (plain, policy) not in self.kinds:
            self.kinds[plain, policy] = make_kind("", policy, plain, self.gpu.rates)
        return self.kinds[plain, policy]

    def _moved(self, setup: Setup, shards: Shards, kind: Kind) -> Exchanged:
        plain = replace(setup, rollout=RolloutConfig(), pool=0, drawn=0)
        key = plain, shards._replace(resident=False), kind.policy
        if key not in self.exchanges:
            models = models_of(setup, shards.shards)
            self.exchanges[key] = exchanged_bytes(key[0], models, shards, kind)
        return self.exchanges[key]

    def _layouts(self, gpus: int) -> list[Overrides]:
        """Ranks of a sample, copies of the weights, and micro-batches enough for all groups."""
        if gpus == 1:
            return [()]
        found, base = [], load_config(self.path, self.given).train.accumulate
        inside = min(gpus, self.gpu.per_node)
        for p in (n for n in (1, 2, 4, 8) if inside % n == 0 and self.heads % n == 0):
            for copies in {1, gpus // inside}:
                groups = gpus // p
                accumulate = -(-base // groups) * groups
                found.append((
                    f"parallel.sequence={p}", f"parallel.replicate={copies}", f"train.accumulate={accumulate}"
                ))  # fmt: skip
        return found

    def _more(self, gpus: int) -> list[Overrides]:
        fp8 = self.gpu.rates.products_fp8 is not None and self.head_dim in HEAD_DIMS
        found = [(), ("rollout.precision=fp8",)] if fp8 else [()]
        if gpus == 1:
            return found
        return [(*one, f"parallel.resident={flag}") for one in found for flag in ("false", "true")]

    def full(self, c: Candidate) -> Prediction:
        """A candidate with dry runs of its own."""
        subject: Subject = find(c.config, self.path, self.options.latent, self.options.model)
        return of_subject(c.config, subject, self.gpu, c.gpus, self.options)

    def limit(self, gpu: Machine) -> float:
        """Bytes that a peak may have."""
        return 1e9 * self.options.budget if self.options.budget else gpu.memory


def search(path: str, given: Sequence[str] = (), options: Options = Options()) -> Found:  # noqa: B008
    """The Pareto front of seconds a graded sample over GPUs: 1, 2, 4, ... up to --gpus, or MOST. UserError
    where nothing fits."""
    s, rows, tried, best = Search(path, given, options), [], 0, float("inf")
    for gpus in (2**i for i in range(s.most.bit_length())):
        every = list(s.candidates(gpus))
        tried += len(every)
        room = s.limit(s.gpu)
        fitting = sorted((c for c in every if c.bytes <= room), key=lambda c: (c.seconds, c.bytes))
        for c in fitting[:AHEAD]:
            if c.seconds >= best:
                break
            found = s.full(c)
            if found.fits:
                rows.append((c.overrides, found))
                best = found.times.per_sample
                break
    if not rows:
        raise UserError(f"--search: nothing of {tried} settings fits {room / 1e9:.1f} GB on {s.most} GPUs")
    return Found(tuple(rows), tuple(_neighbours(s, *rows[-1])), tried)


def _neighbours(s: Search, overrides: Overrides, best: Prediction) -> Iterator[tuple[str, Candidate]]:
    """The settings with one of them changed."""
    gpus = best.times.gpus
    groups = [s._layouts(gpus), [(p,) for p in POLICIES], list(OPTIMIZERS), list(CHAINS), s._more(gpus)]
    for group in groups:
        here = max((option for option in group if set(option) <= set(overrides)), key=len)
        for other in group:
            if other != here:
                changed = tuple(o for o in overrides if o not in here) + other
                if (made := s.candidate(gpus, changed)) is not None:
                    yield " ".join(o for o in other if o not in here) or f"not {' '.join(here)}", made
