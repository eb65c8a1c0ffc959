"""The scripts of examples/ as a user starts them, but in one process: most of their time is the import of models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRIVER = """
import runpy, sys, traceback

steps, *names = sys.argv[1:]
sys.path.insert(0, "examples")
for name in names:
    print("script", name, flush=True)
    sys.argv = [name, "--steps", steps]
    try:
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
"""


def outputs(names: list[str], steps: int, timeout: float) -> dict[str, str]:
    """What each prints, a traceback in its place where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(steps), *names], cwd=ROOT, env=environment, text=True,
        capture_output=True, timeout=timeout,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    _, *found = re.split(r"^script (\w+)\n", run.stdout, flags=re.M)
    return dict(zip(found[::2], found[1::2], strict=True))


def losses(printed: str, steps: int) -> tuple[float, float]:
    """Held out, before and after, of the last line."""
    assert "Traceback" not in printed, printed
    last = printed.splitlines()[-1]
    found = re.fullmatch(rf"{steps} steps: held-out .+ (\d+\.\d+) -> (\d+\.\d+) nats a token", last)
    assert found, printed
    return float(found[1]), float(found[2])
