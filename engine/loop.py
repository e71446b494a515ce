"""The loop that both trainings share: accumulate, clip, step, measure, validate, save, resume.

One optimizer step holds the gradients of all losses of all accumulated micro-batches, and is
clipped once. Nothing in a step waits for the device: an update is made on condition that the gradient is
finite, a condition that the device decides, and the host reads what a step measured while the next one
runs. All randomness follows from the seed and the step, so a run that was stopped and
resumed goes on as if it had not been; on the CPU, to the bit.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from prfl_engine import recompute
from prfl_engine.block_adamw import BlockAdamW
from prfl_engine.checkpoint import atomic_folder, checkpoints, load_pickle
from prfl_engine.config import Config, ModelConfig
from prfl_engine.data import Stream
from prfl_engine.dit import WanTransformer
from prfl_engine.doctor import gpu_metrics
from prfl_engine.errors import TrainingError, UserError
from prfl_engine.metrics import MetricsWriter, progress
from prfl_engine.optim import EMA, lr_factor, make_optimizer, set_lr, update
from prfl_kernels import compiled, table, tuning

STATE = "training_state.pt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(config: Config) -> torch.device:
    """The device of a run; the kernels that the configuration asks for are chosen on the way."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device: got {name!r}, want auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"train.device: got {name!r}, but torch sees no CUDA GPU here")
        if device.index is not None:
            if device.index >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise UserError(f"train.device: got {name!r}, want one of the {count} GPUs that torch sees")
            torch.cuda.set_device(device)  # the one on which Triton launches and graphs are recorded
    if device.type == "cpu":
        compiled.keep_freed_memory()
    try:
        if config.model.kernels is not None:
            table.configure(config.model.kernels)
        table.check(device.type)
    except ValueError as error:
        where = "PRFL_KERNELS" if config.model.kernels is None else "model.kernels"
        raise UserError(f"{where}: {error}") from None
    try:
        tuning.tuned()
    except ValueError as error:
        raise UserError(str(error)) from None
    return device


def set_up(model: WanTransformer, config: ModelConfig) -> WanTransformer:
    """How the blocks of a model compute in training: what they keep, chunks, compilation, precision."""
    model.recompute, model.keep = recompute.of_config(config), config.keep
    model.set_chunk(config.chunk)
    if config.compile:
        model.compile_blocks()
    return model.set_precision(DTYPES[config.compute_dtype], DTYPES[config.residual_dtype])


def prepare_out(config: Config) -> Path | None:
    """Make the output folder; return the checkpoint to resume from, None to start from step 0.

    A folder that holds a run is refused unless train.resume asks to go on with it.
    """
    out = Path(config.train.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"train.out: {out} is a file, want a folder")
    found = checkpoints(out)
    if not config.train.resume and (found or (out / "metrics.jsonl").exists()):
        what = found[-1].name if found else "metrics.jsonl"
        raise UserError(
            f"train.out: {out} already holds {what}, want an empty folder or train.resume=true"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config.to_yaml())
    return found[-1] if found else None


