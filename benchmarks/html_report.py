"""A run as one HTML file that needs nothing else: machine, summary, a table to sort and filter, pictures, gaps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import pictures
from .report import (
    GROUP_TITLES,
    GROUPS,
    Results,
    best_speedups,
    format_limits,
    format_noise,
    gaps,
    is_model,
    label,
    model_numbers,
)
from .table import compact, number, percent

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --bad: #b42318; --good: #0a6b4a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a5adb5; --paper: #14171a; --card: #1e2226;
  --line: #3b4248; --bad: #ff8f80; --good: #63d2a4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
nav a { margin-right: 1rem; } a { color: inherit; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.32rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.wide { white-space: normal; min-width: 20rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; } td.slower { color: var(--bad); font-weight: 600; }
thead th { position: sticky; top: 0; background: var(--card); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid var(--line); border-radius: 6px; }
.fits { overflow-x: auto; }
.notice { border-left: 4px solid var(--bad); background: var(--card); padding: 0.6rem 1rem; }
.soft { color: var(--soft); }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.3rem 0.6rem; width: 22rem; max-width: 100%; margin-right: 0.8rem; }
figure { margin: 1.5rem 0; overflow: auto; } figcaption { font-weight: 600; margin-bottom: 0.4rem; }
figure svg { max-width: 100%; height: auto; display: block; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
"""
# Sorts a table by the column whose title is pressed, and hides the rows that lack a word of the filter.
SCRIPT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const empty = row => head.className === "number" && row.cells[column].dataset.value === undefined;
    const compare = (a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const [x, y] = [value(a), value(b)];
      const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, {numeric: true});
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
for (const input of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  const count = document.getElementById(input.dataset.table + "-count");
  const show = () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    count.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " rows";
  };
  input.addEventListener("input", show);
  show();
}
"""
# Nothing may be loaded from anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CAPTIONS = {
    "speedups": "Speed-up by operation",
    "roofline": "Roofline: what was reached of what the machine can do",
    "scaling": "How times grow",
    "sizes": "Times over the sizes of the rows",
    "errors": "Errors, as a share of what is allowed",
    "losses": "Training a GPT both ways",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table; one with a value is a number, by which it is sorted."""

    text: str
    value: float | None = None
    style: str = ""

    def html(self) -> str:
        styles = " ".join(filter(None, ["number" if self.value is not None else "", self.style]))
        attributes = f' class="{styles}"' if styles else ""
        attributes += "" if self.value is None else f' data-value="{self.value:.9g}"'
        return f"<td{attributes}>{escape(self.text)}</td>"


MISSING, NOT_RUN = (Cell(text, style="number") for text in ("-", "not run"))


