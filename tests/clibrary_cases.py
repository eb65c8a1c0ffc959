"""The C library's kernels, executed as compiled: `python tests/clibrary_cases.py CAPABILITY FOLDER ...`.

FOLDERs hold libraries that clibrary.build made; a JSON line for each case, and for each call that is made wrong. What
the C code packs runs in the emulator: the PTX of the compilation whose code the library embeds, with the blocks, the
shared memory and the arguments that were packed. A pointer may touch what the caller gave for it, and nothing else.
Then the Python path runs on the same tensors. A program of its own, because Triton's interpreter and its compiler
exclude each other in one process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import emulator
import torch
from cases import IGNORE, VALUE, Rows, check_stats, expected, unrelated
from clibrary import CASES, DTYPES, LAYOUTS, POINTED, Library, Packed, call, memory
from compare import assert_close, relative, rounding

import fusedkd
from fusedkd.kernels.aot import embed
from fusedkd.kernels.device import rows
from fusedkd.loss import KDStats

DEVICES = {90: 0, 80: 1}  # those of tests/c/libcuda.c that take the code of an architecture
ORDER = "lockstep"  # the fast one; compiled_cases.py runs the same kernels warp by warp
N = 2
WIDE, ODD = 4112, 4099  # columns: more than one of the widest tiles
NARROW = 131  # less than a tile of the C library, which the Python path cuts down


class Case(NamedTuple):
    """One call."""

    divergence: int  # of CASES
    dtype: str
    layout: str
    columns: int
    gradient: bool = True
    stats: bool = False
    labels: bool = True
    weights: bool = True
    python: tuple[int, ...] = (90,)  # architectures for which the Python path runs, too: it takes seconds to compile

    @property
    def name(self) -> str:
        """As tests show it."""
        flags = [name for name in ("gradient", "stats", "labels", "weights") if getattr(self, name)]
        return " ".join([f"{CASES[self.divergence][0]}{self.divergence}", self.dtype, self.layout, *flags])


def every_way(divergence: int, dtype: str, aligned: tuple[int, ...], others: tuple[int, ...]) -> list[Case]:
    """Both sets of kernels, with and without the gradient; where Python runs the first, and the others."""
    return [
        Case(divergence, dtype, "contiguous", WIDE, python=aligned),
        Case(divergence, dtype, "every second column", ODD, stats=True, python=others),
        Case(divergence, dtype, "padded rows", WIDE, gradient=False, python=others),
        Case(divergence, dtype, "transposed", ODD, gradient=False, stats=True, python=others),
    ]


COVERED = [
    *every_way(3, "float32", aligned=(80, 90), others=(90,)),
    Case(0, "float32", "contiguous", WIDE, labels=False, weights=False),
    Case(1, "float32", "shifted", WIDE, python=()),
    Case(2, "float32", "padded rows", WIDE, python=(80, 90)),
    Case(4, "float32", "contiguous", WIDE),
    Case(5, "float32", "transposed", ODD, python=()),
    Case(6, "float32", "every second column", ODD, weights=False),
    Case(7, "float32", "contiguous", WIDE),
    Case(7, "float32", "odd width", NARROW, stats=True),
    *every_way(3, "bfloat16", aligned=(90,), others=()),
]
CORRUPTED = {  # calls, each of whose arguments is wrong in turn
    "generic": Case(7, "float32", "every second column", NARROW, stats=True),
    "aligned": Case(4, "float32", "contiguous", 256),
}


class Outcome(NamedTuple):
    """A call's results, and what it ran on."""

    data: Rows
    tensors: dict[str, torch.Tensor]
    loss: torch.Tensor
    grad: torch.Tensor | None


