"""Tables of predictions in Markdown, from `prfl plan`: `python -m prfl_bench.plan_tables [TABLE]`.

short: README's; full: ours beside the official settings; paper: its Table 4; targets: what was wanted.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from prfl_bench.official_memory import CASES, total
from prfl_engine.planner import official as settings
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.report import Prediction
from prfl_engine.planner.subject import SIZES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ONE = ("eval.batch_size=1",)
AWAY = "model.recompute={keep: [], offload: [attention, input]}"
NARROW = ("model.weights_dtype=bfloat16", "optim.rounding=stochastic")
LEAN = (*NARROW, "optim.offload=all", AWAY, "model.chunk=8192")
PERSIST, SAMPLES = "rollout.mode=persistent", "rollout.samples"
KEPT = (PERSIST, "loss.sft_every=4")
SMALL, BIG, IMAGE = "prfl_t2v_1.3b_480p", "prfl_t2v_14b_480p", "prfl_i2v_14b_720p"
EIGHT, LORA = "prfl_t2v_14b_480p_8gpu", "prfl_t2v_14b_480p_lora"


# Of T2V-A14B's expert of high noise, which has the shape of 14B.
HIGH = "rollout.sigma_range=[0.875,1]", "rollout.shift=12"
OFFICIAL = None  # in place of overrides: the official code's settings

WHOLE, CHAINED = "all weights in float32", "all weights in float32, chains that persist, `sft_every=4`"
# (model, latents, GPUs, what it is, configuration, overrides)
SHORT = [
    ("1.3B", "480p", 1, WHOLE, SMALL, ()),
    ("14B", "480p", 1, "LoRA of rank 128, 4 graded steps of a rollout, blocks offload", LORA, (AWAY,)),
    ("14B", "720p", 1, "all weights in bfloat16, states and blocks offload", BIG, LEAN),
    ("14B", "720p", 8, WHOLE, EIGHT, ()),
    ("14B", "720p", 8, CHAINED, EIGHT, KEPT),
    ("14B", "720p", 64, CHAINED, "prfl_t2v_14b_720p_64gpu", ()),
    ("14B", "720p", 8, "the official code's settings, by our operations", BIG, OFFICIAL),
]  # fmt: skip
TURN = "rollout.one_index=turn"  # no group of GPUs waits for a longer rollout, as in the official code
# {GPUs: what it is and its overrides}
SMALL_ON = {
    1: ("attention saved", ()),
    8: ("4 GPUs a sample", ("parallel.sequence=4", "train.accumulate=2", TURN)),
    64: ("4 GPUs a sample, 8 copies",
         ("parallel.sequence=4", "parallel.replicate=8", "train.accumulate=16", TURN)),
}  # fmt: skip
BIG_ON = {
    1: ("bfloat16, states and blocks offload", LEAN),
    8: ("8 GPUs a sample", ("parallel.sequence=8", "train.accumulate=8")),
    64: ("8 GPUs a sample, 8 copies",
         ("parallel.sequence=8", "parallel.replicate=8", "train.accumulate=8", TURN)),
}  # fmt: skip
FULL = [
    (name, latent, gpus, what, config, overrides, extra)
    for name, config, on, extra in (
        ("1.3B, T2V", SMALL, SMALL_ON, ()), ("14B, T2V", BIG, BIG_ON, ()), ("14B, I2V", IMAGE, BIG_ON, ()),
        ("A14B, T2V, expert of high noise", BIG, BIG_ON, HIGH),
    )
    for latent in ("480p", "720p") for gpus, (what, overrides) in on.items()
]  # fmt: skip
# (what, limit, unit, (what, configuration, GPUs, overrides), ...)
MEMORY = [
    ("14B, full fine-tuning, attention saved", 40, [
        ("float32", EIGHT, 8, ()), ("bfloat16, float32 masters", EIGHT, 8, NARROW[:1]),
        ("bfloat16, rounded at random", EIGHT, 8, NARROW),
        ("float32, moments in 8 bits", EIGHT, 8, ("optim.name=adamw8bit",)),
        ("float32, states on the host", EIGHT, 8, ("optim.offload=states",)),
        ("bfloat16, rounded at random, moments in 8 bits", EIGHT, 8, (*NARROW, "optim.name=adamw8bit")),
    ]),
    ("14B, LoRA on one", 76, [("blocks offload", LORA, 1, (AWAY,))]),
    ("14B, full fine-tuning on one", 78, [("bfloat16, states and blocks offload", BIG, 1, LEAN)]),
]  # fmt: skip
SPEED = [
    ("4 samples", 2, EIGHT, (f"{SAMPLES}=4",)),
    ("8 samples", 3, EIGHT, (f"{SAMPLES}=8",)),
    ("chains that persist", 4, EIGHT, (PERSIST,)),
    ("chains that persist, flow matching in 1 step of 4", 6, EIGHT, KEPT),
]  # fmt: skip
APART = [
    ("fp8 rollouts, 4 samples", EIGHT, (f"{SAMPLES}=4", "rollout.precision=fp8")),
    ("fp8 rollouts, 8 samples", EIGHT, (f"{SAMPLES}=8", "rollout.precision=fp8")),
]


@cache
def made(name: str, overrides: tuple[str, ...], gpus: int, latent: str) -> Prediction:
    """A prediction for H100s of 80 GB, validation in batches of one."""
    return predict(str(CONFIGS / f"{name}.yaml"), (*ONE, *overrides), Options(gpus=gpus, latent=latent))


@cache
def official(name: str, gpus: int, latent: str, extra: tuple[str, ...] = ()) -> Prediction:
    """The same of the official settings, one sample a group of ranks and no validation."""
    given = (*extra, "train.accumulate=1", "eval.every=0")
    return settings.official(str(CONFIGS / f"{name}.yaml"), given, Options(gpus=gpus, latent=latent))


def gigabytes(p: Prediction) -> str:
    """Of a GPU."""
    return f"{p.memory.peak.bytes / 1e9:.1f}{'' if p.fits else ' (does not fit)'}"


def cost(p: Prediction) -> float:
    """GPU seconds of a graded sample."""
    return p.times.per_sample * p.times.gpus


def share(p: Prediction) -> str:
    """Of flow matching in a step."""
    found = sum(row.seconds for row in p.times.rows if row.phase == "flow matching")
    return f"{found / p.times.seconds:.0%}"


def counted(met: list[bool]) -> str:
    """How many of the ways to a target meet it, in words."""
    if not any(met):
        return f"missed by all {len(met)}." if len(met) > 1 else "missed."
    if all(met):
        return f"met by all {len(met)}." if len(met) > 1 else "met."
    return f"met by {sum(met)} of {len(met)}."


def table(heads: str, rows: Iterable[Iterable]) -> Iterator[str]:
    """In Markdown; heads as in its first line."""
    yield f"| {heads} |"
    yield "|" + "---|" * (heads.count("|") + 1)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def short() -> Iterator[str]:
    """README's."""
    def row(model, latent, gpus, what, name, overrides):
        p = official(name, gpus, latent) if overrides is OFFICIAL else made(name, overrides, gpus, latent)
        sizes = (f"{phase.bytes / 1e9:.0f}" for phase in (p.memory.peak, p.memory.host))
        return model, f"{p.subject.setup.tokens:,}", gpus, what, *sizes, f"{cost(p):.0f}"

    heads = "model | tokens | GPUs | settings | GB a GPU | host, GB a GPU | GPU seconds a graded sample"
    yield from table(heads, (row(*given) for given in SHORT))