def write(results: Results, path: Path, drawn: Mapping[str, str] | None = None) -> None:
    """The page. ``drawn``: what pictures.draw made of the results, where that has been done already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, pictures.draw(results) if drawn is None else drawn), encoding="utf-8")


def page(results: Results, drawn: Mapping[str, str]) -> str:
    """The page's HTML."""
    environment = results["environment"]
    machine = environment.get("gpu", environment.get("processor", "")).partition(",")[0]
    sections = {
        "Summary": _summary(results),
        "Whole models": _models(results),
        "Training end to end": _end_to_end(results["end_to_end"]),
        "Every row": _rows(results["rows"]),
        "Pictures": _pictures(drawn),
        "Every implementation": _implementations(results["rows"]),
        "Reasons for gaps": _gaps(results["rows"]),
        "Machine": _machine(results),
    }
    sections = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{_slug(title)}">{title}</a>' for title in sections)
    body = "\n".join(
        f'<section id="{_slug(title)}"><h2>{title}</h2>\n{text}</section>' for title, text in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastformer benchmark: {escape(machine)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>fastformer benchmark: {escape(machine)}</h1>
<p class="soft">{escape(environment.get("versions", ""))}</p>
{_notices(results)}
<nav>{links}</nav>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _notices(results: Results) -> str:
    failures = [row for row in results["rows"] if row["problem"]]
    notices = [format_noise(results)]
    notices += ["This run was interrupted: what follows is what there was."] if results["interrupted"] else []
    notices += [f"{label(row)}: {row['problem']}" for row in failures]
    return "\n".join(f'<p class="notice">{escape(text)}</p>' for text in notices if text)


def _table(titles: Sequence[tuple[str, bool]], rows: Iterable[Sequence[Cell]], name: str = "") -> str:
    """A table with titles (text, is it of numbers?); one with a name can be sorted and filtered."""
    heads = []
    for title, numeric in titles:
        text = f'<button type="button">{escape(title)}</button>' if name else escape(title)
        heads.append(f'<th scope="col"{" class=number" if numeric else ""}>{text}</th>')
    body = "\n".join(f"<tr>{''.join(cell.html() for cell in row)}</tr>" for row in rows)
    table = f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    if not name:
        return f'<div class="fits"><table>{table}</div>'
    return (
        f'<p><input type="search" data-table="{name}" placeholder="filter: words, as in bf16 bwd" aria-label="filter">'
        f'<span class="soft" id="{name}-count"></span></p>\n'
        f'<div class="scroll"><table class="sorts" id="{name}">{table}</div>'
    )


def _number(value: float | None, text: str | None = None, style: str = "") -> Cell:
    if value is None:
        return MISSING
    return Cell(text or (str(value) if isinstance(value, int) else number(value)), value, style)


def _faster(speedup: float | None) -> Cell:
    """A speed-up, marked where ours is the slower one."""
    if speedup is None:
        return MISSING
    text = number(speedup, decimals=2)
    return _number(speedup, text, "slower" if float(text) < 1 else "")


def _summary(results: Results) -> str:
    """For each group of peers: in how many rows ours is faster, and by how much."""
    lines = []
    for group in GROUPS:
        found = {label(row): speedups[group] for row in results["rows"] if group in (speedups := best_speedups(row))}
        if found:
            mean = math.exp(sum(map(math.log, found.values())) / len(found))
            worst, best = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            cells = [Cell(GROUP_TITLES[group]), _number(len(found)), _faster(mean)]
            cells.append(_number(sum(speedup > 1 for speedup in found.values())))
            cells += [Cell(f"{number(found[name], decimals=2)}: {name}", style="wide") for name in (worst, best)]
            lines.append(cells)
    timed = sum(row["ours"] is not None for row in results["rows"])
    counts = f"<p>{len(results['rows'])} rows, {timed} of them right and timed.</p>"
    titles = [("against", False), ("rows", True), ("speed-up (geometric mean)", True), ("rows where faster", True)]
    return counts + (_table([*titles, ("least", False), ("most", False)], lines) if lines else "")


def _models(results: Results) -> str:
    lines = []
    for row in filter(is_model, results["rows"]):
        start = [Cell(row[key]) for key in ("operation", "shape", "dtype")]
        for title, numbers in model_numbers(row, results["limits"]).items():
            tokens, mfu, memory = (numbers.get(key) for key in ("tokens", "mfu", "memory"))
            if tokens is None and memory is None:
                continue
            name = {"ours": "fastformer", "+compile": "fastformer, compiled"}.get(title, f"torch, {title}")
            cells = [Cell(name), _number(tokens, compact(tokens)), _number(mfu, percent(mfu))]
            lines.append([*start, *cells, _number(None if memory is None else memory / 2**20)])
    titles = [(title, False) for title in ("task", "model", "type", "implementation")]
    titles += [(title, True) for title in ("tokens/s", "MFU", "peak MiB")]
    note = '<p class="soft">MFU: FLOP/s, as a share of the matrix products that were measured.</p>'
    return note + _table(titles, lines) if lines else ""


def _end_to_end(run: dict | None) -> str:
    if not run:
        return ""
    lines = []
    for name, losses in run["losses"].items():
        cells = [Cell(name), _number(run["tokens_per_second"].get(name), None)]
        cells += [
            _number(loss, None if loss is None else f"{loss:.4f}")
            for loss in (losses[-1] if losses else None, run["held_out_loss"].get(name))
        ]
        peak = run["peak_bytes"].get(name)
        lines.append([*cells, _number(None if peak is None else peak / 2**20)])
    titles = [("", False), *((title, True) for title in ("tokens/s", "last loss", "held-out loss", "peak MiB"))]
    verdict = run["problem"] or (
        f"{run['speedup']:.2f}x as many tokens/s" if run["speedup"] else "no speed: too few steps"
    )
    text = f"{run['model']}; {run['batch']}, {run['dtype']}, {run['steps']} steps: {verdict}."
    return f"<p>{escape(text)}</p>" + _table(titles, lines)


def _rows(rows: Sequence[dict]) -> str:
    """Every row with all of its columns."""
    if not rows:
        return ""
    names = ("operation", "shape", "type", "mode", "kernel")
    numbers = ("ms", "+-", *(f"vs {group}" for group in GROUPS), "of limit", "error", "TFLOP/s", "GB/s")
    titles = [(name, False) for name in names]
    titles += [(name, True) for name in (*numbers, "host us", "peak MiB")]
    return _table(titles, map(_row, rows), "rows")


def _row(row: dict) -> list[Cell]:
    start = [Cell(row[key]) for key in ("operation", "shape", "dtype", "mode", "backend")]
    ours = row["ours"]
    if ours is None:
        return [*start, *[MISSING] * 7, _number(row["error_share"]), *[MISSING] * 4]
    speedups, seconds = best_speedups(row), ours["median"]
    cells = [_number(seconds * 1e3, number(seconds * 1e3, 4)), _number(row["spread"], percent(row["spread"]))]
    for group in GROUPS:
        cells.append(_faster(speedups[group]) if group in speedups else NOT_RUN if gaps(row, group) else MISSING)
    cells.append(_number(row["limit_share"], f"{percent(row['limit_share'])} {row['limit']}"))
    cells.append(_number(row["error_share"]))
    for key, unit in (("flops", 1e12), ("bytes", 1e9)):
        cells.append(_number(row[key] / seconds / unit if row[key] else None))
    return [*start, *cells, *_costs(row, "ours")]


def _costs(row: dict, name: str) -> list[Cell]:
    overhead, memory = row["overhead"].get(name), row["memory"].get(name)
    return [_number(None if overhead is None else overhead * 1e6), _number(None if memory is None else memory / 2**20)]


def _implementations(rows: Sequence[dict]) -> str:
    """Every implementation of every row: its times, or why it has none."""
    lines = []
    for row in rows:
        start = [Cell(label(row))]
        found = {"ours": row["ours"] or row["problem"], **row["peers"]}
        for name, timing in sorted(found.items(), key=lambda item: isinstance(item[1], str)):  # those with times first
            if isinstance(timing, str):
                lines.append([*start, Cell(name), *[MISSING] * 7, Cell(timing, style="wide")])
                continue
            cells = [Cell(name)]
            for keys in (("median",), ("low", "high"), ("ci_low", "ci_high")):
                values = [timing[key] * 1e3 for key in keys if key in timing]
                cells.append(_number(values[0], " to ".join(number(v, 4) for v in values)) if values else MISSING)
            cells += [_number(timing["samples"]), _faster(row["speedups"].get(name))]
            lines.append([*start, *cells, *_costs(row, name), Cell("")])
    titles = [("row", False), ("implementation", False)]
    titles += [
        (title, True)
        for title in ("ms", "quartiles", "95% interval", "calls", "speed-up of ours", "host us", "peak MiB")
    ]
    return _table([*titles, ("why not", False)], lines, "implementations") if lines else ""


def _gaps(rows: Sequence[dict]) -> str:
    """Why peers were not timed, and in how many rows."""
    counts: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if isinstance(peer, str):
                counts.setdefault((name, peer), []).append(label(row))
    lines = [
        [Cell(name), Cell(reason, style="wide"), _number(len(where)), Cell(where[0])]
        for (name, reason), where in counts.items()
    ]
    titles = [("implementation", False), ("reason", False), ("rows", True), ("first of them", False)]
    return _table(titles, lines) if lines else ""


def _machine(results: Results) -> str:
    facts = results["environment"] | {"measured limits": format_limits(results)}
    return _table([("", False), ("", False)], [[Cell(name), Cell(text, style="wide")] for name, text in facts.items()])


def _pictures(drawn: Mapping[str, str]) -> str:
    figures = []
    for i, (name, svg) in enumerate(drawn.items()):
        caption = CAPTIONS.get(name, f"Speed-up: {name.partition('-')[2]}")
        figures.append(
            f"<figure><figcaption>{escape(caption)}</figcaption>\n{inline(svg, f'picture{i}', caption)}</figure>"
        )
    return "\n".join(figures)


def inline(svg: str, prefix: str, title: str) -> str:
    """A picture of pictures.draw as a part of a page: ids begin with the prefix, ink and background are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(pictures.INK, "currentColor").replace(pictures.GRID, "var(--line)")
    svg = svg.replace(f"fill: {pictures.PAPER}", "fill: none")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
