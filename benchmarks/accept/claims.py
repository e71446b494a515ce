"""What README and docs say of a GPU, beside what was measured."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from prfl_bench.accept.costs import RATES
from prfl_bench.accept.environment import driver_number
from prfl_bench.accept.results import Results
from prfl_bench.accept.row import BAD, RAN
from prfl_bench.ledger import table as ledger

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not measured"
BYTES, SECONDS, RATE = 0.10, 0.25, 0.10  # relative: how much more or less than predicted still holds
NEAR = 1.02  # times as long as the fastest
CUDA_13_DRIVER = 580

Judgement = tuple[str, str]  # (what was measured, verdict)
Judge = Callable[[Results], Judgement | None]


class Claim(NamedTuple):
    """text stands in `file` as it is here, but for line breaks; means: what of it is judged."""

    file: str
    text: str
    means: str
    judge: Judge


class Verdict(NamedTuple):
    file: str
    text: str
    means: str
    measured: str
    verdict: str


def verdicts(results: Results) -> list[Verdict]:
    """Of all claims; what a CPU has measured says nothing of a GPU."""
    found = []
    for claim in CLAIMS:
        judged = claim.judge(results) if results.on_gpu else None
        found.append(Verdict(*claim[:3], *(judged or ("", UNKNOWN))))
    return found


def holds(ok: bool) -> str:
    return HOLDS if ok else FAILS


def job_bytes(results: Results, name: str) -> Judgement | None:
    """A step's bytes against the planner's."""
    if (pair := results.job(name)) is None:
        return None
    got, want = (part["bytes"] for part in pair)
    text = f"{name}: {got / 1e9:.2f} GB in the step, {want / 1e9:.2f} predicted"
    return text, holds(got <= (1 + BYTES) * want)


def jobs_bytes(results: Results, names: tuple[str, ...]) -> Judgement | None:
    """... of several steps: all that ran."""
    found = [judged for name in names if (judged := job_bytes(results, name))]
    return together(found)


def job_seconds(results: Results, names: tuple[str, ...]) -> Judgement | None:
    found = []
    for name in names:
        if (pair := results.job(name)) is not None:
            got, want = (part["seconds"] for part in pair)
            text = f"{name}: {got:.2f} s, {want:.2f} predicted"
            found.append((text, holds(abs(got / want - 1) <= SECONDS)))
    return together(found)


def together(found: list[Judgement]) -> Judgement | None:
    """Holds if all do."""
    if not found:
        return None
    return "; ".join(text for text, _ in found), holds(all(verdict == HOLDS for _, verdict in found))


def default_attention(results: Results) -> Judgement | None:
    """The default back ends of forward and backward are the fastest that ran."""
    machine, found = results.ran("environment/machine"), []
    for direction, times in results.attention_ms().items():
        if machine is None or len(times) < 2:
            continue
        default = machine["attention"][direction]
        best = min(times, key=times.__getitem__)
        text = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        ok = default in times and times[default] <= NEAR * times[best]
        found.append((f"{direction} ms: {text}; the default is {default}", holds(ok)))
    return together(found)


def all_right(results: Results, implementation: str | None = None, op: str = "") -> Judgement | None:
    """Every correctness row (of an implementation, an operation) that was not refused ran and was right."""
    own = [
        r
        for r in results.stage(f"correct/{op}")
        if r["state"] == RAN or r["state"] in BAD
        if implementation is None or r["name"].split("/")[2] == implementation
    ]
    if not own:
        return None
    bad = [r["name"] for r in own if r["state"] in BAD]
    text = f"{len(own) - len(bad)} of {len(own)} cases right" + (f"; {bad[0]} and others" if bad else "")
    return text, holds(not bad)


def faster(results: Results, ours: str, other: str) -> Judgement | None:
    """Back end `ours` against "compile", or another back end, over all memory-bound operations."""
    ratios = {}
    for op, rows in results.memory("14B", 32760).items():
        passes = {(r["pass"], r["backend"]): r for r in rows}
        for (name, backend), row in passes.items():
            if backend != ours:
                continue
            if other == "compile":
                peer = row["peers"].get("compile")
                time = peer and peer["ms"]
            else:
                time = passes[name, other]["ms"]["median"] if (name, other) in passes else None
            if time:
                ratios[f"{op} {name}"] = time / row["ms"]["median"]
    if not ratios:
        return None
    worst = min(ratios, key=ratios.__getitem__)
    won = sum(ratio >= 1 for ratio in ratios.values())
    return f"{ours} wins {won} of {len(ratios)}; least {worst}: {ratios[worst]:.2f}", holds(
        won == len(ratios)
    )


def rate(results: Results, name: str, claimed: float) -> Judgement | None:
    found = results.ran("environment/rates")
    if found is None or name not in found:
        return None
    return f"{name}: {found[name] / 1e12:,.3g} T/s", holds(found[name] >= (1 - RATE) * claimed)


def attention_rate(results: Results, direction: str, claimed: float) -> Judgement | None:
    found = results.attention("self", "14B", 32760)
    rates = {n: p[direction]["tflop_per_s"] for n, p in found.items() if direction in p}
    if not rates:
        return None
    best = max(rates, key=rates.__getitem__)
    return f"{best}: {rates[best]:,.0f} TFLOP/s {direction}", holds(
        1e12 * rates[best] >= (1 - RATE) * claimed
    )


def planner_rates(results: Results) -> Judgement | None:
    found = [
        rate(results, "product", RATES.products),
        rate(results, "copy", RATES.memory),
        rate(results, "to the host", RATES.link),
        attention_rate(results, "forward", RATES.attention),
        attention_rate(results, "backward", RATES.attention_backward),
    ]
    return together([judged for judged in found if judged])


def ledger_rates(results: Results) -> Judgement | None:
    found = [
        rate(results, "copy", ledger.BANDWIDTH),
        rate(results, "product", ledger.PEAK),
        rate(results, "fp8", 2 * ledger.PEAK),
    ]
    return together([judged for judged in found if judged])


def driver(results: Results) -> Judgement | None:
    machine = results.ran("environment/machine")
    number = driver_number(machine and machine["driver"])
    runs = all_right(results, "cuda")
    if number is None or runs is None:
        return None
    return f"driver {machine['driver']}; CUDA C++ kernels: {runs[0]}", holds(number >= CUDA_13_DRIVER)


def no_gpu_yet(results: Results) -> Judgement | None:
    count = sum(r["state"] == RAN for r in results.rows.values())
    return f"{count} measurements ran on {results.machine['name']}", holds(count == 0)


def few_tokens(results: Results) -> Judgement | None:
    few, many = (results.ran(f"graphs/1.3B/{n}") for n in (1560, 32760))
    if few is None:
        return None
    text = f"{few['gain']:.2f} times as fast at 1,560 tokens"
    if many is None:
        return text, holds(few["gain"] > 1.02)
    return f"{text}, {many['gain']:.2f} at 32,760", holds(few["gain"] > 1.02 and many["gain"] < few["gain"])


def no_waits(results: Results) -> Judgement | None:
    found = [r for r in results.stage("step/1.3B/") if r["state"] == RAN and "waits" in r["values"]]
    if not found:
        return None
    most = max(found, key=lambda r: r["values"]["waits"])
    count = most["values"]["waits"]
    return f"torch reports {count} waits in a step of {most['name']}", holds(count == 0)


def fp8_rollout(results: Results) -> Judgement | None:
    plain, fp8 = results.ran("step/1.3B/attention"), results.ran("step/1.3B/fp8-rollout")
    if plain is None or fp8 is None:
        return None
    text = f"a step {fp8['step']:.2f} s in fp8, {plain['step']:.2f} s without; drift {fp8['drift']:.3f}"
    return text, holds(fp8["step"] < plain["step"])


def no_forwards(results: Results) -> Judgement | None:
    """Chains that persist against the same step after two forwards without gradient."""
    fresh, persistent = results.ran("step/1.3B/attention"), results.ran("step/1.3B/persistent")
    if fresh is None or persistent is None:
        return None
    text = f"a step {persistent['seconds']:.2f} s, fresh after two forwards {fresh['seconds']:.2f} s"
    return text, holds(persistent["seconds"] < fresh["seconds"])


STEPS = (
    "step/1.3B/none",
    "step/1.3B/full",
    "step/1.3B/attention",
    "step/1.3B/offload",
    "step/1.3B/four-samples",
    "step/1.3B/persistent",
)
LARGE = ("large/14B/lora", "large/14B/full")

STEP = "Its bytes are at most a tenth above the planner's"
CLAIMS = (
    Claim("README.md", "Nothing in this repository has run on a GPU yet", "Nothing ran here", no_gpu_yet),
    Claim(
        "README.md",
        "| 1.3B | 32,760 | 1 | all weights in float32 |",
        STEP,
        partial(job_bytes, name="step/1.3B/attention"),
    ),
    Claim(
        "README.md",
        "| 14B | 32,760 | 1 | LoRA of rank 128, 4 graded steps of a rollout, blocks offload |",
        f"{STEP}, for the first 8 blocks",
        partial(job_bytes, name="large/14B/lora"),
    ),
    Claim(
        "README.md",
        "all weights in bfloat16, states and blocks offload",
        f"{STEP}, for the first 8 blocks at 32,760 tokens",
        partial(job_bytes, name="large/14B/full"),
    ),
    Claim(
        "README.md",
        "Attention is the first that is installed of FlashAttention-3, FlashAttention-4, cuDNN,"
        " FlashAttention-2 and our own Triton kernels",
        "Forward and backward, the default is the fastest at 14B and 32,760 tokens",
        default_attention,
    ),
    Claim(
        "README.md",
        "On CUDA the norms, gates, rotation, GELU and reward pooling run as fused Triton kernels",
        "They are as fast as torch.compile or faster",
        partial(faster, ours="triton", other="compile"),
    ),
    Claim(
        "README.md",
        "CUDA C++ kernels for sm_90a, including a warp-specialised attention forward, run if asked for",
        "All of their correctness cases are right",
        partial(all_right, implementation="cuda"),
    ),
    Claim(
        "README.md",
        "`rollout.precision=fp8`, `rollout.cache`, `rollout.cuda_graph`; the drift is measured and limited",
        "A step with an fp8 rollout is faster",
        fp8_rollout,
    ),
    Claim(
        "docs/kernels.md",
        "`PRFL_KERNELS=cuda` chooses them; nothing does by default, since neither has been measured",
        "The CUDA C++ kernels are nowhere slower than Triton's",
        partial(faster, ours="cuda", other="triton"),
    ),
    Claim(
        "docs/kernels.md",
        "`prfl doctor --selftest` runs every implementation that is here against plain torch",
        "All cases are right",
        all_right,
    ),
    Claim(
        "docs/kernels.md",
        "On an H100 the driver must be of the same major version or newer",
        "The CUDA C++ kernels run with this driver",
        driver,
    ),
    Claim(
        "docs/kernels.md",
        "any backward may follow any forward",
        "All cases of attention are right, with every backward",
        partial(all_right, op="attention/"),
    ),
    Claim(
        "docs/kernels.md",
        "predicted, not measured; the assumptions are printed below the table",
        "The rates that the ledger assumes are reached to a tenth",
        ledger_rates,
    ),
    Claim(
        "docs/training.md",
        "Predicted for 14B at 75,600 tokens with a reward model of 8 blocks, in addition to weights,"
        " gradients and states",
        "The bytes of all steps are at most a tenth above the planner's",
        partial(jobs_bytes, names=(*STEPS, *LARGE)),
    ),
    Claim(
        "docs/training.md",
        "for every block the policy that is predicted to be fastest in total",
        "The seconds of all steps are within a quarter of the planner's",
        partial(job_seconds, names=(*STEPS, *LARGE)),
    ),
    Claim(
        "docs/training.md",
        "A step reads nothing from the device.",
        "The host never waits in a step",
        no_waits,
    ),
    Claim(
        "docs/training.md",
        "`rollout.cuda_graph`: for few tokens.",
        "A replayed graph is faster at 1,560 tokens, by more than at 32,760",
        few_tokens,
    ),
    Claim(
        "docs/persistent.md",
        "If the range begins at step 0, a graded sample costs no forward without gradient at all",
        "A step takes less time than a fresh one with two such forwards",
        no_forwards,
    ),
    Claim(
        "engine/planner/seconds.py",
        "Of an H100 SXM: products and copies as measured there once",
        "The rates that the planner assumes are reached to a tenth",
        planner_rates,
    ),
    Claim("docs/benchmarks.md", "There is no GPU measurement yet.", "Nothing ran here", no_gpu_yet),
)
