"""What a run has found, as one HTML page and one JSON file."""

import json
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path

from prfl_bench.accept.claims import FAILS, HOLDS, Verdict, verdicts
from prfl_bench.accept.constants import proposed, rates
from prfl_bench.accept.results import Results, file_name
from prfl_bench.accept.row import BAD, RAN, REFUSED, STAGES
from prfl_bench.accept.tables import Table, tables
from prfl_engine.planner.rates import FILE as RATES

HTML, CONSTANTS = "report.html", "constants.json"


def write(folder: Path, results: Results) -> list[Path]:
    """Write all files of a report; returns their paths, the page first."""
    found, made = verdicts(results), tables(results)
    page, held = folder / HTML, folder / file_name(results.machine, results.date)
    constants = folder / CONSTANTS
    page.write_text(html(results, found, made))
    held.write_text(
        json.dumps(
            {
                "machine": results.machine,
                "date": results.date,
                "rows": list(results.rows.values()),
                "not_run": results.not_run,
                "claims": [v._asdict() for v in found],
                "tables": [table._asdict() for table in made],
            },
            indent=1,
        )
        + "\n"
    )
    constants.write_text(json.dumps(proposed(results), indent=1) + "\n")
    if results.on_gpu:
        (folder / RATES).write_text(json.dumps(rates(results), indent=1) + "\n")
        return [page, held, constants, folder / RATES]
    return [page, held, constants]


def counts(results: Results) -> dict[str, int]:
    """How many rows there are of every state."""
    states = [r["state"] for r in results.rows.values()]
    found = {state: states.count(state) for state in (RAN, REFUSED, *BAD) if state in states}
    return found | ({"not run": len(results.not_run)} if results.not_run else {})


def summary(results: Results) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts(results).items())


def html(results: Results, found: list[Verdict], made: list[Table]) -> str:
    m = results.machine
    bad = [r for r in results.rows.values() if r["state"] in BAD]
    parts = [f"<h1>Acceptance run on {escape(m['name'])}</h1>"]
    facts = f"{results.date} · torch {m['torch']} · Triton {m['triton']} · sources {m['sources']}"
    parts.append(f"<p class=facts>{escape(facts)}</p>")
    parts.append("<div class=tiles>")
    for state, count in counts(results).items():
        parts.append(f"<div class='tile {css(state)}'><b>{count}</b>{escape(state)}</div>")
    parts.append("</div>")
    if not results.on_gpu:
        parts.append("<p>These are the small forms of all rows, on a CPU. They say nothing of a GPU.</p>")
    if bad:
        parts += ["<h2>What went wrong</h2>", rows_table(bad, whole=True)]
    parts += ["<h2>What README and docs say of a GPU</h2>", claims_table(found)]
    for table in made:
        parts += [f"<h3>{escape(table.title)}</h3>", plain_table(table.head, table.rows)]
    parts += defaults_table(proposed(results))
    parts += ["<h2>All rows</h2>", *matrix(results)]
    for stage, rows in groupby(
        sorted(results.rows.values(), key=lambda r: list(STAGES).index(r["stage"])), key=lambda r: r["stage"]
    ):
        parts.append(stage_section(stage, list(rows)))
    if results.not_run:
        rows = [[escape(name), escape(why)] for name, why in results.not_run.items()]
        parts += [f"<h2>Not run ({len(rows)})</h2>", box(["row", "why"], rows)]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Acceptance run on {escape(m['name'])}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def matrix(results: Results) -> list[str]:
    """Right cases of all that ran, by operation and implementation."""
    counts: dict[tuple[str, str], list[str]] = {}
    for r in results.stage("correct/"):
        counts.setdefault(tuple(r["name"].split("/")[1:3]), []).append(r["state"])
    counts = {key: states for key, states in counts.items() if set(states) != {REFUSED}}
    names = list(dict.fromkeys(name for _, name in counts))

    def cell(op: str, name: str) -> str:
        states = [state for state in counts.get((op, name), ()) if state != REFUSED]
        right = states.count(RAN)
        return (
            f"<span class={css(RAN if right == len(states) else BAD[0])}>{right}/{len(states)}</span>"
            if states
            else ""
        )

    rows = [[escape(op), *(cell(op, name) for name in names)] for op in dict.fromkeys(op for op, _ in counts)]
    head = "<h3>Right cases of those that ran, by operation and implementation</h3>"
    return [head, box(["operation", *map(escape, names)], rows, range(1, len(names) + 1))] if rows else []


def stage_section(stage: str, rows: list[dict]) -> str:
    """A stage, folded where everything in it went well."""
    state = " open" if any(r["state"] in BAD for r in rows) or stage not in ("correct",) else ""
    seconds = sum(r["seconds"] for r in rows)
    ran = sum(r["state"] == RAN for r in rows)
    head = f"{escape(STAGES[stage])} <span class=count>{ran} of {len(rows)} ran, {seconds:.0f} s</span>"
    return f"<details{state}><summary>{head}</summary>{rows_table(rows)}</details>"


