"""No Python per row on a CPU: rows that need care take as many operations as there are kinds of care, not rows."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ARGMAX, DEFAULTS, VALUE, Case, Rows, check_logits, each, unrelated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkd
from fusedkd.backends import torch_logprobs, torch_rows
from fusedkd.kernels.device.rows import SAVED, STATS, Logits, Problem
from fusedkd.kernels.device.token_logprobs import SAVED as SAVED_LOGPROBS

FEW, MANY = 64, 512  # rows; fewer than a piece (torch_rows.PIECE)
WIDTHS = [10, 300]  # columns: the largest is looked for at once, or piece by piece


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> int:
    with Operations() as operations:
        run()
    return operations.count


def problem(case: Case, width: int) -> Problem:
    name, params = case
    chosen = fusedkd.divergence(name, **params)
    form = chosen.form
    argmax = chosen.target_token == "teacher_argmax"
    weights = (form.target, form.nontarget)
    return Problem(form.definition, form.decoupled, tuple(form.theta), weights, width, mix=form.mix, argmax=argmax)


def confident(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same FEW rows again and again: the student and the teacher all but certain of a token beside the label."""
    student, teacher = torch.randn(2, FEW, width)
    labels = torch.randint(width, (FEW,))
    top = (labels[:, None] + 1) % width
    student.scatter_add_(1, top, torch.full((FEW, 1), 20.0))
    teacher.scatter_add_(1, top, torch.full((FEW, 1), 18.0))
    return tuple(x.repeat(rows // FEW, *[1] * (x.dim() - 1)) for x in (student, teacher, labels))  # type: ignore[return-value]


@each("case", [*DEFAULTS, ("drkl", ARGMAX)])
@each("width", WIDTHS)
def test_operations(case: Case, width: int) -> None:
    """Value, gradient and both at once."""
    few, many = (operations_of(rows, case, width) for rows in (FEW, MANY))
    assert few == many


def operations_of(rows: int, case: Case, width: int) -> list[int]:
    torch.manual_seed(0)
    student, teacher, labels = confident(rows, width)
    sides = (problem(case, width), Logits(student[None]), Logits(teacher[None]), labels)
    loss, out, upstream = torch.zeros(rows), torch.zeros(rows, width), torch.ones(rows)
    saved, stats = torch.zeros(rows, SAVED), torch.zeros(rows, STATS)
    return [
        count(lambda: torch_rows.value(*sides, loss, saved, stats)),
        count(lambda: torch_rows.gradient(*sides, saved, upstream, out)),
        count(lambda: torch_rows.value_and_gradient(*sides, upstream, out, loss, stats)),
    ]


def test_log_probabilities() -> None:
    """The same of `token_logprobs`."""

    def operations(rows: int) -> list[int]:
        student, _, labels = confident(rows, 300)
        saved, out = torch.zeros(rows, SAVED_LOGPROBS), torch.zeros(rows, 300)
        args = (Logits(student[None]), labels, saved)
        return [
            count(lambda: torch_logprobs.value(*args, 1.0)),
            count(lambda: torch_logprobs.gradient(*args, torch.ones(rows, 2), out, 1.0)),
        ]

    assert operations(FEW) == operations(MANY)


@each("case", [("rkl", {}), ("jsd", {}), ("akl", {}), ("drkl", ARGMAX)])
def test_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of rows that threads share come out as those of one thread, bit for bit, ignored rows between them."""
    monkeypatch.setattr(torch_rows, "PIECE", 900)  # 3 rows
    monkeypatch.setattr(torch_rows, "FEW", 0)
    student, teacher, labels = confident(FEW, 300)
    labels[::5] = -100
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        loss, out, stats = torch.zeros(FEW), torch.full((FEW, 300), torch.nan), torch.zeros(FEW, STATS)
        sides = (problem(case, 300), Logits(student[None].requires_grad_()), Logits(teacher[None]), labels)
        with torch.no_grad():
            torch_rows.value_and_gradient(*sides, torch.rand(FEW, generator=torch.Generator()), out, loss, stats)
        found.append((loss, out, stats))
    assert found[0][1][labels >= 0].abs().sum() > 0
    for ours, alone in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), alone.nan_to_num(7.0))


@each("case", [case for case in DEFAULTS if not problem(case, 2).definition.whole_rows])
def test_logits_are_read_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient at once: what the first sweep makes of the logits is what later sweeps take."""
    readings, read = [], torch_rows._columns
    monkeypatch.setattr(torch_rows, "_columns", lambda *args: readings.append(1) or read(*args))
    student, teacher, labels = confident(FEW, 300)
    sides = (problem(case, 300), Logits(student[None]), Logits(teacher[None]), labels)
    torch_rows.value_and_gradient(*sides, torch.ones(FEW), torch.zeros(FEW, 300), torch.zeros(FEW), None)
    assert len(readings) == 1


def test_few_logits_take_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's threads are for calls that are worth them."""

    class Pool(Exception):
        pass

    def pool(*args: Any, **kwargs: Any) -> Any:
        raise Pool

    monkeypatch.setattr(torch_rows, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(torch_rows, "PIECE", 900)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    student, teacher, labels = confident(FEW, 300)
    sides = (problem(("rkl", {}), 300), Logits(student[None]), Logits(teacher[None]), labels)
    monkeypatch.setattr(torch_rows, "FEW", FEW * 300)
    torch_rows.value(*sides, torch.zeros(FEW), None, None)
    monkeypatch.setattr(torch_rows, "FEW", FEW * 300 - 1)
    with pytest.raises(Pool):
        torch_rows.value(*sides, torch.zeros(FEW), None, None)


FAULTS = """
import resource, torch, fusedkd
torch.set_num_threads(2)
s, t = torch.randn(2, 12, 1 << 17)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(6):
    fusedkd.kd_loss(s, t, divergence="jsd")
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(faults[2:], faults[3:])), s[:6].nbytes // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
def test_memory_is_kept_between_pieces() -> None:
    """Temporaries of a call reuse what an earlier one has touched: fewer page faults than one of them has pages."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    faults, pages = map(int, run.stdout.split())
    assert faults < pages


def test_an_error_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is raised by the call."""
    monkeypatch.setattr(torch_rows, "PIECE", 900)
    monkeypatch.setattr(torch_rows, "FEW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    student, teacher, labels = confident(FEW, 300)
    sides = (problem(("rkl", {}), 300), Logits(student[None]), Logits(teacher[None]), labels + 300)
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch_rows.value(*sides, torch.zeros(FEW), None, None)


@each("width", [3, 10, 128, 129, 384, 515])
@each("share", [0.1, 0.6, 1.0])
def test_rows_of_both_kinds(width: int, share: float) -> None:
    """Some rows or most have a token likelier than 1/2, near either end or between; every row of the gradient is right.

    The teacher knows nothing of it, so that the token's own entry is what is left of a difference of equal numbers.
    """
    rows = unrelated(40, width, std=1.0, ignored=False)
    assert rows.labels is not None
    top = torch.randint(width, (40,))
    top[:2] = torch.tensor([0, width - 1])
    top = torch.where(top == rows.labels, (top + 1) % width, top)
    sure = torch.arange(40) < 40 * share
    student = rows.student.scatter_add(1, top[:, None], torch.where(sure, 20.0, 0.0).double()[:, None])
    check_logits(Rows.of(student, rows.teacher, rows.labels), ("rkl", {}), "torch", per_row=VALUE)


@pytest.mark.parametrize("width", [1, 5, 128, 129, 256, 300, 1003])
def test_likeliest(width: int) -> None:
    """The place of a row's maximum, the first of equal ones."""
    q = torch.rand(200, width)
    q[:50] = q[:50].mul(3).floor()
    q[50:60, -1] = 2.0
    assert torch.equal(torch_rows.likeliest(q), q.argmax(-1))
