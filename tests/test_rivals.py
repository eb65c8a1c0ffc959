"""What the benchmark sets fusedkd beside: each against float64 where it is installed, and what is said of the rest.

`make bench-rivals` installs them all: `.venv-rivals/bin/python -m pytest tests/test_rivals.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedkd.bench import cases, measure, readme, results, rivals, sections, shapes, subjects, timing
from fusedkd.bench.cases import Case, RowInputs, answer, errors, make_inputs, relative, truth
from fusedkd.bench.rivals import PACKAGES, RIVALS, Rival
from fusedkd.bench.tables import where

ROOT = Path(__file__).parent.parent
TINY = shapes.Shape("tiny", 12, 300, 8, 12)
ALLOWED = sections.ALLOWED["float32"]
PROGRAMS = [x for x in RIVALS if x.path == "heads" and x.family in PACKAGES and not x.triton]


def found_errors(rival: Rival, divergence: str, distribution: str = "random") -> dict[str, float]:
    """Of the loss and both gradients, through heads."""
    inputs = make_inputs(Case("heads", TINY, "float32", divergence, distribution=distribution), "cpu")
    return errors(answer(inputs, rival.loss(divergence)), truth(inputs, divergence))


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("rival", "divergence"),
    [(rival, name) for rival in PROGRAMS for name in rival.divergences],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_each_is_what_it_is_named(rival: Rival, divergence: str) -> None:
    """Its settings make the same loss as fusedkd's."""
    if why := rival.missing("cpu"):
        pytest.skip(why)
    assert max(found_errors(rival, divergence).values()) < ALLOWED


@pytest.mark.parametrize("divergence", rivals.EAGER)
@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
def test_eager_torch(divergence: str, distribution: str) -> None:
    """The loss as one writes it, in float32."""
    assert max(found_errors(rivals.named("heads", "eager torch"), divergence, distribution).values()) < ALLOWED


@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
def test_linear_cross_entropy(distribution: str) -> None:
    """Its gradients are forward KL's, its loss is forward KL and the teacher's entropy."""
    rival = rivals.named("heads", "torch linear_cross_entropy")
    inputs = make_inputs(Case("heads", TINY, "float32", "fkl", distribution=distribution), "cpu")
    try:
        loss = rival.loss("fkl")
    except ImportError as error:
        pytest.skip(f"torch >= 2.13: {error}")
    found, exact = answer(inputs, loss), truth(inputs, "fkl")
    teacher = torch.distributions.Categorical(logits=inputs.logits()[1].double())
    assert relative(found.loss, exact.loss + teacher.entropy().mean()) < ALLOWED
    assert all(relative(found.gradients[name], x) < ALLOWED for name, x in exact.gradients.items())
    assert rival.shifted


def bench() -> sections.Bench:
    """What a section works with, told nobody."""
    settings = sections.Settings("cpu", quick=True)
    return sections.Bench(settings, timing.Clock("cpu"), measure.Deadline(None), lambda what, begins: None)


def test_of_a_shifted_loss_gradients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value says nothing; any other is judged by it."""

    def loss(divergence: str) -> Any:
        def more_by_seven(x: RowInputs) -> tuple[torch.Tensor, ...]:
            found = truth(x, divergence)
            return found.loss + 7, found.gradients["logits"]

        return more_by_seven

    members = [Rival(str(shifted), "eager", "rows", loss, shifted=shifted) for shifted in (True, False)]
    monkeypatch.setattr(rivals, "RIVALS", members)
    monkeypatch.setattr(subjects.LossHead, "peak", lambda self, rival, loss: 1000)
    case = Case("rows", TINY, "float32", "rkl")
    cells = sections.measure_case(case, lambda: subjects.LossHead(case, "cpu", ("eager",)), bench())["cells"]
    assert (cells[0]["status"], list(cells[0]["errors"])) == ("measured", ["logits"])
    assert "loss is off" in cells[1]["reason"]


@pytest.mark.parametrize("rival", [x for x in RIVALS if x.family in PACKAGES], ids=lambda x: f"{x.path} {x.name}")
def test_why_it_is_missing(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would help: a command, or a GPU."""
    monkeypatch.setattr(rivals, "interpreted", lambda: False)
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    package = PACKAGES[rival.family]
    alone = "--no-deps " if rival.family == "unsloth" else ""
    assert rival.missing("cpu") == f"not installed: pip install {alone}{package.name}, or make bench-rivals"
    monkeypatch.setattr(rivals, "find_spec", lambda name: name)
    assert rival.missing("cpu") == ("needs a GPU" if rival.triton else None)
    assert rival.missing("cuda") is None


