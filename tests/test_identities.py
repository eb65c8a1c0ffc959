"""What the literature says is the same, is; each side of an identity goes its own way through the kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import VALUE, Case, Rows, device, each, near, unrelated
from compare import assert_close, relative
from torch import Tensor

import fusedkd

TWINS: dict[str, tuple[Case, Case, float]] = {  # one = factor · other, in value and gradient
    "ab(1, 0) = fkl": (("ab", {"alpha": 1.0, "beta": 0.0}), ("fkl", {}), 1.0),
    "ab(0, 1) = rkl": (("ab", {"alpha": 0.0, "beta": 1.0}), ("rkl", {}), 1.0),
    "ab(a, 1-a) = alpha(a)": (("ab", {"alpha": 0.3, "beta": 0.7}), ("alpha", {"alpha": 0.3}), 1.0),
    "ab(1/2, 1/2) = 4 hellinger": (("ab", {"alpha": 0.5, "beta": 0.5}), ("hellinger", {}), 4.0),
    "alpha(1) = fkl": (("alpha", {"alpha": 1.0}), ("fkl", {}), 1.0),
    "alpha(0) = rkl": (("alpha", {"alpha": 0.0}), ("rkl", {}), 1.0),
    "amid(-1, pr) = skl": (("amid", {"alpha": -1.0, "lam": 0.3}), ("skl", {"lam": 0.3}), 1.0),
    "amid(-1, qr) = srkl(1-lam)": (("amid", {"alpha": -1.0, "lam": 0.3, "order": "qr"}), ("srkl", {"lam": 0.7}), 1.0),
    "amid(lam=0, pr) = fkl": (("amid", {"lam": 0.0}), ("fkl", {}), 1.0),
    "amid(lam=0, rp) = rkl": (("amid", {"lam": 0.0, "order": "rp"}), ("rkl", {}), 1.0),
    "amid(lam=1, qr) = rkl": (("amid", {"lam": 1.0, "order": "qr"}), ("rkl", {}), 1.0),
    "amid(3) = amid(1)": (("amid", {"alpha": 3.0}), ("amid", {"alpha": 1.0}), 1.0),
    "jsd(0) = fkl": (("jsd", {"beta": 0.0}), ("fkl", {}), 1.0),
    "jsd(1) = rkl": (("jsd", {"beta": 1.0}), ("rkl", {}), 1.0),
    "skl(0) = fkl": (("skl", {"lam": 0.0}), ("fkl", {}), 1.0),
    "srkl(0) = rkl": (("srkl", {"lam": 0.0}), ("rkl", {}), 1.0),
    "frkl(0) = fkl": (("frkl", {"w": 0.0}), ("fkl", {}), 1.0),
    "frkl(1) = rkl": (("frkl", {"w": 1.0}), ("rkl", {}), 1.0),
    "jeffreys = 2 frkl(1/2)": (("jeffreys", {}), ("frkl", {"w": 0.5}), 2.0),
    "tsallis(a) = a alpha(a)": (("tsallis", {"alpha": 0.3}), ("alpha", {"alpha": 0.3}), 0.3),
    "tsallis(1) = fkl": (("tsallis", {"alpha": 1.0}), ("fkl", {}), 1.0),
    "tsallis(1/2) = 2 hellinger": (("tsallis", {}), ("hellinger", {}), 2.0),
    "triangular = 4 alpha(2) to (p+q)/2": (
        ("triangular", {}),
        ("amid", {"alpha": -1.0, "base": fusedkd.divergence("alpha", alpha=2.0)}),
        4.0,
    ),
    "akl(1) = fkl": (("akl", {"mu": 1.0}), ("fkl", {}), 1.0),
    "renyi(1) = fkl": (("renyi", {"alpha": 1.0}), ("fkl", {}), 1.0),
    "eopd(99) = rkl": (("eopd", {"threshold": 99.0}), ("rkl", {}), 1.0),
    "eopd(0) = 2 frkl(1/2)": (("eopd", {"threshold": 0.0}), ("frkl", {}), 2.0),
    "taid(1) = base": (("taid", {"t": 1.0, "base": "jsd"}), ("jsd", {}), 1.0),
    "dkd = decoupled fkl": (("dkd", {}), ("decoupled", {"base": "fkl", "nontarget": 8.0}), 1.0),
    "drkl = decoupled rkl": (("drkl", {}), ("decoupled", {"nontarget": 0.5}), 1.0),
}


def run(rows: Rows, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """Per-token loss and the gradient of its sum, float64 on the CPU."""
    leaf = rows.student.to(device(backend), torch.float32).requires_grad_()
    made = fusedkd.divergence(case[0], **case[1])
    labels = None if rows.labels is None else rows.labels.to(leaf.device)
    loss = fusedkd.kd_loss(leaf, rows.teacher.to(leaf), labels, divergence=made, reduction="none", backend=backend)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach().double().cpu(), leaf.grad.double().cpu()


# Far apart the oracle has checked both twins; close together is where two ways to compute the same part.
@pytest.mark.smoke
@each("twin", TWINS)
@pytest.mark.parametrize(("distance", "backend"), [(None, "torch"), (1.4e-2, "torch"), (1.4e-2, "triton")])
def test_identity(twin: str, distance: float | None, backend: str) -> None:
    """Far apart and nearly equal."""
    one, other, factor = TWINS[twin]
    rows = unrelated(5, 300, std=3.0) if distance is None else near(distance, 5, 300)
    (loss, grad), (their_loss, their_grad) = (run(rows, case, backend) for case in (one, other))
    assert_close(loss.float(), factor * their_loss, 2 * VALUE)
    assert_close(grad.float(), factor * their_grad, 2 * VALUE)


def test_decomposition_of_both_kls(backend: str) -> None:
    """KL(p‖q) = TCKD + (1 − p_y) NCKD and KL(q‖p) = BRKL + (1 − q_y) NRKL, the weights given per token."""
    rows = unrelated(6, 200, std=2.0, ignored=False)
    assert rows.labels is not None
    p, q = (x.softmax(-1).gather(-1, rows.labels[:, None])[:, 0] for x in (rows.teacher, rows.student))
    for name, weight in (("fkl", 1 - p), ("rkl", 1 - q)):
        whole, _ = run(rows, (name, {}), backend)
        split: dict[str, Any] = {"base": name, "nontarget": weight.float().to(device(backend))}
        parts, _ = run(rows, ("decoupled", split), backend)
        assert_close(parts.float(), whole, VALUE)


@pytest.mark.parametrize("distance", [None, 1.4e-2])
def test_renyi_of_order_one_half(distance: float | None, backend: str) -> None:
    """−2 log(1 − H), H the squared Hellinger distance, and its slope 2/(1 − H)."""
    rows = unrelated(5, 300, std=1.5) if distance is None else near(distance, 5, 300)
    (loss, grad), (half, slope) = (run(rows, (name, {}), backend) for name in ("renyi", "hellinger"))
    assert_close(loss.float(), -2 * torch.log1p(-half), 2 * VALUE)
    assert_close(grad.float(), slope * (2 / (1 - half))[:, None], 2 * VALUE)


def test_renyi_grows_with_its_order(backend: str) -> None:
    """Through α = 1 as elsewhere, and α·D of order 1 − α reversed is (1 − α)·D of order α."""
    rows = unrelated(6, 200, std=1.0, ignored=False)
    orders = (0.03, 0.2, 0.5, 0.9, 0.999, 1.0, 1.001, 1.5, 4.0)
    found = torch.stack([run(rows, ("renyi", {"alpha": alpha}), backend)[0] for alpha in orders])
    assert (found.diff(dim=0) > 0).all()
    assert_close(found[4].float(), found[6], 5e-3)
    turned, _ = run(Rows.of(rows.teacher, rows.student, rows.labels), ("renyi", {"alpha": 0.8}), backend)
    assert_close(turned.float(), 4 * found[1], 2 * VALUE)


def test_eopd_is_a_choice_of_each_row(backend: str) -> None:
    """By the teacher's entropy: rows between whose entropies the threshold lies go different ways."""
    rows = unrelated(6, 200, std=1.0, ignored=False)
    teacher = rows.teacher * torch.linspace(0.5, 6.0, 6, dtype=torch.float64)[:, None]
    rows = Rows.of(rows.student, teacher, rows.labels)
    entropy = torch.special.entr(rows.teacher.softmax(-1)).sum(-1)
    below, above = entropy.sort().values[2:4]
    assert above - below > 0.1
    threshold = float(below + above) / 2
    loss, grad = run(rows, ("eopd", {"threshold": threshold}), backend)
    (reverse, of_reverse), (forward, of_forward) = (run(rows, (name, {}), backend) for name in ("rkl", "fkl"))
    unsure = entropy > threshold
    assert_close(loss.float(), reverse + unsure * forward, VALUE)
    assert_close(grad.float(), of_reverse + unsure[:, None] * of_forward, VALUE)


