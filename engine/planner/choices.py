"""What `prfl plan --search` tries: groups of settings of which a candidate has one each."""

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property

from prfl_engine.config import Config, values_of
from prfl_engine.config_file import from_dict, override
from prfl_engine.errors import UserError, check
from prfl_engine.planner.command import Options
from prfl_engine.planner.machine import Machine
from prfl_kernels.attention.fp8 import HEAD_DIMS

RANK = 128  # of adapters, where the configuration has none
CHUNK = 8192  # tokens, where the configuration has none
POLICIES = (
    "model.recompute=none", "model.recompute=attention", "model.recompute=full",
    "model.recompute={keep: [], offload: [attention, input]}",
    "model.recompute={keep: [attention], offload: [input]}",
)  # fmt: skip
AUTO = "model.host=null", "model.costs=null"  # of auto:GB alone
WIDE, BRAIN = "model.weights_dtype=float32", "model.weights_dtype=bfloat16"
PLAIN = "optim.name=adamw", "optim.rounding=master", "optim.offload=none"
LEAN = BRAIN, "optim.rounding=stochastic"
OPTIMIZERS = (
    (WIDE, *PLAIN),
    (BRAIN, *PLAIN),
    (*LEAN, "optim.name=adamw8bit", "optim.offload=none"),
    (*LEAN, "optim.name=adamw", "optim.offload=states"),
    (*LEAN, "optim.name=adamw", "optim.offload=all"),
)
SAMPLES = 1, 4
BASE = "lora.base=same", "lora.base_place=device"  # of the weights that adapters are for
SHARED = (
    *BASE, "reward.weights=same", "reward.place=device", "model.idle=device", "loss.anchor_place=device",
)  # fmt: skip
Overrides = tuple[str, ...]


class Settings:
    """Configurations that differ from one in a file by a few fields, on so many GPUs; a section is read once
    for all."""

    def __init__(self, path: str, given: Sequence[str], gpus: int):
        self.given = tuple(given)
        self._values, _ = values_of(path, given, gpus)
        self._sections: dict[tuple[str, ...], object] = {}

    @cached_property
    def base(self) -> Config:
        """The one in the file, with what is given."""
        return self.of(())

    def of(self, overrides: Sequence[str]) -> Config:
        """With these overrides. UserError where they are a mistake."""
        by_section: dict[str, list[str]] = {name: [] for name in Config.__dataclass_fields__}
        for item in overrides:
            by_section[item.partition(".")[0]].append(item)
        return Config(**{name: self._section(name, *items) for name, items in by_section.items()})

    def _section(self, name: str, *items: str) -> object:
        key = (name, *items)
        if key not in self._sections:
            values = {name: copy.deepcopy(self._values.get(name, {}))}
            for item in items:
                override(values, item)
            kind = Config.__dataclass_fields__[name].default_factory
            self._sections[key] = from_dict(kind, values[name], name)
        return self._sections[key]

    def changes(self, item: str) -> bool:
        """Whether an override changes the configuration of the file; one that cannot be alone does."""
        section, _, field = item.partition("=")[0].partition(".")
        try:
            made = self._section(section, item)
        except UserError:
            return True
        return getattr(made, field) != getattr(getattr(self.base, section), field)

    def configured(self, name: str) -> str:
        """The override by which section.field has the value of the file."""
        section, _, field = name.partition(".")
        value = getattr(getattr(self.base, section), field)
        return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


