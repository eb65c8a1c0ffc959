"""Results as tables of text, which Markdown and HTML both take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .results import cases, distribution, is_gpu, machine, mark, median, over_floor, spread

Result = dict[str, Any]

COLUMNS = (
    "divergence",
    "implementation",
    "time",
    "over floor",
    "of roofline",
    "extra memory",
    "errors against float64",
)


class Table(NamedTuple):
    """A title, a line about what was measured, the columns and rows, and notes below."""

    title: str
    about: str
    columns: Sequence[str]
    rows: list[list[str]]
    notes: list[str]


def duration(seconds: float, spread: float | None = None) -> str:
    """Return seconds, with their spread if there is one, in a unit that leaves three digits."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    digits = max(0, 2 - math.floor(math.log10(max(seconds * scale, 1))))
    numbers = (seconds,) if spread is None else (seconds, spread)
    return " ± ".join(f"{x * scale:.{digits}f}" for x in numbers) + f" {unit}"


def size(count: float) -> str:
    """Return bytes in a unit that leaves three digits."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{max(count, 0) / 1e6:.0f} MB"


def with_spread(seconds: Sequence[float]) -> str:
    """Return the median and half the distance between the quartiles."""
    return duration(median(seconds), spread(seconds)) if seconds else "not measured"


def error_text(errors: dict[str, float | None]) -> str:
    """Return the errors by name."""
    return ", ".join(f"{name} {'not finite' if x is None else f'{x:.0e}'}" for name, x in errors.items())


def about(case: dict[str, Any]) -> str:
    """Return a case's sizes as a line."""
    shape = case["case"]["shape"]
    widths = "" if case["case"]["path"] == "rows" else f", D={shape['dim']:,} / {shape['teacher_dim']:,}"
    softcap = f", softcap {shape['softcap']:g}" if shape["softcap"] else ""
    sizes = f"N={shape['rows']:,}, V={shape['vocab']:,}{widths}{softcap}"
    return f"{sizes}, {case['case']['dtype']}{mark(case)}{listed(case)}"


def listed(case: dict[str, Any]) -> str:
    """Return what is added where the teacher is known by some tokens; files from before there were such do not say."""
    k = case["case"].get("listed")
    return f", K={k} {case['case']['tail']}" if k else ""


def where(section: dict[str, Any]) -> str:
    """Return the machine, the versions and the day of a section as a line."""
    found = section["machine"]
    how = f"{found['threads']} threads" if found["device"] == "cpu" else f"driver {found['driver']}"
    beside = [f"{name} {version}" for name, version in found["rivals"].items() if version]
    parts = [found["name"], how, f"torch {found['versions']['torch']}", *beside, found["date"][:10], commit(found)]
    return ", ".join(parts)


def commit(found: dict[str, Any]) -> str:
    """Return a machine's commit in short, and whether there were changes that are not in it."""
    digest, *changes = found["commit"].split("+")
    return "+".join([f"commit {digest[:10]}", *changes])


def tables(result: Result) -> Iterator[Table]:
    """Yield every table of a result file."""
    for section, shown in SECTIONS.items():
        if section in result["sections"]:
            yield from shown(result)


def _ceilings(result: Result) -> Iterator[Table]:
    section = result["sections"]["ceilings"]
    rows = []
    for phase in section["ceilings"]:
        rate = phase["amount"] / median(phase["seconds"]) if phase["seconds"] else None
        unit, scale = ("GB/s", 1e9) if phase["unit"] == "B" else ("TFLOP/s", 1e12)
        shown = phase["reason"] or "not measured" if rate is None else f"{rate / scale:.3g} {unit}"
        rows.append([phase["what"], with_spread(phase["seconds"]), shown])
    yield Table("Ceilings", where(section), ("work", "time", "rate"), rows, [])


