"""The tables that README takes from the newest results; where there is none, from the predictions."""

from typing import NamedTuple

from prfl_bench import bench_kernels, shapes
from prfl_bench.accept import kernels, steps
from prfl_bench.accept.costs import RATES, seconds_of
from prfl_bench.accept.results import Results
from prfl_bench.accept.row import Context
from prfl_engine.planner.plan import kinds_of
from prfl_engine.planner.seconds import block_seconds

SHAPES = (("14B", 32760), ("14B", 75600), ("1.3B", 32760))
PASSES = ("forward", "backward")
PREDICTED = "predicted"


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(results: Results | None) -> list[Table]:
    """Attention, memory-bound kernels, and training steps."""
    if results is None:
        return [_predicted_attention(), _predicted_memory(), _predicted_steps()]
    made = [attention(results), memory(results), training(results)]
    if not results.on_gpu:
        made = [table._replace(title=f"In the small form: {table.title}") for table in made]
    return [table for table in made if table.rows]


def both(forward: str, backward: str) -> str:
    return f"{forward} / {backward}" if backward else forward


def shape_title(model: str, tokens: int) -> str:
    return f"{model}, {tokens:,} tokens"


def attention(results: Results) -> Table:
    """TFLOP/s, forward / backward."""
    found = {shape: results.attention("self", *shape) for shape in SHAPES}
    measured = [shape for shape in SHAPES if found[shape]]
    names = [name for name in ("cpu", *kernels.ATTENTION) if any(name in found[s] for s in measured)]
    rows = [[name, *(_rates(found[s].get(name)) for s in measured)] for name in names]
    product = (results.ran("environment/rates") or {}).get("product")
    beside = f"; a large product in bfloat16 runs at {product / 1e12:,.3g}" if product else ""
    title = f"Self-attention, TFLOP/s forward / backward{beside}."
    return Table(title, ["back end", *(shape_title(*s) for s in measured)], rows)


def _rates(passes: dict[str, dict] | None) -> str:
    if not passes:
        return ""
    return both(*(f"{passes[p]['tflop_per_s']:,.3g}" if p in passes else "" for p in PASSES))


def memory(results: Results, model: str = "14B", tokens: int = 32760) -> Table:
    """Milliseconds, forward / backward, of every back end."""
    rows, found = [], results.memory(model, tokens)
    names = list(dict.fromkeys(r["backend"] for passes in found.values() for r in passes))
    for op, passes in found.items():
        cells = []
        for backend in names:
            own = {r["pass"]: r for r in passes if r["backend"] == backend}
            cells.append(both(*(f"{own[p]['ms']['median']:.3g}" if p in own else "" for p in PASSES)))
        first = {r["pass"]: r["peers"].get("compile") for r in passes}
        cells.append(both(*(f"{first[p]['ms']:.3g}" if first.get(p) else "" for p in PASSES)))
        best = {p: max((r["gb_per_s"] for r in passes if r["pass"] == p), default=None) for p in PASSES}
        cells.append(both(*(f"{best[p]:,.0f}" if best[p] else "" for p in PASSES)))
        rows.append([op, *cells])
    copy = (results.ran("environment/rates") or {}).get("copy")
    beside = f"; a copy runs at {copy / 1e9:,.0f} GB/s" if copy else ""
    title = f"Memory-bound operations at {shape_title(model, tokens)}, ms forward / backward{beside}."
    return Table(title, ["operation", *names, "torch.compile", "GB/s of the best"], rows)


def training(results: Results) -> Table:
    """Bytes and seconds of steps, measured and predicted."""
    rows = []
    for name in steps.jobs(Context("cuda", {})):
        if (measured := results.ran(name)) is None:
            continue
        pair = results.job(name)
        size, seconds = (f"{measured['bytes'] / 1e9:,.3g}", f"{measured['seconds']:.3g}")
        told = (f"{pair[1]['bytes'] / 1e9:,.3g}", f"{pair[1]['seconds']:.3g}") if pair else ("", "")
        rows.append([name.split("/", 1)[1], size, told[0], seconds, told[1]])
    head = ["step", "GB", "GB predicted", "s without optimizer", "s predicted"]
    title = (
        "One step at 32,760 tokens; 14B: its first 8 blocks; GB in addition to weights, gradients and states."
    )
    return Table(title, head, rows)


def _predicted_attention() -> Table:
    cells = []
    for model, tokens in SHAPES:
        s, entry = shapes.wan(model, tokens), kernels.ENTRIES["attention, self"]
        forward, backward = seconds_of(entry, s, (0, 0))
        cells.append(f"{1e3 * forward:,.3g} / {1e3 * backward:,.3g}")
    rates = f"{RATES.attention / 1e12:.0f} and {RATES.attention_backward / 1e12:.0f} TFLOP/s"
    title = f"Self-attention, ms forward / backward, {PREDICTED} from FLOPs at {rates}."
    return Table(title, ["", *(shape_title(*s) for s in SHAPES)], [[PREDICTED, *cells]])


def _predicted_memory(model: str = "14B", tokens: int = 32760) -> Table:
    s, rows = shapes.wan(model, tokens), []
    for name in kernels.MEMORY[:8]:
        entry = kernels.ENTRIES[name]
        each = seconds_of(entry, s, bench_kernels.traffic(entry, s))
        rows.append([name, both(f"{1e3 * each[0]:.3g}", f"{1e3 * each[1]:.3g}" if entry.wanted else "")])
    title = (
        f"Memory-bound operations at {shape_title(model, tokens)}, ms forward / backward, {PREDICTED} from"
        f" their bytes at {RATES.memory / 1e12:.1f} TB/s."
    )
    return Table(title, ["operation", PREDICTED], rows)


def _predicted_steps() -> Table:
    rows = []
    for name, job in steps.jobs(Context("cuda", {})).items():
        if job.like:
            continue
        setup, n = job.setup, job.setup.rollout.samples
        policy = kinds_of(setup)[job.kind]
        passes = (1 + n) * setup.count + n * setup.reward_blocks
        one = passes * block_seconds(policy, setup, 0, RATES, frozen=setup.lora is not None)
        rows.append([name.split("/", 1)[1], f"{one + steps.ahead(setup):.2g}"])
    title = f"One step at 32,760 tokens; 14B: its first 8 blocks; seconds without the optimizer, {PREDICTED}."
    return Table(title, ["step", PREDICTED], rows)
