"""A prediction as one HTML page: memory over a step, the paper's settings beside it, and all tables."""

from collections.abc import Sequence
from html import escape

from prfl_engine.planner.entries import COUNTED, ESTIMATED, PREDICTED
from prfl_engine.planner.official import words
from prfl_engine.planner.pareto import Found, pasted
from prfl_engine.planner.picture import moments, ordered
from prfl_engine.planner.report import Prediction

COLORS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f", "#d37295",
    "#8cd17d", "#499894", "#b6992d", "#a0cbe8", "#ff9da7", "#bab0ac", "#86bcb6", "#79706e", "#d4a6c8",
)  # fmt: skip


def html(p: Prediction, other: Prediction, search: Found | None = None) -> str:
    """The page of a prediction; other: that of the paper's settings; search: of which p is the last row."""
    title = f"{p.subject.model}, {p.subject.setup.tokens:,} tokens, {p.shards.size} x {p.gpu.name}"
    names = ordered([*moments(p), *moments(other)])
    top = 1.05 * max(p.limit, other.memory.peak.bytes, p.memory.peak.bytes)
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=facts>{escape(' · '.join(_facts(p)))}</p>", tiles(p)]
    parts += [f"<p class=facts>assumed: {escape(line)}</p>" for line in p.subject.assumed]
    parts += [] if search is None else front(search)
    parts += ["<h2>Memory of a GPU over an optimizer step</h2>", legend(names), "<div class=two>"]
    parts += [chart("As configured", p, names, top), chart("The paper's settings", other, names, top)]
    note = f"{words(other)}. In the order of a step, not to scale in time."
    parts += ["</div>", f"<p class=facts>{escape(note)}</p>"]
    parts += ["<h2>Both</h2>", both(p, other)]
    parts += ["<h2>Memory by phase, GB</h2>", phases(p), "<h3>By category, GB</h3>", categories(p)]
    parts += ["<h3>Host memory of a process, GB</h3>", host(p), "<h3>How each is known</h3>", basis(p)]
    parts += ["<h2>An optimizer step, seconds predicted</h2>", seconds(p)]
    parts.append(f"<p class=facts>{escape(p.basis)}</p>")
    if p.measured is not None:
        parts += ["<h3>Measured rates</h3>", f"<pre>{escape(chr(10).join(p.measured_lines()))}</pre>"]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def front(search: Found) -> list[str]:
    """The rows of a search, the lines to paste, and what another setting would buy in the last one."""
    heads = ["GPUs", "s a sample", "GPU seconds", "an hour", "largest phase, GB", "host, GB a process"]
    rows, lines, priced = [], [], search.rows[0][1].price is not None
    for overrides, p in search.rows:
        t, sizes = p.times, (p.memory.peak.bytes, p.memory.host.bytes)
        cells = [f"{t.gpus}", *(f"{s:.3g}" for s in (t.per_sample, t.per_sample * t.gpus))]
        cells.append(f"{3600 / t.per_sample:.0f}")
        rows.append([*cells, *(f"{size / 1e9:.1f}" for size in sizes)])
        rows[-1] += [f"{p.sample_price:.4f}"] if priced else []
        lines += [f"# {t.gpus} GPUs", *pasted((*search.given, *overrides))]
    parts = [f"<h2>The fastest that fit, of {search.tried:,} settings</h2>"]
    parts += [table([*heads, *(["price each"] if priced else [])], rows)]
    parts += [f"<h3>To put after prfl {search.command} CONFIG</h3>"]
    parts += [f"<pre>{escape(chr(10).join(lines))}</pre>"]
    if search.neighbours:
        rows = [
            [n.change, f"{n.seconds:+.0%}", f"{n.bytes / 1e9:+.1f}", "" if n.fits else "too much"]
            for n in search.neighbours
        ]
        parts += [f"<h3>What another setting would buy on {search.rows[-1][1].times.gpus} GPUs</h3>"]
        parts += [table(["setting", "time", "GB", ""], rows, numeric=(1, 2))]
    if search.left_out:
        lines = "".join(f"<li>{escape(str(each))}" for each in search.left_out)
        parts += [f"<h3>Left out: a training refuses them, or gains nothing</h3><ul>{lines}</ul>"]
    parts += [f"<p>{escape(str(each))}</p>" for each in search.given_up]
    return [*parts, "<p class=facts>Below is the last row.</p>"]


def _facts(p: Prediction) -> list[str]:
    grid, size = "x".join(map(str, p.subject.setup.latent[2:])), p.subject.setup.latent[0]
    found = [f"latents {grid}", f"micro-batches of {size}"]
    if p.shards.many:
        found.append(f"sharded over {p.shards.shards}, {p.shards.sequence} for a sample")
    return [*found, "nothing of this was measured" if p.measured is None else p.gpu.basis]


