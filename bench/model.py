"""What the model of the time says (schedules/model.py): modelled, not measured, for parts that are not here.

    python -m fusedkd bench model --out bench/results

makes the planner's table of counts from those of the compiled kernels (instructions.py), and a page of both, in
seconds; without --out the tables are printed. docs/model.md includes them, and says what they leave out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import divergences
from ..cli.commands import make_folder
from ..divergence import divergence
from ..kernels.maths.definition import Form
from ..schedules import ceilings, model, planner
from . import shapes, targets
from .sections import MAIN
from .tables import Table, markdown, size

COUNTED, PAGE = "instructions.json", "model.md"
MODELLED = "Modelled, not measured"
RATIO = 1.12  # the goal of the heads, in four bare products
PARTS = tuple(ceilings.TABLE)
RESULTS = Path(__file__).resolve().parent / "results"  # of a source checkout
HEADS = (shapes.QWEN3, shapes.QWEN3_WIDE, shapes.LLAMA3, shapes.LLAMA3_WIDE)
INNER, OUTER = (64, 128, 256, 512, 1024, 2048), (512, 1024, 2048, 4096, 8192)
WRITTEN_BY = "python -m fusedkd bench model --out bench/results"
Counts = dict[str, dict[str, dict[str, list[float]]]]


def counts(result: dict[str, Any]) -> Counts:
    """Return what each compiled kernel takes for a pair of logits in the inner tiles of all its sweeps.

    By architecture, variant, and kernel with the bytes of a logit and of a gradient.
    """
    found: Counts = {}
    for line in result["kernels"]:
        loops = zip(*(line[field] for field in model.Counts._fields), strict=True)
        runs = [[times * count for count in loop] for times, loop in zip(line["runs"], loops, strict=True)]
        read, written = (4 if line[key] == "float32" else 2 for key in ("dtype", "gradient_dtype"))
        kernels = found.setdefault(line["architecture"], {}).setdefault(line["name"], {})
        kernels[f"{line['kernel']} {read} {written}"] = [round(sum(sums), 2) for sums in zip(*runs, strict=True)]
    return found


def text_of(found: Counts) -> str:
    """Return the planner's table as JSON, a line for each variant."""
    architectures = []
    for architecture, variants in found.items():
        lines = ",\n".join(f'  "{name}": {json.dumps(kernels)}' for name, kernels in variants.items())
        architectures.append(f' "{architecture}": {{\n{lines}\n }}')
    return f'{{"written_by": "{WRITTEN_BY}", "counts": {{\n' + ",\n".join(architectures) + "\n}}\n"


def write(folder: Path) -> None:
    """Write the planner's table of the counts in a folder of results, and the page beside them.

    Raises:
        argparse.ArgumentError: the folder has no counts.
    """
    result = _counted(folder)
    model.COUNTS.write_text(text_of(counts(result)), encoding="utf-8")
    model.counted.cache_clear()
    (folder / PAGE).write_text(page(result), encoding="utf-8")


