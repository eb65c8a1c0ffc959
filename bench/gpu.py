"""Everything for a machine with a GPU in one command: tests, memory checker, the C library, benchmark, summary.

`make gpu` runs it:

    python -m fusedkd.bench.gpu --out DIR

It ends within --minutes and can be started again: what was finished is noted in DIR/gpu.json and is not repeated while
the sources stay the same. It needs no network; rivals take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..cli.commands import make_folder, positive, require
from . import targets
from .measure import source
from .results import load, stem
from .sections import SECTIONS
from .tables import markdown

# The parts of tests/test_gpu.py: which tests, most seconds, and whether on several processes.
TESTS = {
    "tests": ("not large and not memcheck", 130, True),
    "large": ("large", 45, False),
    "memcheck": ("memcheck", 50, False),
}
# The C library is built for a few divergences and the GPU's architecture, and its programs run there.
LIBRARY = "C library"
LIBRARY_SECONDS = 120
LIBRARY_DIVERGENCES = "rkl;drkl;ab;jsd;taid"
CAPABILITIES = {8: "80", 9: "90", 10: "100"}  # generation -> what CMakeLists.txt calls it
LEAST = 15  # seconds under which nothing more is begun
DRAWING = 20  # seconds that the report takes
JOBS = 12
NEEDS = ("pytest", "hypothesis", "tqdm", "matplotlib", "transformers")
FINISHED = ("passed", "failed", "measured")


@dataclass(frozen=True)
class Run:
    """Where the files are, where the results go, and when all must be over."""

    tests: Path
    out: Path
    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def state_file(self) -> Path:
        """What was finished, by part."""
        return self.out / "gpu.json"

    @property
    def log_file(self) -> Path:
        """Everything that the parts print."""
        return self.out / "gpu.log"

    @property
    def result_file(self) -> Path:
        """What the benchmark writes."""
        return self.out / f"{stem('cuda', torch.cuda.get_device_name(), quick=False)}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished yet, print the summary, and return 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where results, state and log go")
    parser.add_argument("--tests", metavar="DIR", type=Path, default=Path("tests"), help="the tests (default: tests)")
    parser.add_argument("--minutes", metavar="M", type=partial(positive, float), default=9.0, help="default: 9")
    args = parser.parse_args(argv)
    try:
        run = Run(args.tests, make_folder("--out", args.out), time.monotonic() + 60 * args.minutes)
        check(args)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    state = read_state(run.state_file)
    for name in TESTS:
        if name not in state["parts"] and run.left > LEAST:
            note(run, state, name, test(run, name))
    if LIBRARY not in state["parts"] and run.left > LEAST:
        note(run, state, LIBRARY, library(run))
    benchmark(run, state)
    summary(run, state)
    return int(any(part["outcome"] == "failed" for part in state["parts"].values()))


def check(args: argparse.Namespace) -> None:
    """Refuse a machine that cannot do it.

    Raises:
        argparse.ArgumentError: naming what is missing and how it can be given.
    """
    if not torch.cuda.is_available():
        raise argparse.ArgumentError(None, f"needs a CUDA device; torch {torch.__version__} sees none")
    if not (args.tests / "test_gpu.py").is_file():
        raise argparse.ArgumentError(None, f"--tests: no file {args.tests / 'test_gpu.py'}")
    try:
        require("GPU run", "test,bench", NEEDS)
    except argparse.ArgumentError as error:
        raise argparse.ArgumentError(None, f"{error}; without a network: make gpu WHEELS=folder-of-wheels") from error


def read_state(file: Path) -> dict[str, Any]:
    """Return what was finished, nothing if it was of other sources or on another device."""
    fresh = {"source": source(), "device": torch.cuda.get_device_name(), "parts": {}}
    found = json.loads(file.read_text()) if file.exists() else fresh
    same = all(found.get(key) == fresh[key] for key in ("source", "device"))
    return found if same else fresh


def note(run: Run, state: dict[str, Any], name: str, part: dict[str, Any]) -> None:
    """Keep a finished part, and say how it went."""
    print(f"{name:<10} {part['outcome']}: {part['words']}", flush=True)
    if part["outcome"] in FINISHED:
        state["parts"][name] = part
        run.state_file.write_text(json.dumps(state, indent=1) + "\n")


def test(run: Run, name: str) -> dict[str, Any]:
    """Run a part of the tests."""
    which, most, parallel = TESTS[name]
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(run.tests / "test_gpu.py"),
        "-k",
        which,
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    if parallel and find_spec("xdist"):
        command += ["-n", str(min(JOBS, os.cpu_count() or 1))]
    code, seconds, lines = logged(run, name, command, min(most, run.left))
    words = next((line.strip("= ") for line in reversed(lines) if " in " in line), "no summary")
    return part(code, seconds, words)


def part(code: int | None, seconds: float, words: str) -> dict[str, Any]:
    """Return what is kept of a part, from its exit status (None: out of time)."""
    outcome = "cut off" if code is None else "passed" if code == 0 else "failed"
    return {"outcome": outcome, "seconds": seconds, "words": f"{words} ({seconds:.0f} s)"}


def library(run: Run) -> dict[str, Any]:
    """Build the C library beside the results and run its tests, those on the GPU included."""
    sources, folder = run.tests.resolve().parent, run.out / "clib"
    cmake, ctest = shutil.which("cmake"), shutil.which("ctest")
    arch = CAPABILITIES.get(torch.cuda.get_device_capability()[0])
    for missing, words in (
        (cmake is None or ctest is None, "needs cmake on the path"),
        (not (sources / "CMakeLists.txt").is_file(), f"no CMakeLists.txt beside {run.tests}"),
        (arch is None, "has no kernels for this GPU"),
    ):
        if missing:
            return {"outcome": "skipped", "words": words}
    options = [f"-DPython3_EXECUTABLE={sys.executable}", f"-DFUSEDKD_ARCHS={arch}"]
    options.append(f"-DFUSEDKD_DIVERGENCES={LIBRARY_DIVERGENCES}")
    started = time.monotonic()
    lines: list[str] = []
    for command in (
        [str(cmake), "-S", str(sources), "-B", str(folder), *options],
        [str(cmake), "--build", str(folder), "-j", str(os.cpu_count() or 1)],
        [str(ctest), "--test-dir", str(folder), "--output-on-failure"],
    ):
        left = LIBRARY_SECONDS - (time.monotonic() - started)
        code, _, lines = logged(run, LIBRARY, command, min(left, run.left))
        if code != 0:
            break
    seconds = time.monotonic() - started
    return part(code, seconds, next((x for x in lines if "tests passed" in x), lines[-1] if lines else "no output"))


def benchmark(run: Run, state: dict[str, Any]) -> None:
    """Measure every section that is missing; one that brings the process down is left out of the next try."""
    crashed: set[str] = set()
    while missing := [name for name in SECTIONS if name not in state["parts"] and name not in crashed]:
        most = run.left - DRAWING
        if most < LEAST:
            return
        command = [sys.executable, "-m", "fusedkd", "bench", "--device", "cuda", "--out", str(run.out)]
        command += ["--seconds", f"{most - DRAWING:.0f}", "--only", *missing]
        code, seconds, lines = logged(run, "benchmark", command, run.left)
        measured = load(run.result_file)["sections"]
        for name in missing:
            if measured.get(name, {}).get("machine", {}).get("source") == state["source"]:
                note(run, state, name, {"outcome": "measured", "words": f"in {run.result_file.name}"})
        if code is None:
            print("benchmark  cut off: make gpu again to go on", flush=True)
            return
        failed = next((name for name in missing if name not in state["parts"]), None)
        if failed is None:
            return
        crashed.add(failed)
        words = lines[-1] if lines else f"exit status {code}"
        print(f"{failed:<10} not measured: {words} ({seconds:.0f} s)", flush=True)


def logged(run: Run, name: str, command: list[str], seconds: float) -> tuple[int | None, float, list[str]]:
    """Run a command; return its exit status (None: out of time), its seconds, and what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    print(f"{name:<10} at most {seconds:.0f} s ...", flush=True)
    started = time.monotonic()
    with run.log_file.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        bars = name == "benchmark" and sys.stderr.isatty()
        process = subprocess.Popen(
            command, stdout=log, stderr=None if bars else log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
            code = None
    output = run.log_file.read_bytes()[start:].decode(errors="replace")
    return code, time.monotonic() - started, [line for line in output.splitlines() if line.strip()]


def summary(run: Run, state: dict[str, Any]) -> None:
    """Print what was finished, the goals beside what was measured, and what another run would do."""
    print()
    for name, part in state["parts"].items():
        print(f"{name:<10} {part['outcome']}: {part['words']}")
    left = [name for name in (*TESTS, LIBRARY, *SECTIONS) if name not in state["parts"]]
    if left:
        print(f"left       {', '.join(left)}: make gpu again to go on")
    print()
    print(markdown(targets.table("", targets.GPU, load(run.result_file))))
    print("\n".join(_files(run)))


def _files(run: Run) -> Iterator[str]:
    for file in (run.log_file, run.result_file, run.result_file.with_suffix(".html")):
        if file.exists():
            yield str(file)


if __name__ == "__main__":
    sys.exit(main())