def tiles(p: Prediction) -> str:
    """The numbers that decide."""
    peak, t = p.memory.peak, p.times
    found = [
        (f"{peak.bytes / 1e9:.1f} GB", f"of {p.limit / 1e9:.1f}, {peak.name}"),
        ("fits" if p.fits else "does not fit", f"{(p.limit - peak.bytes) / 1e9:+.1f} GB left"),
        (f"{p.memory.host.bytes / 1e9:.0f} GB", "host, a process"),
    ]
    if t.graded or t.trained:
        found.append((f"{t.per_sample:.3g} s", "a graded sample" if t.graded else "a sample"))
        found.append((f"{t.per_sample * t.gpus:.3g}", "GPU seconds each"))
    if p.sample_price is not None:
        found.append((f"{p.sample_price:.4f}", "price each"))
    state = "good" if p.fits else "bad"
    cells = (f"<div class='tile {state if i < 2 else ''}'><b>{escape(a)}</b>{escape(b)}</div>"
             for i, (a, b) in enumerate(found))  # fmt: skip
    return f"<div class=tiles>{''.join(cells)}</div>"


def legend(names: Sequence[str]) -> str:
    """Categories and their colors."""
    cells = (f"<span><i style='background:{_color(names, n)}'></i>{escape(n)}</span>" for n in names)
    return f"<div class=legend>{''.join(cells)}</div>"


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[list(names).index(name) % len(COLORS)]


def chart(title: str, p: Prediction, names: Sequence[str], top: float) -> str:
    """Stacked bytes over a step. Phases have numbers, which the list below names."""
    found, areas = list(moments(p)), []
    below = [0.0] * len(found)
    for name in names:
        above = [b + m.bytes.get(name, 0) for b, m in zip(below, found, strict=True)]
        if above != below:
            most = max(m.bytes.get(name, 0) for m in found) / 1e9
            points = [*_steps(above, top), *reversed(_steps(below, top))]
            text = " ".join(f"{x:.2f},{y:.3f}" for x, y in points)
            tip = f"<title>{escape(name)}, at most {most:.2f} GB</title>"
            areas.append(f"<polygon points='{text}' fill='{_color(names, name)}'>{tip}</polygon>")
        below = above
    starts = [i for i, m in enumerate(found) if i == 0 or m.phase != found[i - 1].phase]
    places = [100 * i / len(found) for i in starts]
    lines = "".join(f"<line x1={x:.2f} x2={x:.2f} y1=0 y2=100 class=border />" for x in places)
    y = 100 * (1 - p.limit / top)
    lines += f"<line x1=0 x2=100 y1={y:.2f} y2={y:.2f} class=limit />"
    marks = "".join(f"<b style='left:{x:.2f}%'>{i + 1}</b>" for i, x in enumerate(places))
    scale = "".join(
        f"<span style='bottom:{100 * gb * 1e9 / top:.2f}%'>{gb}</span>" for gb in _ticks(top / 1e9)
    )
    listed = "".join(f"<li>{escape(found[i].phase)}</li>" for i in starts)
    peak = p.memory.peak
    head = f"{escape(title)}: <b>{peak.bytes / 1e9:.1f} GB</b> in {escape(peak.name)}"
    over = "" if p.fits else " <b class=bad>does not fit</b>"
    return (
        f"<section><p class=head>{head}{over}</p><div class=plot><div class=scale>{scale}</div>"
        f"<svg viewBox='0 0 100 100' preserveAspectRatio=none role=img>{''.join(areas)}{lines}</svg></div>"
        f"<div class=marks>{marks}</div><ol>{listed}</ol></section>"
    )


def _steps(values: Sequence[float], top: float) -> list[tuple[float, float]]:
    """The corners of a staircase from left to right, in hundredths."""
    n, found = len(values), []
    for i, value in enumerate(values):
        y = 100 * (1 - value / top)
        found += [(100 * i / n, y), (100 * (i + 1) / n, y)]
    return found


def _ticks(top: float) -> list[int]:
    """Round numbers from 0 to `top`, about five."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10**5) if top / n <= 6)
    return list(range(0, int(top) + 1, step))


def both(p: Prediction, other: Prediction) -> str:
    """The configuration and the paper's settings side by side."""

    def gb(size: float) -> str:
        return f"{size / 1e9:.1f}"

    def column(one: Prediction) -> list[str]:
        t, memory = one.times, one.memory
        each = [f"{t.per_sample:.3g}", f"{t.per_sample * t.gpus:.3g}"] if t.graded or t.trained else ["", ""]
        fits = "yes" if one.fits else "no"
        return [gb(memory.peak.bytes), fits, gb(memory.host.bytes), gb(memory.disk), *each, f"{t.mfu:.0%}"]

    heads = ["largest phase, GB", "fits", "host, GB a process", "checkpoint, GB", "s a sample",
             "GPU seconds a sample", "MFU"]  # fmt: skip
    rows = [list(cells) for cells in zip(heads, column(p), column(other), strict=True)]
    return table(["", "as configured", "the paper's settings"], rows)


