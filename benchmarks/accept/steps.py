"""A PRFL step at full width: its bytes and seconds beside what the planner predicts.

Every job has a row that predicts, which needs no GPU, and one that measures; the report compares them.
Bytes are those of a step before the optimizer, in addition to weights, gradients and optimizer states, as the
planner counts them: by torch's allocator on CUDA, by LiveBytes on a CPU.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prfl_bench.accept.costs import RATES
from prfl_bench.accept.row import RAN, REFUSED, Context, Outcome, Row
from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.config import Config, LoraConfig, LossConfig, OptimConfig, RolloutConfig
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.recompute import run_under
from prfl_engine.model import lora
from prfl_engine.model.wan import PRESETS, WanConfig
from prfl_engine.objectives import (
    GradedWindow,
    Grader,
    Grading,
    index_range,
    reward_loss,
    sft_loss,
    stratified_indices,
)
from prfl_engine.optim.optimizer import make_optimizer, update
from prfl_engine.planner import models
from prfl_engine.planner.fit_memory import pool_bytes
from prfl_engine.planner.plan import kinds_of, make_kinds, predicted_peak
from prfl_engine.planner.seconds import block_seconds
from prfl_engine.planner.setup import ROUND, RewardSetup, Setup
from prfl_engine.planner.timing import forward_seconds
from prfl_engine.rollout.accelerated import make_rollout
from prfl_engine.rollout.persistent import Persistent
from prfl_kernels import dispatch

PHASES = ("flow matching", "rollout and reward", "backward", "optimizer")
SMALL = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=6, text_dim=64, text_len=16, freq_dim=64)
ONE, FOUR = RolloutConfig(steps=4, range=(2, 2)), RolloutConfig(steps=6, range=(1, 4), samples=4)
# The steps up to the one of ONE; two chains, so that all there are have been rolled out after two steps.
PERSISTENT = RolloutConfig(mode="persistent", steps=4, range=(0, 2), pool=2, probe_every=2**31 - 1)
REPEAT = 2  # steps that count, after one that compiles
LORA = LoraConfig(rank=128)


class Job(NamedTuple):
    """A step: what it is of, the policy of all blocks, the kernels, and the optimizer."""

    setup: Setup
    kind: str  # of the planner's KINDS
    kernels: str = ""
    optim: OptimConfig = OptimConfig()
    like: str = ""  # the job whose bytes and seconds are predicted, if not this one


def config_of(context: Context, preset: str) -> WanConfig:
    return SMALL if context.small else PRESETS[preset]


def latent_of(context: Context, frames: int = 21) -> tuple[int, ...]:
    """Of 480P: 1,560 tokens a latent frame; small on a CPU."""
    return (1, 16, min(frames, 3), 16, 16) if context.small else (1, 16, frames, 60, 104)


def jobs(context: Context) -> dict[str, Job]:
    """All jobs by the names of their rows."""
    small, latent = config_of(context, "t2v-1.3b"), latent_of(context)
    reward = RewardSetup(2 if context.small else 8)
    one = Setup(small, latent, reward=reward, rollout=ONE)
    base = "step/1.3B/attention"
    found = {
        base: Job(one, "attention"),
        "step/1.3B/none": Job(one, "none"),
        "step/1.3B/full": Job(one, "full"),
        "step/1.3B/offload": Job(one, "offload attention, input"),
        "step/1.3B/four-samples": Job(replace(one, rollout=FOUR), "attention"),
        "step/1.3B/persistent": Job(chains_of(replace(one, rollout=PERSISTENT)), "attention"),
        "step/1.3B/fp8-rollout": Job(
            replace(one, rollout=replace(ONE, precision="fp8")), "attention", like=base
        ),
    }
    for choice in ("attention=triton", "attention=cuda", "attention=fa3", "cuda", "reference,attention=sdpa"):
        found[f"step/1.3B/{choice}"] = Job(one, "attention", choice, like=base)
    big = replace(
        one,
        config=config_of(context, "t2v-14b"),
        weight_dtype=torch.bfloat16,
        blocks=6 if context.small else 8,
        chunk=64 if context.small else 8192,
    )
    states = OptimConfig(offload="states", rounding="stochastic")
    rank = replace(LORA, rank=8) if context.small else LORA
    found["large/14B/lora"] = Job(replace(big, lora=rank, rollout=FOUR), "attention")
    found["large/14B/full"] = Job(big, "offload attention, input", optim=states)
    return found


def chains_of(setup: Setup) -> Setup:
    """With the bytes of its chains that persist."""
    return replace(setup, pool=pool_bytes(setup, setup.rollout.pool))


def predict(context: Context, name: str) -> Outcome:
    """Bytes by a dry run, seconds by the planner's rates of an H100."""
    job = jobs(context)[name]
    setup = job.setup
    (kind,) = make_kinds(setup, RATES, {}, [job.kind])
    peak = predicted_peak([kind] * setup.count, kind)
    host = kind.host * (setup.count - 1)
    seconds = (setup.count * kind.cost + kind.reward_cost) / 1e12 + ahead(setup)
    told = f"{peak / 1e9:.2f} GB, {host / 1e9:.2f} GB on the host, {seconds:.2f} s without the optimizer"
    return Outcome(RAN, told, {"bytes": peak, "host": host, "seconds": seconds})


