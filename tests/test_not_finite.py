"""Rows that are not finite on a CPU: NaN where something is NaN or +inf, in that row and in no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ARGMAX, DEFAULTS, DISTINCT, IGNORE, MIXED, VALUE, Case, Rows, each, expected, near, unrelated
from compare import assert_close
from torch import Tensor

import fusedkd

BAD = 1  # the row
CASES = [*DEFAULTS, ("drkl", ARGMAX)]
VALUES = [torch.nan, torch.inf]
PLACES = ["whole row", "label", "another column"]


def spoiled(x: Tensor, labels: Tensor, place: str, value: float) -> Tensor:
    """A copy with `value` in row BAD."""
    column = int(labels[BAD])
    x = x.clone()
    x[BAD, {"whole row": slice(None), "label": column, "another column": (column + 5) % x.shape[1]}[place]] = value
    return x


def call(
    student: Tensor, teacher: Tensor | fusedkd.Head, labels: Tensor | None, case: Case, **options: Any
) -> tuple[Tensor, Tensor, fusedkd.KDStats]:
    """Loss per token, the gradient of their sum with respect to logits, statistics."""
    name, params = case
    leaf = student.clone().requires_grad_()
    options = {"reduction": "none", "backend": "torch", "return_stats": True} | options
    loss, stats = fusedkd.kd_loss(leaf, teacher, labels, divergence=fusedkd.divergence(name, **params), **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, stats


def check(rows: Rows, side: str, place: str, value: float, case: Case, backend: str = "torch", **options: Any) -> None:
    """The bad row is NaN in loss, gradient and what is about its side; others are what they are without it."""
    assert rows.labels is not None
    student, teacher = rows.student.float(), rows.teacher.float()
    if side == "student":
        student = spoiled(student, rows.labels, place, value)
    else:
        teacher = spoiled(teacher, rows.labels, place, value)
    loss, grad, stats = call(student, teacher, rows.labels, case, backend=backend, **options)
    assert loss[BAD].isnan()
    assert grad[BAD].isnan().all()
    about = ["loss", f"{side}_entropy", f"{side}_lse", f"{side}_logprob"]
    assert all(getattr(stats, name)[BAD].isnan() for name in about)
    good = torch.arange(len(loss)) != BAD
    truth, wanted, weights = expected(
        rows.student[good], rows.teacher[good], rows.labels[good], case, {"reduction": "none", **options}
    )
    assert_close(loss[good], wanted, VALUE, what="loss")
    bound = MIXED if case[0] == "amid" else VALUE
    assert_close(grad[good], truth.gradient(weights), bound, what="gradient")
    for name in ("student_lse", "teacher_entropy", "student_logprob"):
        assert_close(getattr(stats, name)[good], truth.stats[name][good[good]], VALUE, what=name)


@each("case", CASES)
@each("side", ["student", "teacher"])
@each("place", PLACES)
def test_every_divergence(case: Case, side: str, place: str) -> None:
    """NaN and +inf, which no softmax can use, beside rows that are far apart."""
    for value in VALUES:
        check(unrelated(6, 130), side, place, value, case)


@each("value", VALUES)
def test_statistics_of_the_other_side(value: float) -> None:
    """What is about the teacher alone knows nothing of the student."""
    rows = unrelated(6, 130)
    assert rows.labels is not None
    student = spoiled(rows.student.float(), rows.labels, "another column", value)
    _, _, stats = call(student, rows.teacher.float(), rows.labels, ("rkl", {}))
    assert all(x.isfinite().all() for x in (stats.teacher_entropy, stats.teacher_lse, stats.teacher_logprob))


@each("case", DISTINCT)
@each("side", ["student", "teacher"])
def test_beside_close_rows(case: Case, side: str) -> None:
    """What the bad row decides for its block costs close rows no digit; many rows, few of them ignored."""
    check(near(1.4e-2, 6, 130), side, "another column", torch.nan, case)
    check(near(1.4e-2, 40, 130), side, "another column", torch.nan, case)


@each("options", [{"ce_weight": 0.3}, {"temperature": 0.5, "temperature_squared": True}])
@each("place", PLACES)
def test_options(options: dict[str, Any], place: str) -> None:
    """A cross-entropy beside it and other temperatures."""
    for case in (("rkl", {}), ("tvd", {}), ("taid", {})):
        for value in VALUES:
            check(unrelated(6, 130), "student", place, value, case, **options)


@each("value", VALUES)
def test_beyond_the_compared_columns(value: float) -> None:
    """A cross-entropy reads columns that the divergence does not: its NaN is the row's."""
    student, teacher, labels = torch.randn(3, 50), torch.randn(3, 40), torch.tensor([1, 2, 3])
    student[BAD, 45] = value
    loss, grad, _ = call(student, teacher, labels, ("rkl", {}), ce_weight=0.5)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    loss, grad, _ = call(student, teacher, labels, ("rkl", {}))
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@each("value", VALUES)
@each("side", ["student", "teacher"])
def test_one_column(side: str, value: float) -> None:
    """A vocabulary of one compares nothing, and still shows that its logit is none."""
    student, teacher, labels = torch.randn(3, 1), torch.randn(3, 1), torch.zeros(3, dtype=torch.long)
    (student if side == "student" else teacher)[BAD] = value
    for case in DEFAULTS:
        loss, grad, _ = call(student, teacher, labels, case)
        assert loss.isnan().tolist() == [False, True, False], case
        assert grad.isnan().flatten().tolist() == [False, True, False], case
        assert not loss[[0, 2]].any()


