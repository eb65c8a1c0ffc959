"""The files of a result: Markdown tables, PNG figures, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from . import targets
from .plots import Plot, plots
from .results import cases, is_gpu, machine, median, over_floor
from .tables import SECTIONS, Table, commit, duration, page, size

Result = dict[str, Any]

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e3e7ec; --paper: #ffffff; --back: #f5f7fa; --ours: #1b4f9c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .8rem; padding-top: .4rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.soft, figcaption, .about { color: var(--soft); font-size: .9rem; }
nav a { margin-right: 1rem; color: var(--ours); text-decoration: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.card, figure, .table { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 1rem 1.1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--ours); }
figure { margin: 0 0 1.2rem; padding: 1rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .6rem; max-width: 50rem; }
.table { padding: 1rem 1.1rem; margin: 0 0 1.1rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); }
th, td { padding: .34rem .9rem .34rem 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); }
tr.ours td { font-weight: 600; color: var(--ours); }
.bar { display: inline-block; height: .6rem; margin-right: .4rem; border-radius: 2px; background: #b9c9e2; }
tr.ours .bar { background: var(--ours); }
ul { margin: .6rem 0 0; padding-left: 1.1rem; }
.missing { color: #9a6a00; }
"""
WORDS = {
    "ceilings": "What the machine gives to anyone: a copy of memory, counted as bytes read and written, and every "
    "matrix product of the head path by itself, at the height at which the library calls it.",
    "rows": "Logits in, loss and their gradient out. The floor reads both sides once and writes the gradient once. In "
    "peaked rows one token has most of the probability, as with trained models; elsewhere logits are normal.",
    "heads": "Hidden states and output layers in, loss and the gradients of hidden states and weight out. The floor is "
    "the four matrix products that no exact implementation can do without.",
    "topk": "The same two with the log-probabilities of a teacher's likeliest tokens in the place of the teacher: one "
    "matrix product and one side's logits less. bucket: all other tokens are one outcome more; truncate: they are left "
    "out. Beside them the dense loss.",
    "memory": "The step of hidden states while one size grows and the other stays.",
    "accuracy": "Errors while the student comes closer to the teacher. Nothing is left out for being wrong here.",
    "step": "Teacher and student forward, loss head, backward and optimiser of an untrained transformers model. The "
    "floor is the same step with a sum in place of the loss head.",
}
TITLES = {
    "ceilings": "Ceilings",
    "rows": "Logits in",
    "heads": "Hidden states in",
    "topk": "A teacher's likeliest tokens",
    "memory": "Growing N and V",
    "accuracy": "Accuracy",
    "step": "A whole training step",
}
FIGURES = {"heads": "roofline", "memory": "growth", "accuracy": "accuracy"}  # section -> the figure it begins with


def write(file: Path, result: Result) -> None:
    """Write FILE.md, FILE-*.png and FILE.html beside the result file."""
    drawn = list(plots(result))
    file.with_suffix(".md").write_text(page(result), encoding="utf-8")
    for plot in drawn:
        file.with_name(f"{file.stem}-{plot.name}.png").write_bytes(plot.png)
    file.with_suffix(".html").write_text(html(result, drawn), encoding="utf-8")


def html(result: Result, drawn: list[Plot]) -> str:
    """Return the report as one self-contained page."""
    found = machine(result)
    figures = {plot.name: plot for plot in drawn}
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>fusedkd</title>"
    anchors = {**{name: TITLES[name] for name in SECTIONS if name in result["sections"]}, "goals": "Goals"}
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, title in anchors.items())
    parts = [
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body><main>",
        "<h1>fusedkd, measured</h1>",
        f"<p class='soft'>{escape(_machine_words(found))}</p><nav>{links}</nav>",
        _cards(result),
        "<p>Everything is run in turns, one of each per round, and every implementation is checked against float64 "
        "before it is timed. Times are medians ± half the distance between the quartiles; memory is the peak above "
        "inputs and gradients; errors are relative L2 norms.</p>",
    ]
    for name, shown in SECTIONS.items():
        if name in result["sections"]:
            parts.append(f"<h2 id='{name}'>{TITLES[name]}</h2><p>{escape(WORDS[name])}</p>")
            if plot := figures.get(FIGURES.get(name, "")):
                parts.append(_figure(plot))
            parts += [_table(table) for table in shown(result)]
    parts.append("<h2 id='goals'>Goals</h2>")
    parts += [_table(table) for table in _goals(result)]
    return "\n".join([*parts, "</main></body></html>\n"])