def ahead(setup: Setup) -> float:
    """Predicted seconds of the steps without gradient."""
    return forwards(setup) * forward_seconds(setup, RATES)


def forwards(setup: Setup) -> int:
    """Steps without gradient: all up to the last graded one that are not graded; none of chains that persist,
    whose range begins at the noise."""
    if setup.rollout.mode == "persistent":
        return 0
    return int(indices(setup.rollout)[-1]) + 1 - setup.rollout.samples


def indices(rollout: RolloutConfig) -> Tensor:
    """The graded steps [K, 1]: the middle of every part."""
    middle = torch.full((rollout.samples, 1), 0.5, dtype=torch.float64)
    return stratified_indices(*index_range(rollout), middle)


def batch_of(config: WanConfig, latent: tuple[int, ...], device: str) -> tuple[Batch, Tensor]:
    """A random batch with texts of full length, and noise."""
    text = torch.randn(latent[0], config.text_len, config.text_dim, device=device)
    return Batch(torch.randn(latent, device=device), text), torch.randn(latent, device=device)


class Step:
    """The models and the optimizer of a job, and its step."""

    def __init__(self, job: Job, device: str):
        setup = job.setup
        torch.manual_seed(0)
        with torch.device(device):
            self.policy = models.generator(setup, setup.count)
            self.reward = models.reward_model(setup, setup.reward_blocks)
        # Drawn as zero, which would hide the gradients of everything before.
        nn.init.normal_(self.policy.head.head.weight, std=0.02)
        for name, p in lora.parameters(self.policy).items():
            if name.endswith("lora_B"):
                nn.init.normal_(p, std=0.02)
        self.job, self.device = job, device
        self.schedule = flow.make_schedule("unipc", setup.rollout.steps, setup.rollout.shift)
        self.rollout = make_rollout(self.policy, setup.rollout, self.schedule, torch.device(device))
        self.optimizer = make_optimizer([(self.policy, 1e-6)], job.optim)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        policy = kinds_of(setup)[job.kind]
        self.run_blocks = run_under([policy] * setup.count)
        self.grader = Grader(
            self.policy,
            self.reward,
            self.schedule,
            setup.chain,
            self.rollout and self.rollout.stretches,
            self.run_blocks,
            run_under([policy] * setup.reward_blocks),
        )
        self.keys = itertools.count()  # of micro-batches
        self.source: Persistent | None = None
        if setup.rollout.mode == "persistent":
            config = Config(rollout=setup.rollout, chain=setup.chain)
            self.source = Persistent(self.grader, config, None, lambda key: [0])

    def windows(self, batch: Batch, noise: Tensor) -> Iterator[GradedWindow]:
        """The graded steps of a step."""
        if self.source is None:
            return Grading(self.grader, batch).windows(noise, indices(self.job.setup.rollout))
        return (window for window, _ in self.source.windows(batch, next(self.keys)))

    def losses(self, lap: Callable[[str], None]) -> Iterator[Tensor]:
        """Take the step up to the optimizer; yields the losses, detached."""
        setup, device = self.job.setup, self.device
        batch, noise = batch_of(setup.config, setup.latent, device)
        loss = sft_loss(
            self.policy, batch, noise, torch.full((1,), 0.6, device=device), self.run_blocks
        ).mean()
        lap(PHASES[0])
        loss.backward()
        lap(PHASES[2])
        yield loss.detach()
        del loss
        for window in self.windows(batch, noise):
            loss = reward_loss(window.logit, LossConfig()).mean() / setup.rollout.samples
            lap(PHASES[1])
            window.backward(loss)
            lap(PHASES[2])
            yield loss.detach()
            del loss, window

    def prepare(self) -> None:
        """Gradients of zero, as the planner assumes them."""
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()

    def time(self) -> tuple[dict[str, float], list[float], int]:
        """(seconds of the phases, losses, how often the host waited for the device) of a step."""
        self.prepare()
        marks: list[tuple[str, object]] = []

        def lap(phase: str) -> None:
            marks.append((phase, now(self.device)))

        with waits(self.device) as waited:
            lap("")
            losses = list(self.losses(lap))
            update(self.optimizer, self.job.optim.clip)
            lap(PHASES[3])
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(marks, marks[1:], strict=False):
            seconds[phase] += between(before, after)
        return seconds, [loss.item() for loss in losses], len(waited)

    def peak(self) -> int:
        """Most bytes of a step before the optimizer, in addition to what is there."""
        self.prepare()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            list(self.losses(lambda _: None))
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        live = LiveBytes(ROUND)
        live.add([*self.policy.parameters(), *self.reward.parameters(), *(p.grad for p in self.trained)])
        before = live.now
        with live:
            list(self.losses(lambda _: None))
        return live.peak - before


