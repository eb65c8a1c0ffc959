"""The tests of the tests: the comparison must reject wrong gradients, and the oracle must be right by itself."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import oracle
import pytest
import torch
from cases import each
from compare import assert_close, relative, rounding
from torch import Tensor

GOLDEN_Q, GOLDEN_P = (0.55, 0.30, 0.15), (0.45, 0.35, 0.20)
GOLDEN_LOSS, GOLDEN_GRAD = 0.021071845260, (0.09933199, -0.05138451, -0.04794749)
NAMES = ("fkl", "rkl", "ab", "drkl", "dkd", "decoupled")
BOUND = 2e-5


def double(values: tuple[float, ...]) -> Tensor:
    """A row of logits from probabilities."""
    return torch.tensor([values], dtype=torch.float64).log()


@pytest.fixture(params=["fkl", "rkl", "drkl", "ab"])
def gradients(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """A true gradient and the one with student and teacher exchanged."""
    student, teacher = 5 * torch.randn(2, 6, 129, dtype=torch.float64)
    labels = torch.randint(129, (6,))
    upstream = torch.randn(6)
    meaning = oracle.meaning(request.param)
    return tuple(
        oracle.distill(a, b, labels, meaning).gradient(upstream) for a, b in ((student, teacher), (teacher, student))
    )


def damaged_row(grad: Tensor) -> Tensor:
    """Only the smallest row is wrong: the total hides it, the row bound must not."""
    grad = grad.clone()
    grad[grad.norm(dim=-1).argmin()] *= 1.01
    return grad


DAMAGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeroed": lambda grad, _: torch.zeros_like(grad),
    "swapped": lambda _, swapped: swapped,
    "negated": lambda grad, _: -grad,
    "one per cent off": lambda grad, _: 1.01 * grad,
    "one column off": lambda grad, _: grad.roll(1, -1),
    "one row off": lambda grad, _: grad.roll(1, 0),
    "smallest row off": lambda grad, _: damaged_row(grad),
    "rounded to half": lambda grad, _: grad.to(torch.bfloat16).double(),
    "one NaN": lambda grad, _: grad.index_fill(1, torch.tensor([3]), torch.nan),
    "one infinity": lambda grad, _: grad.index_fill(1, torch.tensor([3]), torch.inf),
    "a constant added": lambda grad, _: grad + 1e-4 * grad.abs().mean(),
    "small entries dropped": lambda grad, _: grad.where(grad.abs() > grad.abs().quantile(0.6), 0),
}


def test_float32_passes(gradients: tuple[Tensor, Tensor]) -> None:
    """A correctly rounded gradient is accepted, also in half precision with its own rounding allowed."""
    grad, _ = gradients
    assert_close(grad.float(), grad, 1e-7, per_row=1e-7, typical=1e-7)
    half = grad.bfloat16()
    assert_close(half, grad, BOUND + rounding(grad, torch.bfloat16), dtype=torch.bfloat16)


@pytest.mark.smoke
@each("damage", DAMAGE)
def test_damage_fails(gradients: tuple[Tensor, Tensor], damage: str) -> None:
    """Each kind of damage is rejected at the bound of the suite."""
    grad, swapped = gradients
    with pytest.raises(AssertionError):
        assert_close(DAMAGE[damage](grad, swapped).float(), grad, BOUND, per_row=1e-4, typical=1e-4)


def test_half_precision_bound_rejects_one_per_cent(gradients: tuple[Tensor, Tensor]) -> None:
    """One per cent is also too much where bfloat16 rounding is allowed."""
    grad, _ = gradients
    with pytest.raises(AssertionError, match="relative error"):
        wrong = (1.01 * grad).bfloat16()
        assert_close(wrong, grad, BOUND + rounding(grad, torch.bfloat16), dtype=torch.bfloat16)


def test_shape_dtype_and_zeros() -> None:
    """Wrong shape, wrong dtype, dust where the truth is zero, and a missing infinity are rejected."""
    truth = torch.tensor([1.0, 0.0, torch.inf], dtype=torch.float64)
    assert_close(truth.float(), truth, 1e-7)
    for wrong, why in (
        (truth[None].float(), "shape"),
        (truth, "dtype"),
        ((truth + 1e-30).float(), "where the truth is 0"),
        (truth.clamp(max=1e30).float(), r"expected tensor\(\[inf\]"),
        (torch.tensor([torch.nan, 0.0, torch.inf]), "1 entries are not finite"),
        (torch.tensor([0.0, 0.0, torch.inf]), "relative error"),
    ):
        with pytest.raises(AssertionError, match=why):
            assert_close(wrong, truth, 1e-7)
    assert relative(torch.full((3,), 1e-38), torch.zeros(3, dtype=torch.float64)) == torch.inf
    assert relative(torch.zeros(3), torch.zeros(3, dtype=torch.float64)) == 0
    with pytest.raises(AssertionError, match="where the truth is 0"):
        assert_close(torch.full((3,), 1e-38), torch.zeros(3, dtype=torch.float64), 1.0)


def test_golden_drkl() -> None:
    """Three tokens by hand (docs/mathematics.md#drkl)."""
    truth = oracle.distill(double(GOLDEN_Q), double(GOLDEN_P), torch.tensor([0]), oracle.meaning("drkl", gamma=0.5))
    assert truth.loss.item() == pytest.approx(GOLDEN_LOSS, abs=1e-12)
    assert truth.gradient(torch.ones(1))[0].tolist() == pytest.approx(GOLDEN_GRAD, abs=1e-8)
    assert truth.stats["target_grad"].item() == pytest.approx(GOLDEN_GRAD[0], abs=1e-8)
    assert truth.stats["nontarget_grad"].item() == 0


@each("name", NAMES)
def test_oracle_gradient_by_finite_differences(name: str) -> None:
    """Autograd of the oracle agrees with the oracle's own values, statistics of the target included."""
    student, teacher = 2 * torch.randn(2, 3, 7, dtype=torch.float64)
    labels, step = torch.tensor([0, 3, 6]), 1e-5
    options = {"temperature": 1.7, "temperature_squared": True, "ce_weight": 0.3}
    m = oracle.meaning(name)
    truth = oracle.distill(student, teacher, labels, m, **options)
    numeric = torch.empty_like(student)
    parts = {"target_loss": torch.empty(3).double(), "nontarget_loss": torch.empty(3).double()}
    for k in range(7):
        shift = torch.zeros(7, dtype=torch.float64)
        shift[k] = step
        up, down = (oracle.distill(student + d, teacher, labels, m, **options) for d in (shift, -shift))
        numeric[:, k] = (up.loss - down.loss) / (2 * step)
        for key, slot in parts.items():
            slot[labels == k] = ((up.stats[key] - down.stats[key]) / (2 * step / 1.7))[labels == k]
    assert relative(numeric, truth.gradient(torch.ones(3))) < 1e-8
    for key, slot in parts.items():
        assert (slot - truth.stats[key.replace("loss", "grad")]).norm() < 1e-8


def precise_row(name: str, s: list[float], t: list[float], y: int) -> mpmath.mpf:
    """The divergences once more, with 60 digits and no logarithms of a sum but the textbook ones."""

    def softmax(x: list[float]) -> list[mpmath.mpf]:
        exps = [mpmath.exp(mpmath.mpf(v)) for v in x]
        return [e / mpmath.fsum(exps) for e in exps]

    def kl(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.fsum(x * mpmath.log(x / w) for x, w in zip(a, b, strict=True))

    q, p = softmax(s), softmax(t)
    q_rest, p_rest = ([v for k, v in enumerate(x) if k != y] for x in (q, p))
    q_pair, p_pair = ([x[y], mpmath.fsum(rest)] for x, rest in ((q, q_rest), (p, p_rest)))
    q_hat, p_hat = ([v / pair[1] for v in rest] for rest, pair in ((q_rest, q_pair), (p_rest, p_pair)))
    if name == "fkl":
        return kl(p, q)
    if name == "rkl":
        return kl(q, p)
    if name == "ab":
        a, b = mpmath.mpf(0.2), mpmath.mpf(0.7)
        c = a + b
        total = [x**a * w**b - a / c * x**c - b / c * w**c for x, w in zip(p, q, strict=True)]
        return -mpmath.fsum(total) / (a * b)
    if name == "dkd":
        return kl(p_pair, q_pair) + 8 * kl(p_hat, q_hat)
    return kl(q_pair, p_pair) + {"drkl": mpmath.mpf(0.5), "decoupled": 1}[name] * kl(q_hat, p_hat)


@each("name", NAMES)
@pytest.mark.parametrize("gaps", [(0, 0), (40, 0), (0, 40), (40, 35), (-40, 0)], ids=str)
def test_oracle_against_sixty_digits(name: str, gaps: tuple[int, int]) -> None:
    """Values and gradients stay exact where q_y or p_y is 1 − 1e-17, one token at a time."""
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64)
    student[0, 1] += gaps[0]
    teacher[0, 1] += gaps[1]
    truth = oracle.distill(student, teacher, torch.tensor([1]), oracle.meaning(name))
    with mpmath.workdps(60):
        s, t, h = student[0].tolist(), teacher[0].tolist(), mpmath.mpf("1e-20")
        value = float(precise_row(name, s, t, 1))

        def bumped(k: int, step: mpmath.mpf) -> mpmath.mpf:
            return precise_row(name, [v + step * (j == k) for j, v in enumerate(map(mpmath.mpf, s))], t, 1)

        slope = [float((bumped(k, h) - bumped(k, -h)) / (2 * h)) for k in range(5)]
    assert truth.loss.item() == pytest.approx(value, rel=1e-9)
    assert relative(truth.gradient(torch.ones(1))[0], torch.tensor(slope, dtype=torch.float64)) < 1e-9


def test_oracle_identities() -> None:
    """FKL = TCKD + (1 − p_y) NCKD and RKL = BRKL + (1 − q_y) NRKL, and AB at its corners."""
    student, teacher = 3 * torch.randn(2, 5, 31, dtype=torch.float64)
    labels = torch.randint(31, (5,))

    def stats(name: str, **params: float) -> dict[str, Tensor]:
        return oracle.distill(student, teacher, labels, oracle.meaning(name, **params)).stats

    for whole, side in (("fkl", "teacher_logprob"), ("rkl", "student_logprob")):
        joint, split = stats(whole), stats("decoupled", base=whole)
        rest = 1 - joint[side].exp()
        assert relative(split["target_loss"] + rest * split["nontarget_loss"], joint["loss"]) < 1e-13
        assert relative(split["target_loss"], joint["target_loss"]) < 1e-13
    q_y = stats("rkl")["student_logprob"].exp()
    push = -q_y * (1 - q_y) * stats("decoupled", base="rkl")["nontarget_loss"]
    assert relative(stats("rkl")["nontarget_grad"], push) < 1e-11
    corners = {(1.0, 0.0): "fkl", (0.0, 1.0): "rkl"}
    for (alpha, beta), name in corners.items():
        assert relative(stats("ab", alpha=alpha, beta=beta)["loss"], stats(name)["loss"]) < 1e-13
    square = 0.5 * ((student.softmax(-1) - teacher.softmax(-1)) ** 2).sum(-1)
    assert relative(stats("ab", alpha=1.0, beta=1.0)["loss"], square) < 1e-13


@pytest.mark.parametrize("limit", [(0.0, 0.7), (0.2, 0.0), (0.5, -0.5), (0.0, 0.0)], ids=str)
def test_oracle_limits_of_ab(limit: tuple[float, float]) -> None:
    """The limits written out agree with the general formula beside them."""
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    at, beside = (
        oracle.distill(student, teacher, None, oracle.meaning("ab", alpha=limit[0] + e, beta=limit[1] + 2 * e))
        for e in (0.0, 1e-6)
    )
    assert relative(beside.loss, at.loss) < 1e-4
    assert relative(beside.gradient(torch.ones(4)), at.gradient(torch.ones(4))) < 1e-4


def test_oracle_of_missing_columns() -> None:
    """What the three kinds of -inf mean (docs/mathematics.md#infinities-and-empty-rows)."""
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64)
    labels, fkl = torch.tensor([2]), oracle.meaning("fkl")
    teacher[0, 4] = -torch.inf
    renormalised = oracle.distill(student[:, [0, 1, 2, 3, 5]], teacher[:, [0, 1, 2, 3, 5]], labels, fkl)
    truth = oracle.distill(student, teacher, labels, fkl)
    assert torch.equal(truth.loss, renormalised.loss)
    assert truth.gradient(torch.ones(1))[0, 4] == 0
    floored = oracle.distill(student, teacher, labels, oracle.meaning("rkl"), support="floor")
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1).clamp(min=-50)
    assert floored.loss.item() == pytest.approx(float((logq.exp() * (logq - logp)).sum()), rel=1e-14)
    assert floored.gradient(torch.ones(1))[0, 4] > 0
    outside = oracle.distill(student, teacher, torch.tensor([4]), fkl)
    assert outside.stats["target_loss"] == 0
    assert relative(outside.stats["nontarget_loss"], truth.loss) < 1e-14
    student[0, 1] = -torch.inf
    dead = oracle.distill(student, teacher, labels, fkl)
    assert dead.loss.item() == torch.inf
    assert dead.gradient(torch.ones(1)).isfinite().all()
    assert dead.gradient(torch.ones(1))[0, 1] == 0
    assert oracle.distill(student, teacher, labels, oracle.meaning("rkl")).loss.isfinite().all()
    both = oracle.distill(student, teacher.index_fill(1, torch.tensor([1]), -torch.inf), labels, fkl, support="floor")
    assert both.loss.isfinite().all()