class Emulated:
    """Executes launches; `corrupt` changes them first."""

    def __init__(self) -> None:
        self.programs: dict[str, emulator.Program] = {}
        self.corrupt: Callable[[Packed], Packed] = lambda packed: packed

    def __call__(self, library: Library, packed: Packed) -> None:
        packed = self.corrupt(packed)
        line, names = packed.line, packed.line["arguments"]

        def owned(kernel: str, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
            name = names[int(parameter.rsplit("_", 1)[1])]
            return library.tensors.get(name, library.tensors["workspace"])

        key = f"{line['symbol']} {packed.shared}"
        if key not in self.programs:
            self.programs[key] = emulator.Program(ptx(library, line), packed.shared)
        program = self.programs[key]
        assert packed.block == (program.kernel.threads, 1, 1), f"a block of {packed.block} threads"
        assert packed.grid[1:] == (1, 1)
        assert len(packed.arguments) == len(program.kernel.params)
        given = [(kind, memory(kind, x) if kind.startswith("*") else x) for kind, x in packed.arguments]
        with emulator.edited(narrow=owned):
            emulator.launch(program, packed.grid[0], given)


def ptx(library: Library, line: dict[str, Any]) -> str:
    """The PTX of the compilation that a kernel's code comes from: another would give other code."""
    variant, architecture = library.variant(line), f"sm_{line['arch']}"
    _, _, built, _ = embed.unspilled(variant, line["dtype"], architecture, embed.CALLS[line["variant"]])
    assert built.asm["cubin"] == bytes(library.cubin(line)), f"{line['symbol']} is not what is compiled now"
    return built.asm["ptx"]


def in_c(library: Library, case: Case) -> Outcome:
    """The call. Its first row is ignored, so that the last element of every tensor is in use; the other's label is
    likely on both sides, so that the target's term counts."""
    torch.manual_seed(0)
    data = unrelated(N, case.columns, dtype=DTYPES[case.dtype])
    likely = int((data.student + data.teacher)[1].argmax())
    data = dataclasses.replace(data, labels=torch.tensor([IGNORE, likely]) if case.labels else None)
    lay = LAYOUTS[case.layout][1]
    student, teacher = lay(data.student.to(data.dtype)), lay(data.teacher.to(data.dtype))
    given = {
        "weights": torch.tensor([1.0, -0.5]) if case.weights else None,
        "stats": emulator.unwritten(torch.empty(N, len(KDStats._fields))) if case.stats else None,
    }
    status, loss, grad = call(
        library, CASES[case.divergence], student, teacher, data.labels, gradient=case.gradient, **given
    )
    assert status == "OK"
    return Outcome(data, dict(library.tensors), loss, grad)


def meaning(case: Case) -> tuple[tuple[str, dict[str, Any]], dict[str, Any]]:
    """The divergence as `cases` has it, and its options."""
    _, _, parameters, options = CASES[case.divergence]
    return (parameters["name"], {k: x for k, x in parameters.items() if k != "name"}), options


def check(case: Case, outcome: Outcome) -> None:
    """AssertionError where a number is not that of float64 by the suite's bounds."""
    data, tensors = outcome.data, outcome.tensors
    divergence, options = meaning(case)
    truth, value, _ = expected(data.student, data.teacher, data.labels, divergence, {"reduction": "none", **options})
    assert_close(outcome.loss, value, VALUE, what="loss")
    if outcome.grad is not None:
        wanted = truth.gradient(tensors["weights"].double() if case.weights else torch.ones(N).double())
        bound = VALUE + rounding(wanted, data.dtype)
        assert_close(outcome.grad, wanted, bound, dtype=data.dtype, what="gradient")
    if case.stats:
        check_stats(KDStats(*tensors["stats"].unbind(-1)), truth)


def beside_python(case: Case, outcome: Outcome, line: dict[str, Any]) -> dict[str, Any]:
    """The same call in Python: whether it is the same kernel, and how far its results are from those of C."""
    divergence, options = meaning(case)
    student, teacher = outcome.tensors["student"], outcome.tensors["teacher"]
    weights, generic = outcome.tensors.get("weights"), line["variant"] == "generic"
    given = {"divergence": fusedkd.divergence(divergence[0], **divergence[1]), "token_weights": weights, **options}
    given |= {"reduction": "none", "backend": "triton", "return_stats": generic}  # those kernels in C always have them
    tiles, original = [], rows.tile
    rows.tile = lambda *args: tiles.append(original(*args)) or tiles[-1]
    try:
        function = fusedkd.kd_value_and_grad if case.gradient else fusedkd.kd_loss
        found = function(student, teacher, outcome.data.labels, **given)
    finally:
        rows.tile = original
    loss, *rest = found if isinstance(found, tuple) else (found,)
    pairs: dict[str, tuple[Any, torch.Tensor]] = {
        "loss": (outcome.loss if weights is None else outcome.loss * weights, loss)
    }
    if case.gradient:
        pairs["gradient"] = outcome.grad, rest[0]
    if case.stats:
        pairs["stats"] = outcome.tensors["stats"], torch.stack(list(rest[-1]), -1)
    same_tile = [(tile.block, tile.num_warps) for tile in tiles] == [(line["block"], line["num_warps"])]
    return {
        # Columns side by side and no labels are known to Triton in Python, and numbers like any other in C.
        "same kernel": same_tile and case.labels and (student.stride(1) != 1 or not generic),
        "exact": {name: torch.equal(*pair) for name, pair in pairs.items()},
        "away": {name: relative(ours, theirs.double()) for name, (ours, theirs) in pairs.items()},
    }


def seen() -> list[emulator.Finding]:
    return [finding for finding in emulator.findings() if finding.kind not in emulator.BENIGN]


def wrong_launches(packed: Packed) -> Iterator[tuple[str, Packed]]:
    """A launch with one thing wrong, for each: pointers one element too far, numbers a little off."""
    sizes = {kind: dtype.itemsize for kind, dtype in POINTED.items()}
    names = packed.line["arguments"]
    for i, name in enumerate(names):
        kind, value = packed.arguments[i]
        step = sizes.get(kind, 0.01 if kind == "fp32" else -1 if name == "rows" else 1)
        arguments = [*packed.arguments[:i], (kind, value + step), *packed.arguments[i + 1 :]]
        yield name if names.count(name) == 1 else f"{name} ({i})", packed._replace(arguments=arguments)
    for change in (-1, 1):
        yield f"grid {change:+d}", packed._replace(grid=(packed.grid[0] + change, 1, 1))
    yield "block", packed._replace(block=(packed.block[0] // 2, 1, 1))
    yield "shared", packed._replace(shared=packed.shared // 2)


def noticed(library: Library, execute: Emulated, case: Case) -> dict[str, list[str]]:
    """For each wrong launch of a call what says so."""
    in_c(library, case)
    found: dict[str, list[str]] = {}
    for i, (what, _) in enumerate(wrong_launches(library.launches[-1])):
        emulator.clear()
        says = []
        execute.corrupt = lambda packed, i=i: list(wrong_launches(packed))[i][1]
        try:
            check(case, in_c(library, case))
        except (AssertionError, emulator.Fault) as error:
            says.append(type(error).__name__)
        found[what] = says + [finding.kind for finding in seen()]
    execute.corrupt = lambda packed: packed
    return found


def compiled(library: Library, capability: int) -> Iterator[tuple[Case, Outcome | None, dict[str, Any]]]:
    """The cases that a library has kernels for, and what there is to report."""
    built = {(line["dtype"], line["arch"]) for line in library.manifest["kernels"]}
    for case in (case for case in COVERED if (case.dtype, capability) in built):
        emulator.clear()
        library.launches.clear()
        start, outcome, error = time.process_time(), None, None
        try:
            outcome = in_c(library, case)
            check(case, outcome)
        except Exception:
            error = traceback.format_exc(limit=-3)
        seconds = round(time.process_time() - start, 2)
        line = library.launches[-1].line if library.launches else None
        yield case, outcome, {"case": case.name, "error": error, "findings": seen(), "kernel": line, "seconds": seconds}


def main(capability: int, folders: list[Path]) -> None:
    """What the C library launches, and then, since that takes another Triton, the Python path."""
    done = []
    for folder in folders:  # one after the other: a library's first call finds the driver
        execute = Emulated()
        library = Library(folder, execute)
        library.driver.stub_use(DEVICES[capability])
        done += compiled(library, capability)
        if capability == 90 and "float32" in {line["dtype"] for line in library.manifest["kernels"]}:
            for name, case in CORRUPTED.items():
                print(json.dumps({"case": name, "noticed": noticed(library, execute, case)}))
    emulator.install(capability, order=ORDER)
    for case, outcome, report in done:
        if outcome is not None and capability in case.python:
            report["python"] = beside_python(case, outcome, report["kernel"])
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    emulator.settings.order = ORDER
    main(int(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
