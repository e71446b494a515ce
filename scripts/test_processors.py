"""Runs the test suite as other processors would run it, and prints one line for each setting.

    .venv/bin/python scripts/test_processors.py [--limit SECONDS] [--jobs N] [--only TEXT ...] [-- PYTEST...]

torch, oneDNN and our kernels choose their code by the processor, and other code sums in another order. Their
environment variables make this processor choose as an older one would. Arguments after -- go to pytest, such
as the files to run. Output of every run is kept in build/test-processors/. Exit code 1 if a run failed.
"""

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "test-processors"
COUNTS = ("passed", "failed", "skipped")


class Setting(NamedTuple):
    variable: str
    value: str
    needs: str  # of the processor; "" if nothing

    def __str__(self) -> str:
        return f"{self.variable}={self.value}"


SETTINGS = [
    Setting("OMP_NUM_THREADS", "1", ""),
    Setting("OMP_NUM_THREADS", "2", ""),
    Setting("ATEN_CPU_CAPABILITY", "default", ""),
    Setting("ATEN_CPU_CAPABILITY", "avx2", "AVX2"),
    Setting("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX2"),
    Setting("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "AVX512"),
    Setting("PRFL_CPU_ISA", "generic", ""),
    Setting("PRFL_CPU_ISA", "avx2", "AVX2"),
]
VARIABLES = {s.variable for s in SETTINGS}


def environment(*settings: Setting) -> dict[str, str]:
    """This environment with these settings alone, on one thread unless they say otherwise."""
    plain = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    # torch's compiler caches code without regard to ATEN_CPU_CAPABILITY.
    plain["TORCHINDUCTOR_CACHE_DIR"] = str(LOGS / "-".join(["inductor", *map(str, settings)]))
    # Threads that spin at barriers lose minutes where another process has the cores.
    plain["OMP_WAIT_POLICY"] = "PASSIVE"
    return plain | {"OMP_NUM_THREADS": "1"} | {s.variable: s.value for s in settings}


def capabilities() -> list[str]:
    """What of AVX2 and AVX512 the processor has, as torch sees it."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    made = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True)
    return {"AVX2": ["AVX2"], "AVX512": ["AVX2", "AVX512"]}.get(made.stdout.strip(), [])


def run(setting: Setting, jobs: int, limit: float, arguments: list[str]) -> tuple[bool, list[str], str]:
    """(whether all passed, the columns of the line, what failed)."""
    workers = max(1, jobs // 2) if setting.variable == "OMP_NUM_THREADS" and setting.value == "2" else jobs
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "worksteal", *arguments]
    path = LOGS / f"{setting}.log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(path, "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(setting), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = path.read_text().splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in \d+\.\d+s", line)), "")
    counts = {name: sum(map(int, re.findall(rf"(\d+) {name}\b", last))) for name in COUNTS}
    counts["failed"] += sum(map(int, re.findall(r"(\d+) errors?\b", last)))
    wrong = "\n".join(line for line in lines if line.startswith(("FAILED", "ERROR")))
    if code is None:
        wrong = f"took more than {limit:.0f} s"
    elif code:
        wrong = wrong or f"pytest ended with code {code}, see {path}"
    return code == 0, [*(str(counts[n]) for n in COUNTS), f"{seconds:.0f}"], wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a run may take")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of pytest")
    parser.add_argument("--only", nargs="*", default=[""], help="settings whose name holds one of these")
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    has, good = capabilities(), True
    print(f"{'setting':<34}" + "".join(f"{name:>9}" for name in (*COUNTS, "CPU s")), flush=True)
    for setting in SETTINGS:
        if not any(text in str(setting) for text in options.only):
            continue
        if setting.needs and setting.needs not in has:
            print(f"{setting!s:<34}  not run: this processor has no {setting.needs}", flush=True)
            continue
        passed, columns, wrong = run(setting, options.jobs, options.limit, options.arguments)
        good = good and passed
        print(f"{setting!s:<34}" + "".join(f"{a:>9}" for a in columns), flush=True)
        if wrong:
            print(wrong, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
