"""A picture of device memory over one optimizer step by category: PNG, by matplotlib."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import NamedTuple

from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.entries import Phase
from prfl_engine.planner.report import Prediction

STANDING = ("weights", "frozen start", "LoRA", "reward model", "reward head", "optimizer states",
            "optimizer slots", "averaged weights", "e4m3 weights", "CUDA graph", "resident weights",
            "CUDA context", "NCCL buffers", "allocator")  # fmt: skip


class Moment(NamedTuple):
    """Bytes by category at one place of a step."""

    phase: str
    bytes: dict[str, int]


def moments(p: Prediction) -> Iterator[Moment]:
    """The step in its order, from flow matching to the update: of forward and backward what has been saved
    before every block, of the others their largest moment."""
    named = {phase.name: phase for phase in p.memory.phases}
    worst = next((name for name in named if name.startswith("rollout, worst")), "")
    found = (name for name in ("flow matching", "graded step", REWARD_TRAINING) if name in named)
    passes = {name: list(_blocks(p, named[name])) for name in found}
    yield from passes.get("flow matching", passes.get(REWARD_TRAINING, ()))
    if worst:
        yield from [Moment(worst, _sizes(named[worst]))] * 8
        forward = len(passes["graded step"]) // 2
        yield from passes["graded step"][:forward]
        yield from [Moment("reward", _sizes(named["reward"]))] * 4
        yield from passes["graded step"][forward:]
    yield from [Moment("optimizer", _sizes(named["optimizer"]))] * 4


def _sizes(phase: Phase) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for e in phase.entries:
        sizes[e.category] = sizes.get(e.category, 0) + e.bytes
    return sizes


def _blocks(p: Prediction, phase: Phase) -> Iterator[Moment]:
    """Forward and backward of all blocks."""
    kinds, saved, grown, sizes = p.memory.kinds, 0, [], _sizes(phase)
    for i, kind in enumerate(kinds):
        n = kind.numbers[phase.name]
        last = i == len(kinds) - 1
        inside = n.forward_last if last else n.forward
        back = n.backward_last if last else n.backward
        grown.append((saved, inside, back))
        saved += n.saved_last if last else n.saved
    for name, way in (("forward", grown), ("backward", grown[::-1])):
        for before, inside, back in way:
            here = {"saved activations": before, "temporaries": inside if name == "forward" else back}
            yield Moment(f"{phase.name}, {name}", sizes | here)


def ordered(found: Sequence[Moment]) -> list[str]:
    """The categories of moments, those of all phases first."""
    names = dict.fromkeys(n for m in found for n in m.bytes)
    return [n for n in STANDING if n in names] + [n for n in names if n not in STANDING]


def draw(p: Prediction, other: Prediction) -> bytes:
    """A PNG, under it that of `other`, the paper's settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = ((p, "as configured"), (other, "the paper's settings"))
    names = ordered([m for one, _ in pictures for m in moments(one)])
    colors = [pyplot.get_cmap("tab20")(i % 20) for i in range(len(names))]
    figure, places = pyplot.subplots(2, 1, figsize=(12, 11), sharey=True)
    for axes, (one, what) in zip(places, pictures, strict=True):
        found = list(moments(one))
        rows = [[m.bytes.get(n, 0) / 1e9 for m in found] for n in names]
        axes.stackplot(range(len(found)), rows, labels=names, colors=colors, step="post")
        axes.axhline(one.limit / 1e9, color="black", linestyle="--", linewidth=1, label="limit")
        starts = [i for i, m in enumerate(found) if i == 0 or m.phase != found[i - 1].phase]
        for i in starts:
            axes.axvline(i, color="white", linewidth=1)
        phases = [found[i].phase for i in starts]
        axes.set_xticks(starts, phases, rotation=60, rotation_mode="anchor", ha="right", fontsize=8)
        axes.set_ylabel("GB on a GPU, predicted")
        tokens = f"{one.subject.setup.tokens:,} tokens, {one.shards.size} x {one.gpu.name}"
        axes.set_title(f"{one.subject.model}, {tokens}: {what}")
    places[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return file.getvalue()
