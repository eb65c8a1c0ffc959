"""The measured parts of the README and of the documentation, written from the committed result files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import instructions, targets
from .results import cases, committed, is_gpu, machine, mark, median
from .rivals import KLS_AND_JSD
from .tables import Table, about, duration, floors, grouped, markdown, size, where

BEGIN = "<!-- measured: made by `python -m fusedkd bench --out bench/results --readme README.md` -->"
END = "<!-- /measured -->"
GOALS = "goals.md"  # beside the result files; docs/measured.md includes it
WORDS = (
    "One training step of the loss head (`make bench`; `make bench-rivals` with all rivals): hidden states in, loss\n"
    "and the gradients of hidden states and weight out. Time; peak memory above inputs and gradients; the largest\n"
    "relative error, of the loss or of a gradient, against float64."
)
MORE = (
    '"eager torch" is the loss as one writes it. Everything is checked against float64 before it is timed;\n'
    "*imprecise* means wrong by more than the benchmark allows. On a CPU rivals run their own torch code in place of\n"
    "their kernels. Spreads, roofline, rows with one likely token, other sections and goals:\n"
    "[docs/measured.md](docs/measured.md)."
)
NO_GPU = "On a GPU: not measured."
GOALS_WORDS = "Goals on a CPU, in units of the products or of eager torch:"
GPU_WORDS = "On a GPU (`make gpu`; the goals are for an H200, N = 8192, bfloat16, loss and gradients):"


def block(folder: Path) -> str:
    """Return the README's measured part for the result files in a folder."""
    results = committed(folder)
    found = [markdown(table).strip() for result in results if "heads" in result["sections"] for table in _heads(result)]
    unmeasured = [] if any(map(is_gpu, results)) else [NO_GPU]
    return "\n\n".join([BEGIN, *([WORDS, *found, MORE] if found else []), *unmeasured, END])


def _heads(result: dict[str, Any]) -> Iterator[Table]:
    """Two tables for each shape, of what the others have and of the rest; peaked rows are left to the documentation."""
    members = [case for case in cases(result, "heads") if not mark(case)]
    for (sizes,), group in grouped(members, lambda case: (about(case),)):
        line = f"{sizes}. {floors(group)}. {where(result['sections']['heads'])}."
        for common in (True, False):
            part = [case for case in group if (case["case"]["divergence"] in KLS_AND_JSD) == common]
            if part:
                yield Table("", line, ("", *(case["case"]["divergence"] for case in part)), _lines(part), _absent(part))
                line = ""


def _lines(part: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each implementation that was measured, a column for each case: narrow enough for a phone."""
    found: dict[str, dict[str, str]] = {}
    for case in part:
        for cell in filter(lambda cell: cell["status"] != "absent", case["cells"]):
            found.setdefault(cell["implementation"], {})[case["case"]["divergence"]] = _text(cell)
    return [[name, *(texts.get(case["case"]["divergence"], "") for case in part)] for name, texts in found.items()]


def _text(cell: dict[str, Any]) -> str:
    """What is to be said of an implementation in a case."""
    if not cell["seconds"]:
        return f"*{cell['status']}*"
    memory = "memory not measured" if cell["extra_bytes"] is None else size(cell["extra_bytes"])
    error = "not finite" if None in cell["errors"].values() else f"{max(cell['errors'].values()):.0e}"
    status = "" if cell["status"] == "measured" else f", *{cell['status']}*"
    return f"{duration(median(cell['seconds']))}, {memory}, {error}{status}"


def _absent(part: list[dict[str, Any]]) -> list[str]:
    """The implementations that could not run, by what they lack."""
    found: dict[str, list[str]] = {}
    for case in part:
        for cell in filter(lambda cell: cell["status"] == "absent", case["cells"]):
            names = found.setdefault(cell["reason"], [])
            names += [cell["implementation"]] * (cell["implementation"] not in names)
    return [f"{', '.join(names)}: {why}" for why, names in found.items()]


def goals(folder: Path) -> str:
    """Return what is asked of the library, beside what was measured, and the instruction counts."""
    results = committed(folder)
    parts = ["# Goals"]
    for result in results:
        if not is_gpu(result) and "heads" in result["sections"]:
            parts += [GOALS_WORDS, _goals(targets.CPU, result)]
    parts.append(GPU_WORDS)
    for result in [result for result in results if is_gpu(result)] or [None]:
        parts += [f"{machine(result)['name']}:"] if result else []
        parts.append(_goals(targets.GPU, result))
    if counts := instructions.committed(folder):
        parts.append(markdown(counts).strip())
    return "\n\n".join(parts) + "\n"


def _goals(wanted: tuple[targets.Target, ...], result: dict[str, Any] | None) -> str:
    return markdown(targets.table("", wanted, result)).strip()


def write(readme: Path, folder: Path) -> None:
    """Replace the measured part of a README, and write the goals beside the result files.

    Raises:
        argparse.ArgumentError: there is no such file, or it has no such part.
    """
    if not readme.is_file():
        raise argparse.ArgumentError(None, f"--readme: no file {readme}")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise argparse.ArgumentError(None, f"--readme: {readme} needs the lines {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + block(folder) + after, encoding="utf-8")
    (folder / GOALS).write_text(goals(folder), encoding="utf-8")
