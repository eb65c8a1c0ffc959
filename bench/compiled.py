"""What the compiled kernels cost, counted without a GPU: a result file and its page.

tests/compiled_figures.py of a source checkout executes what Triton compiles in the emulator of the tests, which is not
part of the installed package, and asks ptxas. `python -m fusedkd.bench.instructions` runs it for all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tables import Table, grouped, markdown

FILE, PAGE = "compiled.json", "compiled.md"
WARP = 32  # threads
WAYS = {
    "autograd": "`kd_loss` and its backward pass.",
    "fused": "`kd_value_and_grad`.",
    "split rows": "`kd_loss` and its backward pass of few rows: several programs share one.",
    "streaming": '`kd_loss` with `schedule="streaming"`, one chunk: the logits are products of heads.',
    "log-probabilities": "`token_logprobs` and its backward pass; a pair is one logit.",
    "floor": '`kd_loss` with `support="floor"` and its backward pass.',
    "top-k": "`kd_loss` beside a `TopK` of 100 tokens and its backward pass; a pair is one logit of the student.",
}
COLUMNS = (
    "divergence", "dtype", "rows", "kernel", "instructions a pair",
    "sectors loaded a row (least)", "a request", "sectors stored a row (least)", "a request",
    "barriers a row", "shared waves a row (conflicts)", "registers (bytes spilled)", "shared memory",
    "blocks × warps at once", "loaded ahead by a thread", "in flight",
)  # fmt: skip


def script() -> Path:
    """Return the program that counts.

    Raises:
        argparse.ArgumentError: this is not a source checkout.
    """
    file = Path(__file__).resolve().parents[1] / "tests" / "compiled_figures.py"
    if not file.is_file():
        raise argparse.ArgumentError(
            None,
            f"no {file}: kernels are counted by the emulator of fusedkd's tests, which is not installed; run this in a "
            "clone of the repository, after pip install --editable '.[test]'",
        )
    return file


def printed(*command: str | Path, **variables: str) -> Iterator[str]:
    """Yield what a Python program prints, line by line, with environment variables set.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with subprocess.Popen(
        [sys.executable, *command], env=os.environ | variables, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.strip()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def names() -> list[str]:
    """Return what can be counted."""
    return list(printed(script(), "--list"))


def counted(*cases: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of some cases, or of all."""
    variables = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return map(json.loads, printed(script(), *cases, **variables))


def write(folder: Path, triton: str, cases: Sequence[dict[str, Any]]) -> None:
    """Write the result, a line for each case, and its page."""
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / FILE).write_text(f'{{"triton": "{triton}", "cases": [\n{lines}\n]}}\n')
    (folder / PAGE).write_text(page(load(folder)))


def load(folder: Path) -> dict[str, Any]:
    """Return the result in a folder."""
    return json.loads((folder / FILE).read_text())


def page(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    return "\n".join(f"## {table.title}\n\n{markdown(table)}" for table in tables(result))


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield a table for each way through the kernels."""
    for (way, architecture), cases in grouped(result["cases"], lambda case: (case["way"], case["architecture"])):
        about = f"{WAYS[way]} Counted, not measured: {architecture}, Triton {result['triton']}."
        rows = [_row(case, kernel, found) for case in cases for kernel, found in case["kernels"].items()]
        yield Table(way[0].upper() + way[1:], about, COLUMNS, rows, [])


def _row(case: dict[str, Any], kernel: str, found: dict[str, int]) -> list[str]:
    n, warps = case["n"], found["threads"] // WARP
    waves, least = (found[key] / n for key in ("shared_waves", "shared_waves_least"))
    return [
        case["divergence"],
        case["dtype"],
        case["rows"],
        f"`{kernel.split(':')[1]}`",
        f"{found['instructions'] * WARP / (n * case['columns']):.1f}",
        *_sectors(found, "load", n),
        *_sectors(found, "store", n),
        f"{found['barriers'] / n:g}",
        f"{waves:,.0f} ({waves - least:,.0f})",
        f"{found['registers']} ({found['spilled']})",
        f"{found['shared_memory']} B",
        f"{found['blocks_at_once']} × {warps} = {found['blocks_at_once'] * warps}",
        f"{found['bytes_ahead']} B",
        f"{found['bytes_ahead'] * found['threads'] * found['blocks_at_once'] / 1024:.0f} KB",
    ]


def _sectors(found: dict[str, int], kind: str, n: int) -> tuple[str, str]:
    taken, least, requests = (found[f"{kind}_{key}"] for key in ("sectors", "sectors_least", "requests"))
    each = max(requests, 1)  # none of a kernel that has atomic operations alone
    return f"{taken / n:,.0f} ({least / n:,.0f})", f"{taken / each:.1f} ({least / each:.1f})"
