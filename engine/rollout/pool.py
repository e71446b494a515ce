"""The pool of chains that live from one optimizer step to the next, and its file in a checkpoint.

A chain is its states, its prompt and a few numbers. Its noise is not stored: the seed and the position of its
sample give it again. States lie where the model computes, or in host memory (`rollout.pool_place`), from
which they travel when the chain is drawn.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.errors import UserError
from prfl_engine.flow import SolverState
from prfl_engine.inputs import open_tensors, read_tensors
from prfl_engine.memory.live_bytes import host_memory
from prfl_engine.metrics import note
from prfl_engine.rollout.turns import Turn

FILE = "pool.safetensors"
PROMPT = ("latent", "text", "clip", "condition")


@dataclass
class Numbers:
    """What identifies a chain."""

    lap: int  # of its slot, see turns.Turn
    index: int  # of the step that its newest state is before
    position: int  # that its noise is keyed by
    source: int  # number of its sample in the data
    birth: int  # optimizer step in which its oldest part was made


class Finite:
    """Whether the states after a window [B] are finite: known on the device now, on the host later."""

    def __init__(self, states: list[SolverState]):
        ends = [torch.stack([end for a in s for end in torch.aminmax(a.detach())]) for s in states]
        flags = torch.stack(ends).isfinite().all(1)
        self.flags = flags.to("cpu", non_blocking=True)
        self.event = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None

    def __getitem__(self, row: int) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return self.flags[row].item()


@dataclass
class PooledChain:
    """A chain of the pool; its tensors have a batch dimension of 1."""

    numbers: Numbers
    prompt: Batch  # its latent is empty unless the chain began there (rollout.start data)
    states: list[SolverState]  # the last ones, the newest before step numbers.index
    finite: Callable[[], bool] = field(default=lambda: True)


@dataclass
class Counts:
    """What a pool carries from step to step in addition to its chains."""

    drawn: int = 0  # since the pool was begun
    dropped: int = 0  # chains that were not finite
    renewed: int = 0  # chains that were rolled out again
    probed: int = 0  # the last period of probes in which drift was measured; in the first no chain is old
    drift: float | None = None  # as measured last


class Pool:
    """Slots with a chain or None."""

    def __init__(
        self,
        slots: int,
        device: torch.device,
        on_host: bool,
        settings: dict[str, Hashable],
        most: Callable[[float], float] = lambda number: number,
        name: str = FILE,
    ):
        """settings: what chains depend on, by field of the configuration. A pool that was saved under others
        is not read. most(number): the largest number of all ranks, which drop the chains of a slot together;
        name: of the file of this rank."""
        self.most, self.name = most, name
        self.chains: list[PooledChain | None] = [None] * slots
        self.counts, self.device, self.settings = Counts(), device, settings
        self.on_host = on_host

    def take(self, turn: Turn) -> tuple[PooledChain | None, PooledChain | None]:
        """(the chain of the turn's slot that goes on in its lap, the one that has finished before it). A
        chain that is not finite is dropped and is neither."""
        self._check(turn.slot)
        chain = self.chains[turn.slot]
        if chain is None or chain.numbers.lap == turn.lap:
            return chain, None
        self.chains[turn.slot] = None
        return None, chain

    def _check(self, slot: int) -> None:
        """Drop the chain of a slot if it is not finite."""
        if self.chains[slot] is None or not self.most(not self.chains[slot].finite()):
            return
        numbers = self.chains[slot].numbers
        note(f"pool: the chain of noise {numbers.position} is not finite at step {numbers.index}: dropped")
        self.chains[slot], self.counts.dropped = None, self.counts.dropped + 1

    def put(self, chain: PooledChain, states: list[SolverState]) -> None:
        """Give a chain its new states; the tensors are copied, since they may be parts of larger ones."""
        chain.states = [SolverState(*map(self.hold, state)) for state in states]

    def get(self, chain: PooledChain) -> list[SolverState]:
        """The states of a chain, on the device."""
        return [SolverState(*map(self._bring, state)) for state in chain.states]

    def prompt(self, chain: PooledChain) -> Batch:
        """The prompt of a chain, on the device."""
        return Batch(*(None if a is None else self._bring(a) for a in chain.prompt))

    def hold(self, a: Tensor) -> Tensor:
        """A copy of a tensor in the pool's place."""
        if not self.on_host:
            return a.detach().to(self.device, non_blocking=True, copy=True)
        with host_memory():
            held = torch.empty(a.shape, dtype=a.dtype, device="cpu", pin_memory=self.device.type == "cuda")
        return held.copy_(a.detach(), non_blocking=True)

    def _bring(self, a: Tensor) -> Tensor:
        # In the order of the stream: after the copy to the host that may still be under way.
        return a.to(self.device, non_blocking=True)

    def alive(self) -> list[PooledChain]:
        return [chain for chain in self.chains if chain is not None]

    # The file.

    def save(self, folder: Path, writes: bool = True) -> None:
        """Write pool.safetensors. Chains that are not finite are dropped first, by all ranks together, which
        all call this; writes: whether this one then writes."""
        tensors: dict[str, Tensor] = {}
        for slot in range(len(self.chains)):
            self._check(slot)
        if not writes:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to the host have ended
        held = {slot: chain for slot, chain in enumerate(self.chains) if chain is not None}
        for slot, chain in held.items():
            for i, state in enumerate(chain.states):
                parts = zip(SolverState._fields, state, strict=True)
                tensors |= {f"{slot}.{i}.{k}": a.cpu() for k, a in parts}
            prompt = chain.prompt._asdict()
            kept = (k for k in PROMPT if prompt[k] is not None and prompt[k].numel())
            tensors |= {f"{slot}.{k}": prompt[k].cpu() for k in kept}
        numbers = {slot: asdict(chain.numbers) for slot, chain in held.items()}
        said = {"settings": self.settings, "counts": asdict(self.counts), "chains": numbers}
        save_file(tensors, folder / self.name, {"pool": json.dumps(said)})

    def load(self, folder: Path) -> None:
        """Read the pool of a checkpoint. One without a pool, or with one that was made under other settings,
        leaves this pool empty, and a line says so. UserError for a file that is not as it was written."""
        path = folder / self.name
        if not path.exists():
            note(f"{folder} holds no pool of chains: all chains start anew")
            return
        with open_tensors(path) as file:
            said = (file.metadata() or {}).get("pool")
        try:
            said = json.loads(said)
            settings, counts = said["settings"], Counts(**said["counts"])
            numbers = {int(slot): Numbers(**values) for slot, values in said["chains"].items()}
            whole = [v for n in numbers.values() for v in asdict(n).values()]
            whole += [counts.drawn, counts.dropped, counts.renewed, counts.probed]
            drift_ok = counts.drift is None or type(counts.drift) is float
            if not drift_ok or any(type(v) is not int or v < 0 for v in whole):
                raise TypeError
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{path}: got no numbers of a pool, want the file as it was written") from None
        for name, now in self.settings.items():
            if settings.get(name) != now:
                note(f"{path}: made with {name} {settings.get(name)!r}, now {now!r}: all chains start anew")
                return
        tensors = read_tensors(path)
        self.counts = counts
        for slot, known in numbers.items():
            self._read(path, slot, known, tensors)
        if tensors:
            raise UserError(f"{path}: got {next(iter(tensors))!r}, want the tensors of the chains it lists")

    def _read(self, path: Path, slot: int, numbers: Numbers, tensors: dict[str, Tensor]) -> None:
        """Move the chain of a slot from `tensors` into the pool."""
        states, shape = [], None
        try:
            while f"{slot}.{len(states)}.x" in tensors:
                parts = [tensors.pop(f"{slot}.{len(states)}.{k}") for k in SolverState._fields]
                shape = shape or parts[0].shape
                if any(a.shape != shape or a.dim() != 5 or len(a) != 1 for a in parts):
                    raise LookupError
                states.append(SolverState(*parts))
            prompt = [tensors.pop(f"{slot}.{k}", None) for k in PROMPT]
            count = min(self.settings["chain.window"], numbers.index + 1)
            latent = torch.empty(1, 0) if prompt[0] is None else prompt[0]
            fits = latent.shape == (shape if self.settings["rollout.start"] == "data" else (1, 0))
            if len(states) != count or not fits or prompt[1] is None or self.chains[slot] is not None:
                raise LookupError
        except LookupError:
            raise UserError(f"{path}: slot {slot} holds no whole chain, want the file as written") from None
        prompt = [None if a is None else self.hold(a) for a in (latent, *prompt[1:])]
        chain = self.chains[slot] = PooledChain(numbers, Batch(*prompt), [])
        self.put(chain, states)