def phases(p: Prediction) -> str:
    """The phases, and how much of each is known how."""
    rows = [
        [phase.name, *(f"{size / 1e9:.2f}" for size in (
            phase.bytes, phase.of(COUNTED), phase.of(PREDICTED), phase.of(ESTIMATED)))]
        for phase in p.memory.phases
    ]  # fmt: skip
    return table(["phase", "total", COUNTED, PREDICTED, ESTIMATED], rows)


def categories(p: Prediction) -> str:
    """Categories by phase."""
    columns = p.columns()
    found = p.categories()
    rows = [[name, *(f"{size / 1e9:.2f}" if size else "" for size in sizes)] for name, sizes in found]
    return table(["category", *(name for name, _ in columns)], rows)


def host(p: Prediction) -> str:
    """Host memory by category."""
    rows = [[e.category, f"{e.bytes / 1e9:.2f}", e.how, e.basis] for e in p.memory.host.entries]
    return table(["category", "GB", "how", "from"], rows, numeric=(1,))


def basis(p: Prediction) -> str:
    """How each category of the device is known."""
    return table(["category", "how", "from"], [list(row) for row in p.known()], numeric=())


def seconds(p: Prediction) -> str:
    """Phases of an optimizer step."""
    t = p.times
    rows = [
        [row.phase, f"{row.seconds:.2f}", f"{row.seconds / t.seconds:.0%}", f"{row.waits:.2f}",
         f"{row.flops / 1e15:.2f}", f"{row.flops / row.seconds / t.peak:.0%}" if row.flops else ""]
        for row in t.rows
    ]  # fmt: skip
    flops = sum(row.flops for row in t.rows) / 1e15
    rows.append(["all", f"{t.seconds:.2f}", "", "", f"{flops:.2f}", f"{t.mfu:.0%}"])
    return table(["phase", "seconds", "share", "waits", "model PFLOP (counted)", "MFU"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] | None = None) -> str:
    """A table that scrolls in a box of its own. numeric: columns of numbers; None: all but the first."""
    numeric = range(1, len(head)) if numeric is None else numeric

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (" class=n" if i in numeric else "" for i in range(len(cells)))
        made = (f"<{tag}{kind}>{escape(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=box><table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"


STYLE = """
:root{--ink:#1c2430;--dim:#5a6675;--page:#fff;--line:#dde3ea;--soft:#f6f8fa;--good:#176b3a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--dim:#9aa7b5;--page:#12161c;--line:#2f3844;
--soft:#1b212a;--good:#6fcf97;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);color-scheme:light dark;
font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 8px}h3{font-size:15px;margin:24px 0 6px}
.facts{color:var(--dim);margin:4px 0;font-size:13.5px}
.tiles{display:flex;flex-wrap:wrap;gap:8px;margin:16px 0}
.tile{border:1px solid var(--line);border-radius:6px;padding:8px 12px;font-size:13px;color:var(--dim)}
.tile b{display:block;font-size:20px;color:var(--ink)}
.tile.good b{color:var(--good)}.tile.bad b,b.bad{color:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:13px;margin-bottom:10px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:24px}
.head{margin:0 0 6px;font-size:14px}
.plot{position:relative;height:260px;margin-left:34px;border:1px solid var(--line);border-width:0 0 1px 1px}
svg{position:absolute;inset:0;width:100%;height:100%}
.scale span{position:absolute;right:100%;margin-right:6px;transform:translateY(50%);font-size:12px;
color:var(--dim)}
line{vector-effect:non-scaling-stroke}.border{stroke:var(--page);stroke-width:1.5}
.limit{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 4}
.marks{position:relative;height:20px;margin-left:34px;font-size:12px}
.marks b{position:absolute;padding-left:2px}
ol{margin:2px 0 0 34px;padding-left:18px;font-size:13px;color:var(--dim);columns:2}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 10px;border-bottom:1px solid var(--line)}
th{background:var(--soft);white-space:nowrap}tbody tr:last-child td{border-bottom:0}
td:first-child{white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{overflow-x:auto;font-size:12.5px}
@media(max-width:720px){.two{grid-template-columns:1fr}main{padding:16px 12px 48px}th,td{padding:4px 6px}
ol{columns:1}table{font-size:13px}th{white-space:normal}}
"""
