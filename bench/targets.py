"""What the library set out to reach, and how far the committed results are from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import shapes
from .results import cases, distribution, mark, median, over_floor
from .tables import Table, duration, size

Result = dict[str, Any]
ONE_SWEEP, TWO_SWEEPS = ("fkl", "rkl", "drkl", "ab"), ("jsd",)
UNKNOWN = ("not measured", False)


class Found(NamedTuple):
    """What a result file has for a goal: the case, the cell of the implementation, and everything beside them."""

    result: Result
    case: dict[str, Any]
    cell: dict[str, Any]

    def beside(self, name: str) -> dict[str, Any] | None:
        """The cell of another implementation in the same rounds, if it was timed."""
        return next((x for x in self.case["cells"] if x["implementation"] == name and x["seconds"]), None)


Measured = Callable[[Found], tuple[str, bool]]  # what was measured, in words, and whether that is enough


class Target(NamedTuple):
    """A goal in words, and the cells that it is about."""

    work: str
    goal: str
    section: str
    shape: shapes.Shape
    divergences: tuple[str, ...]
    measured: Measured
    implementation: str = "fusedkd"


def _within(seconds: float, most_bytes: float | None = None) -> Measured:
    def measured(found: Found) -> tuple[str, bool]:
        took, held = median(found.cell["seconds"]), found.cell["extra_bytes"]
        if most_bytes is None:
            return duration(took), took <= seconds
        text = f"{duration(took)}, {'memory not measured' if held is None else size(held)}"
        return text, took <= seconds and held is not None and held <= most_bytes

    return measured


def _over_floor(most: float) -> Measured:
    def measured(found: Found) -> tuple[str, bool]:
        ratio = over_floor(found.case, found.cell)
        if ratio is None:
            return UNKNOWN
        rows = _row_work(found)
        return f"{ratio:.2f} ×" + ("" if rows is None else f" (rows alone {rows:.2f} ×)"), ratio <= most

    return measured


def _row_work(found: Found) -> float | None:
    """The time of the same rows as logits, in units of the head path's floor: what is not matrix products."""
    here = found.case["case"]
    for case in cases(found.result, "rows"):
        there = case["case"]
        same = all(there["shape"][key] == here["shape"][key] for key in ("rows", "vocab"))
        same = same and distribution(case) == distribution(found.case)
        if same and (there["dtype"], there["divergence"]) == (here["dtype"], here["divergence"]):
            cell = Found(found.result, case, {}).beside(found.cell["implementation"])
            return None if cell is None else median(cell["seconds"]) / median(found.case["floor"]["seconds"])
    return None


def _streaming(found: Found) -> tuple[str, bool]:
    chunked, held = found.beside("fusedkd"), found.cell["extra_bytes"]
    if chunked is None or held is None:
        return UNKNOWN
    ratio = median(found.cell["seconds"]) / median(chunked["seconds"])
    return f"{size(held)}, {ratio:.2f} × the chunked time", held <= 0.35e9 and ratio <= 1.7


def _beside_eager(found: Found) -> tuple[str, bool]:
    eager = found.beside("eager torch")
    if eager is None or not eager["extra_bytes"] or found.cell["extra_bytes"] is None:
        return UNKNOWN
    time = median(found.cell["seconds"]) / median(eager["seconds"])
    memory = found.cell["extra_bytes"] / eager["extra_bytes"]
    return f"{time:.2f}, {memory:.2f}", time <= 1 and memory <= 0.2


SWEEP, HEADS = "logits in, V=151,936", "heads, V={:,}, D={} / {}"
GPU = (
    Target(f"{SWEEP}, {' '.join(ONE_SWEEP)}", "≤ 2.3 ms", "rows", shapes.QWEN3, ONE_SWEEP, _within(2.3e-3)),
    Target(f"{SWEEP}, jsd", "≤ 3.2 ms", "rows", shapes.QWEN3, TWO_SWEEPS, _within(3.2e-3)),
    *(
        Target(HEADS.format(shape.vocab, shape.dim, shape.teacher_dim), goal, "heads", shape, names, measured)
        for shape, goal, names, measured in (
            (shapes.QWEN3, "≤ 1.12 × four bare products", (*ONE_SWEEP, *TWO_SWEEPS), _over_floor(1.12)),
            (shapes.LLAMA3, "≤ 34 ms, ≤ 3 GB", TWO_SWEEPS, _within(34e-3, 3e9)),
            (shapes.LLAMA3_WIDE, "≤ 51 ms, ≤ 4 GB", TWO_SWEEPS, _within(51e-3, 4e9)),
        )
    ),
    Target(
        "heads, streaming",
        "≤ 350 MB, ≤ 1.7 × the chunked time",
        "heads",
        shapes.QWEN3,
        ("fkl",),
        _streaming,
        "fusedkd streaming",
    ),
)
CPU = (
    Target("heads", "≤ 1.4 × four bare products", "heads", shapes.CPU, ONE_SWEEP, _over_floor(1.4)),
    Target(
        'heads, backend="compiled"',
        "≤ 1.4 × four bare products",
        "heads",
        shapes.CPU,
        (*ONE_SWEEP, *TWO_SWEEPS),
        _over_floor(1.4),
        "fusedkd compiled",
    ),
    Target("heads, of eager torch's time and memory", "≤ 1, ≤ 0.2", "heads", shapes.CPU, ONE_SWEEP, _beside_eager),
)


def table(title: str, targets: tuple[Target, ...], result: Result | None) -> Table:
    """Return the goals beside what a result file has of them; "not measured" where it has nothing."""
    rows = []
    for target in targets:
        found = [] if result is None else list(_measured(target, result))
        texts = "; ".join(f"{name} {text}" for name, text, _ in found) or UNKNOWN[0]
        reached = "" if not found else "yes" if all(enough for *_, enough in found) else "no"
        rows.append([target.work, target.goal, texts, reached])
    return Table(title, "", ("work", "goal", "measured", "reached"), rows, [])


def _measured(target: Target, result: Result) -> Iterator[tuple[str, str, bool]]:
    """(divergence, what was measured, whether that is enough) for every case that the target is about."""
    for case in cases(result, target.section):
        facts, shape = case["case"], case["case"]["shape"]
        if (shape["name"], shape["rows"]) != (target.shape.name, target.shape.rows):
            continue
        cell = Found(result, case, {}).beside(target.implementation)
        if cell and facts["divergence"] in target.divergences:
            yield facts["divergence"] + mark(case), *target.measured(Found(result, case, cell))
