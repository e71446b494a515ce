"""Every operation and back end: gate, time, GB/s, TFLOP/s and share of the roofline, beside plain torch.

    python benchmarks/bench_kernels.py [--ops modulate attention] [--backends triton] [--model 14B]
        [--tokens 32760] [--sp 1 2 4 8] [--dtype bfloat16] [--json FILE]

First the gates, at a small odd size: an error against float64 of at most twice that of plain torch
in the same dtype. What fails gets no time, and the exit code is 1. Then, for every shape of the models
and one rank of every sequence-parallel degree, the median (least to most) of launches with a cold
cache. Row-wise operations get tokens / degree, attention all tokens and heads / degree. GB are
inputs and outputs, each once; TFLOP those of the matrix products; the roofline is the longer of both at
the copy bandwidth and product rate measured in the same run. Beside it the median of each peer
and how many times as long it takes: eager and compiled plain torch, and for attention torch's
scaled_dot_product_attention. On a CPU shapes are small by default (--no-small for those of the models).
--predicted measures nothing and prints the predicted H100 times of prfl_bench.ledger.collect.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

import torch

from prfl_bench import gates, shapes
from prfl_bench.ledger import collect as ledger
from prfl_bench.ledger import table as ledger_rows
from prfl_bench.operations import OPERATIONS, Launch, Operation
from prfl_bench.shapes import Shape
from prfl_bench.timing import Times, compile_absence, limits, machine, measure
from prfl_engine.paths import a_path
from prfl_kernels import dispatch, extension, jit

ENTRIES = tuple(operation for operation in OPERATIONS if operation.call)
PASSES = ("forward", "backward")
PEERS = ("eager", "compile", "sdpa")
DTYPES = ("bfloat16", "float16", "float32")
REPEAT = {"cuda": 20, "cpu": 5}
SP = (1, 2, 4, 8)
# What a back end raises that does not work: torch, CUDA, a library with another signature, Triton.
ERRORS = (RuntimeError, TypeError, *([jit.triton.TritonError] if jit.triton else []))


def base(entry: Operation) -> str:
    """What --ops calls an entry: "attention" for self- and cross-attention."""
    return entry.name.split(",")[0]


def plain(entry: Operation, s: Shape, *inputs: torch.Tensor):
    return entry.plain(s, *entry.prepare(s, *inputs))


def exact(entry: Operation, s: Shape, *inputs: torch.Tensor):
    return (entry.exact or entry.plain)(s, *entry.prepare(s, *inputs))


def gate(entry: Operation, backend: str, s: Shape) -> tuple[str, str]:
    """("passed" | "absent" | "failed", why) of a back end at the small shape s."""
    if backend == dispatch.TRITON and jit.INTERPRETED:
        return "absent", "runs in Triton's interpreter, whose speed says nothing"
    dispatch.configure("reference")
    torch.manual_seed(0)
    inputs = entry.inputs(s)
    try:
        dispatch.configure(f"{entry.op}={backend}")
        dispatch.check(s.device)
        got = gates.results(partial(entry.call, s), inputs, entry.wanted)
    except ValueError as error:
        return "absent", str(error)
    except ERRORS as error:
        return "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    dispatch.configure("reference")
    low = gates.results(partial(entry.yardstick or partial(plain, entry), s), inputs, entry.wanted)
    want = gates.results(partial(exact, entry, s.exact()), [a.double() for a in inputs], entry.wanted)
    if not entry.wanted:
        got, low = (list(entry.decode(*a)) for a in (got, low))
    why = gates.failure(got, low, want)
    return ("failed", why) if why else ("passed", "")


def run_gates(entries: Sequence[Operation], backends: Sequence[str], s: Shape) -> list[dict]:
    """One {"op", "backend", "gate", "why"} for every entry and back end, printed on the way."""
    found = []
    for entry in entries:
        for backend in dispatch.OPERATIONS[entry.op]:
            if backends and backend not in backends:
                continue
            result, why = gate(entry, backend, s)
            found.append({"op": entry.name, "backend": backend, "gate": result, "why": why})
            print(f"{entry.name:20} {backend:10} {result:7} {why}".rstrip(), flush=True)
    return found


def traffic(entry: Operation, s: Shape) -> tuple[int, int]:
    """Bytes of inputs and outputs, each once, of the forward and of the backward."""
    s = s._replace(device="meta")
    inputs = entry.inputs(s)
    outputs = list(gates.tupled(plain(entry, s, *inputs)))
    gradients = [inputs[i] for i in entry.wanted]
    sides = [*inputs, *outputs], [*outputs, *entry.reads(inputs, outputs), *gradients]
    return tuple(sum(a.nbytes for a in side) for side in sides)


def launcher(
    function: Callable, inputs: Sequence[torch.Tensor], wanted: Sequence[int], backward: bool, choice: str
) -> Callable:
    """What `measure` wants: prepares one launch of the function's forward, or backward, and returns it."""

    def prepare():
        dispatch.configure(choice)
        with torch.set_grad_enabled(bool(wanted)):
            if not backward:
                return lambda: function(*inputs)
            outputs = gates.tupled(function(*inputs))
        directions = [torch.randn_like(o) for o in outputs]
        return partial(torch.autograd.grad, outputs, [inputs[i] for i in wanted], directions)

    return prepare


