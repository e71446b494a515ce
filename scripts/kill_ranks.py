"""Kills one of several ranks (SIGKILL) at random moments of a training, resumes it, and compares.

    python scripts/kill_ranks.py [--trials 20] [--ranks 2] [--steps 6] [--seed 0]

A tiny PRFL run saves in the background after every step and validates. In every trial a random rank is killed
at a random moment after it has made its folder. The others must end by themselves within 10 minutes, with
exit code 1, or 0 if they had nothing left to do. Then the run is started again, with train.resume=auto, and
must end with the checkpoint and the metrics of a run that nothing has disturbed, to the bit. Exit code 1
where one does not.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

LIMIT = 600.0  # seconds in which a rank ends by itself, with a whole training


def _rank(rank: int, size: int, port: int, log: str, arguments: list[str]) -> None:
    """A process as torchrun would start it, with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    from prfl_engine.cli import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(size: int, log: Path, *arguments: str) -> list[multiprocessing.Process]:
    """Processes of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prfl_engine.train"])
    made = []
    for rank in range(size):
        given = rank, size, port, f"{log}.{rank}", [str(a) for a in arguments]
        made.append(context.Process(target=_rank, args=given))
        made[-1].start()
    return made


def finish(processes: list[multiprocessing.Process]) -> list[int | None]:
    """Exit codes; None of a process that did not end by itself."""
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


class Result(NamedTuple):
    """What has become of a trial."""

    line: str
    ok: bool


def _last(out: Path) -> str:
    steps = [int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*")]
    return f"checkpoint-{max(steps)}" if steps else "no checkpoint"


def _outcome(out: Path, steps: int):
    from training_runs import content, values

    return content(out / f"checkpoint-{steps}"), values(out), values(out, "eval")


def _begun(out: Path, processes: list[multiprocessing.Process]) -> None:
    """Wait until the run has its folder: before, the others would wait for a lost rank to join them, as long
    as torch lets them."""
    end = time.monotonic() + LIMIT
    while not (out / "config.yaml").exists() and time.monotonic() < end:
        if any(process.exitcode is not None for process in processes):
            return
        time.sleep(0.01)


def trials(folder: Path, count: int, size: int, steps: int, seed: int):
    """Yield the result of every trial."""
    from helpers import write_run
    from training_runs import assert_equal

    train = {"accumulate": size, "steps": steps, "save_every": 1, "ema": 0.5, "resume": "auto"}
    config = write_run(folder, samples=8, train=train, eval={"every": 2})
    processes = start(size, folder / "whole.log", "train", config, f"train.out={folder}/whole")
    _begun(folder / "whole", processes)
    begin = time.monotonic()
    codes = finish(processes)
    length = time.monotonic() - begin
    assert codes == [0] * size, f"the run without a kill ended with {codes}"
    want, draw, number = _outcome(folder / "whole", steps), random.Random(seed), 0
    while number < count:
        out, log = folder / f"trial-{number}", folder / f"trial-{number}.log"
        arguments = "train", config, f"train.out={out}"
        victim, moment = draw.randrange(size), draw.uniform(0, length)
        processes = start(size, log, *arguments)
        _begun(out, processes)
        time.sleep(moment)
        processes[victim].kill()
        at, begin = _last(out), time.monotonic()
        codes, seconds = finish(processes), time.monotonic() - begin
        if codes[victim] == 0:  # it had ended before
            shutil.rmtree(out)
            continue
        number += 1
        again = finish(start(size, log, *arguments))
        others = codes[:victim] + codes[victim + 1 :]
        ok, what = again == [0] * size and all(code in (0, 1) for code in others), "equal to the bit"
        try:
            assert_equal(_outcome(out, steps), want)
        except (AssertionError, KeyError, FileNotFoundError) as error:
            ok, what = False, f"differs: {error}"
        left = sorted(p.name for p in out.glob(".*.tmp"))
        line = (
            f"{number:3}  rank {victim} killed at {moment:5.2f} of {length:.2f} s ({at}); exit codes {codes} "
            f"after {seconds:.1f} s; resumed: {again}, {what}{f', left: {left}' if left else ''}"
        )
        yield Result(line, ok and not left)


def main() -> int:
    """Run the trials of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, usual in (("trials", 20), ("ranks", 2), ("steps", 6), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    args, good = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        for result in trials(Path(folder), args.trials, args.ranks, args.steps, args.seed):
            print(result.line, flush=True)
            good += result.ok
            if not result.ok:
                for log in sorted(Path(folder).glob("trial-*.log.*")):
                    print(f"--- {log.name}\n{log.read_text()}", flush=True)
                return 1
    print(f"{good} of {args.trials} runs are equal to the bit to the one that nothing has disturbed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