def fit(
    config: Config,
    resume: Path | None,
    model: nn.Module,
    groups: list[tuple[nn.Module, float]],
    stream: Stream,
    losses: Callable[..., Iterable[tuple[Tensor, dict[str, Tensor]]]],
    validate: Callable[[int], dict[str, float]] | None,
    save: Callable[[Path, int], None],
    load: Callable[[Path], dict[str, Tensor]],
) -> None:
    """Train `model` for config.train.steps optimizer steps, from the checkpoint `resume` if given.

    losses(item, key) yields (loss, metrics) one after another; each is backpropagated, and its
    graph freed, before the next is computed. `key` is an integer that no other micro-batch has.
    validate(step) returns metrics; "score", higher is better, picks the best checkpoint.
    save(folder, step) writes the trained parameters, load(folder) reads them back in float32, under
    their names in the model.
    """
    train, out = config.train, Path(config.train.out)
    device = pick_device(config)
    optimizer = make_optimizer(groups, config.optim)
    start, best, unlogged = 0, -math.inf, {}
    ema = None
    if train.ema > 0:
        ema = EMA(model, train.ema)
        if resume is not None:
            held = load(resume / "ema")
            ema.average = {k: held[k].detach().float().to(p.device) for k, p in ema.own.items()}
    if resume is not None:  # last, since building the model of the average draws random numbers
        start, best, unlogged = _load_state(resume, optimizer, device)

    def write(folder: Path, step: int) -> None:
        save(folder, step)
        if ema is not None:
            with ema.applied(torch.float32):
                save(folder / "ema", step)

    def checked(step: int) -> None:
        """Validate, with the averaged weights if there are any, and keep the best."""
        nonlocal best
        training = model.training
        model.eval()
        with ema.applied() if ema is not None else nullcontext(), torch.no_grad():
            values = validate(step)
        model.train(training)
        metrics.log(step, values, "eval")
        if values["score"] > best:
            best = values["score"]
            with atomic_folder(out / "best") as folder:
                write(folder, step)
                (folder / "score.json").write_text(json.dumps({"step": step, "score": best}))

    items = stream.loader(start * train.accumulate, config.data.num_workers, device)
    with MetricsWriter(out, train.tensorboard, train.wandb) as metrics:
        metrics.truncate_from(start + 1)
        measurements = Measurements(metrics, train.log_every, unlogged)
        if validate is not None and start == 0:
            checked(0)
        for step in progress(range(start, train.steps), f"{out.name}", train.steps, initial=start):
            factor = lr_factor(step, train.steps, config.optim)
            set_lr(optimizer, factor)
            seen: dict[str, Tensor] = {}
            for micro in range(train.accumulate):
                item = next(items)
                for loss, values in losses(item, step * train.accumulate + micro):
                    (loss / train.accumulate).backward()
                    del loss  # its graph would live as long as the next forward
                    for k, v in values.items():
                        seen[k] = seen.get(k, 0) + v.detach() / train.accumulate
                    measurements.settle()  # the device has a backward of this step to do meanwhile
            norm = update(optimizer, config.optim.clip)
            if ema is not None:
                ema.update()
            measurements.put(step, optimizer.param_groups[0]["base_lr"] * factor, norm, seen)
            done = step + 1
            last = done == train.steps
            check_now = validate is not None and (done % config.eval.every == 0 or last)
            save_now = done % train.save_every == 0 or last
            if check_now or save_now:
                measurements.settle()
            if check_now:
                checked(done)
            if save_now:
                with atomic_folder(out / f"checkpoint-{done}") as folder:
                    write(folder, done)
                    _save_state(folder, done, best, measurements.newest, optimizer, device)
                for old in checkpoints(out)[: -train.keep]:
                    shutil.rmtree(old)


class Measured:
    """Values of a step, 0-dim on the device, on their way to the host."""

    def __init__(self, step: int, lr: float, values: dict[str, Tensor]):
        self.step, self.lr, self.names = step, lr, list(values)
        flat = torch.stack([v.detach().float() for v in values.values()])
        self.numbers = flat.to("cpu", non_blocking=True)  # into pinned memory, where it came from a GPU
        self.event = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None

    def read(self) -> dict[str, float]:
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True)) | {"lr": self.lr}


class Measurements:
    """What steps measure; a step's values are read, all in one transfer, when the next one has begun."""

    def __init__(self, metrics: MetricsWriter, log_every: int, newest: dict[str, Tensor]):
        self.metrics, self.log_every = metrics, log_every
        self.last: Measured | None = None
        self.newest = newest  # since the last log: not every step has every loss

    def put(self, step: int, lr: float, norm: Tensor, values: dict[str, Tensor]) -> None:
        self.newest |= values
        logs = (step + 1) % self.log_every == 0
        self.last = Measured(step, lr, {"grad_norm": norm} | (self.newest if logs else {}))
        if logs:
            self.newest = {}

    def settle(self) -> None:
        """Wait for the last step's values: TrainingError if its gradient was not finite, else log them."""
        if self.last is None:
            return
        step, values = self.last.step, self.last.read()
        self.last = None
        if not math.isfinite(values["grad_norm"]):
            raise TrainingError(
                f"step {step}: the norm of the gradient is {values['grad_norm']}; "
                f"stopped, checkpoints in {self.metrics.out_dir} are whole"
            )
        if (step + 1) % self.log_every == 0:
            self.metrics.log(step + 1, values | gpu_metrics(), "train")


def _save_state(
    folder: Path, step: int, best: float, unlogged: dict[str, Tensor], optimizer, device: torch.device
) -> None:
    state = {"step": step, "best": best, "unlogged": unlogged, "optimizer": optimizer.state_dict()}
    state["kind"] = type(optimizer).__name__
    state["rng"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    torch.save(state, folder / STATE)


def _load_state(folder: Path, optimizer, device: torch.device) -> tuple[int, float, dict[str, Tensor]]:
    # One that copies what it loads need not find room for all of it twice.
    state = load_pickle(folder / STATE, mmap=isinstance(optimizer, BlockAdamW))
    kind, own = state.get("kind", "AdamW"), type(optimizer).__name__
    if kind != own:
        raise UserError(f"{folder / STATE}: holds a state of {kind}, want {own}: the optim section differs")
    try:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        unlogged = {k: v.to(device) for k, v in state.get("unlogged", {}).items()}
        return state["step"], state["best"], unlogged
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / STATE}: does not fit this run: {error}") from None
