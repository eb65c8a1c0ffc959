"""What the interpreter cannot show of compiled kernels: the order of warps, and products that are fused with sums."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_compile import python

HERE = Path(__file__).parent
EMULATOR = Path(os.environ.get("FUSEDKD_EMULATOR", HERE.parent.parent / "shared/tools/ptx"))
emulator = pytest.mark.skipif(
    not (EMULATOR / "device.py").exists(),
    reason="no emulator of PTX: FUSEDKD_EMULATOR names the folder of one",
)


def emulated(folder: Path, check: str, *options: str) -> dict[str, Any]:
    """What a check of emulated.py prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(HERE / "emulated.py"), str(EMULATOR), check, *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@emulator
@pytest.mark.parametrize(
    ("check", "order", "bound"),
    [
        ("token_logprobs", ["greedy"], 2.0**-8),  # what rounding to bfloat16 costs
        ("over_its_logits", ["greedy"], 0.0),
        ("chunks", [], 1e-6),  # sums of numbers below 1 in float32
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_race(check: str, order: list[str], bound: float, tmp_path: Path) -> None:
    """Accesses of the same address by two warps have a barrier between, and the numbers are right without luck."""
    found = emulated(tmp_path, check, *order)
    assert found["races"] == []
    assert found["error"] <= bound


@emulator
def test_taid_of_equals_is_zero(tmp_path: Path) -> None:
    """In loss and gradient, whichever product of a sum of two is fused."""
    found = emulated(tmp_path, "taid_of_equals")
    assert found["largest"] == 0
    assert found["races"] == []


@emulator
def test_nan_is_not_lost_to_a_maximum(tmp_path: Path) -> None:
    """A GPU's maximum of NaN and a number is the number; the interpreter's is NaN."""
    assert emulated(tmp_path, "nan")["lost"] == []


PTX = """
from fusedkd.kernels import aot
for kernel, variant in aot.variants(2, "sm_90"):
    if (kernel, variant.name) == {wanted}:
        print(aot.build(aot.source(variant, "bfloat16"), variant.tile, "sm_90").asm["ptx"])
"""
BARRIER = re.compile(r"\tbar(rier)?\.sync")
STORED_TILE = re.compile(r"\bst\.global[\w.:]*\.v4\.b32")  # 16 bytes of the gradient
STORED_ENTRY = re.compile(r"\bst\.global[\w.:]*\.b16")
LOADED_ENTRY = re.compile(r"\bld\.global[\w.:]*\.b16")


def compiled(kernel: str, name: str) -> list[str]:
    """The lines of a kernel's PTX."""
    return python("-c", PTX.format(wanted=repr((kernel, name))))


def lines_with(pattern: re.Pattern[str], text: list[str]) -> list[int]:
    return [i for i, line in enumerate(text) if pattern.search(line)]


@pytest.mark.parametrize("name", ["rkl", "fkl"])
def test_no_gradient_before_the_label_is_read(name: str) -> None:
    """Every warp reads the label's logits for itself, and the gradient may lie over them."""
    text = compiled("value_and_gradient", name)
    read = max(lines_with(LOADED_ENTRY, text))
    written = min(i for i in lines_with(STORED_TILE, text) if i > read)
    assert any(read < i < written for i in lines_with(BARRIER, text))


def test_no_entry_before_the_tiles_are_written() -> None:
    """The token's column is written with its tile as 0, and then again by another warp."""
    text = compiled("gradient", "token_logprobs")
    (entry,) = lines_with(STORED_ENTRY, text)
    tile = max(i for i in lines_with(STORED_TILE, text) if i < entry)
    assert any(tile < i < entry for i in lines_with(BARRIER, text))
