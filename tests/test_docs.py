"""The documentation's code runs, and it names what there is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import fusedkd

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = {page: re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S) for page in DOCS.glob("*.md")}


def test_there_is_something_to_run() -> None:
    """The pages with code are found, and their blocks."""
    assert {page.name for page, blocks in EXAMPLES.items() if blocks} >= {
        "index.md",
        "choosing.md",
        "memory.md",
        "numerics.md",
    }


@pytest.mark.parametrize("page", [page for page, blocks in EXAMPLES.items() if blocks], ids=lambda page: page.stem)
def test_examples(page: Path) -> None:
    """The blocks of a page run in order; what they assert holds."""
    names: dict[str, object] = {}
    for block in EXAMPLES[page]:
        exec(compile(block, str(page), "exec"), names)


def test_the_reference_is_complete() -> None:
    """Every public name, and nothing else of the top level."""
    named = re.findall(r"^::: fusedkd\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted({*fusedkd.__all__, "compat"} - {"__version__"})


def test_the_table_of_drop_ins() -> None:
    """Every module of compat has a row, and every name in a row exists."""
    table = (DOCS.parent / "README.md").read_text()
    named = set(re.findall(r"fusedkd\.compat\.(\w+)\.(\w+)", table))
    for module, names in re.findall(r"from fusedkd\.compat\.(\w+) import ([\w, ]+)", table):
        named |= {(module, name) for name in re.findall(r"\w+", names)}
    modules = {path.stem for path in (Path(fusedkd.__file__).parent / "compat").glob("[!_]*.py")}
    assert modules == {module for module, _ in named}
    for module, name in named:
        assert callable(getattr(import_module(f"fusedkd.compat.{module}"), name)), f"{module}.{name}"