@each("case", [("fkl", {}), ("tvd", {}), ("drkl", {})])
def test_outside_the_support(case: Case) -> None:
    """Where the teacher forbids a column nobody reads the student's logit there."""
    rows = unrelated(6, 130)
    assert rows.labels is not None
    student, teacher = rows.student.float(), rows.teacher.float()
    teacher[:, 5:9] = -torch.inf
    labels = torch.where((rows.labels >= 5) & (rows.labels < 9), 4, rows.labels)
    clean = call(student, teacher, labels, case)
    student[1, 6], student[3, 7] = torch.nan, torch.inf
    assert all(map(torch.equal, clean[:2], call(student, teacher, labels, case)[:2]))


@pytest.mark.xdist_group("compiled")
def test_compiled() -> None:
    """Compiled rows: NaN, and exact zeros where a row has no weight."""
    case: Case = ("rkl", {})  # whose graphs test_compiled.py makes too
    for side in ("student", "teacher"):
        for place in PLACES:
            for value in VALUES:
                check(unrelated(6, 130), side, place, value, case, "compiled")
    check_without_weight(case, "compiled")


def rows_of_all_kinds() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels: four rows that are not finite and two that are."""
    student, teacher = 3 * torch.randn(2, 6, 130)
    student[0], student[1, 7], teacher[2, 7], teacher[3, 5] = torch.nan, torch.inf, torch.nan, torch.inf
    return student, teacher, torch.full((6,), 5)


def check_without_weight(case: Case, backend: str = "torch") -> None:
    """Through autograd and at once."""
    student, teacher, labels = rows_of_all_kinds()
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    name, params = case
    options = {"divergence": fusedkd.divergence(name, **params), "backend": backend, "reduction": "sum"}
    leaf = student.clone().requires_grad_()
    loss = fusedkd.kd_loss(leaf, teacher, labels, token_weights=weights, **options)
    loss.backward()
    _, grad = fusedkd.kd_value_and_grad(student, teacher, labels, token_weights=weights, **options)
    assert loss.isfinite()
    for found in (leaf.grad, grad):
        assert found is not None
        assert found.any(-1).tolist() == [False, False, False, False, True, False]
        assert found.isfinite().all()


@each("case", CASES)
def test_without_weight(case: Case) -> None:
    """A weight of exactly 0 makes the gradient exactly 0, whatever the row holds."""
    check_without_weight(case)


@each("case", [("rkl", {}), ("tvd", {}), ("drkl", {})])
def test_streaming(case: Case) -> None:
    """A vocabulary chunk at a time, with and without weight."""
    student, teacher, labels = rows_of_all_kinds()
    head = fusedkd.Head(torch.where(teacher.isfinite(), teacher, 0.0), torch.eye(130))
    loss, grad, stats = call(student, head, labels, case, schedule="streaming")
    seen = [True, True, False, False, False, False]
    for found in (loss, stats.loss, stats.student_entropy, stats.student_logprob, stats.student_lse):
        assert found.isnan().tolist() == seen
    assert grad.isnan().all(-1).tolist() == seen
    weights = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    options = {"schedule": "streaming", "ce_weight": 0.5, "token_weights": weights}
    _, grad, _ = call(student, head, labels, case, **options)
    assert grad.any(-1).tolist() == [False, False, True, False, False, False]
    assert grad.isfinite().all()
    hidden = torch.where(student.isfinite(), student, 0.0).requires_grad_()
    loss = fusedkd.kd_loss(
        fusedkd.Head(hidden, torch.eye(130)), teacher, labels, divergence=fusedkd.divergence(case[0], **case[1]),
        schedule="streaming", reduction="none", backend="torch",
    )  # fmt: skip
    loss.sum().backward()
    assert hidden.grad is not None
    for found in (loss, hidden.grad.sum(-1)):
        assert found.isnan().tolist() == [False, False, True, True, False, False]


@each("value", [*VALUES, -torch.inf])
@each("count", [5, 40])
def test_ignored_rows(count: int, value: float) -> None:
    """Logits, parameters and upstream gradients of rows that do not count are not read, on either schedule."""
    student, teacher = 3 * torch.randn(2, count, 60)
    labels = torch.randint(60, (count,))
    labels[2::5] = IGNORE
    out = labels == IGNORE
    weights = torch.ones(count)
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("fkl", ("target", "nontarget")),
        ("ab", ("alpha", "beta")),
        ("jsd", ("beta",)),
        ("srkl", ("lam",)),
        ("taid", ("t",)),
        ("amid", ("alpha", "lam")),
        ("akl", ("mu",)),
        ("renyi", ("alpha",)),
        ("eopd", ("threshold",)),
    ]
    for name, keys in cases:
        for schedule in ("chunked", "streaming") if name not in ("amid", "akl") else ("chunked",):
            found = []
            for filler in (0.4, value):
                params = {key: torch.where(out, filler, weights * 0.4) for key in keys}
                leaf = torch.where(out[:, None], filler, student).requires_grad_()
                beside = torch.where(out[:, None], filler, teacher)
                head = fusedkd.Head(teacher, torch.eye(60))
                loss, stats = fusedkd.kd_loss(
                    leaf, beside if schedule == "chunked" else head, labels, reduction="none", return_stats=True,
                    schedule=schedule if schedule == "streaming" else "auto", backend="torch",
                    divergence=fusedkd.divergence(name, **params),
                )  # fmt: skip
                loss.backward(torch.where(out, filler, weights))
                assert leaf.grad is not None
                found.append(torch.cat((loss.detach()[:, None], leaf.grad, torch.stack(stats, -1)), -1))
            assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0)), (name, schedule)
            assert not found[1][out].nan_to_num(7.0 if name != "amid" else 0.0).any(), (name, schedule)


@each("case", CASES)
def test_nothing(case: Case) -> None:
    """No rows at all."""
    for labels in (torch.zeros(0, dtype=torch.long), None):
        if labels is None and case[0] in ("drkl", "dkd", "decoupled") and "target_token" not in case[1]:
            continue
        loss, grad, stats = call(torch.randn(0, 40), torch.randn(0, 40), labels, case)
        assert loss.shape == stats.loss.shape == (0,)
        assert grad.shape == (0, 40)
        if case[0] in ("amid", "akl") or "target_token" in case[1]:
            continue
        student = fusedkd.Head(torch.randn(0, 8), torch.randn(40, 8).requires_grad_())
        divergence = fusedkd.divergence(case[0], **case[1])
        options = {"schedule": "streaming", "divergence": divergence, "backend": "torch"}
        fusedkd.kd_loss(student, torch.randn(0, 40), labels, **options).backward()
        assert not student.weight.grad.any()


@each("value", VALUES)
@each("place", ["whole row", "label", "another column"])
def test_log_probabilities(place: str, value: float) -> None:
    """`token_logprobs`: the row's log-probability, entropy and gradient, and nothing of it without weight."""
    labels = torch.tensor([3, 4, 5])
    student = spoiled(torch.randn(3, 40), labels, place, value).requires_grad_()
    found = fusedkd.token_logprobs(student, labels, return_entropy=True, backend="torch")
    (grad,) = torch.autograd.grad(found, student, [torch.ones(3)] * 2, retain_graph=True)
    for x in (*found, grad.sum(-1)):
        assert x.isnan().tolist() == [False, True, False]
    assert grad[BAD].isnan().all()
    weights = torch.tensor([1.0, 0.0, 0.0])
    (grad,) = torch.autograd.grad(found, student, [weights, weights])
    assert grad.any(-1).tolist() == [True, False, False]
    assert grad.isfinite().all()
