"""Logits on both sides: every divergence, dtype, shape and layout against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    ALL,
    DEFAULTS,
    DISTINCT,
    DTYPES,
    IGNORE,
    LARGE_VOCABULARY,
    ODD,
    TYPICAL,
    VALUE,
    VOCABULARIES,
    Case,
    Rows,
    check_logits,
    device,
    each,
    named,
    random_labels,
    unrelated,
)
from compare import assert_close
from torch import Tensor

import fusedkd

LAYOUTS = {
    "padded rows": lambda x: torch.cat((x, x + 1), -1)[..., : x.shape[-1]],
    "shifted rows": lambda x: torch.cat((x[..., :3], x), -1)[..., 3:],
    "every second column": lambda x: torch.stack((x, -x), -1)[..., 0],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@each("case", ALL)
def test_every_divergence(case: Case, backend: str) -> None:
    """Unrelated rows, every entry of the gradient and of the statistics."""
    check_logits(unrelated(5, ODD), case, backend, typical=TYPICAL)


@each("case", DEFAULTS)
def test_many_rows(case: Case) -> None:
    """A CPU takes the scalars of many rows at once, and of few (everywhere else here) row by row."""
    check_logits(unrelated(40, 130), case, "torch")


@each("case", DEFAULTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b, dtypes in DTYPES.items() for d in dtypes if d != torch.float32], ids=named
)
def test_every_dtype(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Half precision comes in and goes out with no error but the rounding of the gradient."""
    check_logits(unrelated(5, 260, dtype=dtype), case, backend)


@each("case", DISTINCT)
@each("vocabulary", VOCABULARIES)
def test_every_vocabulary(case: Case, vocabulary: int, backend: str) -> None:
    """Sizes around the edges of a tile, and those with nothing or one column beside the target."""
    check_logits(unrelated(3, vocabulary), case, backend)


@each("case", [*DISTINCT[:6], DISTINCT[-1]])
@pytest.mark.usefixtures("wide_tiles")
def test_large_vocabulary(case: Case, backend: str) -> None:
    """A real vocabulary: many tiles, whose maxima differ."""
    check_logits(unrelated(2, LARGE_VOCABULARY, ignored=False), case, backend, typical=TYPICAL)


@each("case", [("rkl", {}), ("drkl", {})])
@each("layout", LAYOUTS)
def test_layouts(case: Case, layout: str, backend: str) -> None:
    """Views of larger memory are read in place, and the gradient reaches the tensor behind the view."""
    check_logits(unrelated(2, 3, 129), case, backend, prepare=LAYOUTS[layout])


@each("lead", [(), (1,), (0,), (2, 3), (2, 1, 3), (0, 4)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    """Any number of leading dimensions, none and empty ones included."""
    check_logits(unrelated(*lead, 37, ignored=False), ("drkl", {}), backend)


def test_expanded_rows(backend: str) -> None:
    """One row seen many times (stride 0) collects the gradients of all of them."""
    place = device(backend)
    rows = unrelated(1, 129, ignored=False)
    labels = random_labels((4,), 129)
    student, teacher = (x.expand(4, -1) for x in (rows.student, rows.teacher))
    truth = oracle.distill(student, teacher, labels, oracle.meaning("rkl"))
    leaf = rows.student.to(place, torch.float32).requires_grad_()
    theirs = rows.teacher.to(place, torch.float32).expand(4, -1)
    loss = fusedkd.kd_loss(
        leaf.expand(4, -1), theirs, labels.to(place), divergence="rkl", reduction="none", backend=backend
    )
    upstream = torch.randn(4)
    loss.backward(upstream.to(place))
    assert_close(loss, truth.loss, VALUE)
    assert_close(leaf.grad, truth.gradient(upstream).sum(0, keepdim=True), VALUE)


@each("sizes", [(300, 257, None), (257, 300, None), (300, 257, 129), (257, 257, 200)])
@each("case", DISTINCT)
def test_vocabulary_mismatch(case: Case, sizes: tuple[int, int, int | None], backend: str) -> None:
    """Columns beyond the common range are not read (they hold NaN) and get no gradient."""
    v_student, v_teacher, vocab_size = sizes
    common = vocab_size or min(v_student, v_teacher)
    student, teacher = (5 * torch.randn(3, v, dtype=torch.float64) for v in (v_student, v_teacher))
    student[:, common:] = teacher[:, common:] = torch.nan
    rows = Rows.of(student, teacher, random_labels((3,), common))
    check_logits(rows, case, backend, vocab_size=vocab_size)


def test_dtypes_may_differ(backend: str) -> None:
    """A float32 student beside a bfloat16 teacher, and the reverse."""
    rows = unrelated(5, 129, dtype=torch.bfloat16)
    check_logits(rows, ("rkl", {}), backend, teacher_dtype=torch.float32)
    check_logits(Rows.of(rows.student, rows.teacher, rows.labels), ("rkl", {}), backend, teacher_dtype=torch.bfloat16)


@each("case", DISTINCT)
def test_ignored_rows_are_not_read(case: Case, backend: str) -> None:
    """NaN in an ignored row leaves its loss, statistics and gradient exactly 0."""
    rows = unrelated(6, 129)
    for x in (rows.student, rows.teacher):
        x[rows.labels == IGNORE] = torch.nan
    check_logits(rows, case, backend)


@each("case", DISTINCT)
def test_all_rows_ignored(case: Case, backend: str) -> None:
    """Nothing counted gives exact zeros."""
    rows = unrelated(3, 129)
    check_logits(Rows.of(rows.student, rows.teacher, torch.full((3,), IGNORE)), case, backend)


@each("case", [("fkl", {}), ("rkl", {}), ("ab", {}), ("rkl", {"target": 2.0, "nontarget": 2.0})])
def test_without_labels(case: Case, backend: str) -> None:
    """No labels: nothing is held out, and the target statistics are NaN."""
    rows = unrelated(4, ODD)
    check_logits(Rows.of(rows.student, rows.teacher, None), case, backend, typical=TYPICAL)


@pytest.mark.smoke
@each("case", DEFAULTS)
def test_backends_agree(case: Case) -> None:
    """The same call on both backends: the same numbers, the same ignored rows."""
    name, params = case
    rows = unrelated(5, 1000)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        leaf = rows.student.to(device(backend), torch.float32).requires_grad_()
        teacher, labels = rows.teacher.to(leaf), rows.labels.to(leaf.device)
        divergence = fusedkd.divergence(name, **params)
        loss = fusedkd.kd_loss(leaf, teacher, labels, divergence=divergence, backend=backend)
        loss.backward()
        return loss.detach().double().cpu(), leaf.grad.double().cpu()

    (loss, grad), (their_loss, their_grad) = run("torch"), run("triton")
    assert_close(loss.float(), their_loss, VALUE)
    assert_close(grad.float(), their_grad, VALUE)


def test_same_call_same_bits(backend: str) -> None:
    """Two calls, and two backward passes of one call, give the same bits."""
    rows, place = unrelated(5, ODD), device(backend)
    teacher, labels = rows.teacher.to(place, torch.float32), rows.labels.to(place)
    seen = []
    for _ in range(2):
        leaf = rows.student.to(place, torch.float32).requires_grad_()
        loss = fusedkd.kd_loss(leaf, teacher, labels, divergence="drkl", backend=backend)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            seen.append((loss.detach(), grad))
    for loss, grad in seen[1:]:
        assert torch.equal(loss, seen[0][0])
        assert torch.equal(grad, seen[0][1])
