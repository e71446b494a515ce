"""The loop that both trainings share: accumulate, clip, step, measure, validate, save, resume.

One optimizer step uses the gradients of all losses of all accumulated micro-batches, clipped and applied once
unless configured otherwise (optim/updates.py). The host never waits for the device in a step: the device
skips the update if the gradient is not finite, and the host reads the metrics of a step while the next one
runs. All random numbers depend only on the seed and the step, so a run that was stopped and resumed gives the
same result as one that was not; on the CPU, to the bit.
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from prfl_engine import checksums, failures, files
from prfl_engine.batch import Batch
from prfl_engine.build import pick_device, trains_a_part
from prfl_engine.checkpoint_shards import Saving, load_sharded, save_sharded
from prfl_engine.checkpoints import Checkpoints
from prfl_engine.config import Config
from prfl_engine.errors import TrainingError, UserError, check
from prfl_engine.exposed import measured
from prfl_engine.inputs import make_folder
from prfl_engine.interrupt import Interrupts, Stopped, interrupts
from prfl_engine.measurements import Measurements, Performance
from prfl_engine.metrics import MetricsWriter, NoMetrics, note
from prfl_engine.metrics import progress as progress_bar
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model.flops import Costs
from prfl_engine.optim.optimizer import EMA, make_optimizer, not_finite
from prfl_engine.optim.updates import Updates
from prfl_engine.parallel import World
from prfl_engine.phases import Shape, count, mark, timed
from prfl_engine.restarts import note_run
from prfl_engine.resume import Progress, Start, read_state, save_state, write_run
from prfl_kernels import dispatch

BROKEN = "broken.jsonl"
"""File of a run: a line {"sample": path, "reason": line} for every sample that is left out."""


def kernels(device: str) -> str:
    """Which implementation runs which operations on a kind of device, in one line."""
    found: dict[str, list[str]] = {}
    for op, implementation, _ in dispatch.choices(device):
        found.setdefault(implementation, []).append(op)
    return "; ".join(f"{name} for {', '.join(ops)}" for name, ops in found.items())


class Carried(Protocol):
    """What a run carries from step to step in addition to weights and optimizer, such as a pool of chains."""

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""

    def load(self, folder: Path) -> None:
        """Read it from a checkpoint; every rank calls it. UserError on all where it does not fit on one."""

    def lost(self, step: int) -> bool:
        """Whether it explains that the gradient of optimizer step `step` is not finite. The update was
        skipped, so the run can go on without what was lost."""


def fit(
    config: Config,
    begin: Start,
    model: nn.Module,
    groups: list[tuple[nn.Module, float]],
    batches: MicroBatches,
    backpropagate: Callable[..., Iterable[dict[str, Tensor]]],
    validate: Callable[[int], dict[str, float]] | None,
    save: Callable[..., None],
    load: Callable[[Path], dict[str, Tensor]],
    costs: Callable[[Shape], Costs],
    carried: Carried | None = None,
    world: World = World(),  # noqa: B008 - frozen
    split: bool = False,
) -> None:
    """Train `model` for config.train.steps optimizer steps, from where `begin` says.

    backpropagate(item, key, share) backpropagates the losses of a micro-batch, times share, one after another
    and yields the metrics of each. `key` is an integer that no other micro-batch has.
    validate(step) returns metrics; "score", higher is better, picks the best checkpoint.
    save(folder, step, values) writes the trained parameters, or in their place `values` by the same names;
    load(folder) reads them back in float32, under their names in the model. costs(shape) counts the work on
    a sample of latents [*, *shape]. What is `carried` is in every checkpoint, too. Every process of `world`
    calls this; the first one writes what is written once. split: update also after the first backward of the
    last micro-batch.

    SIGTERM and Ctrl-C end it after the step, with a checkpoint. Raises UserError before anything is written,
    TrainingError for a run that cannot go on: numbers that are not finite, or what `failures` lists.
    """
    device, progress = pick_device(config), Progress()
    group = world.saves if config.parallel.save_async else world.control
    checkpoints = Checkpoints(Path(config.train.out), config.train.keep, group)
    try:
        with interrupts() as signals:
            optimizer = make_optimizer(groups, config.optim)
            ema = EMA(model, config.train.ema) if config.train.ema > 0 else None
            with world.agreed():
                if begin.checkpoint is not None:
                    progress = _load(config, begin, model, optimizer, ema, load, device, world)
                    batches.go_on(progress.broken, progress.shapes)
                elif (name := not_finite(model)) is not None:
                    raise UserError(f"model to start from: {name} is not finite, want finite weights")
            progress.shapes = batches.planned
            if begin.checkpoint is not None and carried is not None:
                carried.load(begin.checkpoint)
            trained = config, begin, model, optimizer, ema, batches, backpropagate, validate, save, costs
            Run(*trained, progress, signals, carried, world, checkpoints, split).train(device)
    except failures.KINDS as error:
        if (reason := failures.reason(error)) is None:
            raise
        if failures.lost_rank(error):
            reason = f"{world.who_is_lost()}; {reason}"
        raise TrainingError(f"{reason}; {checkpoints.last()}") from None


def _load(config: Config, begin: Start, model, optimizer, ema: EMA | None, load, device, world) -> Progress:
    """Load what a checkpoint holds in addition to the weights, which must be finite; a sharded one holds the
    weights too."""
    folder, several = begin.checkpoint, world.mesh is not None
    if several:
        load_sharded(folder, model, optimizer, ema, trained=trains_a_part(config))
    if (name := not_finite(model)) is not None:
        raise UserError(f"{folder}: {name} is not finite, want a checkpoint with finite weights")
    if ema is not None and not several:
        want = f"0: {folder} holds no averaged weights"
        check((folder / "ema").is_dir(), "train.ema", config.train.ema, want)
        held = load(folder / "ema")
        ema.average = {k: held[k].detach().float().to(p.device) for k, p in ema.own.items()}
    # Last, since building the model of the average draws random numbers.
    progress = read_state(folder, device, None if several else optimizer)
    if begin.new_score:
        progress.best = -math.inf
    return progress


@dataclass
class Run:
    """A run that has been accepted; the fields are fit's."""

    config: Config
    begin: Start
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    batches: MicroBatches
    backpropagate: Callable[..., Iterable[dict[str, Tensor]]]
    validate: Callable[[int], dict[str, float]] | None
    save: Callable[..., None]
    costs: Callable[[Shape], Costs]
    progress: Progress
    signals: Interrupts
    carried: Carried | None
    world: World
    checkpoints: Checkpoints
    split: bool
    too_far: str | None = None  # why train.stop_anchor ends the run

    def train(self, device: torch.device) -> None:
        """Take the folder and make all steps that are left, until a signal comes: then Stopped is raised."""
        out = Path(self.config.train.out)
        with self.signals.at_once(False), ExitStack() as held:
            with self.world.agreed():
                if self.world.leads:
                    self.take_folder(out, held, device)
            with self.checkpoints:
                self.steps(device)
            name = self.world.signal(self.signals)
            if name is not None or (self.too_far and self.progress.step < self.config.train.steps):
                saved = f"{self.checkpoints.last()}, train.resume=true goes on from it"
                saved = saved if files.checkpoints(out) else "nothing to save"
                raise Stopped(f"{name or self.too_far}: stopped; {saved}")

    def take_folder(self, out: Path, held: ExitStack, device: torch.device) -> None:
        """Lock the folder for as long as `held` is open, and say how the run starts."""
        found = self.begin.checkpoint
        if not held.enter_context(files.locked(make_folder(out, "train.out"))):
            note(f"{out}: its file system has no locks, so nothing stops a second run in this folder")
        if files.checkpoints(out)[-1:] != ([] if found is None else [found]):
            raise UserError(f"train.out: {out} got a checkpoint from another run meanwhile, start again")
        files.clear_leftovers(out)
        note_run(out)
        files.write_whole(out / "config.yaml", self.config.to_yaml())
        print(f"prfl: kernels: {kernels(device.type)}", flush=True)
        for change in self.begin.changes:
            print(f"prfl: {change}", flush=True)
        self.list_broken(at_start=True)
        if self.begin.new_score and self.validate is not None:
            print("prfl: validation has changed: earlier scores no longer count for best", flush=True)
        if self.progress.step >= (steps := self.config.train.steps):
            print(f"prfl: {found} has all of train.steps = {steps}: no step is left", flush=True)

    def steps(self, device: torch.device) -> None:
        """The steps from progress.step on, with their validations and checkpoints."""
        train, progress, optimizer, out = self.config.train, self.progress, self.optimizer, self.out
        world, own = self.world, train.accumulate // self.world.readers  # micro-batches of a step here
        first = progress.step * train.accumulate + world.reader
        items = self.batches.loader(first, self.config.data.num_workers, device, world.readers)
        start = progress.step + 1 if self.begin.checkpoint else 0
        writer = MetricsWriter(out, train.tensorboard, train.wandb, start) if world.leads else NoMetrics()
        several = world.mesh is not None
        with (
            closing(items), writer as metrics, timed(device) as clock,
            measured(clock, world.leads) if several else nullcontext(),
        ):  # fmt: skip
            bfloat16 = self.config.model.compute_dtype == "bfloat16"
            performance = Performance(device, world, self.costs, bfloat16)
            measurements = Measurements(
                metrics, train.log_every, progress.unlogged, self.bad_gradient, self.look, world.mean, clock,
                performance,
            )  # fmt: skip
            stop = world.any(self.signals.asked is not None)
            first_time = self.begin.checkpoint is None or progress.unvalidated
            if self.validate is not None and first_time and not stop:
                self.check(metrics)
                stop = world.any(self.signals.asked is not None)
            if stop:
                return
            updates = Updates(optimizer, self.config, self.ema, own, self.split)
            steps = range(progress.step, train.steps)
            if world.leads:
                steps = progress_bar(steps, out.name, train.steps, initial=progress.step)
            for step in steps:
                updates.begin(step)
                seen: dict[str, Tensor] = {}
                for micro in range(own):
                    mark("data")
                    key = step * train.accumulate + micro * world.readers + world.reader
                    with world.agreed():
                        item = next(items)
                    item = self.batches.accept(item, key, device)
                    self.list_broken()
                    for batch in [item.batch] if isinstance(item.batch, Batch) else item.batch:
                        count("samples", batch.latent)
                    for number, values in enumerate(self.backpropagate(item.batch, key, 1 / own)):
                        for k, v in values.items():
                            seen[k] = seen.get(k, 0) + v.detach() / own
                        updates.after(number, micro == own - 1)
                        measurements.settle()  # the device has a backward of this step to do meanwhile
                norm = updates.end()
                measurements.put(step, updates.lr, norm, seen)
                progress.step = done = step + 1
                last = done == train.steps
                check_now = self.validate is not None and (done % self.config.eval.every == 0 or last)
                if check_now:
                    measurements.settle()
                    self.check_weights()
                    self.check(metrics)
                # Asked once, since a signal may come at any time. The next checkpoint raises what has failed.
                asked = self.signals.asked is not None or self.too_far is not None
                stop = world.any(asked or self.checkpoints.failed)
                if stop or last or done % train.save_every == 0:
                    measurements.settle()
                    self.check_weights()
                    progress.unlogged = measurements.unlogged()
                    metrics.sync()
                    self.write_checkpoint(device)
                if stop:
                    break

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.config.train.out)

    def list_broken(self, at_start: bool = False) -> None:
        """Write the samples that are left out to broken.jsonl when there are more of them."""
        broken, path = self.batches.broken, self.out / BROKEN
        before, more = self.progress.broken, []
        if len(broken) > len(before):
            self.progress.broken = self.batches.left_out()
            places = zip(broken, self.progress.broken, strict=True)
            more = [sample for sample, place in places if place not in before]
        if not self.world.leads or not (more or at_start):
            return
        if not broken:  # a run that was killed before its first checkpoint may have left some
            path.unlink(missing_ok=True)
            return
        for sample in more:
            note(f"{broken[sample]}; left out (data.skip_broken)")
        lines = [{"sample": str(sample), "reason": why} for sample, why in broken.items()]
        files.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))

    def look(self, step: int, values: dict[str, float]) -> None:
        """Whether the logged values of a step, the same on all ranks, end the run."""
        limit = self.config.train.stop_anchor
        if limit is None or self.too_far is not None:
            return
        for name in ("anchor", "sft_anchor"):
            if (found := values.get(name, 0.0)) > limit:
                self.too_far = f"train.stop_anchor: {name} of step {step + 1} is {found:.4g}, above {limit:g}"

    def check(self, metrics: MetricsWriter) -> None:
        """Validate, with the averaged weights if there are any, and keep the best. Left for the resumed run
        where a signal has come or comes now."""
        progress, training, ema = self.progress, self.model.training, self.ema
        mark("validation")
        progress.unvalidated = True
        self.model.eval()
        try:
            # One of several ranks must not leave a validation alone.
            at_once = self.signals.at_once(self.world.size == 1)
            with ema.applied() if ema else nullcontext(), torch.no_grad(), at_once:
                values = self.validate(progress.step)
        except Stopped:
            return
        finally:
            self.model.train(training)
        progress.unvalidated = False
        metrics.log(progress.step, values, "eval")
        if values["score"] > progress.best:
            progress.best = values["score"]
            with self.world.folder(self.out / "best") as folder:
                self.write_weights(folder)
                if self.world.leads:
                    score = {"step": progress.step, "score": progress.best}
                    (folder / "score.json").write_text(json.dumps(score))
                    checksums.write(folder)

    def write_checkpoint(self, device: torch.device) -> None:
        """Write checkpoint-N, with several processes perhaps in the background, then delete the oldest."""
        mark("save")
        alone = self.world.mesh is None

        def state(folder: Path) -> None:
            if alone:
                self.write_weights(folder)
            if self.world.leads:
                save_state(folder, self.progress, device, self.optimizer if alone else None)
                write_run(folder, self.config, self.begin.sources)
            if self.carried is not None:
                self.carried.save(folder)

        def shards(folder: Path, then: Callable[[], None]) -> Saving:
            part = trains_a_part(self.config)  # the other weights are in another folder
            behind = self.world.saves if self.config.parallel.save_async else None
            trained = self.model, self.optimizer, self.ema
            return save_sharded(folder, *trained, trained=part, background=behind, then=then)

        self.checkpoints.write(self.progress.step, state, None if alone else shards)

    def write_weights(self, folder: Path) -> None:
        """Write the trained weights, and the averaged ones to `folder`/ema."""
        self.save(folder, self.progress.step)
        if self.ema is not None and self.world.mesh is not None:
            self.save(folder / "ema", self.progress.step, self.ema.average)
        elif self.ema is not None:
            with self.ema.applied(torch.float32):
                self.save(folder / "ema", self.progress.step)

    def check_weights(self) -> None:
        """TrainingError if a trained weight is not finite."""
        if (name := self.not_finite()) is not None:
            what = f"{name} is not finite after the update"
            raise TrainingError(f"step {self.progress.step - 1}: {what}; {self.checkpoints.last()}")

    def not_finite(self) -> str | None:
        """The name of a trained parameter that is not finite on some rank; every rank must ask."""
        return next(filter(None, self.world.all(not_finite(self.model))), None)

    def bad_gradient(self, step: int, norm: float) -> None:
        """TrainingError for a norm that is not finite, with what may be its cause; none where what is carried
        explains it."""
        if (name := self.not_finite()) is not None:
            cause = f"the weights were not finite: {name}"
        elif self.carried is not None and self.carried.lost(step):
            note(f"step {step}: the norm of the gradient is {norm}, as a chain was not finite: no update")
            return
        else:
            cause = self.batches.suspects(range(step * (n := self.config.train.accumulate), (step + 1) * n))
        what = f"the norm of the gradient is {norm}; {cause}"
        raise TrainingError(f"step {step}: {what}; {self.checkpoints.last()}")
