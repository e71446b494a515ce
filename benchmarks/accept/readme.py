"""README's GPU tables, from the newest results in benchmarks/results, between two markers.

    python -m prfl_bench.accept.readme [RESULTS.json]

A file that is given is copied to benchmarks/results first.
"""

import shutil
import sys
from pathlib import Path

from prfl_bench.accept.machine import ROOT
from prfl_bench.accept.results import FOLDER, Results, newest, read
from prfl_bench.accept.tables import tables
from prfl_engine.errors import UserError

BEGIN, END = "<!-- GPU tables: python -m prfl_bench.accept.readme -->", "<!-- end of GPU tables -->"
README = ROOT / "README.md"


def section(results: Results | None) -> str:
    """What stands between the markers."""
    if results is None:
        head = "No GPU has been measured yet; every number here is predicted."
    else:
        head = f"Measured on one {results.machine['name']}, torch {results.machine['torch']}, {results.date}."
    return "\n\n".join([BEGIN, head, *(table.markdown() for table in tables(results)), END])


def rewritten(text: str, results: Results | None) -> str:
    """README with the section of these results. UserError where it has not both markers once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{README.name}: want the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    return before + section(results) + rest.split(END)[1]


def main(arguments: list[str]) -> None:
    for path in map(Path, arguments):
        if not read(path).on_gpu:
            raise UserError(f"{path}: got results of a CPU, want those of a GPU")
        FOLDER.mkdir(exist_ok=True)
        shutil.copy(path, FOLDER / path.name)
    README.write_text(rewritten(README.read_text(), newest()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
