"""The numerical pitfalls of the literature, one by one: the textbook formula falls into it here, the library does not.

Every test first shows in float32 that the pitfall is there, by an error no smaller than the one that is known of it.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import torch
from cases import VALUE, Case, device, each
from torch import Tensor

import fusedkd

V = 32_000


def ours(student: Tensor, teacher: Tensor, labels: Tensor | None, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """Per-token loss and gradient in float32."""
    leaf = student.to(device(backend), torch.float32).requires_grad_()
    made = fusedkd.divergence(case[0], **case[1])
    given = None if labels is None else labels.to(leaf.device)
    loss = fusedkd.kd_loss(leaf, teacher.to(leaf), given, divergence=made, reduction="none", backend=backend)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach().double().cpu(), leaf.grad.double().cpu()


def truth(student: Tensor, teacher: Tensor, labels: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    exact = oracle.distill(
        student.float().double(), teacher.float().double(), labels, oracle.meaning(case[0], **case[1])
    )
    return exact.loss, exact.gradient(torch.ones_like(exact.loss))


def off(found: Tensor, exact: Tensor) -> float:
    """Relative error of the whole; infinite where something is not finite."""
    gap = float((found.double() - exact).norm() / exact.norm())
    return gap if math.isfinite(gap) else math.inf


@each("outside", [3.5e-3, 6e-5, 2e-8])
def test_one_minus_q(outside: float, backend: str) -> None:
    """DRKL as (RKL − q_y log(q_y/p_y))/(1 − q_y) …: 1 − q_y has no digits left (0.5 to 70 % off)."""
    teacher, student = 2 * torch.randn(2, 1, V, dtype=torch.float64)
    label = torch.tensor([7])
    student[0, 7] = student[0].logsumexp(0) + math.log(1 / outside)
    case: Case = ("decoupled", {"base": "rkl"})
    exact, exact_grad = truth(student, teacher, label, case)
    logq, logp = student.float().log_softmax(-1)[0], teacher.float().log_softmax(-1)[0]
    q, p = logq.exp(), logp.exp()
    rkl = (q * (logq - logp)).sum()
    rest = (rkl - q[7] * (logq[7] - logp[7])) / (1 - q[7]) - (1 - q[7]).log() + (1 - p[7]).log()
    binary = q[7] * (logq[7] - logp[7]) + (1 - q[7]) * ((1 - q[7]).log() - (1 - p[7]).log())
    assert not off((binary + rest)[None], exact) < (2e-5 if outside > 1e-3 else 1e-3)
    loss, grad = ours(student, teacher, label, case, backend)
    assert off(loss, exact) < VALUE
    assert off(grad, exact_grad) < VALUE


def test_exponents_that_add_up(backend: str) -> None:
    """exp(αu + βz) of logits around 90 with α + β > 1 overflows; it needs a maximum of its own."""
    teacher, student = 3 * torch.randn(2, 2, 500, dtype=torch.float64) + 90
    case: Case = ("ab", {"alpha": 0.2, "beta": 0.9})
    assert (0.2 * teacher + 0.9 * student).float().exp().isinf().any()
    exact, exact_grad = truth(student, teacher, None, case)
    loss, grad = ours(student, teacher, None, case, backend)
    assert off(loss, exact) < VALUE
    assert off(grad, exact_grad) < VALUE


def test_powers_of_a_probability(backend: str) -> None:
    """softmax(u)^0.2 is 0 where p = e^−110, and 2.8e-10 in truth."""
    student = torch.zeros(1, 64, dtype=torch.float64)
    teacher = torch.full((1, 64), -110.0, dtype=torch.float64)
    teacher[0, 0] = 0
    assert (teacher.float().softmax(-1)[0, 1] ** 0.2) == 0
    case: Case = ("ab", {"alpha": 0.2, "beta": 0.0})
    exact, exact_grad = truth(student, teacher, None, case)
    loss, grad = ours(student, teacher, None, case, backend)
    assert off(loss, exact) < VALUE
    assert off(grad[:, 1:], exact_grad[:, 1:]) < VALUE


def test_logarithms_of_probabilities(backend: str) -> None:
    """log p − log q of probabilities is −inf or NaN beyond a gap of 104; of logits it is exact."""
    teacher, student = torch.randn(2, 2, 300, dtype=torch.float64)
    teacher[:, :100] -= 300
    assert not teacher.float().softmax(-1).log().isfinite().all()
    for name in ("rkl", "fkl", "jsd"):
        exact, exact_grad = truth(student, teacher, None, (name, {}))
        loss, grad = ours(student, teacher, None, (name, {}), backend)
        assert off(loss, exact) < VALUE
        assert off(grad, exact_grad) < VALUE


@each("case", [("jsd", {}), ("skl", {}), ("srkl", {}), ("amid", {})])
def test_mixtures_below_the_smallest_number(case: Case, backend: str) -> None:
    """log(λp + (1−λ)q) is −inf where both are below 1e-38."""
    teacher, student = torch.randn(2, 2, 300, dtype=torch.float64)
    teacher[:, :150] -= 200
    student[:, :150] -= 150
    q, p = student.float().softmax(-1), teacher.float().softmax(-1)
    assert (0.1 * p + 0.9 * q).log().isinf().any()
    exact, exact_grad = truth(student, teacher, None, case)
    loss, grad = ours(student, teacher, None, case, backend)
    assert off(loss, exact) < VALUE
    assert off(grad, exact_grad) < VALUE


@each("offset", [0.0, 500.0])
def test_value_as_a_difference(offset: float, backend: str) -> None:
    """E_q[z − u] − (Ls − Lt): 1.7e-4 off at a KL of 1e-3, 4e-2 with logits around 500."""
    teacher = 5 * torch.randn(4, V, dtype=torch.float64) + offset
    teacher = teacher.float().double()
    student = (teacher + 0.05 * torch.randn(4, V, dtype=torch.float64)).float().double()
    exact, exact_grad = truth(student, teacher, None, ("rkl", {}))
    s, t = student.float(), teacher.float()
    textbook = (s.softmax(-1) * (s - t)).sum(-1) - (s.logsumexp(-1) - t.logsumexp(-1))
    assert off(textbook, exact) > (1e-2 if offset else 5e-5)
    loss, grad = ours(student, teacher, None, ("rkl", {}), backend)
    assert off(loss, exact) < VALUE
    assert off(grad, exact_grad) < VALUE


def test_small_alpha(backend: str) -> None:
    """(q S − p^α q^(1−α))/α at α = 1e-4 is 7.5e-4 off; with expm1 it is not."""
    teacher, student = torch.randn(2, 4, 2000, dtype=torch.float64)
    case: Case = ("alpha", {"alpha": 1e-4})
    exact, exact_grad = truth(student, teacher, None, case)
    logq, logp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    mixed = (1e-4 * logp + (1 - 1e-4) * logq).exp()
    textbook = (logq.exp() * mixed.sum(-1, keepdim=True) - mixed) / 1e-4
    assert float((textbook.double() - exact_grad).abs().max() / exact_grad.abs().max()) > 1e-4
    loss, grad = ours(student, teacher, None, case, backend)
    assert off(loss, exact) < VALUE
    assert float((grad - exact_grad).abs().max() / exact_grad.abs().max()) < VALUE


@each("case", [("rkl", {}), ("fkl", {}), ("drkl", {}), ("dkd", {}), ("jsd", {})])
def test_saturated_target(case: Case, backend: str) -> None:
    """h_y − q_y H cancels at the target as q_y → 1; a clamped log(1 − q_y) has gradient 0 beyond 1 − 1.2e-7."""
    teacher, student = torch.randn(2, 3, 400, dtype=torch.float64)
    label = torch.tensor([1, 2, 3])
    for row, gap in enumerate((20.0, 30.0, 40.0)):
        student[row, label[row]] = student[row].logsumexp(0) + gap
    assert (student.float().softmax(-1).amax(-1) > 1 - 1.2e-7).all()
    exact, exact_grad = truth(student, teacher, label, case)
    loss, grad = ours(student, teacher, label, case, backend)
    assert off(loss, exact) < VALUE
    at_label = torch.arange(3), label
    assert (grad[at_label] != 0).all()
    for row in range(3):
        assert off(grad[row], exact_grad[row]) < 1e-4
        assert off(grad[at_label][row : row + 1], exact_grad[at_label][row : row + 1]) < 1e-4


CONTINUOUS: list[tuple[Case, Case, bool]] = [  # a limit, a neighbour, and whether the loss is continuous there
    (("ab", {"alpha": 0.0, "beta": 0.6}), ("ab", {"alpha": 1e-5, "beta": 0.6}), True),
    (("ab", {"alpha": 0.6, "beta": 0.0}), ("ab", {"alpha": 0.6, "beta": 1e-5}), True),
    (("ab", {"alpha": 0.3, "beta": -0.3}), ("ab", {"alpha": 0.3, "beta": -0.30001}), True),
    (("skl", {"lam": 0.0}), ("skl", {"lam": 1e-6}), True),
    (("taid", {"t": 1.0}), ("taid", {"t": 1 - 1e-6}), True),
    (("jsd", {"beta": 0.0}), ("jsd", {"beta": 1e-3}), False),
    (("jsd", {"beta": 1.0}), ("jsd", {"beta": 1 - 1e-3}), False),
]


@each("which", range(len(CONTINUOUS)))
def test_limits(which: int, backend: str) -> None:
    """Limits are limits, but for GKD's two ends of β, which are other losses by definition."""
    limit, neighbour, continuous = CONTINUOUS[which]
    teacher, student = 0.5 * torch.randn(2, 3, 200, dtype=torch.float64)
    values = [ours(student, teacher, None, case, backend)[0] for case in (limit, neighbour)]
    apart = off(values[0], values[1])
    assert apart < 1e-3 if continuous else apart > 10


def test_nothing_to_weigh(backend: str) -> None:
    """AKL at p = q is 0/0 in its weights; TAID at t = 0 has no gradient, also beside −inf."""
    logits = torch.randn(3, 200, dtype=torch.float64)
    loss, grad = ours(logits, logits.clone(), None, ("akl", {}), backend)
    assert not loss.any()
    assert not grad.any()
    teacher = torch.randn(3, 200, dtype=torch.float64)
    teacher[:, ::5] = -torch.inf
    student = logits.clone()
    student[:, 1::5] = -torch.inf
    for case in (("taid", {"t": 0.0}), ("taid", {"t": 0.0, "base": "rkl"})):
        loss, grad = ours(student, teacher, None, case, backend)
        assert not loss.any()
        assert not grad.any()
    options: dict[str, Any] = {"divergence": fusedkd.divergence("taid", t=1.0), "reduction": "none"}
    plain = fusedkd.kd_loss(student.float(), teacher.float(), reduction="none")
    assert torch.equal(fusedkd.kd_loss(student.float(), teacher.float(), **options), plain)
