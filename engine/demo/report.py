"""The demo's report: one HTML file with a player and plots, and the same numbers as JSON."""

import base64
import html
import json
from pathlib import Path

import numpy as np
from torch import Tensor

from prfl_engine.demo import player
from prfl_engine.media.video import pixels, write_animation
from prfl_engine.metrics import read_metrics

COLORS = {"before": "#8a8f98", "control": "#d98c2b", "PRFL": "#2268b3"}
SHOWN = 6  # seeds in the animation
OFFERED = 12  # seeds in the player
STRIPS = 3  # of which all frames are shown side by side

STYLE = """
:root { color-scheme: light dark; --text: #1c2733; --page: #fff; --line: #d9dee4; --quiet: #5b6875 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ee; --page: #14191f; --line: #37424e; --quiet: #9fabb8 }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem;
       color: var(--text); background: var(--page) }
h1, h2 { line-height: 1.2 } .result { font-size: 1.15rem } .quiet { color: var(--quiet); font-size: .9rem }
code { overflow-wrap: anywhere }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.plots img, .wide img { width: 100%; background: #fff; border-radius: 4px }
.plots .wide { grid-column: 1 / -1 } .wide img { min-width: 45rem } .box { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .9rem; text-align: right;
       border-bottom: 1px solid var(--line); white-space: nowrap }
td:first-child, th:first-child { text-align: left }
"""


