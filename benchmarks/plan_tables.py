"""Tables of predictions in Markdown: `python -m prfl_bench.plan_tables [readme|paper]`, from `prfl plan`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from prfl_engine.planner.command import Options, predict

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ONE = ("eval.batch_size=1",)
AWAY = "model.recompute={keep: [], offload: [attention, input]}"
LEAN = (
    "model.weights_dtype=bfloat16", "optim.rounding=stochastic", "optim.offload=all", AWAY, "model.chunk=8192"
)  # fmt: skip
PERSIST = "chains that persist, `sft_every=4`"
KEPT = ("rollout.mode=persistent", "loss.sft_every=4")
# (model, latents, GPUs, what it is, configuration, overrides)
README = [
    ("1.3B", "480p", 1, "float32, attention saved", "prfl_t2v_1.3b_480p", ()),
    ("1.3B", "720p", 1, "float32, attention saved", "prfl_t2v_1.3b_480p", ()),
    ("1.3B", "480p", 8, "float32, 4 GPUs a sample", "prfl_t2v_1.3b_480p",
     ("parallel.sequence=4", "train.accumulate=8")),
    ("1.3B", "720p", 64, f"float32, 4 GPUs a sample, {PERSIST}", "prfl_t2v_1.3b_480p",
     ("parallel.sequence=4", "parallel.replicate=8", "train.accumulate=16", *KEPT)),
    ("14B", "480p", 1, "LoRA of rank 128, 4 samples, blocks offload", "prfl_t2v_14b_480p_lora", (AWAY,)),
    ("14B", "720p", 1, "LoRA of rank 128, 4 samples, blocks offload", "prfl_t2v_14b_480p_lora", (AWAY,)),
    ("14B", "480p", 1, "all weights in bfloat16, states and blocks offload", "prfl_t2v_14b_480p", LEAN),
    ("14B", "720p", 1, "all weights in bfloat16, states and blocks offload", "prfl_t2v_14b_480p", LEAN),
    ("14B", "480p", 8, "float32, 8 GPUs a sample", "prfl_t2v_14b_480p_8gpu", ()),
    ("14B", "720p", 8, "float32, 8 GPUs a sample", "prfl_t2v_14b_480p_8gpu", ()),
    ("14B", "720p", 8, f"float32, 8 GPUs a sample, {PERSIST}", "prfl_t2v_14b_480p_8gpu", KEPT),
    ("14B", "480p", 64, f"float32, 8 GPUs a sample, {PERSIST}", "prfl_t2v_14b_480p_64gpu", ()),
    ("14B", "720p", 64, f"float32, 8 GPUs a sample, {PERSIST}", "prfl_t2v_14b_720p_64gpu", ()),
]  # fmt: skip
OFFICIAL = (
    "model.recompute=full", "model.weights_dtype=float32", "parallel.sequence=4", "parallel.replicate=1",
    "eval.every=0",
)  # fmt: skip
PAPER = [
    (
        "14B", latent, gpus, "official settings", "prfl_t2v_14b_480p",
        (*OFFICIAL, f"train.accumulate={gpus // 4}"),
    )
    for latent in ("480p", "720p") for gpus in (8, 24)
]  # fmt: skip


def lines(rows: list[tuple]) -> Iterator[str]:
    """A table, all on H100s of 80 GB, validation in batches of one."""
    yield "| model | tokens | GPUs | settings | GB a GPU | host, GB a GPU | s a graded sample | GPU s |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, latent, gpus, what, name, overrides in rows:
        path = str(CONFIGS / f"{name}.yaml")
        p = predict(path, (*ONE, *overrides), Options(gpus=gpus, latent=latent))
        size, host = p.memory.peak.bytes / 1e9, p.memory.host.bytes / 1e9
        seconds = p.times.per_sample
        fits = "" if p.fits else " (does not fit)"
        cells = (
            model, f"{p.subject.setup.tokens:,}", gpus, what, f"{size:.1f}{fits}", f"{host:.0f}",
            f"{seconds:.3g}", f"{seconds * gpus:.3g}",
        )  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    for line in lines({"readme": README, "paper": PAPER}[sys.argv[1] if len(sys.argv) > 1 else "readme"]):
        print(line, flush=True)