@each("rule", ["exclusive", "inclusive"])
def test_akl_is_a_sort(rule: str, backend: str) -> None:
    """The head by the author's sort, or by that of the copies, where no two logits are equal; weights detached."""
    rows = unrelated(8, 400, std=2.0, ignored=False)
    p, q = rows.teacher.softmax(-1), rows.student.softmax(-1)
    for mu in (0.0, 0.3, 0.5, 0.9):
        order = p.argsort(-1, descending=True)
        mask = p.gather(-1, order).cumsum(-1) > mu
        mask[:, 0] = False
        if rule == "inclusive":  # in the copies' words: not in the tail
            order = p.argsort(-1)
            mask = p.gather(-1, order).cumsum(-1) <= 1 - mu
            mask[:, -1] = False
        gap = (p - q).abs().gather(-1, order)
        head, tail = gap.masked_fill(mask, 0).sum(-1), gap.masked_fill(~mask, 0).sum(-1)
        forward, reverse = (run(rows, (name, {}), backend) for name in ("fkl", "rkl"))
        w = tail / (head + tail)
        loss, grad = run(rows, ("akl", {"mu": mu, "head": rule}), backend)
        assert_close(loss.float(), (1 - w) * forward[0] + w * reverse[0], VALUE)
        assert_close(grad.float(), (1 - w)[:, None] * forward[1] + w[:, None] * reverse[1], VALUE)