def full() -> Iterator[str]:
    """Ours beside the official settings, under the same rates and with the same attention."""
    def row(model, latent, gpus, what, name, overrides, extra):
        ours, theirs = made(name, (*overrides, *extra), gpus, latent), official(name, gpus, latent, extra)
        four = made(name, (*overrides, *extra, f"{SAMPLES}=4"), gpus, latent)
        tokens, seconds = f"{ours.subject.setup.tokens:,}", (f"{cost(p):.3g}" for p in (theirs, ours, four))
        return model, tokens, gpus, gigabytes(theirs), what, gigabytes(ours), *seconds

    heads = (
        "model | tokens | GPUs | official, GB | ours | ours, GB | official, GPU s a graded sample | ours |"
        " ours, 4 samples"
    )
    yield from table(heads, (row(*given) for given in FULL))


def paper() -> Iterator[str]:
    """Memory and a step of the official code; of a step without flow matching too."""
    rows = []
    for (name, case), told in zip(CASES.items(), ("66.81", "55.47", "out of memory"), strict=True):
        for latent, size in SIZES.items():
            for gpus in (8, 24):
                needed = total(case(size, gpus))
                rows.append((name, latent, gpus, f"{needed / 1e9:.1f}", f"{needed / 2**30:.1f}", told))
    yield from table("method | latents | GPUs | GB | GiB | paper", rows)
    yield ""
    rows = []
    for latent in SIZES:
        for gpus in (8, 24):
            p = official(BIG, gpus, latent)
            alone = next(row.seconds for row in p.times.rows if row.phase == "flow matching")
            seconds = (p.times.seconds, p.times.seconds - alone, alone)
            rows.append((latent, gpus, *(f"{s:.1f}" for s in seconds)))
    rows.append(("paper", "", "51.11", "43.69", "7.42"))
    yield from table("latents | GPUs | s a step | without flow matching | difference", rows)
    yield ""
    parts = ((p.name, f"{p.bytes / 1e9:.2f}", p.basis) for p in CASES["PRFL, 81 frames"](SIZES["720p"], 8))
    yield from table("PRFL, 720p, 8 GPUs | GB | from", parts)