def write_report(out: Path, numbers: dict) -> Path:
    """Write report.html, report.json, plots (.png), frames and the animation (.webp) to `out`.

    `numbers` are those of `compare` and of run.demo. "videos" leaves them; "result" and "training" come in.
    """
    out = Path(out)
    videos = numbers.pop("videos")
    numbers |= {"result": _result(numbers), "training": curves(out)}
    (out / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    strip = _strip(out / "frames.webp", videos, numbers["captions"])
    pictures = [
        _plot(out / "accuracy.png", lambda ax: _accuracy(ax, numbers)),
        _plot(out / "reward.png", lambda ax: _reward(ax, numbers)),
        _plot(out / "seeds.png", lambda ax: _seeds(ax, numbers), columns=2),
        _plot(out / "training.png", lambda ax: _training(ax, numbers["training"]), columns=3),
    ]
    animation = out / "samples.webp"
    _animate(animation, videos, numbers["captions"])
    page = out / "report.html"
    chosen = _spread(len(numbers["captions"]), OFFERED)
    shown = player.player(videos, numbers["captions"], chosen, f'<img alt="samples" src="{animation.name}">')
    page.write_text(_page(numbers, pictures, shown, strip))
    return page


def _plot(path: Path, draw, columns: int = 1) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((4.2 * columns + 2.4 * (columns == 1), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    draw(axes)
    for ax in [axes] if columns == 1 else axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _strip(path: Path, videos: dict[str, Tensor], captions: list[str]) -> Path:
    """All frames of the samples of STRIPS prompts, a row a video."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = _spread(len(captions), STRIPS)
    figure = Figure((11, 0.82 * len(videos) * len(chosen) + 0.3 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen) * len(videos), 1, squeeze=False)[:, 0]
    for ax, (i, name) in zip(axes, [(i, name) for i in chosen for name in videos], strict=True):
        frames = pixels(videos[name][i]).numpy()  # [F, H, W, 3]
        ax.imshow(np.concatenate(frames, 1), interpolation="bicubic")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
        ax.spines[:].set_visible(False)
        for k in range(1, len(frames)):
            ax.axvline(k * frames.shape[2] - 0.5, color="white", lw=1.5)
        if name == next(iter(videos)):
            ax.set_title(captions[i], loc="left", fontsize=10)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})
    return path


def _accuracy(ax, numbers: dict) -> None:
    found = numbers["reward_accuracy"]
    for offset, (judge, color) in enumerate([("learned", "#2268b3"), ("hand-made", "#b9bec6")]):
        values = [of[judge]["low"] for of in found.values()]
        x = [i + 0.38 * offset for i in range(len(values))]
        bars = ax.bar(x, values, 0.36, color=color, label=judge)
        ax.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=8)
    ax.set_xticks([i + 0.19 for i in range(len(found))], [n.replace(" it ", "\nit ") for n in found])
    ax.axhline(0.5, color="#555", lw=0.8, ls=":")
    ax.set(ylim=(0.4, 1.15), ylabel="held-out accuracy, mean of t ≤ 600", title="Steady or broken motion?")
    ax.legend(frameon=False, loc="upper right", ncols=2)


def _reward(ax, numbers: dict) -> None:
    for name, found in numbers["models"].items():
        by_t = found["reward_by_timestep"]
        label = f"{name} (mean {found['reward']:.3f})"
        ax.plot(list(map(float, by_t)), list(by_t.values()), "o-", color=COLORS[name], label=label)
    ax.set(xlabel="timestep at which the sample is scored", ylabel="mean reward on held-out seeds",
           ylim=(0, 1.03), title="Reward of samples")  # fmt: skip
    ax.legend(frameon=False)


def _seeds(axes, numbers: dict) -> None:
    seeds = numbers["per_seed"]
    for ax, other in zip(axes, ("before", "control"), strict=True):
        x, y = seeds[other]["acceleration"], seeds["PRFL"]["acceleration"]
        ax.scatter(x, y, s=14, color=COLORS["PRFL"], alpha=0.7)
        top = 1.05 * max(*x, *y)
        ax.plot([0, top], [0, top], color="#555", lw=0.8, ls=":")
        test = numbers["tests"][f"PRFL against {other}"]["blind"]
        ax.set(xlabel=f"acceleration, {other}", ylabel="acceleration, PRFL",
               title=f"Below the line PRFL moves better: {test['preferred']} of {test['of']}")  # fmt: skip
        ax.title.set_fontsize(9)


def curves(out: Path) -> dict:
    """What the trainings logged: {title: {optimizer step: value}}."""
    shown = {
        "Pre-training, whole videos: loss": ("pretrain", "train/sft_loss"),
        "Reward model: loss": ("reward", "train/loss"),
        "PRFL: reward of graded steps": ("prfl", "train/reward"),
    }
    return {
        title: {r["step"]: r["values"][key] for r in read_metrics(out / folder) if key in r["values"]}
        for title, (folder, key) in shown.items()
    }


def _training(axes, found: dict) -> None:
    for ax, (title, curve) in zip(axes, found.items(), strict=True):
        ax.plot(list(curve), list(curve.values()), lw=1)
        ax.set(xlabel="optimizer step", title=title)


def _animate(path: Path, videos: dict[str, Tensor], captions: list[str]) -> None:
    chosen = _spread(len(captions), SHOWN)
    cells = [pixels(video[i]) for video in videos.values() for i in chosen]
    labels = [captions[i] if n == 0 else name for n, name in enumerate(videos) for i in chosen]
    labels = [label[:22] for label in labels]
    write_animation(path, cells, labels, columns=len(chosen), scale=4, fps=8)


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the positions 0..count-1, at equal distances."""
    return sorted({i * count // wanted for i in range(wanted)})


def _result(numbers: dict) -> str:
    """What came out, in one sentence."""

    def preferred(name: str) -> str:
        found = numbers["tests"][name]["blind"]
        return f"{found['preferred']} of {found['of']}"

    models = numbers["models"] | {"steady": numbers["clean"]}
    at = {name: f"{of['acceleration']:.2f}" for name, of in models.items()}
    return (
        f"After {numbers['settings']['prfl']} updates of PRFL samples move better than before in "
        f"{preferred('PRFL against before')} held-out pairs and better than the control's in "
        f"{preferred('PRFL against control')} (the control's better than before in "
        f"{preferred('control against before')}), as optical flow judges that is not told which is which: "
        f"their acceleration is {at['PRFL']}, before {at['before']}, of steady motion {at['steady']}."
    )


def _ahead(accuracy: dict) -> str:
    """Where the learned reward model is above the hand-made features, in one sentence."""
    above = [name for name, a in accuracy.items() if a["learned"]["low"] > a["hand-made"]["low"]]
    other = [name for name in accuracy if name not in above]
    parts = [("is above them", above), ("is not above them", other)]
    said = ", and ".join(f"{what} on {' and on '.join(names)}" for what, names in parts if names)
    return f"By the mean of t ≤ 600 the learned model {said}."


def _page(numbers: dict, pictures: list[Path], shown: str, strip: Path) -> str:
    accuracy, seconds, clean = numbers["reward_accuracy"], numbers["seconds"], numbers["clean"]
    keys = {"acceleration": 2, "speed": 2, "reward": 3, "distance": 3, "unsteadiness": 3, "jerk": 4}
    rows = [
        [name, *(f"{m[key]:.{digits}f}" if key in m else "" for key, digits in keys.items())]
        for name, m in (numbers["models"] | {"steady motion, drawn": clean}).items()
    ]
    tests = [
        [name, f"{t['blind']['preferred']} of {t['blind']['of']}", f"{t['reward_gain']:+.3f}",
         f"{t['reward_p']:.2g}", f"{-t['distance_gain']:+.3f}", f"{t['distance_p']:.2g}"]
        for name, t in numbers["tests"].items()
    ]  # fmt: skip
    stages = [[name, f"{s:.0f} s"] for name, s in seconds.items()]
    names = list(next(iter(accuracy.values()))["learned"]["by_timestep"])
    table = [
        [name, judge, *(f"{a[judge]['by_timestep'][t]:.3f}" for t in names), f"{a[judge]['low']:.3f}"]
        for name, a in accuracy.items() for judge in a
    ]  # fmt: skip
    kinds = [
        [kind, f"{a['learned']['by_kind'][kind]:.3f}", f"{a['hand-made']['by_kind'][kind]:.3f}", name]
        for name, a in accuracy.items() for kind in a["learned"]["by_kind"]
    ]  # fmt: skip
    steps, machine = numbers["settings"], numbers["machine"]
    wide = False, False, True, True
    plots = "".join(map(_image, pictures, wide))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>PRFL demo</title><style>{STYLE}{player.STYLE}</style>
<h1>Process reward feedback learning, seen</h1>
<p class="result">{html.escape(numbers["result"])}</p>
{shown}
<p class="quiet">All four videos have the first frame and the prompt in common. Drawn: what the prompt says.
Then samples of one seed: before, after the control, after PRFL. At an edge a light goes back. Made by
<code>{html.escape(numbers["command"])}</code>.</p>
{_image(strip, wide=True)}
<h2>What was done</h2>
<p>A tiny Wan transformer, which is given the first frame and a prompt, was pre-trained on lights that move
over photographs, four of five shaking, and on windows of real video ({steps["short"]} steps on their first
frames, {steps["pretrain"]} on all). Its first three blocks became a reward model that tells steady from
broken motion on <em>noisy latents</em>, of both ({steps["reward"]} steps). Its reward was propagated back
through single denoising steps into the generator ({steps["prfl"]} updates, one of four with flow matching).
No pixel was decoded in training. The control had the same data, seeds and number of updates, all with flow
matching alone.</p>
<h2>Generators, on {steps["seeds"]} held-out first frames</h2>
{_table(["", "acceleration", "speed", "reward", "distance", "unsteadiness", "jerk"], rows)}
{_table(["pairs", "better motion, blind", "reward by", "p", "distance by", "p"], tests)}
<p><em>Acceleration</em>: the change of velocity from frame to frame by optical flow (OpenCV, DIS), pixels a
frame squared; the smaller one of a pair is the better one, unless it moves less than half as fast as the
steady motion that was drawn. The choice is blind: the order is drawn. <em>Speed</em>: pixels a frame.
<em>Reward</em>: mean over the timesteps below 1000 of the reward of the noised sample. <em>Distance</em>:
|log(U / U drawn)|, U the unsteadiness of the decoded video (its mean absolute second difference in time, the
jerk, over its mean absolute first difference). Nothing was trained on acceleration, speed or distance. p:
paired permutation test.</p>
<h2>Reward model, held out</h2>
{_table(["accuracy", "", *(f"t = {t}" for t in names), "mean of t ≤ 600"], table)}
<p>How often the steady one of two videos with the same first frame, prompt and noise has the higher score.
The frames of photographs and windows are of parts of the shots that training never saw. Hand-made: one
linear comparison per timestep of features of the temporal differences of the same noisy latents.
{_ahead(accuracy)} At t = 1000 all but the given first frame is noise, and 0.5 is all there is.</p>
{_table(["mean of t ≤ 600", "learned", "hand-made", ""], kinds)}
<div class="plots">{plots}</div>
<h2>Time</h2>
{_table(["stage", "wall time of this run"], stages)}
<p>On {html.escape(machine["processor"])}, {machine["threads"]} threads; products of training in
{steps["compute_dtype"]}.</p>
<p class="quiet">All numbers of this page, and those of every seed, are in <code>report.json</code>.</p>
</html>
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(r, "td") for r in rows)
    return f'<div class="box"><table>{line(head, "th")}{body}</table></div>'


def _image(path: Path, wide: bool) -> str:
    data, kind = base64.b64encode(path.read_bytes()).decode(), path.suffix[1:]
    image = f'<img alt="{path.stem}" src="data:image/{kind};base64,{data}">'
    return f'<div class="box wide">{image}</div>' if wide else image