def peers_of(entry: Operation, s: Shape, names: Sequence[str]) -> dict[str, Callable]:
    found = {"eager": partial(entry.plain, s)}
    torch._inductor.config.compile_threads = 1  # no pool of processes that start up beside what is timed
    # Without the reset shapes add up to torch's limit of recompilations, and it goes on in eager.
    torch.compiler.reset()
    found["compile"] = torch.compile(partial(entry.plain, s), fullgraph=True, dynamic=False)
    found |= {name: partial(peer, s) for name, peer in entry.peers.items()}
    return {name: found[name] for name in names if name in found}


def rows_of(
    entry: Operation, s: Shape, backends: Sequence[str], peers: Sequence[str], repeat: int, limit: dict
) -> list[dict]:
    """The measured rows of an operation at a shape, of every pass and back end."""
    dispatch.configure("reference")
    work = zip(traffic(entry, s), entry.flops(s), strict=True)
    inputs = entry.inputs(s)
    prepared = [a.detach() for a in entry.prepare(s, *inputs)]
    for i in entry.wanted:
        inputs[i].requires_grad_()
        prepared[i].requires_grad_()
    launched = {("ours", name): (partial(entry.call, s), inputs, f"{entry.op}={name}") for name in backends}
    for name, function in peers_of(entry, s, peers).items():
        launched["peer", name] = function, prepared, "reference"
    rows = []
    for name, (moved, flops) in zip(PASSES if entry.wanted else PASSES[:1], work, strict=False):
        backward = name == "backward"
        candidates = {
            key: launcher(function, tensors, entry.wanted, backward, choice)
            for key, (function, tensors, choice) in launched.items()
        }
        times = measure(candidates, s.device, repeat)
        for backend in backends:
            ours = times["ours", backend]
            row = {"op": entry.name, "pass": name, "backend": backend, "shape": list(inputs[0].shape)}
            row |= figures(ours, moved, flops, limit["copy"], limit[entry.rate])
            beside = {peer: compared(t, ours) for (kind, peer), t in times.items() if kind == "peer"}
            rows.append(row | {"peers": beside})
    return rows


def figures(times: Times | None, moved: int, flops: int, bandwidth: float, rate: float) -> dict:
    found = {"bytes": moved, "flops": flops, "ms": None}
    if times is None:
        return found
    return found | {
        "ms": {name: 1e3 * seconds for name, seconds in times._asdict().items()},
        "gb_per_s": moved / times.median / 1e9,
        "tflop_per_s": flops / times.median / 1e12,
        "roofline": max(moved / bandwidth, flops / rate) / times.median,
        "bound": "memory" if moved / bandwidth >= flops / rate else "compute",
    }


def compared(peer: Times | None, ours: Times | None) -> dict | None:
    """Milliseconds of a peer, and how many times as long as ours it takes."""
    if peer is None:
        return None
    return {"ms": 1e3 * peer.median, "ratio": peer.median / ours.median if ours else None}


