"""The C library's launches, executed as compiled: the kernels that it embeds, on the arguments that the C code packs.

The emulator runs in processes of its own: this one has Triton's interpreter (clibrary_cases.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import clibrary
import clibrary_cases
import pytest
from clibrary_cases import CORRUPTED, COVERED, Case

pytestmark = [
    pytest.mark.xdist_group("clib"),  # one process, one build
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.interpreter("it starts processes with the emulator itself"),
]
HALF = "bfloat16"  # built for one architecture and one divergence: a kernel takes seconds to compile
RUNS = [
    (capability, case)
    for capability in map(int, clibrary.ARCHS)
    for case in COVERED
    if case.dtype != HALF or capability == 90
]


@pytest.fixture(scope="session")
def reports(clib: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What the processes say of each case by architecture, and of each call that is made wrong."""
    half = clibrary.build(tmp_path_factory.mktemp("half"), ("90",), (HALF,), ("drkl",))
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = {}
    for capability in clibrary.ARCHS:
        command = [sys.executable, clibrary_cases.__file__, capability, str(clib), str(half)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        for report in map(json.loads, run.stdout.splitlines()):
            found[int(capability), report["case"]] = report
    return found


@pytest.mark.parametrize(("capability", "case"), RUNS, ids=lambda value: getattr(value, "name", None))
def test_as_python_and_float64(capability: int, case: Case, reports: dict[Any, Any]) -> None:
    """The numbers are right and nothing strays or races; they are Python's, to the bit where the kernel is."""
    report = reports[capability, case.name]
    found = "\n".join(" ".join(finding) for finding in report["findings"])
    assert report["error"] is None, f"{report['error']}\n{found}"
    assert not found, found
    line = report["kernel"]
    assert (line["arch"], line["dtype"]) == (capability, case.dtype)
    assert line["kernel"] == ("value_and_gradient" if case.gradient else "value")
    if capability in case.python:
        found = report["python"]
        assert max(found["away"].values()) < clibrary.SAME
        assert not found["same kernel"] or all(found["exact"].values())


@pytest.mark.parametrize("what", CORRUPTED)
def test_a_wrong_launch_is_noticed(what: str, reports: dict[Any, Any]) -> None:
    """Each argument a little off, pointers by one element: a wrong number, or an access out of what was given."""
    noticed = reports[90, what]["noticed"]
    harmless = {name for name, says in noticed.items() if not says}
    assert harmless == {name for name in noticed if name.startswith("zero_stride")}  # of an axis of one entry
    assert noticed["grid +1"] == noticed["shared"] == ["Fault", "out of bounds"]
    for name in ("student", "teacher", "grad"):
        stray = "misaligned access" if what == "aligned" else "out of bounds"
        assert stray in noticed[name], f"{name} is one element too far"


@pytest.mark.parametrize("capability", [int(arch) for arch in clibrary.ARCHS])
def test_what_was_run(capability: int, reports: dict[Any, Any]) -> None:
    """Kernels of each kind, some of them the very kernels of the Python path, and all divergences that were built."""
    ran = [report for (arch, _), report in reports.items() if arch == capability and report.get("kernel")]
    kinds = {(report["kernel"]["kernel"], report["kernel"]["variant"]) for report in ran}
    assert kinds == {(kernel, variant) for kernel in clibrary.embed.KERNELS for variant in clibrary.embed.CALLS}
    assert any(report["python"]["same kernel"] for report in ran if "python" in report)
    assert {clibrary.CASES[case.divergence][0] for case in COVERED} == set(clibrary.NAMES)
