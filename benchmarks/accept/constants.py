"""The constants that the results propose: tiles, as `prfl tune` stores them, and default back ends.

Tiles are constants of the kernels' modules, beside their CANDIDATES; in the folder PRFL_TUNING the file takes
their place for its GPU (kernels/tuning.py). Default back ends stand in kernels/dispatch.py and
kernels/attention/op.py.
"""

from prfl_bench.accept.results import Results
from prfl_bench.accept.row import RAN

PASSES = ("forward", "backward")
WORTH = 1.02  # times as fast as the present default


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


def rates(results: Results) -> dict:
    """What `prfl plan --rates` takes: the planner's rates as measured (attention: the fastest back end at 14B
    and 32,760 tokens), and the steps beside their predictions."""
    found, limits = {}, results.ran("environment/rates") or {}
    names = {"products": "product", "memory": "copy", "link": "to the host", "products_fp8": "fp8"}
    found = {field: limits[name] for field, name in names.items() if name in limits}
    for kind, fields in (("self", ("attention", "attention_backward")), ("fp8-self", ("attention_fp8",))):
        timed = results.attention(kind, "14B", 32760).values()
        for field, direction in zip(fields, PASSES, strict=False):
            best = [passes[direction]["tflop_per_s"] for passes in timed if direction in passes]
            found |= {field: 1e12 * max(best)} if best else {}
    pairs = ((name, results.job(name)) for name in results.rows)
    steps = [
        {
            "step": name, "bytes": got["bytes"], "seconds": got["seconds"],
            "bytes_predicted": told["bytes"], "seconds_predicted": told["seconds"],
        }
        for name, (got, told) in ((name, pair) for name, pair in pairs if pair)
    ]  # fmt: skip
    machine = results.machine
    known = {"gpu": machine["name"], "date": results.date, "torch": machine["torch"]}
    return known | {"rates": found, "steps": steps}


def defaults(results: Results) -> list[dict]:
    """The present default and the fastest of every operation that was timed, {back end: ms} beside."""
    machine = results.ran("environment/machine")
    if machine is None:
        return []
    timed = {f"attention {direction}": times for direction, times in results.attention_ms().items()}
    now = {f"attention {direction}": name for direction, name in machine["attention"].items()}
    for name, rows in results.memory("14B", 32760).items():
        passes = len({r["pass"] for r in rows})
        every = {
            b: [r["ms"]["median"] for r in rows if r["backend"] == b] for b in {r["backend"] for r in rows}
        }
        timed[name] = {b: sum(ms) for b, ms in sorted(every.items()) if len(ms) == passes}
        op = rows[0]["operation"]
        now[name] = next(o["implementation"] for o in machine["operations"] if o["op"] == op)
    found = []
    for name, times in timed.items():
        if times:
            default, best = now[name], min(times, key=times.__getitem__)
            best = default if default in times and times[default] < WORTH * times[best] else best
            found.append({"op": name, "now": default, "best": best, "ms": times})
    return found
