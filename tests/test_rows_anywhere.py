"""Rows that begin anywhere: what kernels give does not depend on where logits lie, nor on what lies beside them.

Around every row is NaN. Kernels load the whole vectors of rows that begin alike on both sides, and their edges one by
one (kernels/device/vectors.py); of others they load every column by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import assert_close
from torch import Tensor

import fusedkd

pytest.importorskip("triton")
from fusedkd.kernels.device import rows

N = 4
WIDE = 4096 + 1024 + 5  # more than the widest tile, and no whole vector at the end
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # of a gradient, rounded to the dtype
DIVERGENCES = ("fkl", "rkl", "ab", "jsd", "amid", "akl")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether rows were found to begin alike, launch by launch."""
    found, congruent = [], rows.congruent

    def noted(*sides: Any) -> bool:
        found.append(congruent(*sides))
        return found[-1]

    monkeypatch.setattr(rows, "congruent", noted)
    return found


def placed(x: Tensor, past: int, stride: int) -> Tensor:
    """A copy (N, V) whose first row begins `past` elements behind 64 bytes, amid NaN."""
    memory = torch.full((past + len(x) * stride + 8,), torch.nan, dtype=x.dtype)
    assert memory.data_ptr() % 64 == 0
    return memory.as_strided(x.shape, (stride, 1), past).copy_(x)


def logits(columns: int, dtype: torch.dtype, *likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides and labels, the third row ignored; of the other rows the student is sure of one token each."""
    student, teacher = 3 * torch.randn(2, N, columns)
    for row, column in enumerate(likeliest):
        student[row, column] = 12.0 if columns < 1000 else 16.0
    labels = torch.tensor([columns - 1, 0, -100, columns // 2])
    return student.to(dtype), teacher.to(dtype), labels


def results(student: Tensor, teacher: Tensor, labels: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses and gradient."""
    x = student.detach().requires_grad_()
    loss = fusedkd.kd_loss(x, teacher, labels, reduction="none", backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def check(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> None:
    """Against float64."""
    loss, gradient = results(student, teacher, labels, "triton", **options)
    truth, slope = results(student.double(), teacher.double(), labels, "torch", **options)
    assert_close(loss, truth, 5e-6)
    assert_close(gradient, slope, BOUND[student.dtype], dtype=student.dtype, what="gradient")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("past", range(8))
def test_every_residue(past: int, dtype: torch.dtype, launches: list[bool]) -> None:
    """Of the first row, and of others by an odd stride: label and likeliest token in the first and last vector."""
    student, teacher, labels = logits(133, dtype, 0, 132, 7, 131)
    check(placed(student, past, 141), placed(teacher, past, 141), labels, divergence="rkl")
    assert launches == [True, past % (16 // dtype.itemsize) == 0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("columns", "past"), [(5, 3), (WIDE, 0)])
def test_every_class(divergence: str, columns: int, past: int, launches: list[bool]) -> None:
    """Rows with no whole vector, and with several tiles."""
    student, teacher, labels = logits(columns, torch.bfloat16, 0, columns - 1, 1, columns // 2)
    check(placed(student, past, columns), placed(teacher, past + 8, columns), labels, divergence=divergence)
    assert launches == [True, past == 0]


@pytest.mark.parametrize(
    "options",
    [
        {"ce_weight": 0.5},
        {"divergence": fusedkd.divergence("drkl", target_token="teacher_argmax")},
        {"vocab_size": 120},
        {"vocab_size": 120, "ce_weight": 0.5},
        {"support": "floor"},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], launches: list[bool]) -> None:
    """That have columns of their own, or look for the target."""
    student, teacher, labels = logits(333, torch.float32, 0, 332, 7, 331)
    labels = labels.clamp(max=options.get("vocab_size", 333) - 1)
    teacher[0, :2], teacher[3, -2:] = 9.0, 9.0  # the first of equal largest ones is the target
    check(placed(student, 1, 333), placed(teacher, 5, 333), labels, **{"divergence": "drkl", **options})
    assert launches[0]


def test_two_dtypes(launches: list[bool]) -> None:
    """A vector of one side is two loads of the other, or half a load."""
    student, teacher, labels = logits(133, torch.float32, 0, 132, 7, 131)
    for mine, theirs in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        check(placed(student.to(mine), 3, 133), placed(teacher.to(theirs), 7, 133), labels, divergence="fkl")
    assert launches[0]


def test_slices(launches: list[bool]) -> None:
    """The last position of every sequence cut off on both sides, and a window of columns.

    The gradient lies without gaps: where it begins otherwise, its kernel finds another's tiles in what the value left.
    """
    student, teacher, _ = logits(133, torch.bfloat16)
    for cut in (lambda x: x.view(2, 2, 133)[:, :-1], lambda x: x.view(2, 2, 133)[:, 1:, 3:130]):
        check(cut(student), cut(teacher), torch.tensor([[5], [120]]), divergence="rkl")
    assert launches == [True, False] * 2


def test_sides_that_begin_differently(launches: list[bool]) -> None:
    """Every column by itself, and the same numbers."""
    student, teacher, labels = logits(133, torch.bfloat16, 0, 132, 7, 131)
    for past, stride in ((1, 133), (0, 134)):
        check(placed(student, 0, 133), placed(teacher, past, stride), labels, divergence="rkl")
    assert not any(launches)


def test_the_backward_pass_of_a_copy() -> None:
    """Saved tensors that come back elsewhere have their tiles elsewhere: a row's likeliest token is found again."""
    student, teacher, labels = logits(WIDE, torch.float32, 4098, 4095, 0, WIDE - 1)

    def elsewhere(x: Tensor) -> Tensor:
        return placed(x.view(N, WIDE), 1, WIDE).view(x.shape) if x.numel() == N * WIDE else x

    x = placed(student, 0, WIDE + 3).requires_grad_()
    other = placed(teacher, 0, WIDE + 3)
    about = {"divergence": "rkl", "reduction": "none", "backend": "triton"}
    with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
        loss = fusedkd.kd_loss(x, other, labels, **about)
    gradient = torch.autograd.grad(loss.sum(), x)[0]
    _, slope = results(student.double(), teacher.double(), labels, "torch", divergence="rkl")
    assert_close(gradient, slope, BOUND[torch.float32], what="gradient")


@pytest.mark.parametrize("schedule", ["chunked", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_meet_no_unaligned_row(schedule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is launched with an odd vocabulary has rows at multiples of 16 elements."""
    seen: list[Tensor] = []
    logits_arg, grad_arg = rows.logits_arg, rows.grad_arg

    def noted(tensor: Tensor) -> None:
        seen.append(tensor)

    monkeypatch.setattr(rows, "logits_arg", lambda side, *rest: noted(side.x) or logits_arg(side, *rest))
    monkeypatch.setattr(rows, "grad_arg", lambda out, *rest, **more: noted(out) or grad_arg(out, *rest, **more))
    heads = [fusedkd.Head(*(torch.randn(n, 8).to(dtype).requires_grad_() for n in (6, 301))) for _ in range(2)]
    about = {"divergence": "rkl", "schedule": schedule, "backend": "triton"}
    fusedkd.kd_loss(heads[0], heads[1], torch.arange(6), **about).backward()
    assert seen
    for tensor in seen:
        assert tensor.data_ptr() % 16 == 0
        assert tensor.stride(-2) % 16 == 0