def _counted(folder: Path) -> dict[str, Any]:
    file = folder / COUNTED
    if not file.is_file():
        raise argparse.ArgumentError(
            None, f"no {file}: write it by python -m fusedkd.bench.instructions --out {folder} --loops"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def page(result: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    return "\n".join(f"## {table.title}\n\n{markdown(table)}" for table in tables(result))


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the parts, the counts, and the times that they make."""
    yield _parts()
    yield _pairs()
    yield _goals()
    for shape in HEADS:
        yield _heads(shape)
    yield _every_divergence()
    yield _logits()
    yield _chunks("inner", "Rows per product", INNER)
    yield _chunks("outer", "Rows per gradient chunk", OUTER)
    for part in ("H200", "B200"):
        yield _gains(part, result)


def _parts() -> Table:
    rows = []
    for name, best in ceilings.TABLE.items():
        part = ceilings.PARTS[name]
        rows.append(
            [
                name,
                f"{part.multiprocessors}",
                f"{part.clock / 1e9:.2f} GHz",
                f"{ceilings.ISSUED}",
                f"{part.fp32_lanes}",
                f"{ceilings.SPECIAL}",
                f"{best.flops / 1e12:,.0f} of {part.flops / 1e12:,.0f} TFLOP/s",
                f"{best.bandwidth / 1e12:.2f} of {part.bandwidth / 1e12:.2f} TB/s",
            ]
        )
    about = (
        "By their data sheets, with the shares that are usually reached; sources are in `schedules/ceilings.py`.\n"
        "Instructions of threads, float32 operations and special functions are those of a multiprocessor and clock."
    )
    columns = ("part", "SMs", "clock", "issued", "float32", "special", "products reach", "memory reaches")
    return Table("The parts", about, columns, rows, [])


def _pairs() -> Table:
    rows = []
    for read, what in ((2, "bfloat16"), (4, "float32")):
        for name in divergences():
            found = [
                model.counts_of("value_and_gradient", divergence(name).form, architecture, read, 2)
                for architecture in dict.fromkeys(part.architecture for part in ceilings.PARTS.values())
            ]
            each = zip(*(x.counts for x in found), strict=True)
            rows.append([name, what, f"`{found[0].of}`", *map(_slashed, each)])
    about = (
        "What value and gradient take for a pair of logits, in the inner tiles of all sweeps, with a gradient in\n"
        "bfloat16. Counted in the machine code of sm_80 / sm_90 / sm_100; one number where all are the same."
    )
    columns = (
        "divergence",
        "logits",
        "compiled as",
        "instructions",
        "special functions",
        "float32 operations",
        "bytes",
    )
    return Table("Counts", about, columns, rows, [])


def _slashed(numbers: Sequence[float]) -> str:
    texts = [f"{x:g}" for x in numbers]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _goals() -> Table:
    rows = [
        [target.work, target.goal, "; ".join(map(_goal_text(target), target.divergences))] for target in targets.GPU
    ]
    about = f"{MODELLED}: what the model says of an H200 at the goals of the library, bfloat16, N = 8192."
    return Table(f"{MODELLED}: goals", about, ("work", "goal", "modelled, not measured"), rows, [])


def _goal_text(target: targets.Target) -> Callable[[str], str]:
    def rows(name: str) -> str:
        time = _rows_of("value_and_gradient", divergence(name).form, target.shape, ceilings.TABLE["H200"])
        return f"{name} {_ms(time.ms)} ms"

    def heads(name: str) -> str:
        found = head_time(target.shape, name, "H200")
        return f"{name} {_ms(found.plan.expected_ms)} ms, {found.ratio:.2f} ×, {size(found.plan.workspace)}"

    def streaming(name: str) -> str:
        chunked = head_time(target.shape, name, "H200").plan
        streamed = _plan(target.shape, name, "H200", "streaming")
        return f"{name} {size(streamed.workspace)}, {streamed.expected_ms / chunked.expected_ms:.2f} × the chunked time"

    return rows if target.section == "rows" else streaming if "streaming" in target.implementation else heads


class HeadTime(NamedTuple):
    """A plan of both heads in bfloat16, with float32 logits between products and rows."""

    plan: planner.Plan
    rows: model.KernelTime

    @property
    def ratio(self) -> float:
        """Its time in units of its four matrix products."""
        return self.plan.expected_ms / self.plan.products_ms

    @property
    def allowed(self) -> float:
        """Milliseconds that the rows may take at the goal."""
        return (RATIO - 1) * self.plan.products_ms


def head_time(shape: shapes.Shape, name: str, part: str) -> HeadTime:
    """Return the plan of a shape."""
    made = _plan(shape, name, part)
    (rows,) = (kernel for kernel in made.kernels if not kernel.is_product)
    return HeadTime(made, rows)


def _plan(shape: shapes.Shape, name: str, part: str, schedule: str = "auto") -> planner.Plan:
    sizes = shape.rows, shape.vocab, shape.dim, shape.teacher_dim
    return planner.plan(*sizes, divergence=name, device=part, schedule=schedule)


HEAD_COLUMNS = (
    "four products", "rows: issue", "special functions", "bytes", "limit", "sum", "sum / products",
    f"rows at {RATIO} ×, at most", "of what they take",
)  # fmt: skip


def _head_row(found: HeadTime) -> list[str]:
    return [
        _ms(found.plan.products_ms),
        *map(_ms, found.rows.limits[1:]),
        found.rows.limit,
        _ms(found.plan.expected_ms),
        f"{found.ratio:.2f}",
        _ms(found.allowed),
        f"{100 * found.allowed / found.rows.ms:.0f} %",
    ]


def _heads(shape: shapes.Shape) -> Table:
    rows = [[part, name, *_head_row(head_time(shape, name, part))] for part in PARTS for name in MAIN]
    about = (
        f"{MODELLED}: ms of loss and all gradients, N={shape.rows:,}, {_short(shape)}, bfloat16, with float32\n"
        f"logits between products and rows. The last columns: what the rows may take for {RATIO} × the products."
    )
    return Table(f"{MODELLED}: heads, {_short(shape)}", about, ("part", "divergence", *HEAD_COLUMNS), rows, [])


def _every_divergence() -> Table:
    rows = [[name, *_head_row(head_time(shapes.QWEN3, name, "H200"))] for name in divergences()]
    about = f"{MODELLED}: the same of every divergence at its defaults on an H200, {_short(shapes.QWEN3)}."
    return Table(f"{MODELLED}: every divergence", about, ("divergence", *HEAD_COLUMNS), rows, [])


def _logits() -> Table:
    shape, rows = shapes.QWEN3, []
    for part, best in ceilings.TABLE.items():
        for name in MAIN:
            for call, kernels in (("kd_value_and_grad", ["value_and_gradient"]), ("kd_loss", ["value", "gradient"])):
                times = [_rows_of(kernel, divergence(name).form, shape, best) for kernel in kernels]
                sums = [sum(limits) for limits in zip(*(time.limits[1:] for time in times), strict=True)]
                limits = ", ".join(dict.fromkeys(time.limit for time in times))
                rows.append([part, name, f"`{call}`", *map(_ms, sums), limits, _ms(sum(time.ms for time in times))])
    sizes = f"N={shape.rows:,}, V={shape.vocab:,}"
    about = f"{MODELLED}: ms of loss and gradient, {sizes}, bfloat16; `kd_loss` with its backward pass."
    columns = ("part", "divergence", "call", "issue", "special functions", "bytes", "limit", "time")
    return Table(f"{MODELLED}: logits in", about, columns, rows, [])


def _rows_of(kernel: str, form: Form, shape: shapes.Shape, best: ceilings.Ceiling) -> model.KernelTime:
    return model.time_of_rows(model.RowWork(kernel, 1, shape.rows * shape.vocab, 2, 2), form, best)


def _chunks(which: str, title: str, heights: tuple[int, ...]) -> Table:
    shape, rows = shapes.QWEN3, []
    usual = {part: head_time(shape, "fkl", part).plan for part in PARTS}
    for height in heights:
        plans = [_at_size(shape, part, which, height, plan) for part, plan in usual.items()]
        rows.append([f"{height:,}", *map(_products_text, plans), f"{plans[0].workspace / 1e9:.2f} GB"])
    taken = usual["H200"]
    about = (
        f"{MODELLED}: ms of the four products in chunks of so many tokens, {_short(shape)}; a product that is bound\n"
        f"by bytes is named. On an H200 the plan takes {taken.rows_per_product:,} rows per product and "
        f"{taken.rows_per_chunk:,} per gradient chunk."
    )
    return Table(f"{MODELLED}: {title.lower()}", about, (title.lower(), *PARTS, "workspace"), rows, [])


def _at_size(shape: shapes.Shape, part: str, which: str, height: int, usual: planner.Plan) -> planner.Plan:
    outer, inner = (height, min(height, usual.rows_per_product)) if which == "outer" else (usual.rows_per_chunk, height)
    sizes = shape.rows, shape.vocab, shape.dim, shape.teacher_dim
    return planner.plan_chunks(*sizes, "fkl", part, (max(outer, inner), inner))


def _products_text(plan: planner.Plan) -> str:
    bound = [kernel.name for kernel in plan.kernels if kernel.is_product and kernel.limit == "bytes"]
    return _ms(plan.products_ms) + (f" ({', '.join(bound)})" if bound else "")


def _loops(form: Form, architecture: str, read: int, result: dict[str, Any]) -> model.Counts:
    """What the first sweep of value and gradient takes for a pair, its gradient being in bfloat16."""
    name = model.counts_of("value_and_gradient", form, architecture, read, 2).of
    wanted = (architecture, name, "value_and_gradient", "float32" if read == 4 else "bfloat16", "bfloat16")
    keys = ("architecture", "name", "kernel", "dtype", "gradient_dtype")
    (line,) = (line for line in result["kernels"] if tuple(line[key] for key in keys) == wanted)
    return model.Counts(*(line[field][0] for field in model.Counts._fields))


def _now(form: Form, architecture: str, result: dict[str, Any], read: int = 4) -> model.Counts:
    return model.counts_of("value_and_gradient", form, architecture, read, 2).counts


def _half_logits(form: Form, architecture: str, result: dict[str, Any]) -> model.Counts:
    return _now(form, architecture, result, 2)


def _read_once(form: Form, architecture: str, result: dict[str, Any]) -> model.Counts:
    return _now(form, architecture, result)._replace(bytes=2 * 4 + 2)


def _epilogue(form: Form, architecture: str, result: dict[str, Any], read: int = 4) -> model.Counts:
    now, first = _now(form, architecture, result, read), _loops(form, architecture, read, result)
    return model.Counts(*(x - y for x, y in zip(now, first, strict=True)))


def _half_epilogue(form: Form, architecture: str, result: dict[str, Any]) -> model.Counts:
    return _epilogue(form, architecture, result, 2)


Changed = Callable[[Form, str, dict[str, Any]], model.Counts]
CHANGES: dict[str, Changed] = {
    "as they are": _now,
    "bfloat16 logits": _half_logits,
    "float32 logits, read from memory once, by later sweeps from L2": _read_once,
    "float32 logits, the statistics sweep in the products' epilogues": _epilogue,
    "bfloat16 logits, the statistics sweep in the products' epilogues": _half_epilogue,
}


def _gains(part: str, result: dict[str, Any]) -> Table:
    """What the rows of a head would take if one thing were otherwise."""
    best, shape, rows = ceilings.TABLE[part], shapes.QWEN3, []
    assert best.part is not None
    for title, changed in CHANGES.items():
        cells = []
        for name in MAIN:
            work = model.RowWork("value_and_gradient", 1, shape.rows * shape.vocab, 4, 2)
            found = model.time_of_counts(work, changed(divergence(name).form, best.part.architecture, result), best)
            ratio = 1 + found.ms / head_time(shape, name, part).plan.products_ms
            cells.append(f"{_ms(found.ms)}, {found.limit} ({ratio:.2f})")
        rows.append([title, *cells])
    about = (
        f"{MODELLED}: ms of the row kernels of the heads on {part} and what limits them, {_short(shape)}, were one\n"
        "thing otherwise; in brackets the whole in units of its four products, taken to cost what they cost now."
    )
    return Table(f"{MODELLED}: what would change, {part}", about, ("rows", *MAIN), rows, [])


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}"


def _short(shape: shapes.Shape) -> str:
    return f"V={shape.vocab:,}, D={shape.dim:,} / {shape.teacher_dim:,}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of bench model."""
    files = f"{PAGE}, and the planner's table of counts of {COUNTED} in DIR"
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"write {files}")


def run(args: argparse.Namespace) -> int:
    """Print the tables, or write them."""
    if args.out:
        write(make_folder("--out", args.out))
    else:
        print(page(_counted(RESULTS)))
    return 0