def now(device: str):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before, after) -> float:
    """Seconds between two results of `now`."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3


@contextmanager
def waits(device: str) -> Iterator[list]:
    """What torch says of calls that make the host wait for the device, in this block."""
    if device == "cpu":
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [w for w in caught if "synchronizing" in str(w.message)]


def measure(context: Context, name: str) -> Outcome:
    """A step that compiles, one whose bytes count, and some whose seconds do."""
    job = jobs(context)[name]
    dispatch.configure(job.kernels)
    try:
        dispatch.check(context.device)
    except ValueError as error:
        return Outcome(REFUSED, str(error))
    told = predicted_of(context, name)
    if context.device == "cuda" and told:
        free = torch.cuda.mem_get_info()[0]
        weights = parameter_bytes(job)
        if told["bytes"] + weights > free:
            needed = (told["bytes"] + weights) / 1e9
            return Outcome(REFUSED, f"predicted at {needed:.0f} GB, {free / 1e9:.0f} GB are free")
    step = Step(job, context.device)
    step.time()
    size = step.peak()
    found = [step.time() for _ in range(1 if context.small else REPEAT)]
    seconds = {phase: statistics.median(phases[phase] for phases, *_ in found) for phase in PHASES}
    losses, waited = found[-1][1:]
    if not all(torch.tensor(losses).isfinite()):
        raise ArithmeticError(f"the losses are {losses}")
    total = sum(seconds.values())
    values = {
        "bytes": size,
        "seconds": total - seconds["optimizer"],
        "step": total,
        "phases": seconds,
        "waits": waited,
    }
    if step.rollout is not None:
        batch, noise = batch_of(job.setup.config, job.setup.latent, context.device)
        with torch.no_grad():
            values["drift"] = step.rollout.drift(batch, noise, indices(job.setup.rollout)[-1]).item()
    if context.device == "cuda":
        values["reserved"] = torch.cuda.max_memory_reserved()
    return Outcome(RAN, f"{size / 1e9:.2f} GB, {total:.2f} s a step", values)


def predicted_of(context: Context, name: str) -> dict:
    """What the row that predicts has found of a job."""
    return context.values(predicting(jobs(context)[name].like or name))


def predicting(name: str) -> str:
    """The name of the row that predicts a job."""
    stage, rest = name.split("/", 1)
    return f"{stage}/predicted/{rest}"


def parameter_bytes(job: Job) -> int:
    """Weights of both models, and gradients and moments of what is trained and on the device."""
    with torch.device("meta"):
        policy = models.generator(job.setup, job.setup.count)
        reward = models.reward_model(job.setup, job.setup.reward_blocks)
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    own = trained * (3 if job.optim.offload == "none" else 1)
    return sum(p.nbytes for m in (policy, reward) for p in m.parameters()) + own


def rows(stage: str) -> list[Row]:
    """Those that predict, then those that measure."""
    found = {n: j for n, j in jobs(Context("cuda", {})).items() if n.startswith(f"{stage}/")}
    own = [name for name, job in found.items() if not job.like]
    return [
        *(Row(predicting(n), partial(predict, name=n), 20, 2.5, alone=False) for n in own),
        *(Row(n, partial(measure, name=n), seconds(job), 1.5) for n, job in found.items()),
    ]


def seconds(job: Job) -> float:
    """Predicted for the row that measures: models, compilation, and all its steps."""
    setup = job.setup
    n = setup.rollout.samples
    passes = (1 + n) * setup.count + n * setup.reward_blocks
    policy = kinds_of(setup)[job.kind]
    one = passes * block_seconds(policy, setup, 0, RATES) + ahead(setup)
    pinning = 20 if job.optim.offload != "none" else 0
    return 15 + pinning + (REPEAT + 2) * one
