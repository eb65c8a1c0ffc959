"""Every kernel as compiled for a GPU, one case of each way, dtype class and layout, emulated with a sanitizer.

The emulator runs in a process of its own: this one has Triton's interpreter (compiled_cases.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compiled_cases
import pytest

pytestmark = [
    pytest.mark.xdist_group("compiled"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.interpreter("it starts a process with the emulator itself"),
]


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """What the process says about each case."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = Path(compiled_cases.__file__)
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {report["case"]: report for report in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("case", compiled_cases.CASES)
def test_compiled(case: str, reports: dict[str, Any]) -> None:
    """The numbers are right, and nothing races, strays or reads what nobody wrote."""
    report = reports[case]
    found = "\n".join(" ".join(finding) for finding in report["findings"])
    assert report["error"] is None, f"{report['error']}\n{found}"
    assert not found, found


def launchable() -> set[str]:
    """file:kernel of every kernel that there is."""
    aot = pytest.importorskip("fusedkd.kernels.aot.compiler")
    tables = (aot.ROW_KERNELS, aot._CHUNK_KERNELS, aot._SPLIT_KERNELS, aot._TOPK_KERNELS)
    kernels = [kernel for table in tables for kernel in table.values()]
    kernels += [aot.rows._floor, aot.token_logprobs._value, aot.token_logprobs._gradient]
    return {f"{Path(kernel.fn.__code__.co_filename).name}:{kernel.fn.__name__}" for kernel in kernels}


def test_every_kernel_has_run(reports: dict[str, Any]) -> None:
    """None is left out when one is added."""
    assert launchable() == {name for report in reports.values() for name in report["kernels"]}
