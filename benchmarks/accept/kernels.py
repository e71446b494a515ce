"""Times of kernels at the shapes of Wan: those bound by memory in GB/s, attention in TFLOP/s, by back end."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prfl_bench import bench_kernels, shapes
from prfl_bench.accept.costs import INDUCTOR, TRITON, seconds_of
from prfl_bench.accept.environment import limits_of
from prfl_bench.accept.row import BAD, FAILED, RAN, REFUSED, Context, Outcome, Row
from prfl_bench.operations import OPERATIONS, Operation
from prfl_bench.shapes import Shape
from prfl_bench.timing import compile_absence
from prfl_kernels import dispatch

ENTRIES = {entry.name: entry for entry in OPERATIONS if entry.call}
# By how much of a step they are; without the sublayers and the linear layer, whose time is that of products.
MEMORY = (
    "gated_add_modulate",
    "qk_norm_rope",
    "bias_gelu",
    "gated_add_norm",
    "modulate",
    "reward_pool",
    "rms_norm",
    "gated_add",
    "gated_add_modulate_fp8",
    "quantize_fp8, gelu",
    "qk_norm_rope_fp8",
    "solver_step",
    "modulate_fp8",
    "gated_add_norm_fp8",
    "quantize_fp8",
    "layer_norm",
    "query_pool",
)
ATTENTION = ("cudnn", "triton", "cuda", "fa3", "fa3_hub", "sdpa", "fa4", "fa2", "xformers")
ATTENTION_FP8 = ("cuda", "triton")
COMPILED_ON_CPU = ("modulate",)  # torch.compile takes half a minute for each
REPEAT, SMALL_REPEAT = 12, 3
LONG = 40_000  # tokens from which on a third of the repetitions does
AGREE = 2e-2  # of bfloat16 results over 10^4 keys, relative root mean square


def shape(context: Context, model: str, tokens: int) -> Shape:
    """In bfloat16 with a float32 residual stream; small on a CPU."""
    dtypes = torch.bfloat16, torch.float32
    if context.small:
        grid = next(iter(shapes.SMALL_GRIDS.values()))
        return Shape(shapes.SMALL_MODELS[model], grid, 1, 1, shapes.SMALL_TEXT, *dtypes, "cpu")
    return shapes.wan(model, tokens)._replace(device="cuda")


def running(context: Context, entry: Operation) -> tuple[list[str], list[str]]:
    """(back ends of an operation that run here and were not found wrong, why not of the others)."""
    good, reasons, e4m3 = [], [], "_fp8" in entry.name
    for name in dispatch.OPERATIONS[entry.op]:
        if name == dispatch.REFERENCE:
            continue
        why = dispatch.absence(entry.op, name, context.device, torch.bfloat16, None, e4m3)
        why = why or ("was found wrong" if wrong(context, entry, name) else None)
        if why is None:
            good.append(name)
        else:
            reasons.append(f"{name} {why}")
    return good, reasons


def wrong(context: Context, entry: Operation, backend: str) -> bool:
    """Whether a correctness row of this operation in bfloat16 went wrong."""
    start = f"correct/{entry.op}/{backend}/{slug(entry.name)}/"
    return any(
        name.startswith(start) and "/bfloat16" in name and result["state"] in BAD
        for name, result in context.known.items()
    )


def slug(name: str) -> str:
    """An operation's name as rows have it."""
    return name.replace(", ", "-").replace(" ", "-")


def memory(context: Context, name: str, model: str, tokens: int) -> Outcome:
    """All back ends of an operation in turn, beside eager torch and torch.compile."""
    entry = ENTRIES[name]
    backends, reasons = running(context, entry)
    if not backends:
        return Outcome(REFUSED, "; ".join(reasons))
    peers = ["eager"]
    if compile_absence(context.device) is None and (not context.small or name in COMPILED_ON_CPU):
        peers.append("compile")
    s, repeat = shape(context, model, tokens), SMALL_REPEAT if context.small else REPEAT
    timed, limit = partial(bench_kernels.rows_of, entry, s, backends), limits_of(context)
    try:
        found = timed(peers, repeat, limit)
    except RuntimeError as error:
        if "compile" not in peers:
            raise
        reasons.append(f"torch.compile: {str(error).strip().splitlines()[0]}"[:200])
        found = timed(peers[:-1], repeat, limit)
    found = [row | {"operation": entry.op} for row in found]
    told = [f"{r['pass']} {r['backend']} {r['gb_per_s']:,.0f} GB/s" for r in found if r["ms"]]
    return Outcome(RAN, ", ".join(told), {"rows": found, "reasons": reasons})