def rows_table(rows: list[dict], whole: bool = False) -> str:
    """whole: with the stage in the names."""
    cells = [
        [
            f"<span class=name>{escape(r['name'] if whole else r['name'].split('/', 1)[1])}</span>",
            badge(r["state"]),
            f"{r['seconds']:.1f}",
            f"{escape(r['detail'])}{bars(r)}",
        ]
        for r in rows
    ]
    return box(["row", "state", "seconds", "found"], cells, numeric=(2,))


def bars(row: dict) -> str:
    """The timed passes of a row as shares of the roofline."""
    timed = [r for r in row["values"].get("rows", ()) if r.get("ms") and "roofline" in r]
    if row["stage"] not in ("memory", "attention") or not timed:
        return ""
    lines = []
    for r in timed:
        share = max(0.0, min(1.0, r["roofline"]))
        time = f"{r['pass']} {r['backend']}: {r['ms']['median']:.3g} ms"
        label = f"{time}, {100 * r['roofline']:.0f} % of the roofline"
        peers = ", ".join(f"{n} {p['ms']:.3g} ms" for n, p in r["peers"].items() if p)
        lines.append(
            f"<div class=bar><i style='width:{100 * share:.0f}%'></i></div>"
            f"<small>{escape(label)}{escape('; ' + peers) if peers else ''}</small>"
        )
    return f"<div class=bars>{''.join(lines)}</div>"


def claims_table(found: list[Verdict]) -> str:
    order = (FAILS, HOLDS)
    ranked = sorted(found, key=lambda v: order.index(v.verdict) if v.verdict in order else len(order))
    rows = [
        [
            escape(v.file),
            f"{escape(v.text)}<br><small>{escape(v.means)}</small>",
            escape(v.measured) or "–",
            badge(v.verdict),
        ]
        for v in ranked
    ]
    return box(["where", "claim, and what is judged", "measured", "verdict"], rows)


def defaults_table(constants: dict) -> list[str]:
    rows = [
        [d["op"], str(d["now"]), d["best"], ", ".join(f"{b} {ms:.3g}" for b, ms in d["ms"].items())]
        for d in constants["defaults"]
    ]
    parts = (
        [
            "<h3>Default back ends now and the fastest; ms, both passes together but in attention</h3>",
            plain_table(["operation", "now", "fastest", "ms"], rows, ()),
        ]
        if rows
        else []
    )
    tiles = [[t["kernel"], str(t["key"]), str(t["default"]), str(t["best"])] for t in constants["changed"]]
    if tiles:
        parts += [
            "<h3>Tiles that beat the constants</h3>",
            plain_table(["kernel", "key", "now", "best"], tiles, ()),
        ]
    return parts


def plain_table(head: list[str], rows: list[list[str]], numeric: Iterable[int] | None = None) -> str:
    """numeric: the columns of numbers, None: all but the first."""
    numeric = range(1, len(head)) if numeric is None else numeric
    return box([escape(h) for h in head], [[escape(cell) for cell in row] for row in rows], numeric)


def box(head: list[str], rows: list[list[str]], numeric=()) -> str:
    """A table that scrolls inside its box."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numeric else ''}>{c}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    titles = cells("th", head)
    return f"<div class=box><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"


def css(state: str) -> str:
    return "good" if state in (RAN, HOLDS) else "bad" if state in (*BAD, FAILS) else "none"


def badge(state: str) -> str:
    return f"<span class='badge {css(state)}'>{escape(state)}</span>"


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;background:#fff}
body{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px}h3{font-size:15px;margin:24px 0 6px}
.facts,.count,small{color:#5a6675}.count{font-weight:400;font-size:13px;margin-left:8px}
.tiles{display:flex;flex-wrap:wrap;gap:8px;margin:16px 0}
.tile{border:1px solid #dde3ea;border-radius:6px;padding:8px 14px;min-width:76px}
.tile b{display:block;font-size:22px}
.tile.good b{color:#176b3a}.tile.bad b{color:#b3261e}.tile.none b{color:#5a6675}
.box{overflow-x:auto;border:1px solid #dde3ea;border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:6px 10px;border-bottom:1px solid #eaeef2}
th{background:#f6f8fa;font-weight:600;white-space:nowrap}tbody tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.name{white-space:nowrap}
td:last-child{min-width:220px}td.n:last-child{min-width:0}
.badge{border-radius:10px;padding:1px 8px;font-size:12px;white-space:nowrap;background:#eef1f4;color:#46515e}
span.good{color:#176b3a}span.bad{color:#b3261e;font-weight:600}
.badge.good{background:#e3f4e8;color:#176b3a}.badge.bad{background:#fde7e5;color:#b3261e}
details{margin:10px 0}summary{cursor:pointer;font-weight:600;padding:4px 0}
.bars{margin-top:4px}.bar{background:#eef1f4;height:6px;border-radius:3px;max-width:320px;margin-top:4px}
.bar i{display:block;height:6px;border-radius:3px;background:#3b78b8}small{font-size:12px}
@media(max-width:600px){body{padding:16px 10px 48px}th,td{padding:5px 7px}}
"""
