"""Runs that end early: signals, kills, a second run, a full disk, lost loader processes, no memory."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line, tiny_config, write_data, write_run
from ranks import server
from safetensors import SafetensorError
from training_runs import assert_equal, content, run, values

from prfl_engine import failures, files, loop, micro_batches, resume, tensor_files
from prfl_engine import train as train_module
from prfl_engine.cli import main
from prfl_engine.data import Reader, read_lists
from prfl_engine.errors import UserError
from prfl_engine.interrupt import Stopped, interrupts, shield
from prfl_engine.optim import updates
from prfl_engine.rollout import fresh as fresh_module

LONG = ["train.steps=100000", "train.save_every=100000", "loss.weight=0"]


def signalled(monkeypatch, module, name, call, number=signal.SIGTERM):
    """The process gets a signal in the call-th call of a function."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_the_rest_is_the_same_to_the_bit(
    number, tmp_path, monkeypatch, capsys
):
    config = write_run(tmp_path, train={"steps": 4, "ema": 0.9, "log_every": 2}, eval={"every": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, f"train.out={whole}")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signalled(patch, train_module, "sft_loss", 5, number)  # two calls are of the first validation
        capsys.readouterr()
        run("train", config, f"train.out={cut}")
    assert f"prfl: {number.name}: stopped; {cut}/checkpoint-3 is the last" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert sorted(os.listdir(cut)) == ["best", "checkpoint-3", "config.yaml", "metrics.jsonl", "samples"]
    run("train", config, f"train.out={cut}", "train.resume=true")
    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))
    for prefix in ("train", "eval"):
        assert values(cut, prefix) == values(whole, prefix)


@pytest.mark.parametrize("call, step", [(1, 0), (2, 2)])
def test_a_signal_ends_a_validation_and_the_resumed_run_makes_it(call, step, tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, train={"steps": 4}, eval={"every": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, f"train.out={whole}")
    with monkeypatch.context() as patch:
        signalled(patch, train_module, "write_samples", call)
        run("train", config, f"train.out={cut}")
    saved = f"{cut}/checkpoint-2 is the last" if step else "nothing to save"
    assert f"SIGTERM: stopped; {saved}" in capsys.readouterr().err
    assert list(values(cut, "eval")) == ([0] if step else [])
    run("train", config, f"train.out={cut}", "train.resume=true")
    assert values(cut, "eval") == values(whole, "eval") and values(cut) == values(whole)
    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))


def test_a_signal_before_the_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    signalled(monkeypatch, train_module, "make_policy", 1)
    assert main(["train", str(config)]) == 0
    assert one_line(capsys) == "prfl: SIGTERM: stopped; nothing to save"
    assert not (tmp_path / "run").exists()


def test_a_second_signal_is_not_waited_for():
    for number in (signal.SIGTERM, signal.SIGINT):
        code = (
            "import os; from prfl_engine.interrupt import interrupts\n"
            "with interrupts() as i, i.at_once(False):\n"
            f"    for _ in range(2): os.kill(os.getpid(), {number:d})"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode == 128 + number
        assert "stopping after this step" in ended.stderr and "again" in ended.stderr


def test_blocks_nest_and_elsewhere_nothing_is_handled():
    with interrupts() as outer, interrupts() as inner:
        assert inner is outer
        with outer.at_once(False):
            os.kill(os.getpid(), signal.SIGTERM)
            assert outer.asked == signal.SIGTERM
            with pytest.raises(Stopped), outer.at_once(True):
                raise AssertionError("not reached")


def started(config, *overrides):
    """A run in a process of its own, in its own group, that has made a step."""
    metrics = config.parent / "run/metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    argv = "train", str(config), *LONG, "data.num_workers=2", *overrides
    process = server().Process(target=in_a_session, args=(config.with_name("stderr"), argv))
    process.start()
    while process.is_alive():
        if metrics.exists() and metrics.stat().st_size > before:
            return process
        time.sleep(0.05)
    raise AssertionError(lines(process, config))


def in_a_session(stderr, argv):
    """`prfl ARGV` as the leader of a session of its own."""
    os.setsid()
    torch.set_num_threads(1)
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(argv))


def lines(process, config):
    """The exit code, and stderr without progress bars."""
    process.join()
    err = config.with_name("stderr").read_text().replace("\r", "\n")
    return process.exitcode, [s for s in err.splitlines() if "prfl" in s or "File" in s]