def test_akl_heads_differ_by_the_token_that_crosses(backend: str) -> None:
    """The same where that token has no gap to weigh; elsewhere not."""
    p, q = torch.tensor([[[0.45, 0.3, 0.15, 0.1]], [[0.15, 0.3, 0.25, 0.3]]], dtype=torch.float64).log()
    rows = Rows.of(q, p, None)
    for mu, alike in ((0.5, True), (0.7, True), (0.8, False), (0.2, True)):
        one, other = (run(rows, ("akl", {"mu": mu, "head": head}), backend)[0] for head in ("exclusive", "inclusive"))
        assert (relative(one, other) < VALUE) is alike, mu


@each("head", ["exclusive", "inclusive"])
def test_akl_with_equal_logits(head: str, backend: str) -> None:
    """Equal logits are in the head together or not at all, whatever their order; a teacher of bfloat16 has many."""
    rows = unrelated(6, 500, std=2.0, ignored=False)
    teacher = rows.teacher.bfloat16().double()
    order = torch.randperm(500)
    labels = rows.labels
    assert labels is not None
    case = ("akl", {"head": head})
    loss, grad = run(Rows.of(rows.student, teacher, labels), case, backend)
    again, moved = run(Rows.of(rows.student[:, order], teacher[:, order], order.argsort()[labels]), case, backend)
    assert_close(again.float(), loss, VALUE)
    assert_close(moved.float(), grad[:, order], VALUE)


