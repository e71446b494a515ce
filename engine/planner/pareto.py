"""`prfl plan --search`: the fastest settings that fit on every number of GPUs.

Tried are all combinations of the groups in choices.py. Everything else stays as configured. All are sorted by
predicted seconds; bytes are counted in this order until something fits. Bytes of blocks come from one dry run
for every policy, chunk, dtype and cut, and only where weights, gradients and states alone leave room. What
fits is then predicted in full, with its validation, and the next best is taken where that does not fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from prfl_engine.config import Config
from prfl_engine.errors import UserError
from prfl_engine.memory.policy import of_config
from prfl_engine.planner.choices import Choices, Overrides, Settings, check_use, whole
from prfl_engine.planner.command import Options, layout, machine_of, of_subject, subject_of
from prfl_engine.planner.numbers import Numbers
from prfl_engine.planner.plan import Kind, make_kind
from prfl_engine.planner.predict import memory, stands
from prfl_engine.planner.report import WIDTH, Prediction, wrapped
from prfl_engine.planner.setup import Setup
from prfl_engine.planner.sharded import Shards, exchanged_bytes
from prfl_engine.planner.standing import models_of
from prfl_engine.planner.timing import times

MOST = 64  # GPUs, where --gpus does not say
CHANGE = 62  # columns of a change of settings
RANKS = 8  # over which weights are sharded in the dry runs of candidates
AHEAD = 12  # candidates of a number of GPUs that are predicted in full before it is given up


@dataclass(frozen=True)
class Candidate:
    """Settings and their seconds a sample, predicted without a dry run of their own."""

    option: tuple[Overrides, ...]
    config: Config
    setup: Setup
    shards: Shards
    seconds: float


@dataclass(frozen=True)
class Neighbour:
    """The settings of a row with one group changed: what that costs and buys."""

    change: str
    seconds: float  # of a sample, relative: -0.1 is 10 % less
    bytes: int  # of the largest phase, in addition
    fits: bool


@dataclass
class LeftOut:
    """Settings that were not tried."""

    field: str  # that was refused
    why: str  # in the first of them: what it got and what it wants
    gpus: list[int]
    count: int = 0

    def __str__(self) -> str:
        counts = ", ".join(map(str, self.gpus))
        return f"{self.count:,} by {self.field} on {counts} GPUs, such as: {self.why}"


class GivenUp(NamedTuple):
    """Settings of a number of GPUs that would take less time, and were not predicted in full."""

    gpus: int
    count: int

    def __str__(self) -> str:
        return (
            f"on {self.gpus} GPUs {self.count:,} settings were not predicted in full: {AHEAD} that seemed to"
            " fit did not"
        )


@dataclass(frozen=True)
class Found:
    """The fastest settings of every number of GPUs that is faster than all smaller ones, in full."""

    rows: tuple[tuple[Overrides, Prediction], ...]
    neighbours: tuple[Neighbour, ...]  # of the last row
    tried: int
    given: tuple[str, ...] = ()  # overrides of all settings, as the search got them
    command: str = "train"  # of prfl, whose settings they are
    left_out: tuple[LeftOut, ...] = ()
    given_up: tuple[GivenUp, ...] = ()

    def text(self) -> str:
        """For a terminal: a table, a line of overrides for each, and what other settings would buy."""
        price = self.rows[0][1].price is not None
        head = f"{'GPUs':>5}{'s a sample':>12}{'GPU s':>9}{'an hour':>9}{'largest, GB':>13}{'host, GB':>10}"
        lines = [f"{self.tried:,} settings tried; predicted, the fastest that fit:"]
        lines.append(head + (f"{'price each':>12}" if price else ""))
        for _, p in self.rows:
            t = p.times
            lines.append(
                f"{t.gpus:5}{t.per_sample:12.2f}{t.per_sample * t.gpus:9.1f}{3600 / t.per_sample:9.0f}"
                f"{p.memory.peak.bytes / 1e9:13.1f}{p.memory.host.bytes / 1e9:10.1f}"
                + (f"{p.sample_price:12.4f}" if price else "")
            )
        least = self.rows[0][1]
        lines.append(f"the smallest machine that works: {least.times.gpus} x {least.gpu.name}")
        lines += [f"assumed: {line}" for line in least.subject.assumed]
        if self.left_out:
            lines.append("settings that were left out, since a training refuses them or gains nothing:")
            lines += [line for each in self.left_out for line in wrapped(f"- {each}")]
        lines += [str(each) for each in self.given_up]
        lines += ["", f"to put after `prfl {self.command} CONFIG`; read what they change, adapters"]
        lines.append("(lora.rank) want another learning rate, chains that persist and more samples train")
        lines.append("another loss:")
        for overrides, p in self.rows:
            own = f"# {p.times.gpus} GPUs" + ("" if overrides else ": as configured")
            lines += [own, *pasted((*self.given, *overrides))]
        if self.neighbours:
            lines += ["", f"what another setting would buy on {self.rows[-1][1].times.gpus} GPUs"]
        for n in self.neighbours:
            change = n.change
            if len(change) > CHANGE:
                change = " ".join(item.partition(".")[2] for item in change.split())[:CHANGE]
            line = f"  {change:{CHANGE}}{n.seconds:+7.0%} time{n.bytes / 1e9:+9.1f} GB"
            lines.append(line + ("" if n.fits else "  too much"))
        return "\n".join(lines)

    def values(self) -> dict:
        """For JSON."""
        least = self.rows[0][1]
        return {
            "tried": self.tried, "given": list(self.given),
            "smallest": {"gpu": least.gpu.name, "gpus": least.times.gpus},
            "rows": [{"overrides": list(o), **p.values()} for o, p in self.rows],
            "neighbours": [n.__dict__ for n in self.neighbours],
            "left_out": [each.__dict__ for each in self.left_out],
            "given_up": [each._asdict() for each in self.given_up],
        }  # fmt: skip


class Search:
    """The candidates of a configuration on a machine."""

    def __init__(self, path: str, given: Sequence[str], options: Options):
        self.path, self.given, self.options = path, given, options
        self.gpu, self.most = machine_of(options._replace(gpus=options.gpus or MOST))
        self.made: dict[int, Choices] = {}
        self.kinds: dict[object, Kind] = {}
        self.hosts: dict[object, int] = {}
        self.saved: dict[object, int] = {}
        self.subjects: dict[object, Setup] = {}
        self.left: dict[str, LeftOut] = {}
        base = Settings(path, given, self.most).base
        self.model = subject_of(base, path, 1, options).setup.config

    @cached_property
    def room(self) -> float:
        """Bytes that a peak may have."""
        return 1e9 * self.options.budget if self.options.budget else self.gpu.memory

    @property
    def counts(self) -> list[int]:
        """Numbers of GPUs: powers of two, and the largest."""
        return sorted({2**i for i in range(self.most.bit_length())} | {self.most})

    def choices(self, gpus: int) -> Choices:
        """What is tried on so many GPUs. UserError where the file is a mistake there."""
        if gpus not in self.made:
            m, settings = self.model, Settings(self.path, self.given, gpus)
            self.made[gpus] = Choices(
                settings, self.gpu, gpus, self.options, m.num_heads, m.dim // m.num_heads
            )
        return self.made[gpus]

    def candidates(self, gpus: int) -> Iterator[Candidate]:
        """All settings on so many GPUs that are no mistake, the others noted in `left`; none where the file
        is one there, such as one of HY-Video-PRFL whose dataset.sp_size does not divide them."""
        try:
            options = self.choices(gpus).candidates()
        except UserError as error:
            self.leave_out(gpus, error)
            return
        for option in options:
            try:
                yield self.candidate(gpus, option)
            except UserError as error:
                self.leave_out(gpus, error)

    def leave_out(self, gpus: int, error: UserError) -> None:
        """Note settings that were not tried."""
        field, _, why = str(error).partition(": ")
        left = self.left.setdefault(field, LeftOut(field, why, []))
        left.count += 1
        if gpus not in left.gpus:
            left.gpus.append(gpus)

    def candidate(self, gpus: int, option: tuple[Overrides, ...]) -> Candidate:
        """These settings. UserError where they are a mistake, or buy nothing."""
        config = self.choices(gpus).settings.of(whole(option))
        shards = layout(config, self.gpu, gpus, self.options.train_reward)
        check_use(config)
        setup = self._setup(config, gpus)
        if shards.many:  # one dry run for all numbers of ranks, which change the padding alone
            sharding = shards.sharding()._replace(ranks=RANKS)
            setup = replace(setup, sharding=sharding, grad_dtype=None, arriving=None)
        plain, policy = self._plain(setup), of_config(config.model)
        host = Numbers(*[0] * len(Numbers._fields))._replace(host=self._host(plain, policy))
        kind = Kind("", policy, {"": host}, 0, 0)
        models = models_of(setup, shards.shards)
        moved = exchanged_bytes(plain, models, shards, kind)
        took = times(config, setup, [kind] * setup.count, kind, models, self.gpu, shards, moved)
        return Candidate(option, config, setup, shards, took.per_sample)

    def bytes(self, c: Candidate, searching: bool = False) -> int:
        """The largest phase without validation; in a search that is too much, less of it may be counted: what
        stands in all phases, and half of what blocks save, as found with other dtypes or chunks."""
        setup = replace(c.setup, validation=None)
        if searching:
            key = of_config(c.config.model), setup.latent, setup.sequence
            least = stands(c.config, setup, self.gpu, c.shards) + self.saved.get(key, 0) // 2
            if least > self.room:
                return least
        kind, plain = self._kind(c), self._plain(c.setup)
        return memory(c.config, setup, self.gpu, c.shards, kind, plain).peak.bytes

    def full(self, c: Candidate) -> Prediction:
        """A candidate with dry runs of its own."""
        subject = subject_of(c.config, self.path, c.shards.size, self.options)
        return of_subject(c.config, subject, self.gpu, c.shards.size, self.options)

    def _setup(self, config: Config, gpus: int) -> Setup:
        c, arriving = config, config.optim if config.optim.in_backward else None
        own = c.model, c.lora, c.reward, c.rollout, c.loss, c.parallel, c.train.accumulate, arriving
        key = *own, gpus
        if key not in self.subjects:
            self.subjects[key] = subject_of(config, self.path, gpus, self.options).setup
        return self.subjects[key]

    @staticmethod
    def _plain(setup: Setup) -> Setup:
        """What blocks depend on: not on states of rollouts."""
        r = setup.rollout
        keep = "steepest" if r.seeds_keep == "both" else r.seeds_keep  # of one graded step
        rollout = replace(
            r, mode="fresh", pool=None, pool_place="device", stride=1, samples=1, seeds_keep=keep,
            precision="same", cache=0.0, cuda_graph=False,
        )  # fmt: skip
        return replace(setup, rollout=rollout, pool=0, drawn=0, pool_host=0, validation=None)

    def _host(self, plain: Setup, policy) -> int:
        """Bytes that a block offloads, from a dry run where it does."""
        if not policy.offload:
            return 0
        key = replace(plain, chunk=None, lora=None, weight_dtype=plain.compute_dtype), policy
        if key not in self.hosts:
            self.hosts[key] = make_kind("", policy, key[0], self.gpu.rates).host
        return self.hosts[key]

    def _kind(self, c: Candidate) -> Kind:
        """The candidate's blocks, with the states of a plain rollout."""
        key = self._plain(c.setup), of_config(c.config.model)
        if key not in self.kinds:
            made = self.kinds[key] = make_kind("", key[1], key[0], self.gpu.rates)
            saved = max(n.saved for n in made.numbers.values()) * c.setup.count
            self.saved.setdefault((key[1], c.setup.latent, c.setup.sequence), saved)
        return self.kinds[key]