def children(pid):
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_processes(tmp_path):
    """A second run; a batch system's SIGTERM to every process; a killed loader process; a killed run."""
    config = write_run(tmp_path)
    out = tmp_path / "run"
    first = started(config)
    with pytest.raises(UserError, match=rf"train\.out: .*in use by process {first.pid} on"):
        files.check_free(out)
    loaders = children(first.pid)  # its own: those of a fork server would outlive it if it were killed
    assert len(loaders) == 2 and {command(pid) for pid in loaders} == {command(first.pid)}
    before = sorted(os.listdir(out))
    run("train", config, "train.resume=true", code=2)
    assert sorted(os.listdir(out)) == before
    os.killpg(first.pid, signal.SIGTERM)
    code, found = lines(first, config)
    assert code == 0 and len(found) == 2 and "SIGTERM: stopped; " in found[1], found
    (last,) = files.checkpoints(out)

    second = started(config, "train.resume=true")
    os.kill(children(second.pid)[-1], signal.SIGKILL)
    code, found = lines(second, config)
    assert code == 1 and len(found) == 1, found
    assert "lost a loader process: " in found[0] and f"{last} is the last good" in found[0]

    third = started(config, "train.resume=true")
    third.kill()
    third.join()
    assert (out / files.LOCK).exists()
    run("train", config, "train.resume=true", f"train.steps={last.name[11:]}")
    assert sorted(os.listdir(out)) == [last.name, "config.yaml", "metrics.jsonl"]


def test_a_loader_process_is_shielded_from_its_beginning(tmp_path, monkeypatch):
    def masked(worker):
        (tmp_path / f"{worker}").write_text(str(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))))
        shield(worker)

    monkeypatch.setattr(micro_batches, "shield", masked)
    paths = read_lists([str(write_data(tmp_path / "data", tiny_config()))], "list")
    stream = micro_batches.MicroBatches(Reader(tiny_config()), paths, 1, 0)
    next(stream.loader(0, 1, torch.device("cpu")))
    assert (tmp_path / "0").read_text() == str(sorted((signal.SIGINT, signal.SIGTERM)))
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fresh_module, "Grading", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                main(["train", str(config), "eval.every=1", "train.resume=auto"])
    assert "holds no checkpoint: starting at step 0" in capsys.readouterr().err
    run("train", config, "eval.every=1", "train.resume=true")
    assert list(values(tmp_path / "run", "eval")) == [0, 1, 2]


# Failures of the machine.


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")


def torn(error):
    """A save that has written half a file."""

    def save(value, path, *args):
        Path(path).write_bytes(b"half")
        raise error

    return save


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
WRITER = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 41792 vs 41680")
NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("module, name, broken, needle", [
    (tensor_files, "write_tensors", no_space, "cannot write: file: No space left"),
    (torch, "save", torn(WRITER), "inline_container"),
    (torch, "save", torn(RuntimeError("basic_ios::clear: iostream error")), "iostream"),
    (resume, "write_run", no_space, "cannot write: file: No space left"),
    (os, "fsync", no_space, "No space left"),
    (updates, "update", torn(NO_MEMORY), "out of memory: "),
    (updates, "update", torn(torch.OutOfMemoryError("CUDA out of memory. Tried")), "out of memory: CUDA"),
    (fresh_module, "Grading", torn(MemoryError("Unable to allocate 8 PiB")), "Unable to allocate"),
], ids=range(8))  # fmt: skip
def test_a_failure_of_the_machine_is_one_line(module, name, broken, needle, tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    run("train", config)
    before, out = content(tmp_path / "run/checkpoint-2"), tmp_path / "run"
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    if name == "write_run":
        module = loop
    if name in ("update", "Grading"):
        error = broken.__closure__[0].cell_contents
        broken = lambda *args: (_ for _ in ()).throw(error)  # noqa: E731
    monkeypatch.setattr(module, name, broken)
    run("train", config, "train.resume=true", "train.steps=3", "eval.every=3", code=1)
    line = one_line(capsys)
    assert needle in line and f"{out}/checkpoint-2 is the last good checkpoint" in line
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    assert [p.name for p in files.checkpoints(out)] == ["checkpoint-2"]
    assert_equal(content(out / "checkpoint-2"), before)


def test_a_broken_connection_to_a_loader_process(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator, "_try_get_data", torn_connection)
    run("train", config, "data.num_workers=1", code=1)
    line = one_line(capsys)
    assert "lost a loader process: the connection to it broke (ConnectionResetError); there is no" in line


def torn_connection(*args, **kwargs):
    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_a_full_disk_in_the_words_of_safetensors():
    assert failures.reason(FULL) == f"cannot write: {FULL}"


def test_what_is_no_failure_of_the_machine_keeps_its_traceback():
    others = RuntimeError("shape"), OSError(errno.ENOENT, "no"), SafetensorError("header"), ValueError("x")
    for error in others:
        assert failures.reason(error) is None


def test_a_full_disk_of_another_command(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path)
    save, names = np.save, []

    def full(path, array):
        names.append(path)
        return save(path, array) if len(names) < 2 else no_space()

    monkeypatch.setattr("numpy.save", full)
    before = sorted(tmp_path.iterdir())
    assert main(["sample", str(config), "--out", str(tmp_path / "s")]) == 1
    assert one_line(capsys) == "prfl: cannot write: file: No space left on device"
    assert len(names) == 2 and sorted(tmp_path.iterdir()) == before