def test_mixture_detached_or_not(backend: str) -> None:
    """The same value, another gradient."""
    rows = unrelated(5, 100, std=2.0)
    (loss, grad), (same, other) = (run(rows, ("srkl", {"detach_mixture": x}), backend) for x in (False, True))
    assert torch.equal(loss, same)
    assert (grad - other).norm() > 0.05 * grad.norm()


def test_jeffreys_adds_both_kls(backend: str) -> None:
    """In value and gradient; the weights of the split multiply both."""
    rows = unrelated(5, 300, std=2.0)
    weights = {"target": 0.5, "nontarget": 1.5}
    forward, reverse, whole = (run(rows, (name, weights), backend) for name in ("fkl", "rkl", "jeffreys"))
    for one, other, both in zip(forward, reverse, whole, strict=True):
        assert_close(both.float(), one + other, VALUE)


def test_todi_is_jeffreys_but_for_the_gradient(backend: str) -> None:
    """Its weights do not learn: −(1 + ½) q δ where q meets p, and Jeffreys' is −2 q δ."""
    for distance, bound in ((1.4e-2, 2e-2), (1.4e-3, 2e-3)):
        rows = near(distance, 5, 300)
        (loss, grad), (same, other) = (run(rows, (name, {}), backend) for name in ("todi", "jeffreys"))
        assert_close(loss.float(), same, 2 * VALUE)
        assert (grad - 0.75 * other).norm() < bound * other.norm()


def test_csd_is_reverse_kl(backend: str) -> None:
    """The gradient of concrete score distillation weighed by the student: q (d − Σ q d), d the logits' difference."""
    rows = unrelated(5, 300, std=2.0, ignored=False)
    q, d = rows.student.softmax(-1), rows.student - rows.teacher
    _, grad = run(rows, ("rkl", {}), backend)
    assert_close(grad.float(), q * (d - (q * d).sum(-1, keepdim=True)), VALUE)


def test_triangular_is_symmetric_and_between_its_neighbours() -> None:
    """2·hellinger ≤ triangular ≤ 4·hellinger, at most 2·tvd, 4·jsd·[1/(2 log 2), 1]; the sides may change places."""
    for rows in (unrelated(8, 200, std=2.0, ignored=False), unrelated(8, 3, std=1.0, ignored=False)):
        back = Rows.of(rows.teacher, rows.student, rows.labels)
        loss, grad = run(rows, ("triangular", {}), "torch")
        turned, other = run(back, ("triangular", {}), "torch")
        assert_close(turned.float(), loss, VALUE)
        assert (grad - other).norm() > 0.1 * grad.norm()
        hellinger, tvd, jsd = (run(rows, (name, {}), "torch")[0] for name in ("hellinger", "tvd", "jsd"))
        bounds = [(2 * hellinger, 4 * hellinger), (0 * tvd, 2 * tvd), (2 / math.log(2) * jsd, 4 * jsd)]
        for low, high in bounds:
            assert (low <= loss).all() and (loss <= high).all()


def test_tsallis_at_0(backend: str) -> None:
    """Reverse KL with weight 0: nothing, and nothing of an infinite forward KL either."""
    rows = unrelated(3, 50, std=2.0)
    rows.student[:, 7] = -torch.inf
    loss, grad = run(rows, ("tsallis", {"alpha": 0.0}), backend)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("name", ["jsd", "skl", "srkl", "tvd", "hellinger", "triangular"])
def test_bounded(name: str, backend: str) -> None:
    """Disjoint rows: the value is the bound, finite, and the gradient is finite."""
    rows = unrelated(4, 100, std=1.0, ignored=False)
    student, teacher = rows.student.clone(), rows.teacher.clone()
    student[:, :50] -= 300
    teacher[:, 50:] -= 300
    bounds = {"jsd": math.log(2), "skl": math.log(10), "srkl": math.log(10), "triangular": 2.0}
    loss, grad = run(Rows.of(student, teacher, None), (name, {}), backend)
    assert torch.allclose(loss, torch.full_like(loss, bounds.get(name, 1.0)), rtol=1e-6)
    assert grad.isfinite().all()