def test_every_package_is_pinned() -> None:
    """In bench/rivals.txt, or with those that tests/compat needs; in one of them."""
    pins = (ROOT / "bench/rivals.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    for package in PACKAGES.values():
        assert len(re.findall(rf"\b{package.name}==[\d.]+\d", pins)) == 1, package.name


def test_what_all_have_is_measured_first() -> None:
    """The time of a section ends with peaked rows, which the rivals are not asked about."""
    found = sections.cases_of("heads", sections.Settings("cpu"))
    assert [case.divergence for case in found[:3]] == ["fkl", "rkl", "jsd"]
    assert {case.divergence for case in found} == set(sections.MAIN)
    half = len(found) // 2
    assert all(case.distribution == "random" and case.families is None for case in found[:half])
    assert all(case.distribution == "peaked" and case.families == ("eager",) for case in found[half:])


def cell(name: str, status: str = "measured", **facts: Any) -> dict[str, Any]:
    """What a result file has of an implementation."""
    measured = {"errors": {"loss": 1e-7, "weight": 2e-6}, "extra_bytes": 3 * 10**8, "seconds": [0.5, 1.5, 2.5]}
    return {"implementation": name, "status": status, "reason": None, **measured, **facts}


def result(**divergences: list[dict[str, Any]]) -> dict[str, Any]:
    """A result file of heads."""
    shape = {"rows": 512, "vocab": 151936, "dim": 256, "teacher_dim": 512, "softcap": None}
    floor = {"what": "four bare matrix products", "seconds": [1.0]}
    found = [
        {"case": {"path": "heads", "shape": shape, "dtype": "float32", "divergence": name}, "floor": floor, "cells": x}
        for name, x in divergences.items()
    ]
    versions = {name: None for name in ("liger-kernel", "trl")} | {"orda-kernel": "0.1.0"}
    machine = {**measure.machine("cpu"), "rivals": versions}
    return {"schema": results.SCHEMA, "sections": {"heads": {"machine": machine, "quick": False, "cases": found}}}


def test_the_readme_s_tables() -> None:
    """A line for each that ran, with time, memory and its worst error; what did not run is named once, with why."""
    gone = {"errors": {}, "extra_bytes": None, "seconds": []}
    absent = [cell("A", "absent", **gone, reason="needs a GPU"), cell("B", "absent", **gone, reason="needs a GPU")]
    off = {"errors": {"loss": None, "weight": 2e-3}, "extra_bytes": None}
    first, second = readme._heads(
        result(
            fkl=[cell("ours"), cell("theirs", "imprecise", **off), *absent],
            jsd=[cell("ours"), cell("wrong", "wrong", **{**gone, "errors": {"loss": 2.0}}), absent[0]],
            drkl=[cell("ours", errors={"weight": 3e-6})],
        )
    )
    assert first.columns == ("", "fkl", "jsd")
    assert first.rows == [
        ["ours", "1.50 s, 300 MB, 2e-06", "1.50 s, 300 MB, 2e-06"],
        ["theirs", "1.50 s, memory not measured, not finite, *imprecise*", ""],
        ["wrong", "", "*wrong*"],
    ]
    assert first.notes == ["A, B: needs a GPU"]
    assert (second.columns, second.rows, second.notes) == (("", "drkl"), [["ours", "1.50 s, 300 MB, 3e-06"]], [])
    assert (second.about, "orda-kernel 0.1.0" in first.about, "trl" in first.about) == ("", True, False)


def test_versions_stand_beside_the_machine() -> None:
    """Of the packages that are there."""
    line = where(result()["sections"]["heads"])
    assert re.search(r"torch \S+, orda-kernel 0\.1\.0, \d{4}-", line)
