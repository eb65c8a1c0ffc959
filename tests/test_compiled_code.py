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


def emulated(check: str, *order: str) -> dict[str, Any]:
    """What a check of emulated.py prints."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("emulated.py")), check, *order]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("check", "order", "bound"),
    [
        ("token_logprobs", ["greedy"], 2.0**-8),  # what rounding to bfloat16 costs
        ("over_its_logits", ["greedy"], 0.0),
        ("chunks", [], 1e-6),  # sums of numbers below 1 in float32
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_race(check: str, order: list[str], bound: float) -> None:
    """Accesses of the same address by two warps have a barrier between, and the numbers are right without luck."""
    found = emulated(check, *order)
    assert found["races"] == []
    assert found["error"] <= bound


def test_taid_of_equals_is_zero() -> None:
    """In loss and gradient, whichever product of a sum of two is fused."""
    found = emulated("taid_of_equals")
    assert found["largest"] == 0
    assert found["races"] == []


def test_nan_is_not_lost_to_a_maximum() -> None:
    """A GPU's maximum of NaN and a number is the number; the interpreter's is NaN."""
    assert emulated("nan")["lost"] == []


PTX = """
from fusedkd.kernels.aot import compiler as aot
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