def line(row: dict) -> str:
    shape = " x ".join(str(n) for n in row["shape"])
    start = f"{row['op']:20} {row['pass']:8} {row['backend']:10} {shape:20}"
    if row["ms"] is None:
        return f"{start} out of memory"
    ms, flops = row["ms"], f"{row['tflop_per_s']:.4g}" if row["flops"] else ""
    spread = "predicted" if "predicted" in row else f"({ms['least']:.4g} - {ms['most']:.4g})"
    peers = [
        f"{name} " + ("out of memory" if p is None else f"{p['ms']:.4g}")
        + (f" ({p['ratio']:.2f}x)" if p and p["ratio"] else "")
        for name, p in row.get("peers", {}).items()
    ]  # fmt: skip
    return (
        f"{start} {ms['median']:9.4g} {spread:22} {row['gb_per_s']:8.4g} {flops:>8} "
        f"{100 * row['roofline']:5.1f}%  " + ", ".join(peers)
    ).rstrip()


HEAD = (
    f"{'operation':20} {'pass':8} {'back end':10} {'shape':20} {'ms':>9} {'(least - most)':22} "
    f"{'GB/s':>8} {'TFLOP/s':>8} {'roof':>6}  peers: ms (times ours)"
)


def title(s: Shape) -> str:
    dtypes = " and ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (s.dtype, s.residual)))
    model, width, heads, _ = s.model
    return f"\nWan {model} (C {width}, {heads} heads), {s.tokens} tokens, rank of {s.sp}, {dtypes}\n{HEAD}"


def chosen_shapes(args: argparse.Namespace) -> list[Shape]:
    models = shapes.SMALL_MODELS if args.small else shapes.MODELS
    grids = shapes.SMALL_GRIDS if args.small else shapes.GRIDS
    text = shapes.SMALL_TEXT if args.small else shapes.TEXT
    dtypes = getattr(torch, args.dtype), getattr(torch, args.residual)
    return [
        Shape(models[model], grids[tokens], sp, 1, text, *dtypes, args.device)
        for model in args.model
        for tokens in args.tokens
        for sp in args.sp
    ]


def measured(args: argparse.Namespace, entries: Sequence[Operation]) -> dict:
    dtypes = getattr(torch, args.dtype), getattr(torch, args.residual)
    print("gates: error against float64 at most twice that of plain torch")
    found = run_gates(entries, args.backends, shapes.gate_shape(*dtypes, args.device))
    if all(g["gate"] != "passed" for g in found):
        return {"gates": found, "rows": []}
    peers, why = list(args.peers), compile_absence(args.device)
    if "compile" in peers and why:
        peers.remove("compile")
        print(f"torch.compile is left out: {why}")
    limit = limits(args.device, dtypes[0], any(entry.rate == "fp8" for entry in entries))
    rates = [f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in limit.items() if name != "copy"]
    bandwidth = f"copy {limit['copy'] / 1e9:.4g} GB/s"
    print(f"\n{machine(args.device)}, torch {torch.__version__}; limits: {', '.join([bandwidth, *rates])}")
    rows = []
    for s in chosen_shapes(args):
        print(title(s))
        for entry in entries:
            backends = [g["backend"] for g in found if g["op"] == entry.name and g["gate"] == "passed"]
            if entry.divided is None and s.sp > 1:
                print(f"{entry.name:20} left out: it has the whole sequence")
            elif entry.divided == "heads" and s.model.heads % s.sp:
                print(f"{entry.name:20} left out: {s.model.heads} heads for {s.sp} ranks")
            elif backends:
                for row in rows_of(entry, s, backends, peers, args.repeat, limit):
                    rows.append({"model": s.model.name, "tokens": s.tokens, "sp": s.sp} | row)
                    print(line(row), flush=True)
    return {"machine": machine(args.device), "limits": limit, "gates": found, "rows": rows}


def ledger_names(entries: Sequence[Operation]) -> dict[str, tuple[Operation, int]]:
    """(entry, index of the pass) by what the ledger calls it."""
    return {e.name + suffix: (e, i) for i, suffix in enumerate(("", " backward")) for e in entries}


