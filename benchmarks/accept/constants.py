"""The constants that the results propose: tiles, as `prfl tune` stores them, and default back ends.

Tiles are constants of the kernels' modules, beside their CANDIDATES; in the folder PRFL_TUNING the file takes
their place for its GPU (kernels/tuning.py). Default back ends stand in kernels/dispatch.py and
kernels/attention/op.py.
"""

from prfl_bench.accept.results import Results
from prfl_bench.accept.row import RAN

WORTH = 1.02  # times as fast as the present default, forward and backward together


def proposed(results: Results) -> dict:
    """A file of tuned choices, with what changes besides under "changed" and "defaults"."""
    tiles = [r["values"] for r in results.stage("tiles/") if r["state"] == RAN and r["values"]["timed"]]
    changed = [t for t in tiles if t["best"] != t["default"]]
    return {
        "gpu": results.machine["name"],
        "torch": results.machine["torch"],
        "triton": results.machine["triton"],
        "choices": [{"kernel": t["kernel"], "key": t["key"], "choice": t["best"]} for t in tiles],
        "changed": [{k: t[k] for k in ("kernel", "key", "default", "best")} for t in changed],
        "defaults": defaults(results),
    }


def defaults(results: Results) -> list[dict]:
    """The present default and the fastest of every operation that was timed, {back end: ms} beside."""
    machine = results.ran("environment/machine")
    if machine is None:
        return []
    now = {o["op"]: o["implementation"] for o in machine["operations"]}
    timed = {"attention": [r for p in results.attention("self", "14B", 32760).values() for r in p.values()]}
    timed |= results.memory("14B", 32760)
    found = []
    for name, rows in timed.items():
        passes = max((len({r["pass"] for r in rows}), 1))
        every = {
            b: [r["ms"]["median"] for r in rows if r["backend"] == b] for b in {r["backend"] for r in rows}
        }
        totals = {b: sum(ms) for b, ms in sorted(every.items()) if len(ms) == passes}
        default = now.get(name, now.get(name.split("-")[0].removesuffix("_fp8")))
        if not totals:
            continue
        best = min(totals, key=totals.__getitem__)
        if default in totals and totals[default] < WORTH * totals[best]:
            best = default
        found.append({"op": name, "now": default, "best": best, "ms": totals})
    return found
