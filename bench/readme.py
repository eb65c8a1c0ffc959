"""The measured part of the README, written from the committed result files so that it cannot drift."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import instructions, targets
from .results import committed, is_gpu, machine
from .tables import SECTIONS, markdown

BEGIN = "<!-- measured: made by `python -m fusedkd bench --out bench/results --readme README.md` -->"
END = "<!-- /measured -->"
CPU_WORDS = (
    "One training step of the loss head, `make bench` on a CPU: hidden states in, loss and the gradients of hidden\n"
    "states and weight out. Runs are interleaved, times are medians ± half the distance between the quartiles; memory\n"
    "is the peak above inputs and gradients; everything is checked against float64 before it is timed, errors are\n"
    'relative L2. "eager torch" is the loss as one writes it. The floor is of torch.mm; on a CPU the products of\n'
    "fusedkd that read a weight are those of oneDNN, which the ceilings time beside it. Samples, plots and the other\n"
    "sections: [bench/results](bench/results)."
)
GOALS_WORDS = "Goals, in units of the products or of eager torch:"
GPU_WORDS = "On a GPU (`make gpu`; the goals are for an H200, N = 8192, bfloat16, loss and gradients):"


def block(folder: Path) -> str:
    """Return the measured part for the result files in a folder."""
    results = committed(folder)
    parts = [BEGIN]
    for result in results:
        if not is_gpu(result) and "heads" in result["sections"]:
            parts += [CPU_WORDS, *(markdown(found).strip() for found in SECTIONS["heads"](result))]
            parts += [GOALS_WORDS, _goals(targets.CPU, result)]
    parts.append(GPU_WORDS)
    for result in [result for result in results if is_gpu(result)] or [None]:
        parts += [f"{machine(result)['name']}:"] if result else []
        parts.append(_goals(targets.GPU, result))
    if counts := instructions.committed(folder):
        parts.append(markdown(counts).strip())
    return "\n\n".join([*parts, END])


def _goals(goals: tuple[targets.Target, ...], result: dict[str, Any] | None) -> str:
    return markdown(targets.table("", goals, result)).strip()


def write(readme: Path, folder: Path) -> None:
    """Replace the measured part of a README.

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
