"""The sections of the benchmark: which cases each measures, and how a case is measured.

ceilings   what the machine gives: a copy, and every matrix product of the head path alone
rows       logits in
heads      hidden states in: time, memory and accuracy of one training step of the loss head
topk       both with a teacher known by its likeliest tokens, beside the dense loss
memory     the time and memory of heads while V or N grows
accuracy   errors while the student comes closer to the teacher
step       a whole training step of a small transformers model
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from . import ceilings, shapes
from .cases import DISTRIBUTIONS, Case, Loss, mean_kl
from .measure import Deadline
from .rivals import FAMILIES, KLS_AND_JSD, OURS, Rival
from .step import TrainingStep, case_of
from .subjects import LossHead, Subject
from .timing import Clock, interleaved, reason

# Every section, and its share of a limited time.
SECTIONS = {"ceilings": 1, "rows": 4, "heads": 8, "topk": 4, "memory": 3, "accuracy": 2, "step": 3}
# Relative L2 errors against float64. Above the first an implementation is called imprecise; above the second, which
# a gradient of zeros has, it is wrong and is not timed.
ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
WRONG = 0.9
DISTANCES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
GPU_DISTANCES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3)  # of hidden states: bfloat16 holds nothing closer
FLOOR = "floor"
TIME_UP = "not measured: the section's time was up"
LISTED = 32  # tokens of a top-k teacher
MAIN = ("fkl", "rkl", "drkl", "ab", "jsd")


@dataclass(frozen=True)
class Settings:
    """How much is measured, on what, and beside whom."""

    device: str
    quick: bool = False
    families: tuple[str, ...] = FAMILIES

    @property
    def rounds(self) -> int:
        """Timed runs of everything."""
        return 2 if self.quick else 5 if self.device == "cpu" else 30

    @property
    def case_seconds(self) -> float | None:
        """Time after which a case has had rounds enough, if there were three."""
        return 60.0 if self.device == "cpu" else 6.0


class Runner:
    """An implementation on its way through a case: the loss it made, and its cell of the result."""

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        self.loss: Loss | None = None
        self.cell: dict[str, Any] = {
            "implementation": rival.name,
            "family": rival.family,
            "status": "measured",
            "reason": None,
            "errors": {},
            "extra_bytes": None,
            "seconds": [],
        }

    def ended(self, status: str, why: str) -> Runner:
        """Note that and why it gets no further."""
        self.loss = None
        self.cell.update(status=status, reason=why)
        return self


class Bench(NamedTuple):
    """What a section works with: settings, a clock, the time at which it must end, and whom to tell of progress."""

    settings: Settings
    clock: Clock
    deadline: Deadline
    tick: Callable[[str, bool], object]  # what is being done, and whether a case begins


def cases_of(section: str, settings: Settings) -> list[Case]:
    """Return the cases of a section, the most telling first."""
    plans = {"rows": _rows, "heads": _heads, "topk": _topk, "memory": _growing, "accuracy": _closer}
    return list(plans[section](settings)) if section in plans else []


def _dtype(settings: Settings) -> str:
    return "float32" if settings.device == "cpu" else "bfloat16"


def _shape(settings: Settings) -> shapes.Shape:
    if settings.quick:
        return shapes.QUICK
    return shapes.CPU if settings.device == "cpu" else shapes.QWEN3


def _rows(settings: Settings) -> Iterator[Case]:
    alone = ("eager",)
    shape, dtype = _shape(settings), _dtype(settings)
    if settings.quick or settings.device == "cpu":
        yield from _main("rows", settings)
        return
    yield from (Case("rows", shape, dtype, name) for name in ("fkl", "jsd"))
    yield from (Case("rows", shape, dtype, name, families=alone) for name in ("rkl", "drkl", "ab"))
    yield Case("rows", shapes.LLAMA3, "float32", "jsd")
    yield Case("rows", shapes.GEMMA3, dtype, "fkl", families=alone)
    yield Case("rows", shape.resized(rows=16), dtype, "rkl", families=alone)
    yield from (Case("rows", shape, dtype, name, families=alone, distribution="peaked") for name in ("fkl", "jsd"))


def _main(path: str, settings: Settings) -> Iterator[Case]:
    """The main divergences, on rows of both kinds."""
    for distribution in DISTRIBUTIONS:
        for name in MAIN[:1] if settings.quick else MAIN:
            yield Case(path, _shape(settings), _dtype(settings), name, distribution=distribution)


def _heads(settings: Settings) -> Iterator[Case]:
    shape, dtype = _shape(settings), _dtype(settings)
    if settings.quick or settings.device == "cpu":
        names = MAIN[:1] if settings.quick else (*KLS_AND_JSD, *(name for name in MAIN if name not in KLS_AND_JSD))
        yield from (Case("heads", shape, dtype, name) for name in names)
        yield from (Case("heads", shape, dtype, name, families=("eager",), distribution="peaked") for name in names)
        return
    few = ("eager", "trl", "unsloth")
    yield Case("heads", shapes.QWEN3, dtype, "fkl")
    yield Case("heads", shapes.LLAMA3, dtype, "jsd")
    yield Case("heads", shapes.LLAMA3_WIDE, dtype, "jsd")
    yield from (Case("heads", shape, dtype, name, families=few) for name in ("rkl", "drkl", "ab", "jsd"))
    for other in (shapes.GEMMA2, shapes.GEMMA3, shapes.PHI4, shapes.PHI4_MINI, shapes.QWEN3_NARROW):
        yield Case("heads", other, dtype, "fkl", families=few)
    yield from (Case("heads", shape, dtype, name, families=few, distribution="peaked") for name in ("fkl", "jsd"))


def _topk(settings: Settings) -> Iterator[Case]:
    for path in ("heads", "rows"):
        dense = Case(path, _shape(settings), _dtype(settings), "fkl", families=("eager",))
        yield from (replace(dense, families=None, listed=LISTED, tail=tail) for tail in ("bucket", "truncate"))
        yield dense


def _growing(settings: Settings) -> Iterator[Case]:
    shape, dtype = _shape(settings), _dtype(settings)
    kind = "QUICK" if settings.quick else "CPU" if settings.device == "cpu" else "GPU"
    few = ("eager", "liger", "trl", "unsloth", "fla")
    for rows in getattr(shapes, f"{kind}_ROWS"):
        yield Case("heads", shape.resized(rows=rows), dtype, "fkl", families=few)
    for vocab in getattr(shapes, f"{kind}_VOCABULARIES"):
        if vocab != shape.vocab:
            yield Case("heads", shape.resized(vocab=vocab), dtype, "fkl", families=few)


def _closer(settings: Settings) -> Iterator[Case]:
    few = shapes.Shape("accuracy", 16, _shape(settings).vocab, 256, 256)
    distances = DISTANCES[::3] if settings.quick else DISTANCES
    for kind in DISTRIBUTIONS:
        for name in MAIN[:1] if settings.quick else ("fkl", "rkl", "jsd"):
            yield from (Case("rows", few, "float32", name, distance, distribution=kind) for distance in distances)
        if settings.device == "cpu":
            yield from (Case("heads", few, "float32", "fkl", distance, distribution=kind) for distance in distances)
        else:
            many = few.resized(rows=1024)
            yield from (Case("heads", many, "bfloat16", "fkl", near, distribution=kind) for near in GPU_DISTANCES)


def units_of(section: str, settings: Settings) -> int:
    """How many times a section will tick."""
    if section == "ceilings":
        return len(ceilings.phases(_shape(settings), settings.device))
    if section == "step":
        return 1
    return len(cases_of(section, settings))


def measure_section(section: str, bench: Bench) -> dict[str, Any]:
    """Return everything that a section measures, as the result file holds it."""
    settings = bench.settings
    if section == "ceilings":
        found = ceilings.measure(_shape(settings), settings.device, bench.clock, settings.rounds, bench.tick)
        return {"ceilings": found}
    if section == "step":
        make = partial(TrainingStep, settings.device, settings.quick, settings.families)
        return {"cases": [measure_case(case_of(settings.device, settings.quick), make, bench)]}
    measured = []
    for case in cases_of(section, settings):
        make = partial(LossHead, case, settings.device, settings.families)
        measured.append(measure_case(case, make, bench, timed=section != "accuracy"))
    return {"cases": measured}


def measure_case(case: Case, make: Callable[[], Subject], bench: Bench, *, timed: bool = True) -> dict[str, Any]:
    """Return a case with a cell for every implementation: errors, and if `timed` peak memory and seconds."""
    bench.tick(str(case), True)
    result: dict[str, Any] = {"case": case.facts(), "reason": None, "floor": None, "cells": []}
    if bench.deadline.passed:
        return {**result, "reason": TIME_UP}
    try:
        subject = make()
        if any(rival.compiles for rival in subject.rivals):
            torch.compiler.reset()  # it gives up silently after a few shapes
        runners = [_checked(subject, rival, bench, judged=timed) for rival in _ours_first(subject.rivals)]
        if timed:
            result["floor"] = _timed(subject, runners, bench)
        elif isinstance(subject, LossHead):
            result["case"]["kl"] = mean_kl(subject.inputs)
        result["cells"] = [runner.cell for runner in sorted(runners, key=lambda x: subject.rivals.index(x.rival))]
    except torch.OutOfMemoryError as error:
        result["reason"] = reason(error)
    finally:
        gc.collect()
        if bench.settings.device != "cpu":
            torch.cuda.empty_cache()
    return result


def _ours_first(rivals: list[Rival]) -> list[Rival]:
    """If time runs out while others compile, what is compared is there."""
    return sorted(rivals, key=lambda rival: rival.family != OURS)


def _checked(subject: Subject, rival: Rival, bench: Bench, *, judged: bool) -> Runner:
    """Run an implementation once beside float64; what is absent, fails or disagrees gets no further."""
    runner = Runner(rival)
    bench.tick(f"{subject.case}: {rival.name}", False)
    if absent := rival.missing(subject.device):
        return runner.ended("absent", absent)
    if bench.deadline.passed:
        return runner.ended("not measured", TIME_UP)
    try:
        runner.loss = rival.loss(subject.case.divergence)
        found = subject.check(runner.loss)
        if rival.shifted:
            del found["loss"]
    except (ImportError, NotImplementedError) as error:
        return runner.ended("absent", reason(error))
    except Exception as error:
        return runner.ended("failed", reason(error))
    runner.cell["errors"] = {name: error if math.isfinite(error) else None for name, error in found.items()}
    allowed = ALLOWED[subject.case.dtype]
    worst = max(found, key=lambda name: found[name])
    if judged and found[worst] > allowed:
        runner.cell.update(status="imprecise", reason=f"{worst} is off by {found[worst]:.1e}, allowed {allowed:.0e}")
    if judged and found[worst] > WRONG:
        return runner.ended("wrong", f"{worst} is off by {found[worst]:.1e}: not timed")
    return runner


def _timed(subject: Subject, runners: list[Runner], bench: Bench) -> dict[str, Any]:
    """Measure peak memory, then run everything in turns; return the floor's samples."""
    subject.forget_truth()
    work = {runner.cell["implementation"]: _measured_memory(subject, runner) for runner in runners if runner.loss}
    cells = {runner.cell["implementation"]: runner.cell for runner in runners}
    floor: list[float] = []
    settings = bench.settings
    end = Deadline(settings.case_seconds)
    turns = interleaved(
        {FLOOR: subject.floor(), **work}, bench.clock, settings.rounds, lambda: end.passed or bench.deadline.passed
    )
    for number, found in enumerate(turns):
        bench.tick(f"{subject.case}: round {number} of {settings.rounds}", False)
        for name, seconds in found.items():
            if isinstance(seconds, str) and name != FLOOR:
                cells[name].update(status="failed", reason=seconds)
            elif isinstance(seconds, float) and number:  # the first round warms up
                (floor if name == FLOOR else cells[name]["seconds"]).append(seconds)
    return {"what": subject.floor_name, "seconds": floor}


def _measured_memory(subject: Subject, runner: Runner) -> Callable[[], object]:
    """Note an implementation's peak memory; return what is to be timed."""
    loss = runner.loss
    assert loss is not None
    try:
        runner.cell["extra_bytes"] = subject.peak(runner.rival, loss)
    except Exception as error:
        runner.cell["reason"] = f"memory not measured: {reason(error)}"
    return partial(subject.run, loss)