class Choices:
    """The groups of a configuration on so many GPUs of a machine."""

    def __init__(
        self, settings: Settings, gpu: Machine, gpus: int, options: Options, heads: int, head_dim: int
    ):
        self.settings, self.gpu, self.gpus, self.options = settings, gpu, gpus, options
        self.heads, self.head_dim = heads, head_dim

    def groups(self) -> list[list[Overrides]]:
        """Layouts, optimizers with or without adapters, policies, chunks, chains, rollouts. In every
        group what is as configured comes first, and all options set the same fields."""
        base = self.settings.base
        chunks = [(f"model.chunk={c}",) for c in (base.model.chunk or "null", base.model.chunk or CHUNK)]
        policies = [(policy, *AUTO) for policy in POLICIES]
        groups = [self._layouts(), self._training(), policies, chunks]
        if not self.options.train_reward:
            groups += [self._chains(), self._rollouts()]
        return [
            sorted(self._allowed(self._alike(g)), key=lambda option: len(self.minimal(option)))
            for g in groups
        ]

    def _alike(self, group: list[Overrides]) -> list[Overrides]:
        """The options, each once, with the same fields: what one leaves alone is as configured."""
        every = [{item.partition("=")[0]: item for item in option} for option in group]
        names = dict.fromkeys(itertools.chain.from_iterable(every))
        return list(dict.fromkeys(
            tuple(option.get(name) or self.settings.configured(name) for name in names) for option in every
        ))  # fmt: skip

    def _allowed(self, group: list[Overrides]) -> list[Overrides]:
        """The options that leave alone what overrides of the command have set."""
        return [option for option in group if self._free(option) == option] or [()]

    def _free(self, overrides: Overrides) -> Overrides:
        """Those that leave it alone."""
        fixed = {item.partition("=")[0] for item in self.settings.given}
        return tuple(
            item for item in overrides
            if item.partition("=")[0] not in fixed or not self.settings.changes(item)
        )  # fmt: skip

    def minimal(self, overrides: Overrides) -> Overrides:
        """Those that change the configuration."""
        return tuple(item for item in overrides if self.settings.changes(item))

    def candidates(self) -> Iterator[tuple[Overrides, ...]]:
        """One option of every group, in all combinations."""
        return itertools.product(*self.groups())

    def _layouts(self) -> list[Overrides]:
        """Ranks of a sample, copies of the weights, and micro-batches enough for all groups; weights that
        are shared wait nowhere else."""
        if self.gpus == 1:
            return [("parallel.sequence=1", "parallel.replicate=1")]
        gpus, base, found = self.gpus, self.settings.base.train.accumulate, []
        inside = min(gpus, self.gpu.per_node)
        for p in (n for n in (1, 2, 4, 8) if inside % n == 0 and self.heads % n == 0):
            for copies in sorted({1, gpus // inside}):
                groups = gpus // p
                accumulate = -(-base // groups) * groups
                found.append((
                    f"parallel.sequence={p}", f"parallel.replicate={copies}",
                    f"train.accumulate={accumulate}", *self._free(SHARED),
                ))  # fmt: skip
        return found

    def _training(self) -> list[Overrides]:
        """All weights, or adapters; on one GPU adapters with frozen weights where they are as configured, on
        the device, and on the host. Those of several GPUs are as layouts have them."""
        base, alone = self.settings.base, self.gpus == 1
        rank = base.lora.rank or min(RANK, self.heads * self.head_dim)
        idle = () if base.trained_experts != (True, True) else ("model.idle=device",)
        here = self._free((*BASE, *idle)) if alone else ()
        full = [("lora.rank=0", *here, *optimizer) for optimizer in OPTIMIZERS]
        adapters = [(f"lora.rank={rank}", dtype, *PLAIN) for dtype in (WIDE, BRAIN)]
        if alone and not self.options.train_reward:
            frozen = "lora.base_place", *(("reward.place",) if base.reward.path else ())
            device, host = (
                self._free(tuple(f"{name}={place}" for name in frozen)) for place in ("device", "host")
            )
            adapters += [*((*one, *device) for one in adapters), (*adapters[-1], *host)]
        return full + adapters

    def _chains(self) -> list[Overrides]:
        """Fresh or persistent, and graded steps of a rollout or of a sample."""
        r = self.settings.base.rollout
        fresh, persistent = ("rollout.mode=fresh",), ("rollout.mode=persistent",)
        if r.mode == "persistent":
            fresh += "rollout.pool=null", "rollout.pool_place=device", "rollout.stride=1"
        elif r.one_index:
            persistent += ("rollout.one_index=0",)
        if r.seeds > 1:
            persistent += "rollout.seeds=1", "rollout.seeds_step=null", "rollout.seeds_keep=steepest"
        if r.lora is not None:
            persistent += ("rollout.lora=null", "eval.rollout_lora=false")
        samples = sorted({*SAMPLES, r.samples})
        return [(*mode, f"rollout.samples={k}") for mode in (fresh, persistent) for k in samples]

    def _rollouts(self) -> list[Overrides]:
        fp8 = self.gpu.rates.products_fp8 is not None and self.head_dim in HEAD_DIMS
        found = [(f"rollout.precision={p}",) for p in (("same", "fp8") if fp8 else ("same",))]
        if self.gpus == 1:
            return found
        return [
            (*one, f"parallel.resident={flag}", "rollout.cuda_graph=false")
            for one in found for flag in ("false", "true")
        ]  # fmt: skip


def check_use(config: Config) -> None:
    """UserError for settings that buy nothing: what is for rollouts with chains that persist, which are never
    rolled out but in the beginning."""
    r = config.rollout
    if r.mode == "persistent":
        want = "with chains that persist, which are hardly rolled out"
        check(r.precision == "same", "rollout.precision", r.precision, f"same {want}")
        resident = config.parallel.resident
        check(not resident, "parallel.resident", resident, f"false {want}")


def whole(option: Sequence[Overrides]) -> Overrides:
    """The overrides of all groups."""
    return tuple(itertools.chain.from_iterable(option))