def grouped(
    found: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Return cases by what they have in common, in the order in which it first occurs."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in found:
        groups.setdefault(key(case), []).append(case)
    return groups.items()


def kind(case: dict[str, Any]) -> tuple[str, ...]:
    """Return the path, the dtype and the divergence of a case, and the kind of its rows."""
    return (*(case["case"][key] for key in ("path", "dtype", "divergence")), distribution(case))


def _like(case: dict[str, Any]) -> tuple[str, ...]:
    return case["case"]["shape"]["name"] + mark(case), about(case)


def _like_beside_all(case: dict[str, Any]) -> tuple[str, ...]:
    """As `_like`, in a section with both paths, and with teachers known by some tokens or by all."""
    name, sizes = _like(case)
    given = "logits in" if case["case"]["path"] == "rows" else "hidden states in"
    return f"{name}{listed(case) or ', all tokens'}, {given}", sizes


def _compared(
    section: str, title: str, like: Callable[[dict[str, Any]], tuple[str, ...]] = _like
) -> Callable[[Result], Iterator[Table]]:
    def shown(result: Result) -> Iterator[Table]:
        found = result["sections"][section]
        for (name, sizes), members in grouped(cases(result, section), like):
            rows = [_row(case, cell) for case in members for cell in case["cells"] if cell["status"] != "absent"]
            line = f"{sizes}. {floors(members)}. {where(found)}."
            yield Table(f"{title}: {name}", line, COLUMNS, rows, notes(members))
        if skipped := [case for case in found["cases"] if not case["cells"]]:
            rows = [[case["case"]["divergence"], about(case), case["reason"]] for case in skipped]
            yield Table(f"{title}: not measured", "", ("divergence", "case", "reason"), rows, [])

    return shown


def floors(members: list[dict[str, Any]]) -> str:
    """Return what the floor of some cases is and how long it took."""
    samples = [x for case in members if case["floor"] for x in case["floor"]["seconds"]]
    what = next((case["floor"]["what"] for case in members if case["floor"]), "")
    return f"Floor, {what}: {with_spread(samples)}" if what else "No floor"


def notes(members: list[dict[str, Any]]) -> list[str]:
    """Return why implementations are not in some cases, or in part only."""
    cells = (cell for case in members for cell in case["cells"] if cell["reason"])
    return list(dict.fromkeys(f"{cell['implementation']}: {cell['reason']}" for cell in cells))


def _row(case: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    ratio = over_floor(case, cell)
    memory = "not measured" if cell["extra_bytes"] is None else size(cell["extra_bytes"])
    timed = bool(cell["seconds"])
    status = "" if cell["status"] == "measured" else f", {cell['status']}"
    return [
        case["case"]["divergence"],
        cell["implementation"],
        with_spread(cell["seconds"]) + status if timed else cell["status"],
        "" if ratio is None else f"{ratio:.2f}",
        "" if ratio is None else f"{100 / ratio:.0f} %",
        memory if timed else "",
        error_text(cell["errors"]),
    ]


def _growing(result: Result) -> Iterator[Table]:
    section = result["sections"]["memory"]
    found = cases(result, "memory")
    rows = [
        [f"{case['case']['shape']['rows']:,}", f"{case['case']['shape']['vocab']:,}", *_row(case, cell)[1:6]]
        for case in found
        for cell in case["cells"]
        if cell["status"] != "absent"
    ]
    title = "Hidden states in, while N and V grow"
    yield Table(title, f"{where(section)}.", ("N", "V", *COLUMNS[1:6]), rows, notes(found))


def _accuracy(result: Result) -> Iterator[Table]:
    section = result["sections"]["accuracy"]
    for (path, dtype, divergence, _), members in grouped(cases(result, "accuracy"), kind):
        names = list(dict.fromkeys(x["implementation"] for case in members for x in case["cells"] if x["errors"]))
        rows = []
        for case in members:
            found = {cell["implementation"]: cell["errors"] for cell in case["cells"]}
            rows.append([f"{case['case']['kl']:.1e}", *(error_text(found.get(name, {})) or "-" for name in names)])
        given = "logits in" if path == "rows" else "hidden states in"
        title = f"Accuracy: {divergence}, {given}, {dtype}{mark(members[0])}"
        yield Table(title, f"{about(members[0])}. {where(section)}.", ("KL", *names), rows, notes(members))


SECTIONS: dict[str, Callable[[Result], Iterator[Table]]] = {
    "ceilings": _ceilings,
    "rows": _compared("rows", "Logits in"),
    "heads": _compared("heads", "Hidden states in"),
    "topk": _compared("topk", "A teacher's likeliest tokens", _like_beside_all),
    "memory": _growing,
    "accuracy": _accuracy,
    "step": _compared("step", "A whole training step"),
}


def markdown(table: Table) -> str:
    """Return a table as Markdown, without its title."""
    lines = [table.about, ""] if table.about else []
    lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(re.sub(r"\|", "\\\\|", text) for text in row) + " |" for row in table.rows]
    lines += ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def page(result: Result) -> str:
    """Return all tables of a result file as one Markdown page."""
    kind = "GPU" if is_gpu(result) else "CPU"
    parts = [f"# Measured on a {kind}: {machine(result)['name']}\n", *_sections(tables(result))]
    return "\n".join(parts)


def _sections(found: Iterable[Table]) -> Iterator[str]:
    for table in found:
        yield f"## {table.title}\n\n{markdown(table)}"
