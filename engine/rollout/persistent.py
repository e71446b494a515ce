"""Graded steps of chains that persist: training without a rollout for every graded step.

A graded step is a denoising step, and its detached result is the state before the next one. So a chain that
lives on from one optimizer step to the next, and is graded at every step on its way, needs no other forwards.
Its earlier steps were made by weights a few updates older; docs/persistent.md says what that costs.

A pool of chains (pool.py) stands next to the data stream, and `turns.Turns` decides which of them are drawn.
Each is rolled out to its place once, when its slot is drawn for the first time: the first round of a run is
made of fresh rollouts. A chain that has passed the range is replaced by a sample of the micro-batch that
draws its slot, from that sample's own noise; steps before the range are made then, accelerated where that is
configured.

Every `rollout.probe_every` optimizer steps a chain that has just finished is rolled out again, plainly, by
the present weights. The relative L2 distance of the two latents is the drift. Above `rollout.max_drift` the
oldest chains of the pool are rolled out again to where they are, until one of them was closer than that.

Data-parallel ranks: each owns a pool of the same seed, so all make the same forwards, see turns.py. What a
rank finds out by itself, a chain that is not finite and the drift, all ranks act upon (the maximum over
ranks).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine.batch import Batch, collate
from prfl_engine.chain import Chain
from prfl_engine.config import Config
from prfl_engine.config_method import scales
from prfl_engine.errors import UserError, check
from prfl_engine.flow import SolverState, init_state, rounded
from prfl_engine.metrics import note
from prfl_engine.model.start import Anchor
from prfl_engine.objectives import GradedWindow, Grader, Grading, fixed, index_range, start_of
from prfl_engine.parallel import World
from prfl_engine.rollout.drift import DriftMeter
from prfl_engine.rollout.pool import FILE, Finite, Numbers, Pool, PooledChain
from prfl_engine.rollout.turns import Turn, Turns
from prfl_engine.seeds import Purpose, noise_like


class Persistent:
    """Where graded steps come from, with `rollout.mode` persistent. A run carries it from step to step."""

    def __init__(
        self,
        grader: Grader,
        config: Config,
        meter: DriftMeter | None,
        sources: Callable[[int], list[int]],
        world: World = World(),  # noqa: B008 - frozen
        anchor: Anchor | None = None,
    ):
        """sources(key): the numbers of the samples of micro-batch `key` in the data (`MicroBatches.picked`).
        UserError where the configuration does not fit."""
        r, device = config.rollout, next(grader.model.parameters()).device
        steps = index_range(r)
        most = steps[1] + 1 - steps[0]
        check(r.stride <= most, "rollout.stride", r.stride, f"at most {most}, the steps of rollout.range")
        self.grader, self.config, self.meter, self.sources = grader, config, meter, sources
        self.anchor = anchor
        size, seed = config.data.batch_size, config.train.seed
        self.world, slots = world, config.pool // world.readers
        self.turns = Turns(steps, slots, config.graded // world.readers, size, r.stride, seed)
        names = "solver", "steps", "shift", "start", "samples", "stride"
        settings = {f"rollout.{name}": getattr(r, name) for name in names}
        settings |= {"rollout.sigmas": list(r.sigmas)} if r.sigmas else {}
        if r.start == "data":  # steps are counted from the first one in it
            settings["rollout.sigma_range"] = list(r.sigma_range)
        settings["chain.guidance"] = list(scales(config.chain.guidance))
        settings |= {"rollout.range": list(steps), "rollout.pool": config.pool, "chain.window": grader.window}
        settings |= {"processes with samples of their own": world.readers}
        name = pool_name(world.readers, world.reader)
        self.pool = Pool(slots, device, r.pool_place == "host", settings, world.most, name)
        self._recent: dict[int, list[Callable[[], bool]]] = {}  # of the last optimizer steps, see `lost`

    def windows(self, batch: Batch, key: int) -> Iterator[tuple[GradedWindow, dict[str, Tensor]]]:
        """The rollout.samples windows of micro-batch `key`, each of as many chains as it has samples and with
        metrics to add up. Backpropagate a window before taking the next one."""
        c, counts, device = self.config, self.pool.counts, batch.latent.device
        step, values = key // c.train.accumulate, {}
        if self.meter is not None:
            self.meter.begin(step)
            values = self.meter.values()
        births = Births(self, batch, key, step)
        for part in range(c.rollout.samples):
            turns = [self.turns[counts.drawn + row] for row in range(len(batch.latent))]
            counts.drawn += len(turns)
            chains = [self._chain(turn, births, step) for turn in turns]
            window = self._grade(chains, turns, step, key)
            ages = sum(step - chain.numbers.birth for chain in chains)
            now = {"chain_age": ages / len(chains) / c.rollout.samples}
            if part == 0:  # once for every micro-batch
                now |= {"chain_dropped": counts.dropped, "chain_renewed": counts.renewed}
                now |= {} if counts.drift is None else {"chain_drift": counts.drift}
            yield window, values | {k: torch.full((), float(v), device=device) for k, v in now.items()}
            del window  # its graph holds the states before it
            values = {}

    def _chain(self, turn: Turn, births: "Births", step: int) -> PooledChain:
        """The chain of a turn: the slot's own, or a new one."""
        chain, finished = self.pool.take(turn)
        if finished is not None and step // self.config.rollout.probe_every > self.pool.counts.probed:
            self._probe(finished, step)
        if chain is None:
            chain = self.pool.chains[turn.slot] = births.make(turn.lap)
        return chain

    def _grade(self, chains: list[PooledChain], turns: list[Turn], step: int, key: int) -> GradedWindow:
        """The window of these chains up to the steps of their turns, whose results they take."""
        prompts = [Batch(*(None if a is None else a[0] for a in self.pool.prompt(c))) for c in chains]
        anchor, c = self.anchor and self.anchor.at(step), self.config
        first = key * c.data.batch_size
        draw = partial(noise_like, purpose=Purpose.REWARD_DRAW, seed=c.train.seed, first=first)
        grading, states = Grading(self.grader, collate(prompts), anchor, draw), []
        for chain in chains:
            known = self.pool.get(chain)
            states.append([None] * (chain.numbers.index + 1 - len(known)) + known)
        way = grading.way(states)
        window = grading.grade(way, torch.tensor([turn.index for turn in turns]))
        finite = Finite([held[-1] for held in way.states])
        self._recent = {s: found for s, found in self._recent.items() if s >= step - 1}
        recent = self._recent.setdefault(step, [])
        for row, (chain, turn, held) in enumerate(zip(chains, turns, way.states, strict=True)):
            chain.numbers.index, chain.finite = turn.index + 1, partial(finite.__getitem__, row)
            known = [state for state in held if state is not None]
            self.pool.put(chain, known[-self.grader.window :])
            if chain.numbers.birth < step:
                recent.append(chain.finite)
        return window

    # Staleness.

    def _probe(self, finished: PooledChain, step: int) -> None:
        """Measure the drift of a chain that has finished; above the bound, renew the oldest ones."""
        r, counts = self.config.rollout, self.pool.counts
        counts.probed = step // r.probe_every
        counts.drift = self.world.most(self._rolled(finished)[1])
        drift, before = counts.drift, counts.renewed
        # By birth and slot alone, which are the same on all ranks.
        oldest = sorted(self.pool.alive(), key=lambda chain: chain.numbers.birth)
        for chain in oldest:
            if drift <= r.max_drift:
                break
            if not self.world.most(not chain.finite()):
                states, drift = self._rolled(chain)
                drift = self.world.most(drift)
                self.pool.put(chain, states)
                chain.numbers.birth = step
                counts.renewed += 1
        if counts.renewed > before:
            note(
                f"step {step}: chain drift {counts.drift:.3g}, rollout.max_drift {r.max_drift:g}: "
                f"{counts.renewed - before} of {len(oldest)} chains rolled out again"
            )

    @torch.no_grad()
    def _rolled(self, chain: PooledChain) -> tuple[list[SolverState], float]:
        """(the states of a chain as the present weights make them from its noise, without acceleration; the
        relative L2 distance of its newest latent from theirs)."""
        g, index = self.grader, torch.tensor([chain.numbers.index])
        old, prompt = self.pool.get(chain)[-1].x, self.pool.prompt(chain)
        start = self.start(prompt, self.noise(old, chain.numbers.position))
        way = Chain(Grading(g, prompt).velocity, g.schedule, start)
        way.advance_to(index, (index - (g.window - 1)).clamp(min=0))
        states = [state for state in way.states[0] if state is not None]
        new = states[-1].x
        return states, ((old - new).norm() / new.norm()).item()

    def noise(self, like: Tensor, position: int) -> Tensor:
        """The noise [1, C, T, H, W] of the chain that is keyed by `position`, in the dtype of `like`."""
        return noise_like(like, Purpose.ROLLOUT_NOISE, self.config.train.seed, position).to(like.dtype)

    def start(self, prompt: Batch, noise: Tensor) -> Tensor:
        """Where a chain with this noise begins; its sample's latent is needed with rollout.start data."""
        g = self.grader
        return fixed(g.model, prompt, start_of(self.config.rollout, g.schedule, prompt.latent, noise))

    # What `loop.fit` carries from step to step.

    def save(self, folder: Path) -> None:
        """Write the pool into a checkpoint."""
        self.pool.save(folder, self.world.rank % self.world.sequence == 0)

    def load(self, folder: Path) -> None:
        """Read the pool of a checkpoint. UserError where it does not fit, or some ranks have none or that of
        another checkpoint: pools change together. Every chain has to be where the last draw of its slot left
        it."""
        with self.world.agreed():
            there = self._read(folder)
        births = {s: c.numbers.birth for s, c in enumerate(self.pool.chains) if c is not None}
        found = self.world.all(repr((there, self.pool.counts, births)))
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                path = folder / pool_name(self.world.readers, rank // self.world.sequence)
                raise UserError(f"{path}: does not go with the pool of rank 0, want one checkpoint's")
        if not (folder / self.pool.name).exists():
            note(f"{folder} holds no pool of chains: all chains start anew")

    def _read(self, folder: Path) -> bool:
        there = self.pool.load(folder)
        drawn, path = self.pool.counts.drawn, folder / self.pool.name
        last = (self.turns[k] for k in range(max(0, drawn - 2 * self.turns.pool), drawn))
        left = {turn.slot: (turn.lap, turn.index + 1) for turn in last}
        for slot, chain in enumerate(self.pool.chains):
            if chain is not None and (at := (chain.numbers.lap, chain.numbers.index)) != left.get(slot):
                at = f"got the chain of slot {slot} in lap {at[0]} before step {at[1]}"
                raise UserError(f"{path}: {at}, want it where the last of {drawn} draws left it")
        return there

    def lost(self, step: int) -> bool:
        """Whether a chain that was graded in optimizer step `step` (the last one or the one before) is not
        finite. Only chains with a history count: what the present weights have made from noise by themselves
        is no fault of the pool."""
        return bool(self.world.most(not all(finite() for finite in self._recent.get(step, []))))


def pool_name(readers: int, reader: int) -> str:
    """The file of the pool of one of so many groups."""
    return FILE if readers == 1 else f"pool-{reader}.safetensors"


class Births:
    """New chains from the samples of one micro-batch, each sample once before any is taken twice."""

    def __init__(self, owner: Persistent, batch: Batch, key: int, step: int):
        self.owner, self.batch, self.key, self.step = owner, batch, key, step
        self.sources, self.used = owner.sources(key), [0] * len(batch.latent)

    def make(self, lap: int) -> PooledChain:
        """A chain at its noise. Of the samples at hand it takes one that fewest chains of the pool have."""
        c, pool = self.owner.config, self.owner.pool
        held = Counter(chain.numbers.source for chain in pool.alive())
        row = min(range(len(self.used)), key=lambda row: (self.used[row], held[self.sources[row]], row))
        # With one window a micro-batch this is the position of the sample in the stream.
        position = (self.key * c.rollout.samples + self.used[row]) * c.data.batch_size + row
        self.used[row] += 1
        latent, *prompt = (None if a is None else a[row : row + 1] for a in self.batch)
        known = pool.hold(latent) if c.rollout.start == "data" else torch.empty(1, 0)
        prompt = Batch(known, *(None if a is None else pool.hold(a) for a in prompt))
        chain = PooledChain(Numbers(lap, 0, position, self.sources[row], self.step), prompt, [])
        start = self.owner.start(prompt._replace(latent=latent), self.owner.noise(latent, position))
        pool.put(chain, [init_state(rounded(start, self.owner.grader.schedule.dtype))])
        return chain
