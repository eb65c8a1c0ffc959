"""Result files: one per device, a section as it was last measured, with the machine of that day."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1


def stem(device: str, name: str, quick: bool) -> str:
    """Return the name of a device's files without their endings."""
    slug = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug + ("-quick" if quick else "")


def empty() -> dict[str, Any]:
    """Return a result without a section."""
    return {"schema": SCHEMA, "sections": {}}


def load(file: Path) -> dict[str, Any]:
    """Return a result file's contents, or those of an empty one where there is none of this schema.

    Raises:
        argparse.ArgumentError: the file is not JSON.
    """
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise argparse.ArgumentError(None, f"--out: {file} is not JSON ({error}); delete it") from error
        if found.get("schema") == SCHEMA:
            return found
    return empty()


def save(file: Path, result: dict[str, Any]) -> None:
    """Write a result file."""
    file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def committed(folder: Path) -> list[dict[str, Any]]:
    """Return the full (not quick) results in a folder, the CPU's first."""
    files = sorted(folder.glob("*.json"), key=lambda file: (file.stem != "cpu", file.stem))
    found = [load(file) for file in files]
    return [
        result for result in found if result["sections"] and not any(x["quick"] for x in result["sections"].values())
    ]


def cases(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Return the measured cases of a section, none if it was not run."""
    return [case for case in result["sections"].get(section, {}).get("cases", []) if case["cells"]]


def distribution(case: dict[str, Any]) -> str:
    """Return "random" or "peaked"; files from before there were two kinds of rows do not say."""
    return case["case"].get("distribution", "random")


def mark(case: dict[str, Any]) -> str:
    """Return what is added to the name of a case of peaked rows; random ones are not marked."""
    return ", peaked rows" if distribution(case) == "peaked" else ""


def machine(result: dict[str, Any]) -> dict[str, Any]:
    """Return the machine of the section that was measured last."""
    return max((x["machine"] for x in result["sections"].values()), key=lambda x: x["date"])


def is_gpu(result: dict[str, Any]) -> bool:
    """Whether a result was measured on a GPU."""
    return machine(result)["device"] != "cpu"


def timed(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the cells of a case that have times."""
    yield from (cell for cell in case["cells"] if cell["seconds"])


def median(seconds: Sequence[float]) -> float:
    """Return the middle sample."""
    return statistics.median(seconds)


def spread(seconds: Sequence[float]) -> float:
    """Return half the distance between the quartiles, or between the ends of a few samples."""
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / 2
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2


def over_floor(case: dict[str, Any], cell: dict[str, Any]) -> float | None:
    """Return a cell's time in units of the least work that there is, measured in the same rounds."""
    floor = case["floor"]["seconds"] if case["floor"] else []
    return median(cell["seconds"]) / median(floor) if floor and cell["seconds"] else None
