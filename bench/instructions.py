"""What the compiled kernels cost, in result files that take a compiler and no GPU.

    python -m fusedkd.bench.instructions --out bench/results

What each loop takes per logit pair, instructions, special functions, float32 operations and bytes: the divergences
below are compiled by kernels/aot/compiler.py for three architectures and counted by kernels/aot/sass.py, in a quarter
of an hour. docs/measured.md has the instructions; the model of the time is made of these counts, and written again
(model.py). Any other kernel: python -m fusedkd.kernels.aot.compiler sm_90 bfloat16 NAME --instructions.

What runs of whole kernels take, instructions, memory and barriers: compiled.py, in about half an hour more; not with
--loops.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.commands import make_folder
from ..kernels.language import triton
from . import compiled, model
from .tables import Table

ARCHITECTURE = "sm_90"  # of the table
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FILE = model.COUNTED
KERNELS = ("value", "gradient", "value_and_gradient")
DIVERGENCES = (  # names of aot.variants: every divergence at its defaults, and `ab` where one sweep does not do
    "fkl", "rkl", "decoupled_fkl", "decoupled_rkl", "ab", "ab_two", "frkl", "jsd_two", "skl_two", "srkl_two", "tvd_two",
    "hellinger_two", "triangular_two", "todi_two", "mixed_fkl", "amid_teacher_two", "amid_student_two", "akl_rows",
    "renyi_rows", "eopd_rows",
)  # fmt: skip


class Elements(NamedTuple):
    """Dtypes of logits and of their gradient, and the kernels that the model needs of them."""

    logits: str
    gradient: str
    kernels: tuple[str, ...]


_BOTH = ("value_and_gradient", "chunk_gradient")
ELEMENTS = (
    Elements("bfloat16", "bfloat16", ("value", "gradient", "absorb", "add_sums", *_BOTH)),
    Elements("float32", "float32", ("value", "gradient", "absorb", "add_sums", *_BOTH)),
    Elements("float32", "bfloat16", _BOTH),  # between the products of a half-precision model
)
# The inner tiles of all sweeps of value_and_gradient in bfloat16, together: where reading and writing the logits would
# still take longer on an H200, or 1.5 to 2 times as long for mixtures (the goal), and the most that they take today.
GOALS = {
    "rkl": (58.0, 58.0),
    "fkl": (58.0, 64.0),
    "ab": (105.0, 105.0),
    "jsd_two": (140.0, 140.0),
    "skl_two": (140.0, 140.0),
    "srkl_two": (140.0, 140.0),
    "tvd_two": (110.0, 110.0),
    "hellinger_two": (110.0, 110.0),
}
# The most that rkl in bfloat16 should take in the inner tiles of each sweep, by the loop's place. Of an H200 the model
# (model.py) says that reading a pair takes the time of 29 instructions, reading it and writing the gradient that of 43.
# The 30 are of a sweep that takes two terms of each remainder's series and leaves the value to the gradient sweep.
BUDGETS = {"value": {0: 42.0}, "gradient": {0: 24.0}, "value_and_gradient": {0: 30.0, 2: 24.0}}
ABOUT = (
    "Instructions per logit pair of each loop over the columns, in the order of the machine code ({architecture},\n"
    "Triton {triton}). A sweep has two: inner tiles, and those with the label or the vocabulary's end. To the second\n"
    "loop of a gradient goes also the tile of a token that may be likelier than 1/2; with a cross-entropy all\n"
    "tiles. The last number of a gradient is of the loop that writes the zeros of an ignored row. The budget of 30 is\n"
    "missed on purpose: it is that of short series, which are wrong where a single column is far apart\n"
    "(`test_a_short_series_is_not_enough`). The third loop of `akl_rows`, a search, runs 16 times a row."
)
KEPT = (
    "architecture", "name", "kernel", "dtype", "gradient_dtype", "block", "num_warps", "registers",
    "instructions", "special", "fp32", "bytes", "runs",
)  # fmt: skip


def counted(architecture: str, elements: Elements) -> Iterator[dict[str, Any]]:
    """Compile the divergences in a process of its own; yield what is reported of each kernel.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    command = ("-m", "fusedkd.kernels.aot.compiler", architecture, elements.logits, *DIVERGENCES, "--instructions")
    options = ("--gradient", elements.gradient, "--kernels", *elements.kernels)
    for report in map(json.loads, compiled.printed(*command, *options, TRITON_INTERPRET="0")):
        where = f"{architecture} {elements.logits} {elements.gradient}"
        print(f"loops of {report['name']} {where}: {report['kernel']}", file=sys.stderr, flush=True)
        yield {key: report[key] for key in KEPT}


def table(result: dict[str, Any]) -> Table:
    """Return the instructions where logits and gradients have one dtype, those of rkl above their budgets."""
    found = {
        (x["name"], x["dtype"], x["kernel"]): x["instructions"]
        for x in result["kernels"]
        if x["architecture"] == ARCHITECTURE and x["dtype"] == x["gradient_dtype"]
    }
    rows = []
    for name, dtype in dict.fromkeys((name, dtype) for name, dtype, _ in found):
        rows.append([name, dtype, *(_sweeps(found.get((name, dtype, kernel), ())) for kernel in KERNELS)])
        if (name, dtype) == ("rkl", "bfloat16"):
            rows.append(["rkl, budget", dtype, *(_budget(BUDGETS.get(kernel, {})) for kernel in KERNELS)])
    about = ABOUT.format(architecture=ARCHITECTURE, triton=result["triton"])
    return Table("Instructions per logit pair", about, ("divergence", "dtype", *KERNELS), rows, [])


def _sweeps(counts: Sequence[float]) -> str:
    return " + ".join(f"{x:g}" for x in counts)


def _budget(loops: dict[int, float]) -> str:
    return " + ".join(f"{loops[i]:g}" if i in loops else "·" for i in range(max(loops, default=-1) + 1))


def committed(folder: Path) -> Table | None:
    """Return the table of the counts in a folder of results, None if they are not there."""
    file = folder / FILE
    return table(json.loads(file.read_text())) if file.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, write the files."""
    parser = argparse.ArgumentParser(prog="python -m fusedkd.bench.instructions", description=__doc__)
    files = f"{FILE}, {model.PAGE}, {compiled.FILE} and {compiled.PAGE}"
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"write {files} to DIR")
    parser.add_argument("--loops", action="store_true", help=f"{FILE} and {model.PAGE} alone")
    args = parser.parse_args(arguments)
    if triton is None:
        parser.error("counting instructions needs triton: install triton")
    try:
        compiled.script()  # which may be missing: known before anything is compiled
        folder = make_folder("--out", args.out)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    kernels = [line for where in ARCHITECTURES for elements in ELEMENTS for line in counted(where, elements)]
    lines = ",\n".join(map(json.dumps, kernels))
    (folder / FILE).write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    model.write(folder)
    if not args.loops:
        compiled.write(folder, triton.__version__, list(_announced(compiled.counted(), len(compiled.names()))))
    return 0


def _announced(cases: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    for number, case in enumerate(cases, 1):
        print(f"case {number} of {total}: {case['case']}", file=sys.stderr, flush=True)
        yield case


if __name__ == "__main__":
    sys.exit(main())
