"""`prfl accept`: run the rows that fit into the minutes, go on where an earlier call stopped, and report."""

from pathlib import Path

from prfl_bench.accept import listing, machine, report
from prfl_bench.accept.journal import Journal
from prfl_bench.accept.results import Results
from prfl_bench.accept.row import BAD
from prfl_bench.accept.run import SOURCE, Run, chosen
from prfl_engine.errors import UserError
from prfl_engine.inputs import check_out


def accept(out: Path, minutes: float, only: list[str], source: str = SOURCE, rows=listing.rows) -> int:
    """Returns 1 if a row went wrong, else 0. minutes 0: only the report, of any machine's folder."""
    if not minutes >= 0:
        raise UserError(f"--minutes: got {minutes}, want 0 or more")
    if minutes:
        check_out(out, "--out")
    chosen(rows(machine.device()), only)  # a name that is none is refused before anything is written
    journal = Journal(out, machine.identity() if minutes else None)
    if not journal.machine:
        raise UserError(f"--out: {out} holds no results to report, want --minutes above 0")
    device = journal.machine["device"]
    given = chosen(rows(device), only), device, out, journal, minutes
    run = Run(*given, lambda text: print(text, flush=True), source)
    try:
        if minutes:
            run.run()
    finally:
        results = Results(journal.machine, journal.date, journal.results, run.not_run)
        for path in report.write(out, results):
            print(path)
    print(report.summary(results))
    return int(any(result["state"] in BAD for result in journal.results.values()))
