"""NaN in a row's logits is NaN in its loss and gradient; rows beside it, and rows without weight, see nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ARGMAX, DEFAULTS, MIXED, VALUE, Case, device, each, expected
from compare import assert_close
from torch import Tensor

import fusedkd
from fusedkd.backends import triton
from fusedkd.kernels.device import split_rows

VOCABULARY = 300
LABEL = 130
CASES = [*DEFAULTS, ("drkl", ARGMAX), ("ab", {"alpha": 0.2, "beta": 0.7, "target": 0.5})]
NAN_ROWS = 6


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Six rows with NaN, each elsewhere, and a good one. Student, teacher, labels."""
    student, teacher = 5 * torch.randn(2, NAN_ROWS + 1, VOCABULARY)
    student[0] = torch.nan
    student[1, 7] = torch.nan
    student[2, LABEL] = torch.nan
    teacher[3] = torch.nan
    teacher[4, 7] = torch.nan
    teacher[5, LABEL] = torch.nan
    return student, teacher, torch.full((NAN_ROWS + 1,), LABEL)


def by_autograd(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = fusedkd.kd_loss(leaf, teacher, labels, reduction="none", **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def at_once(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return fusedkd.kd_value_and_grad(student, teacher, labels, reduction="none", **options)


Way = Callable[..., tuple[Tensor, Tensor]]


def check(way: Way, case: Case, backend: str, **options: Any) -> None:
    """Loss and gradient of the rows above; the good row's are right all the same."""
    name, params = case
    place = device(backend)
    student, teacher, labels = rows()
    chosen = {"divergence": fusedkd.divergence(name, **params), "backend": backend}
    loss, grad = way(student.to(place), teacher.to(place), labels.to(place), **chosen, **options)
    assert loss[:NAN_ROWS].isnan().all(), loss
    assert grad[:NAN_ROWS].isnan().any(-1).all(), grad.isnan().sum(-1)
    good = (student[NAN_ROWS:].double(), teacher[NAN_ROWS:].double(), labels[NAN_ROWS:])
    truth, value, weights = expected(*good, case, {"reduction": "none", **options})
    bound = MIXED if name == "amid" else VALUE
    assert_close(loss[NAN_ROWS:], value, VALUE, what="loss")
    assert_close(grad[NAN_ROWS:], truth.gradient(torch.ones_like(value) * weights), bound, what="gradient")


@each("case", CASES)
@each("way", [by_autograd, at_once])
def test_every_divergence(way: Way, case: Case, backend: str) -> None:
    """Whatever the formula compares: total variation's slope is a sign, which NaN has too."""
    check(way, case, backend)


@each("case", [("rkl", {}), ("tvd", {}), ("taid", {})])
def test_options(case: Case, backend: str) -> None:
    """Cross-entropy, a temperature and a floor beside it."""
    check(by_autograd, case, backend, ce_weight=0.5, temperature=2.0)
    check(by_autograd, case, backend, support="floor")


def share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row by three programs."""
    monkeypatch.setattr(triton, "shares_rows", lambda problem, x: split_rows.serves(problem))
    monkeypatch.setattr(split_rows, "SMALLEST", 128)


@each("case", [case for case in CASES if case[0] not in ("amid", "akl") and case[1] is not ARGMAX])
def test_shared_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of a row's programs finds reaches all."""
    share_rows(monkeypatch)
    check(by_autograd, case, "triton")


@each("case", [("rkl", {}), ("tvd", {}), ("taid", {})])
def test_streaming(case: Case, backend: str) -> None:
    """The label's logit comes with one vocabulary chunk, the loss after the last."""
    place = device(backend)
    _, teacher, labels = rows()
    hidden, weight = torch.randn(NAN_ROWS + 1, 16), torch.randn(VOCABULARY, 16)
    hidden[0] = torch.nan
    bad = torch.tensor([True, False, False, True, True, True, False])
    hidden, teacher = hidden.to(place).requires_grad_(), teacher.to(place)
    loss = fusedkd.kd_loss(
        fusedkd.Head(hidden, weight.to(place)), teacher, labels.to(place), reduction="none", schedule="streaming",
        divergence=fusedkd.divergence(case[0], **case[1]), backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(hidden.grad.isnan().any(-1).cpu(), bad)


@each("token", [LABEL, 7, 8])
def test_token_logprobs(token: int, backend: str) -> None:
    """The token's logit, or another's, or all of them; and of a vocabulary of one."""
    place = device(backend)
    logits = rows()[0][:3].to(place).requires_grad_()
    for x in (logits, logits[:1, :1]):
        ids = torch.full((len(x),), min(token, x.shape[1] - 1), device=place)
        logprob, entropy = fusedkd.token_logprobs(x, ids, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
        assert logprob.isnan().all()
        assert entropy.isnan().all()
        assert grad[: len(x), : x.shape[1]].isnan().any(-1).all()


def check_no_weight(case: Case, backend: str) -> None:
    """Through autograd and at once."""
    place = device(backend)
    student, teacher, labels = (x.to(place) for x in rows())
    student[1, 8], teacher[5, 8] = torch.inf, torch.inf
    chosen = {"divergence": fusedkd.divergence(case[0], **case[1]), "reduction": "none", "backend": backend}
    weights = torch.zeros(NAN_ROWS + 1, device=place)
    weights[NAN_ROWS] = 2.0
    leaf = student.clone().requires_grad_()
    fusedkd.kd_loss(leaf, teacher, labels, **chosen).backward(weights)
    _, grad = fusedkd.kd_value_and_grad(student, teacher, labels, token_weights=weights, **chosen)
    assert leaf.grad is not None
    for found in (leaf.grad, grad):
        assert not found[:NAN_ROWS].any()
        assert found[NAN_ROWS].isfinite().all()
        assert found[NAN_ROWS].any()


@each("case", CASES)
def test_no_weight(case: Case, backend: str) -> None:
    """A row whose upstream gradient is 0 has a gradient of exactly 0: nothing that its logits hold is multiplied."""
    check_no_weight(case, backend)


@each("case", [("rkl", {}), ("jsd", {}), ("taid", {})])
def test_no_weight_in_shared_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of the row agrees."""
    share_rows(monkeypatch)
    check_no_weight(case, "triton")


def test_log_probabilities_without_weight(backend: str) -> None:
    """The same of `token_logprobs`, where both upstream gradients are 0."""
    place = device(backend)
    logits = rows()[0].to(place).requires_grad_()
    found = fusedkd.token_logprobs(
        logits, torch.full((NAN_ROWS + 1,), LABEL, device=place), return_entropy=True, backend=backend
    )
    weights = torch.zeros(NAN_ROWS + 1, device=place)
    weights[NAN_ROWS] = 2.0
    torch.autograd.backward(found, [weights, 0 * weights])
    assert logits.grad is not None
    assert not logits.grad[:NAN_ROWS].any()
    assert logits.grad[NAN_ROWS].isfinite().all()
    assert logits.grad[NAN_ROWS].any()