def attention(context: Context, kind: str, model: str, tokens: int, backend: str) -> Outcome:
    """Forward of one back end and, where it has one, its own backward, held against torch's own attention."""
    entry = ENTRIES[kind]
    op, facts = entry.op, (context.device, torch.bfloat16, 128)
    if why := dispatch.absence(op, backend, *facts):
        return Outcome(REFUSED, f"it {why}")
    s, repeat = shape(context, model, tokens), SMALL_REPEAT if context.small else REPEAT
    if tokens > LONG:
        repeat //= 3
    choice, own = backend, bool(entry.wanted and dispatch.OPERATIONS[op][backend].backward)
    if own and not dispatch.absence(f"{op}_backward", backend, *facts):
        choice = f"{backend},{op}_backward={backend}"
    error = disagreement(entry, s, choice)
    found = bench_kernels.rows_of(entry, s, [choice], [], repeat, limits_of(context))
    found = [row | {"backend": backend} for row in found if own or row["pass"] == "forward"]
    told = [f"{r['pass']} {r['tflop_per_s']:,.3g} TFLOP/s" for r in found if r["ms"]]
    state = RAN if error <= AGREE or op == "attention_fp8" else FAILED
    return Outcome(state, ", ".join([*told, f"{error:.1e} from torch's"]), {"rows": found, "error": error})


def disagreement(entry: Operation, s: Shape, choice: str) -> float:
    """The largest relative distance of outputs and gradients from those of scaled_dot_product_attention."""
    torch.manual_seed(0)
    inputs = entry.inputs(s)
    peer = entry.peers["sdpa"]

    def results(function: Callable) -> list[Tensor]:
        given = [a.detach().requires_grad_(i in entry.wanted) for i, a in enumerate(inputs)]
        with torch.set_grad_enabled(bool(entry.wanted)):
            out = function(*given)
        if not entry.wanted:
            return [out]
        generator = torch.Generator(s.device).manual_seed(0)
        direction = torch.randn(out.shape, generator=generator, device=s.device).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, given, direction)]

    dispatch.configure(f"{entry.op}={choice}")
    got, want = results(partial(entry.call, s)), results(lambda *a: peer(s, *entry.prepare(s, *a)))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def memory_row(name: str, model: str, tokens: int) -> Row:
    entry, s = ENTRIES[name], shapes.wan(model, tokens)
    passes = 2 if entry.wanted else 1
    each = sum(seconds_of(entry, s, bench_kernels.traffic(entry, s))[:passes])
    # Two back ends and two peers, of which eager moves several times the bytes; a flush of the cache each.
    seconds = passes * (INDUCTOR + 2 * TRITON) + (REPEAT + 2) * (8 * each + 4 * 1e-3)
    return Row(
        f"memory/{slug(name)}/{model}/{tokens}",
        partial(memory, name=name, model=model, tokens=tokens),
        seconds,
        25 if name in COMPILED_ON_CPU else 0.6,
    )


def attention_row(kind: str, model: str, tokens: int, backend: str) -> Row:
    name = f"attention, {kind}" if kind in ("self", "cross") else f"attention_fp8, {kind.split('-')[1]}"
    s, entry = shapes.wan(model, tokens), ENTRIES[name]
    forward, backward = seconds_of(entry, s, (0, 0))
    repeat = REPEAT // 3 if tokens > LONG else REPEAT
    gradient = bool(entry.wanted)
    seconds = 3 * TRITON + (repeat + 4) * (forward * (2 + gradient) + backward) + 4 * forward
    run = partial(attention, kind=name, model=model, tokens=tokens, backend=backend)
    return Row(f"attention/{kind}/{model}/{tokens}/{backend}", run, seconds, 0.7)


def memory_rows(model: str, tokens: int) -> list[Row]:
    return [memory_row(name, model, tokens) for name in MEMORY]


def attention_rows(kind: str, model: str, tokens: int) -> list[Row]:
    backends = ATTENTION_FP8 if kind.startswith("fp8") else ATTENTION
    return [attention_row(kind, model, tokens, backend) for backend in backends]
