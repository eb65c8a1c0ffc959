"""Rows, and what the float64 oracle says of them, for tests/c/vectors.c: python vectors.py FILE --dtypes float32 ..."""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

import oracle
import torch
from compare import rounding

from fusedkd.kernels.aot import embed

ROWS = 6
SIZES = {1008: "aligned", 1003: "odd"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUND = 2e-5  # relative L2, as everywhere
LEAST = 1e-4  # of amid's gradient where both sides hardly overlap


def cases(names: list[str]) -> list[tuple[str, dict[str, Any], bool]]:
    """Those divergences, or all in C, at their defaults, their decoupled forms, α-β where it takes two sweeps."""
    specs = [embed.spec(name) for name in names or embed.in_c()]
    found: list[tuple[str, dict[str, Any], bool]] = [(one["name"], {}, False) for one in specs]
    found += [(one["name"], {}, True) for one in specs if one["separable"]]
    limits = [("ab", {"alpha": 0.0, "beta": 0.7}, False), ("ab", {"alpha": 0.5, "beta": 0.0}, False)]
    return found + (limits if not names or "ab" in names else [])


def write(file: Any, case: tuple[str, dict[str, Any], bool], dtype: str, columns: int) -> None:
    """One case: numbers, then student, teacher, labels, weights, loss and gradient."""
    name, params, decoupled = case
    student, teacher = (3 * torch.randn(2, ROWS, columns)).to(DTYPES[dtype])
    labels = torch.randint(columns, (ROWS,))
    labels[2] = -100
    weights = torch.rand(ROWS) + 0.5
    meaning = oracle.meaning("decoupled", base=name, **params) if decoupled else oracle.meaning(name, **params)
    truth = oracle.distill(
        student.double(), teacher.double(), labels, meaning, temperature=1.5, temperature_squared=True
    )
    grad = truth.gradient(weights.double())
    bound = BOUND + rounding(grad, DTYPES[dtype]) + (LEAST if name == "amid" else 0.0)
    values = [params.get(key, default) for key, default, *_ in embed.spec(name)["parameters"]]
    values += [0.0] * (embed.MOST_PARAMETERS - len(values))
    numbers = (embed.in_c().index(name), list(DTYPES).index(dtype), int(decoupled), ROWS, columns)
    file.write(struct.pack("<5i4d2d", *numbers, *values, 1.5, bound))
    for x in (student, teacher, labels, weights, truth.loss.double(), grad.double()):
        file.write(x.contiguous().view(torch.uint8).numpy().tobytes())


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, required=True)
    parser.add_argument("--divergences", nargs="*", choices=embed.in_c(), default=[], metavar="NAME")
    args = parser.parse_args()
    torch.manual_seed(0)
    with args.file.open("wb") as file:
        for dtype in args.dtypes:
            for case in cases(args.divergences):
                for columns in SIZES:
                    write(file, case, dtype, columns)


if __name__ == "__main__":
    main()