def pasted(overrides: Overrides) -> list[str]:
    """Lines to paste into a shell after a command, at most WIDTH wide."""
    lines: list[str] = []
    for item in (f"'{o}'" if set(o) & set(" {[") else o for o in overrides):
        if not lines or len(lines[-1]) + len(item) + 3 > WIDTH:
            lines.append(item)
        else:
            lines[-1] += f" {item}"
    return [line + " \\" for line in lines[:-1]] + lines[-1:]


def search(path: str, given: Sequence[str] = (), options: Options = Options()) -> Found:  # noqa: B008
    """The Pareto front of seconds a sample over GPUs: 1, 2, 4, ... up to --gpus, or MOST. UserError where
    nothing fits."""
    s, rows, tried, best = Search(path, given, options), [], 0, float("inf")
    chosen: Candidate | None = None
    given_up: list[GivenUp] = []
    for gpus in s.counts:
        every = sorted(s.candidates(gpus), key=lambda c: c.seconds)
        tried, full = tried + len(every), 0
        for i, c in enumerate(every):
            if c.seconds >= best:
                break
            if full == AHEAD:
                given_up.append(GivenUp(gpus, sum(other.seconds < best for other in every[i:])))
                break
            if s.bytes(c, searching=True) > s.room:
                continue
            found, full = s.full(c), full + 1
            if found.fits:
                rows.append((s.choices(gpus).minimal(whole(c.option)), found))
                best, chosen = found.times.per_sample, c
                break
    if chosen is None:
        left = "".join(f"; left out: {each}" for each in s.left.values() if not tried)
        left += "".join(f"; {each}" for each in given_up)
        raise UserError(
            f"--search: nothing of {tried} settings fits {s.room / 1e9:.1f} GB on {s.most} GPUs{left}"
        )
    command = "train-reward" if options.train_reward else "train"
    left, others = tuple(s.left.values()), tuple(_neighbours(s, chosen))
    return Found(tuple(rows), others, tried, tuple(given), command, left, tuple(given_up))


def _neighbours(s: Search, best: Candidate) -> Iterator[Neighbour]:
    """The settings with one group changed, where that takes less time or less memory."""
    size, choices = s.bytes(best), s.choices(best.shards.size)
    for place, group in enumerate(choices.groups()):
        for other in group:
            option = (*best.option[:place], other, *best.option[place + 1 :])
            if other == best.option[place]:
                continue
            try:
                made = s.candidate(best.shards.size, option)
            except UserError:  # one of those that have been left out
                continue
            change = " ".join(item for item in other if item not in best.option[place])
            taken, ratio = s.bytes(made), made.seconds / best.seconds - 1
            if ratio < -0.005 or taken < 0.99 * size:
                yield Neighbour(change, ratio, taken - size, taken <= s.room)
