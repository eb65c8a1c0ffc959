"""What the ranks of a sharded vocabulary tell each other (schedules/sharded.py), and how long that takes on paper.

    python -m fusedkd bench sharding --out bench/results

Floats per token are counted: the row work of one rank runs on a few tokens, and what it would gather is added up. Times
are modelled, not measured: bytes at a stated bandwidth beside the matrix products of schedules/model.py. Without --out
the tables are printed; docs/sharding.md includes the committed page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .. import backends, divergences
from ..cli.commands import make_folder
from ..divergence import divergence
from ..kernels.device.args import SAVED
from ..kernels.device.rows import Logits, Problem
from ..schedules import planner, topk
from ..schedules.partial_rows import Part
from ..schedules.ranks import Ranks
from ..schedules.sharded import ShardedRows
from . import shapes
from .model import MODELLED
from .sections import MAIN
from .tables import Table, duration, markdown

PAGE = "sharding.md"
PART = "H200"
# NVLink 4: 900 GB/s for both directions of an H100 or H200 (data sheets), of which a collective sends in one.
BANDWIDTH = 450e9
SIZES = (2, 4, 8)
TOKENS = 128 * 1024
SHAPE = shapes.QWEN3_WIDE.resized(rows=TOKENS)
ROWS, COLUMNS, LISTED = 64, 40, 8  # of the calls that are counted


class Told(NamedTuple):
    """All-gathers of one inner chunk, each with the float32 numbers that a rank has for a token."""

    value: list[int]
    gradient: list[int]

    @property
    def floats(self) -> int:
        """Of both."""
        return sum(self.value) + sum(self.gradient)


class _Counted(Ranks):
    """A rank that is alone and notes what it would have told others."""

    def __new__(cls) -> _Counted:
        """Of columns from 0 on."""
        ranks = super().__new__(cls, SimpleNamespace(rank=lambda: 0, size=lambda: 1), 0, COLUMNS)
        ranks.told = []
        return ranks

    told: list[int]

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Its own."""
        self.told.append(x.shape[-1] * x.element_size() // 4)
        return x[None]


def told(name: str = "fkl", **options: Any) -> Told:
    """Return what a chunk of tokens takes with a divergence; options: those of a Problem."""
    form = divergence(name).form
    weights = form.target, form.nontarget
    problem = Problem(form.definition, form.decoupled, form.theta, weights, COLUMNS, mix=form.mix, **options)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    ranks, labels = _Counted(), torch.arange(ROWS) % COLUMNS
    rows = ShardedRows(backends.get("torch"), ranks)
    loss, saved = student.new_empty(ROWS), student.new_empty((ROWS, SAVED))
    sides = Logits(student[None]), Logits(teacher[None])
    rows.value(problem, *sides, labels, loss, saved, None)
    value = list(ranks.told)
    rows.gradient(problem, *sides, labels, saved, None, torch.empty_like(student))
    return Told(value, ranks.told[len(value) :])


def told_of_floor() -> list[int]:
    """Return what support="floor" adds."""
    form, ranks = divergence("fkl").form, _Counted()
    problem = Problem(form.definition, form.decoupled, form.theta, (1.0, 1.0), COLUMNS)
    x = torch.randn(ROWS, COLUMNS)
    ShardedRows(backends.get("torch"), ranks).floor_rows(problem, Logits(x[None]), None, x.new_empty(ROWS), 50.0)
    return ranks.told


def told_beside_topk(k: int, ce_weight: float = 0.0) -> list[int]:
    """Return what a chunk of tokens takes beside a TopK."""
    form, ranks, x = divergence("fkl").form, _Counted(), torch.randn(ROWS, COLUMNS)
    problem = Problem(form.definition, form.decoupled, form.theta, (1.0, 1.0), COLUMNS, ce_weight=ce_weight)
    listed, labels = x.log_softmax(-1).topk(k), torch.arange(ROWS) % COLUMNS
    teacher = topk.outcomes_of("bucket", listed.indices, listed.values, labels, False, COLUMNS, torch.float32)
    every = slice(0, ROWS), slice(0, COLUMNS)
    parts = topk.TopKParts(problem, backends.get("torch"), teacher.kind, teacher.logits(*every, None), labels, ranks)
    saved = x.new_empty((ROWS, topk.saved_width(teacher.kind, teacher.tensors)))
    parts.value([Part(0, problem, Logits(x[None]), Logits(x[None]))], saved, x.new_empty(ROWS), None)
    return ranks.told


def page() -> str:
    """Return all tables as Markdown."""
    return "\n".join(f"### {table.title}\n\n{markdown(table)}" for table in tables())


def tables() -> Iterator[Table]:
    """Yield what is told, what else may be, and the times that this takes."""
    yield _floats()
    yield _extras()
    yield _times()


def _floats() -> Table:
    rows = []
    for name in divergences():
        found = told(name)
        each = ", ".join(map(str, found.value)), ", ".join(map(str, found.gradient))
        received = (f"{4 * (size - 1) * found.floats:,}" for size in SIZES)
        rows.append([name, *each, *received])
    about = (
        "float32 numbers that a rank has for a token in each all-gather of an inner chunk, in turn, and the bytes\n"
        "that it receives for a token in all of them, by the number of ranks. Counted, at each divergence's defaults."
    )
    columns = ("divergence", "value", "gradient", *(f"bytes at tp {size}" for size in SIZES))
    return Table("Floats per token", about, columns, rows, [])


def _extras() -> Table:
    plain = told("rkl")
    argmax = told("rkl", argmax=True)
    assert argmax.gradient == plain.gradient
    more, ce = told_beside_topk(LISTED), told_beside_topk(LISTED, 0.5)
    assert len(more) == len(ce) == 1
    rows = [
        ['target_token="teacher_argmax"', "one all-gather", f"{argmax.floats - plain.floats}"],
        ['support="floor"', "one all-gather", f"{sum(told_of_floor())}"],
        ["a `TopK` of K tokens", "one all-gather for the value, none for the gradient", f"K + {more[0] - LISTED}"],
        ["a `TopK`, with `ce_weight`", "the same", f"K + {ce[0] - LISTED}"],
    ]
    about = "What else is told in an inner chunk; a `TopK` takes its own in place of all others. Counted."
    return Table("What costs more", about, ("call", "collectives", "floats per token"), rows, [])


class Time(NamedTuple):
    """A step of one rank: seconds, and bytes that the rank sends and as many that it receives."""

    plan: planner.Plan
    collectives: int
    gathered: float  # bytes
    reduced: float

    @property
    def wire(self) -> float:
        """Seconds of all bytes."""
        return (self.gathered + self.reduced) / BANDWIDTH

    @property
    def products(self) -> float:
        """Seconds of the matrix products."""
        return self.plan.products_ms / 1e3


def time_of(name: str, size: int) -> Time:
    """Return what a step takes of a rank, the hidden gradient summed."""
    columns = -(-SHAPE.vocab // size)
    plan = planner.plan(SHAPE.rows, columns, SHAPE.dim, SHAPE.teacher_dim, divergence=name, device=PART, ranks=size)
    found = told(name)
    chunks = -(-SHAPE.rows // plan.rows_per_product)
    gathered = 4 * (size - 1) * found.floats * SHAPE.rows
    reduced = 2 * (size - 1) / size * 4 * SHAPE.rows * SHAPE.dim  # as a ring adds float32 numbers up
    return Time(plan, chunks * (len(found.value) + len(found.gradient)) + 1, gathered, reduced)


def _times() -> Table:
    rows: dict[tuple[str, ...], list[str]] = {}  # divergences by what they have in common
    for size in SIZES:
        for name in MAIN:
            time = time_of(name, size)
            cells = (
                f"{time.collectives}",
                f"{time.gathered / 1e6:,.1f} MB",
                duration(time.gathered / BANDWIDTH),
                f"{time.reduced / 1e6:,.0f} MB",
                duration(time.reduced / BANDWIDTH),
                duration(time.products),
                f"{100 * time.wire / time.products:.1f} %",
            )
            rows.setdefault((f"{size}", *cells), []).append(name)
    about = (
        f"{MODELLED}: a step of {TOKENS:,} tokens on one of tp {PART}s, V={SHAPE.vocab:,}, D={SHAPE.dim:,} on\n"
        'both sides, bfloat16, hidden_grad="reduce". Bytes that a rank receives, at '
        f"{BANDWIDTH / 1e9:.0f} GB/s, which is\n"
        "one direction of NVLink 4 by its data sheet. The products are the four of the rank's columns. Latency, of\n"
        "which each collective has some, and the row kernels are not in it."
    )
    columns = (
        "tp", "divergences", "collectives", "gathered", "time", "hidden gradient", "time", "products",
        "both times / products",
    )  # fmt: skip
    found = [[cells[0], ", ".join(names), *cells[1:]] for cells, names in rows.items()]
    return Table(f"{MODELLED}: a step", about, columns, found, [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of bench sharding."""
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"write {PAGE} in DIR")


def run(args: argparse.Namespace) -> int:
    """Print the tables, or write them."""
    if args.out:
        (make_folder("--out", args.out) / PAGE).write_text(page(), encoding="utf-8")
    else:
        print(page())
    return 0