def _machine_words(found: dict[str, Any]) -> str:
    versions = {**found["versions"], **found["rivals"]}
    parts = [found["name"], f"{found['threads']} threads" if found["device"] == "cpu" else f"driver {found['driver']}"]
    parts += [f"{name} {version}" for name, version in versions.items() if version]
    parts += [commit(found), found["date"][:10]]
    return " · ".join(parts) + (" · Triton kernels in the interpreter" if found["triton_interpret"] else "")


def _cards(result: Result) -> str:
    """The headline numbers of the first case of the head path."""
    members = cases(result, "heads")
    if not members:
        return ""
    case = members[0]
    cells = {cell["implementation"]: cell for cell in case["cells"]}
    shown = list(_headlines(case, cells))
    cards = "".join(f"<div class='card'><b>{escape(number)}</b>{escape(words)}</div>" for number, words in shown)
    return f"<div class='cards'>{cards}</div>"


def _headlines(case: dict[str, Any], cells: dict[str, Any]) -> Iterator[tuple[str, str]]:
    ours, eager = cells.get("fusedkd"), cells.get("eager torch")
    name = case["case"]["divergence"]
    if ours and ours["seconds"]:
        yield duration(median(ours["seconds"])), f"loss head, {name}, N={case['case']['shape']['rows']:,}"
        if ratio := over_floor(case, ours):
            yield f"{ratio:.2f} ×", "the four bare matrix products"
        if eager and eager["seconds"]:
            yield f"{median(eager['seconds']) / median(ours['seconds']):.2f} ×", "as fast as eager torch"
    if ours and ours["extra_bytes"] and eager and eager["extra_bytes"]:
        held = size(eager["extra_bytes"])
        yield size(ours["extra_bytes"]), f"held above inputs and gradients; eager torch holds {held}"


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode()
    image = f"<img alt='{escape(plot.title)}' src='data:image/png;base64,{data}'>"
    return f"<figure><h3>{escape(plot.title)}</h3>{image}<figcaption>{escape(plot.words)}</figcaption></figure>"


def _goals(result: Result) -> Iterator[Table]:
    gpu = is_gpu(result)
    if not gpu:
        yield targets.table("On this CPU", targets.CPU, result)
    yield targets.table("On a GPU: N = 8192, bfloat16", targets.GPU, result if gpu else None)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(_row(table, row) for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    about = f"<p class='about'>{escape(table.about)}</p>" if table.about else ""
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    below = f"<ul class='soft'>{notes}</ul>" if notes else ""
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='table'>{title}{about}{grid}{below}</div>"


def _row(table: Table, row: list[str]) -> str:
    ours = " class='ours'" if any(text.startswith("fusedkd") for text in row) else ""
    pairs = zip(table.columns, row, strict=True)
    return f"<tr{ours}>" + "".join(f"<td>{_text(column, text)}</td>" for column, text in pairs) + "</tr>"


def _text(column: str, text: str) -> str:
    """A cell; a share of the roofline with a bar as long, what is missing in another colour."""
    if column == "of roofline" and text.endswith(" %"):
        return f"<span class='bar' style='width:{float(text[:-2]) * 0.7:.0f}px'></span>{escape(text)}"
    if text in ("not measured", "failed", "wrong"):
        return f"<span class='missing'>{escape(text)}</span>"
    return escape(text)
