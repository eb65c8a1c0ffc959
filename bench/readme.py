"""The measured parts of the README and of the documentation, written from the committed result files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import instructions, targets
from .results import cases, committed, is_gpu, machine, mark, median
from .tables import Table, about, duration, floors, grouped, markdown, size, where

BEGIN = "<!-- measured: made by `python -m fusedkd bench --out bench/results --readme README.md` -->"
END = "<!-- /measured -->"
GOALS = "goals.md"  # beside the result files; docs/measured.md includes it
WORDS = (
    "One training step of the loss head, `make bench`: hidden states in, loss and the gradients of hidden states and\n"
    "weight out; time, and peak memory above inputs and gradients."
)
MORE = (
    '"eager torch" is the loss as one writes it. Everything is checked against float64 before it is timed;\n'
    "*imprecise* means wrong by more than the benchmark allows. Spreads, roofline, other sections and goals:\n"
    "[docs/measured.md](docs/measured.md)."
)
PEAKED = "In peaked rows a token has most of the probability, as with trained models; in the others none stands out."
NO_GPU = "On a GPU: not measured."
GOALS_WORDS = "Goals on a CPU, in units of the products or of eager torch:"
GPU_WORDS = "On a GPU (`make gpu`; the goals are for an H200, N = 8192, bfloat16, loss and gradients):"


def block(folder: Path) -> str:
    """Return the README's measured part for the result files in a folder."""
    results = committed(folder)
    found = [markdown(table).strip() for result in results if "heads" in result["sections"] for table in _heads(result)]
    peaked = [PEAKED] if any(mark(case) for result in results for case in cases(result, "heads")) else []
    unmeasured = [] if any(map(is_gpu, results)) else [NO_GPU]
    return "\n\n".join([BEGIN, *([WORDS, *found, *peaked, MORE] if found else []), *unmeasured, END])


def _heads(result: dict[str, Any]) -> list[Table]:
    """One table for each shape: a line per divergence, a column per implementation that was measured."""
    made = []
    members = [case for case in cases(result, "heads") if case["cells"]]
    for (sizes,), group in grouped(members, lambda case: (about(case).removesuffix(mark(case)),)):
        measured = [(case, cell) for case in group for cell in case["cells"] if cell["seconds"]]
        columns = list(dict.fromkeys(cell["implementation"] for _, cell in measured))
        rows: dict[str, dict[str, str]] = {}
        for case, cell in measured:
            memory = "memory not measured" if cell["extra_bytes"] is None else size(cell["extra_bytes"])
            status = "" if cell["status"] == "measured" else f", *{cell['status']}*"
            text = f"{duration(median(cell['seconds']))}, {memory}{status}"
            rows.setdefault(case["case"]["divergence"] + mark(case), {})[cell["implementation"]] = text
        table = [[name, *(found.get(column, "") for column in columns)] for name, found in rows.items()]
        line = f"{sizes}. {floors(group)}. {where(result['sections']['heads'])}."
        made.append(Table("", line, ("divergence", *columns), table, []))
    return made


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