def targets() -> Iterator[str]:
    """What was wanted of 14B at 720p, what is predicted, and what is met."""
    rows, ways_met = [], {}
    for what, limit, ways in MEMORY:
        for way, name, gpus, overrides in ways:
            p = made(name, overrides, gpus, "720p")
            size, host = p.memory.peak.bytes / 1e9, p.memory.host.bytes / 1e9
            met = "met" if size <= limit else f"missed by {size - limit:.2f}"
            ways_met.setdefault(what, []).append(size <= limit)
            line = " ".join(f"`{o}`" for o in overrides)
            rows.append((what, way, line, gpus, f"{size:.2f} of {limit} GB", f"{host:.0f}", met))
    yield from table("target | way | overrides | GPUs | a GPU | host, GB a GPU | ", rows)
    yield ""
    yield from (f"- {what}: {counted(found)}" for what, found in ways_met.items())
    yield ""
    base = cost(official(BIG, 8, "720p"))
    rows, all_met, checked = [], [], []
    for what, want, name, overrides in SPEED:
        p = made(name, (*overrides, "eval.every=0"), 8, "720p")
        ratio = base / cost(p)
        met = "met" if ratio >= want else f"missed by {1 - ratio / want:.0%}"
        all_met.append(ratio >= want)
        often = made(name, overrides, 8, "720p")
        every = often.subject.config.eval.every
        checked.append(f"- {what}: {base / cost(often):.2f} with a validation every {every} steps")
        line = " ".join(f"`{o}`" for o in overrides)
        rows.append((what, line, gigabytes(p), f"{cost(p):.1f}", f"{ratio:.2f} of {want}", share(p), met))
    for what, name, overrides in APART:
        p = made(name, (*overrides, "eval.every=0"), 8, "720p")
        line = " ".join(f"`{o}`" for o in overrides)
        rows.append((what, line, gigabytes(p), f"{cost(p):.1f}", f"{base / cost(p):.2f}", share(p), "apart"))
    yield f"The official settings on 8 GPUs take {base:.0f} GPU seconds a graded sample; validation in none."
    yield ""
    heads = "what | overrides | GB a GPU | GPU s a graded sample | times fewer | flow matching | "
    yield from table(heads, rows)
    yield ""
    yield f"Of the times: {counted(all_met)}"
    yield ""
    yield from checked


TABLES = {"short": short, "full": full, "paper": paper, "targets": targets}

if __name__ == "__main__":
    for line in TABLES[sys.argv[1] if len(sys.argv) > 1 else "short"]():
        print(line, flush=True)
