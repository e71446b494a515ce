"""What tests of whole runs on several processes run on every rank: the command line as torchrun starts it."""

import contextlib
import gc
import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prfl_engine import cli


def free_port() -> int:
    """A port that nothing uses yet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(size: int, port: int, patch: Callable | None, *argv: str) -> tuple[int, str] | None:
    """(exit code, what it prints) of `prfl ARGV` on the first `size` ranks. patch(monkeypatch, rank): what it
    changes holds for this command alone."""
    rank = int(os.environ["RANK"])
    if rank >= size:
        return None
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as changed, launched(size, port):
        if patch is not None:
            patch(changed, rank)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = cli.main([str(a) for a in argv])
    return code, said.getvalue()


@contextlib.contextmanager
def launched(size: int, port: int) -> Iterator[None]:
    """The environment that torchrun gives a process, which would end afterwards. This one goes on; so what a
    training leaves in cycles, its groups and their threads too, is freed here, not amid the next one."""
    given = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]
        gc.collect()


def full_disk(monkeypatch, rank: int) -> None:
    """The last rank of two finds no room for its part of a checkpoint."""
    from sharded_checkpoint_cases import disk_full

    if rank == 1:
        from prfl_engine import checkpoint_shards

        original = checkpoint_shards.write_tensors

        def write(*arguments):
            with disk_full(True):
                return original(*arguments)

        monkeypatch.setattr(checkpoint_shards, "write_tensors", write)


def two_kinds(monkeypatch, rank: int) -> None:
    """A plan has blocks that recompute nothing or all to choose from."""
    from prfl_engine.planner import plan

    monkeypatch.setattr(plan, "KINDS", {name: plan.KINDS[name] for name in ("none", "full")})


def slow_save(monkeypatch, rank: int) -> None:
    """A checkpoint takes its name when the run makes its next validation, or after that."""
    from threading import Event

    from prfl_engine import checkpoint_shards, loop

    checked, write, check = Event(), checkpoint_shards._write, loop.Run.check

    def written(folder: Path, *arguments) -> None:
        checked.wait()
        write(folder, *arguments)

    def checking(run, metrics) -> None:
        if run.progress.step == 3:
            assert not (run.out / "checkpoint-2").exists()
            checked.set()
        check(run, metrics)

    monkeypatch.setattr(checkpoint_shards, "_write", written)
    monkeypatch.setattr(loop.Run, "check", checking)


def unreadable_here(monkeypatch, rank: int) -> None:
    """Sample 3 cannot be read on the second rank, as if its file system had lost it for a moment."""
    from prfl_engine.data import Reader
    from prfl_engine.errors import UserError

    original = Reader.read

    def read(reader, path, rng):
        if rank == 1 and path.stem == "3":
            raise UserError(f"{path}: lost")
        return original(reader, path, rng)

    monkeypatch.setattr(Reader, "read", read)


def told_validation(monkeypatch, rank: int) -> None:
    """Prints the samples of every batch of a validation."""
    import torch

    from prfl_engine import train
    from prfl_engine.batch import Batch

    def told(loss):
        def made(*given):  # the model, with a frozen start or without, the batch and the rest
            if not torch.is_grad_enabled():
                batch = next(a for a in given if isinstance(a, Batch))
                print(f"evaluated {len(batch.latent)}")
            return loss(*given)

        return made

    for name in "sft_loss", "anchored_sft_loss":
        monkeypatch.setattr(train, name, told(getattr(train, name)))


def signalled_while_loading(monkeypatch, rank: int) -> None:
    """The second rank gets SIGTERM when it begins to load the generator."""
    import signal

    from prfl_engine import train

    load = train.make_policy

    def make_policy(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(train, "make_policy", make_policy)
    monkeypatch.setattr(train, "make_frozen_reward", None)  # never called


def told_halves(monkeypatch, rank: int) -> None:
    """Every rank prints whether guided steps with gradient have both halves even where a scale is 1."""
    from prfl_engine import train

    original = train.training_guidance

    def made(*arguments, **named):
        guidance = original(*arguments, **named)
        print(f"both halves in all steps: {guidance.always}")
        return guidance

    monkeypatch.setattr(train, "training_guidance", made)