def predicted(args: argparse.Namespace, entries: Sequence[Operation]) -> dict:
    """The ledger's rows of these operations, in the form of measured ones."""
    names = ledger_names(entries)
    stream = getattr(torch, args.residual)

    def wanted(launch: Launch, s: Shape) -> bool:
        here = s.model.name in args.model and s.tokens in args.tokens
        return here and launch.op in names and (s.residual == stream or len(launch.streams) == 1)

    found, rows = ledger.collect(only=wanted), []
    for s in chosen_shapes(args):
        print(title(s))
        for made in found["operations"]:
            if (made["model"], made["length"]) != (s.model.name, s.tokens):
                continue
            entry, i = names[made["op"]]
            times = Times(*[made["predicted_seconds"]] * 3)
            rate = ledger_rows.PEAK * (2 if entry.rate == "fp8" else 1)
            shape = list(entry.inputs(s._replace(device="meta"))[0].shape)
            row = {"op": entry.name, "pass": PASSES[i], "backend": dispatch.TRITON, "shape": shape}
            row |= figures(times, made["minimum_bytes"], entry.flops(s)[i], ledger_rows.BANDWIDTH, rate)
            rows.append({"model": s.model.name, "tokens": s.tokens, "sp": s.sp, "predicted": True} | row)
            print(line(rows[-1]))
    absent = [e.name for e in entries if e.name not in {row["op"] for row in rows}]
    if absent:
        print(f"\nnot in the ledger, which holds Triton kernels: {', '.join(absent)}")
    print("\n" + "\n".join(textwrap.wrap(found["assumptions"], 110)))
    return {"assumptions": found["assumptions"], "rows": rows}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Operation]]:
    """The options; ValueError for a value that is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--ops", nargs="+", metavar="OP", help="default: all")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that run")
    parser.add_argument("--peers", nargs="*", metavar="NAME", default=list(PEERS), help="eager compile sdpa")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="1.3B 5B 14B")
    lengths = " ".join(map(str, shapes.GRIDS))
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help=f"{lengths}; with --small 312 720")
    parser.add_argument("--sp", nargs="+", type=int, metavar="N", help="1 2 4 8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--residual", default="float32", help="dtype of the residual stream")
    parser.add_argument("--repeat", type=int, default=REPEAT[device])
    parser.add_argument("--json", type=a_path, metavar="FILE", help="write everything there too")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="the default on a CPU")
    parser.add_argument("--predicted", action="store_true", help="the ledger's H100 times; measures nothing")
    args = parser.parse_args(argv)
    extension.keep_freed_memory()
    args.device = device
    if args.small is None:
        args.small = device == "cpu" and not args.predicted
    # Compiling takes most of the time of small shapes: one of them unless more are asked for.
    grids = list(shapes.SMALL_GRIDS if args.small else shapes.GRIDS)
    models = list(shapes.MODELS)
    args.model = args.model or (models[-1:] if args.small else models)
    args.tokens = args.tokens or (grids[:1] if args.small else list(shapes.DEFAULT))
    args.sp = args.sp or ([1] if args.small or args.predicted else list(SP))
    ops = list(dict.fromkeys(base(entry) for entry in ENTRIES))
    backends = sorted({name for names in dispatch.OPERATIONS.values() for name in names})
    known = {
        "ops": ops, "backends": backends, "peers": PEERS, "model": models, "tokens": grids, "sp": SP,
        "dtype": DTYPES, "residual": DTYPES,
    }  # fmt: skip
    for option, choices in known.items():
        given = getattr(args, option) or []
        for value in given if isinstance(given, list) else [given]:
            if value not in choices:
                raise ValueError(f"--{option}: got {value}, want one of {', '.join(map(str, choices))}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json: got {args.json}, want a file in a folder that is there")
    if args.repeat < 1:
        raise ValueError(f"--repeat: got {args.repeat}, want 1 or more")
    if args.predicted and (args.small or args.sp != [1] or args.dtype != "bfloat16"):
        raise ValueError("--predicted: got --small, --sp or --dtype, want none: the ledger has none of them")
    return args, [entry for entry in ENTRIES if base(entry) in (args.ops or ops)]


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 if an operation fails its gate, 2 for options that do not fit."""
    try:
        args, entries = parse(argv)
        found = (predicted if args.predicted else measured)(args, entries)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    dispatch.configure("")
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"options": options} | found, indent=2))
    failed = [f"{g['op']} by {g['backend']}" for g in found.get("gates", ()) if g["gate"] == "failed"]
    if failed:
        print(f"\nno times, since the gate failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
