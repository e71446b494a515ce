"""Training metrics: one JSON line per call, TensorBoard, and Weights & Biases when asked for.

A line of metrics.jsonl is {"step": int, "time": seconds since the epoch, "values": {name: number}}.
JSON has no NaN and no infinity: both are written as null and read back as NaN, so any JSON reader
takes the file. The file is the record that a resumed run cuts back to its own step; TensorBoard is
told the same through purge_step.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from prfl_engine.errors import UserError
from prfl_engine.files import write_whole
from prfl_engine.paths import check_file

FILE = "metrics.jsonl"


def decimal(value: float) -> str:
    """The shortest decimal that reads back as `value`: 400, 400.0001. Two timesteps have two names."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl, or of the one in a folder; null values come back as NaN.

    A last line without its newline is the torn write of a killed run and is left out. UserError for a line
    that is no record, and for a file that cannot be read.
    """
    path = Path(path)
    path = check_file(path / FILE if path.is_dir() else path, "a file of metrics records")
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                values = record["values"].items()
                record["values"] = {k: math.nan if v is None else v for k, v in values}
                record["step"] = int(record["step"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not a metrics record ({error})") from error
            yield line, record


class MetricsWriter:
    """Writes what a run measures into out_dir; the main process alone holds one.

    TensorBoard's files go to out_dir/tensorboard. They and the imports that they need (about a second)
    start with the first value, so that a run that fails early leaves none.
    """

    def __init__(
        self, out_dir: str | Path, tensorboard: bool = True, wandb_project: str | None = None, start: int = 0
    ):
        """start: the first step of this run. The lines of steps from there on, which an aborted run left, and
        a torn last line are dropped. The file is replaced in one rename, so a kill in the middle leaves the
        old one or the new. UserError where a line is no record, or wandb cannot be imported."""
        self.out_dir, self.start, self._tensorboard, self._board = Path(out_dir), start, tensorboard, None
        self.out_dir.mkdir(parents=True, exist_ok=True)
        path, self._wandb = self.out_dir / FILE, None
        if wandb_project:
            wandb = _import_wandb(wandb_project)
            self._wandb = wandb.init(project=wandb_project, name=self.out_dir.name, dir=str(self.out_dir))
        if path.exists():
            write_whole(path, b"".join(line for line, record in _lines(path) if record["step"] < start))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def log(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Append the values of one step, each named prefix/name."""
        named = {f"{prefix}/{k}" if prefix else k: float(v) for k, v in values.items()}
        safe = {k: v if math.isfinite(v) else None for k, v in named.items()}
        record = {"step": int(step), "time": round(time.time(), 3), "values": safe}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard and self._board is None:
            self._board = _summary_writer()(str(self.out_dir / "tensorboard"), purge_step=self.start)
        if self._board is not None:
            for name, value in named.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def sync(self) -> None:
        """Flush the records to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, and end what TensorBoard and Weights & Biases write."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class NoMetrics:
    """A MetricsWriter of a process that writes nothing."""

    def log(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *exception) -> None:
        pass


def check_writers(tensorboard: bool, wandb_project: str | None) -> None:
    """UserError if a run that is to write to TensorBoard or Weights & Biases cannot; writes nothing."""
    if tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "train.tensorboard: got true, but tensorboard is not installed: pip install tensorboard, "
            "or set train.tensorboard=false"
        )
    if wandb_project:
        _import_wandb(wandb_project)


def _summary_writer():
    """torch's SummaryWriter; it also imports TensorFlow if installed, so TensorFlow's log is silenced."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard cannot be imported ({error}): pip install tensorboard, "
                "or set train.tensorboard=false"
            ) from error
    return SummaryWriter


def _import_wandb(project: str):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb: got {project!r}, but wandb cannot be imported ({error}): "
            "pip install wandb, or leave the field empty"
        ) from error
    return wandb


def note(line: str) -> None:
    """A line on stderr that leaves progress bars whole."""
    from tqdm import tqdm

    tqdm.write(f"prfl: {line}", file=sys.stderr)


def progress(iterable: Iterable, desc: str, total: int | None = None, initial: int = 0):
    """A progress bar on stderr; where that is no terminal, a line every half minute."""
    from tqdm import tqdm

    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
