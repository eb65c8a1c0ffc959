"""Rows that break textbook formulas: nearly equal, saturated, shifted, sorted, and with -inf in every place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import (
    DEFAULTS,
    DISTINCT,
    FEW,
    LARGE_VOCABULARY,
    ODD,
    ROW,
    SEVERAL_TILES,
    SWEEPS,
    Case,
    Rows,
    check_heads,
    check_logits,
    device,
    each,
    named,
    near,
    random_labels,
    side,
    unrelated,
)
from compare import assert_close
from torch import Tensor

import fusedkd

DISTANCES = {2.0: "KL 1", 0.14: "KL 1e-2", 1.4e-2: "KL 1e-4", 1.4e-3: "KL 1e-6", 1.4e-4: "KL 1e-8"}
INF = torch.inf
POLES = [(0.0, 0.7), (0.2, 0.0), (0.0, 0.0), (0.5, -0.5), (-0.4, 0.4)]
BESIDE_POLES = [(1e-4, 0.7), (-1e-4, 0.7), (0.2, 1e-4), (1e-4, 1e-4), (0.5, -0.4999), (2e-4, -1e-4)]
CORNERS = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (0.1, 0.8), (0.06, 0.7), (0.7, 0.06)]
NEGATIVE = [(0.5, -0.2), (-0.3, 0.9), (1.5, -0.5), (-0.2, -0.2)]


@each("case", DISTINCT)
@each("distance", DISTANCES)
def test_near(case: Case, distance: float, backend: str) -> None:
    """Late in training: the divergence is tiny, its value and gradient are as accurate as ever, row by row."""
    check_logits(near(distance, 5, ODD), case, backend, per_row=ROW)


@each("case", [case for case in DEFAULTS if case not in DISTINCT])
def test_near_the_others(case: Case, backend: str) -> None:
    """Every divergence where the sums of both ends matter: near rows, whose target is likely in some."""
    check_logits(near(0.14, 6, 260), case, backend, per_row=ROW)


@each("case", DISTINCT)
@each("distance", [1.4e-2, 1.4e-4])
def test_near_log_probabilities(case: Case, distance: float, backend: str) -> None:
    """Log-probabilities are logits too; their rounding errors are all there is to tell the rows apart."""
    rows = near(distance, 5, ODD)
    student, teacher = (x.log_softmax(-1) for x in (rows.student, rows.teacher))
    check_logits(Rows.of(student, teacher, rows.labels), case, backend, per_row=ROW)


@each("case", [("rkl", {}), ("drkl", {}), ("ab", {})])
@pytest.mark.usefixtures("wide_tiles")
def test_near_large_vocabulary(case: Case, backend: str) -> None:
    """The smallest divergence over the longest row."""
    check_logits(near(1.4e-4, 2, LARGE_VOCABULARY), case, backend, per_row=ROW)


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "torch") for case in DISTINCT), *((case, "triton") for case in FEW)], ids=named
)
@each("distance", [0.14, 1.4e-2, 1.4e-3])
def test_near_heads(case: Case, distance: float, backend: str) -> None:
    """Heads of a student that has nearly become its teacher: only the GEMM's own rounding may show."""
    student = side((6,), 257, 32, bias=True)
    noise = distance / 5 * torch.randn_like(student.hidden)
    teacher = type(student)(student.hidden + noise, student.weight, student.bias)
    check_heads(student, teacher, random_labels((6,), 257), case, backend, reduction="sum")


@each("case", DEFAULTS)
@each("offset", [0.0, 0.5, -300.0])
def test_equal_rows(case: Case, offset: float, backend: str) -> None:
    """p = q, also after an exact shift of the logits: value and gradient are 0, not small."""
    name, params = case
    place = device(backend)
    teacher = (torch.randn(4, ODD) * 5 * 1024).round() / 1024  # a grid on which the shift is exact
    student = (teacher + offset).to(place).requires_grad_()
    loss = fusedkd.kd_loss(
        student,
        teacher.to(place),
        random_labels((4,), ODD).to(place),
        divergence=fusedkd.divergence(name, **params),
        reduction="none",
        backend=backend,
    )
    loss.backward(torch.randn(4).to(place))
    assert_close(loss, torch.zeros(4, dtype=torch.float64), 0.0, what="loss")
    assert_close(student.grad, torch.zeros(4, ODD, dtype=torch.float64), 0.0, what="gradient")


def one_apart(gap: float) -> Rows:
    """Rows that are equal but for the student's least likely column, which the teacher has `gap` nats off."""
    rows = unrelated(4, ODD, std=2.0, ignored=False)
    column = rows.student.argmin(-1, keepdim=True)
    return Rows.of(rows.student, rows.student.scatter_add(-1, column, rows.student.new_full((4, 1), gap)), rows.labels)


@each("case", DISTINCT)
@each("gap", [-20.0, -5.0, 3.0])
def test_one_column_apart(case: Case, gap: float, backend: str) -> None:
    """All remainders are 0 but one, which no short series describes."""
    check_logits(one_apart(gap), case, backend, per_row=ROW)


def test_a_short_series_is_not_enough() -> None:
    """Why the first sweep of value and gradient takes more instructions than its budget (bench/instructions.py).

    The budget is that of a sweep whose remainders are two terms of their series wherever their sum is small. One column
    apart puts that normaliser off, and with it reverse KL as the gradient sweep would sum it.
    """
    rows = one_apart(-20.0)
    s, t = rows.student.double(), rows.teacher.double()
    q, d = s.softmax(-1), t - s
    short = q * d**2 * (1 / 2 + d / 6)
    r = torch.log1p((q * d + short).sum(-1, keepdim=True))
    delta = d - r
    value = (q * (torch.expm1(delta) - delta)).sum(-1)
    truth = (q * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)
    assert (short.sum(-1).abs() < 1e-3).all(), "the rows are not close enough for a short series"
    assert ((value / truth - 1).abs() > 1e-3).all()


def peak(rows: Rows, column: Tensor, gap: float, *, sides: str) -> Rows:
    """Raise one column of each row by `gap` over the row's maximum."""
    raised = {}
    for name in ("student", "teacher"):
        x = getattr(rows, name).clone()
        if name in sides:
            x.scatter_(-1, column[:, None], x.amax(-1, keepdim=True) + gap)
        raised[name] = x
    return Rows.of(raised["student"], raised["teacher"], rows.labels)


@each("case", DISTINCT)
@each("sides", ["student", "teacher", "student and teacher"])
@each("at_label", [True, False])
def test_saturated(case: Case, sides: str, at_label: bool, backend: str) -> None:
    """q_y or p_y within 1e-17 of 1, or of 0 because another token has the mass."""
    rows = unrelated(4, ODD, std=2.0, ignored=False)
    column = rows.labels if at_label else (rows.labels + 5) % ODD
    check_logits(peak(rows, column, 40.0, sides=sides), case, backend, per_row=ROW)


@each("case", DISTINCT)
def test_saturated_beside_cross_entropy(case: Case, backend: str) -> None:
    """A student certain of a token that is not the label: the cross-entropy pulls where the divergence hardly does."""
    rows = unrelated(4, ODD, std=2.0, ignored=False)
    rows = peak(rows, (rows.labels + 5) % ODD, 20.0, sides="student")
    check_logits(rows, case, backend, per_row=ROW, ce_weight=0.5)


SATURATING = [("jsd", {}), ("jsd", {"beta": 0.9}), ("skl", {}), ("srkl", {}), ("tvd", {}), ("triangular", {})]


# √(pq) is what hellinger and renyi have left where the others have p or q: they lose digits at twice the distance.
@pytest.mark.parametrize(
    ("case", "apart"),
    [*((case, 9.0) for case in SATURATING), (("hellinger", {}), 18.0), (("renyi", {}), 18.0)],
    ids=named,
)
def test_near_and_far(case: Case, apart: float, backend: str) -> None:
    """Both kinds in one call: where student and teacher hardly overlap, the gradient is what is left of equal numbers
    unless phi leaves out its multiple of q; where the student is nearly its teacher, unless it does not.
    """
    rows, close = unrelated(4, 130, std=1.0, ignored=False), near(1.4e-3, 4, 130)
    rows.student[:, :65] -= apart
    rows.teacher[:, 65:] -= apart
    sides = [torch.stack((x, y), 1).view(8, 130) for (_, x), (_, y) in zip(vars_of(rows), vars_of(close), strict=True)]
    labels = torch.stack((rows.labels, close.labels), 1).view(8)
    check_logits(Rows.of(*sides, labels), case, backend, per_row=ROW)


@each("case", DISTINCT)
@each("gap", [15.0, 60.0])
def test_peaked_apart(case: Case, gap: float, backend: str) -> None:
    """Student and teacher certain of different tokens, one of them the label in half of the rows."""
    rows = unrelated(4, ODD, std=1.0, ignored=False)
    labels = rows.labels.clone()
    rows = peak(rows, rows.labels, gap, sides="student")
    rows = peak(rows, (labels + 7) % ODD, gap, sides="teacher")
    labels[2:] = (labels[2:] + 9) % ODD
    check_logits(Rows.of(rows.student, rows.teacher, labels), case, backend, per_row=ROW)


@each("case", DISTINCT)
@each("sides", ["student", "teacher"])
def test_peaked_against_flat(case: Case, sides: str, backend: str) -> None:
    """One side certain, the other uniform: the remainders of the one-sweep value cancel here."""
    rows = unrelated(4, ODD, ignored=False)
    student, teacher = (torch.zeros_like(x) if name != sides else x for name, x in vars_of(rows))
    check_logits(peak(Rows.of(student, teacher, rows.labels), rows.labels, 30.0, sides=sides), case, backend)


def vars_of(rows: Rows) -> list[tuple[str, Tensor]]:
    """The two sides by name."""
    return [("student", rows.student), ("teacher", rows.teacher)]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "ascending": lambda x: x.sort(-1).values,
    "descending": lambda x: x.sort(-1, descending=True).values,
    "low first tile": lambda x: torch.cat((x[..., :8192] - 80, x[..., 8192:]), -1),
    "high last column": lambda x: torch.cat((x[..., :-1] - 40, x[..., -1:]), -1),
}


@each("case", SWEEPS)
@pytest.mark.parametrize(
    ("order", "distance"), [*((order, None) for order in ORDERS), ("ascending", 1.4e-2), ("low first tile", 1.4e-2)]
)
@pytest.mark.usefixtures("wide_tiles")
def test_running_maxima(case: Case, order: str, distance: float | None, backend: str) -> None:
    """Every tile raises the maxima, or none does after the first; far apart and nearly equal."""
    shape = (2, SEVERAL_TILES)
    rows = unrelated(*shape, ignored=False) if distance is None else near(distance, *shape)
    student, teacher = (ORDERS[order](x) for _, x in vars_of(rows))
    check_logits(Rows.of(student, teacher, rows.labels), case, backend, per_row=ROW)


@each("case", DISTINCT)
@each("offsets", [(500.0, -500.0), (-500.0, 500.0), (500.0, 500.0)])
def test_offsets(case: Case, offsets: tuple[float, float], backend: str) -> None:
    """A constant added to a row means nothing, however large."""
    rows = near(0.5, 5, ODD)
    student, teacher = (x + offset for (_, x), offset in zip(vars_of(rows), offsets, strict=True))
    check_logits(Rows.of(student, teacher, rows.labels), case, backend, per_row=ROW)


def without(rows: Rows, *, student: Any = (), teacher: Any = ()) -> Rows:
    """Set the given columns of a side to -inf."""
    ours, theirs = rows.student.clone(), rows.teacher.clone()
    ours[:, student] = -INF
    theirs[:, teacher] = -INF
    return Rows.of(ours, theirs, rows.labels)


def supported(*shape: int) -> Rows:
    """Unrelated rows whose labels are even columns, so that odd ones can go."""
    rows = unrelated(*shape, std=3.0)
    labels = torch.where(rows.labels >= 0, rows.labels // 2 * 2, rows.labels)
    return Rows.of(rows.student, rows.teacher, labels)


ODD_COLUMNS = slice(1, None, 2)


@each("case", DISTINCT)
@each("support", ["teacher", "floor"])
def test_teacher_without_columns(case: Case, support: str, backend: str) -> None:
    """A teacher logit of -inf removes the column, or counts as a log-probability of -50."""
    rows = without(supported(5, ODD), teacher=ODD_COLUMNS)
    check_logits(rows, case, backend, support=support)


@each("case", SWEEPS)
@pytest.mark.usefixtures("wide_tiles")
def test_teacher_without_first_tiles(case: Case, backend: str) -> None:
    """Whole tiles outside the support, at both ends."""
    rows = unrelated(2, SEVERAL_TILES, ignored=False)
    rows = Rows.of(rows.student, rows.teacher, torch.tensor([9000, 12000]))
    columns = torch.cat((torch.arange(8500), torch.arange(16500, SEVERAL_TILES)))
    check_logits(without(rows, teacher=columns), case, backend)


@each("case", DISTINCT)
@each("support", ["teacher", "floor"])
def test_both_without_columns(case: Case, support: str, backend: str) -> None:
    """Columns forbidden on both sides are not part of the problem."""
    check_logits(without(supported(5, ODD), student=ODD_COLUMNS, teacher=ODD_COLUMNS), case, backend, support=support)


@each("case", [*DISTINCT, ("ab", {"alpha": 0.5, "beta": 0.0}), ("decoupled", {"base": "fkl"})])
@each("support", ["teacher", "floor"])
def test_student_without_columns(case: Case, support: str, backend: str) -> None:
    """The value is what mathematics gives, infinite or not; the gradient is 0 there and finite elsewhere."""
    check_logits(without(supported(5, 129), student=slice(1, None, 6)), case, backend, support=support)


@each("case", SWEEPS)
@each("excluded", [(), (100, 8200, 17_000)])
@pytest.mark.usefixtures("wide_tiles")
def test_certain_student(case: Case, excluded: tuple[int, ...], backend: str) -> None:
    """A token above 1/2 in a tile without the label, its entry the sum of what other tiles have.

    Likely columns that the student excludes among them: their gradient is 0, their share of that entry is not.
    """
    rows = unrelated(3, SEVERAL_TILES, ignored=False)
    labels = torch.tensor([9000, 12_000, 24_580])
    teacher = rows.teacher.clone()
    teacher[:, excluded] = teacher.amax() + 2
    rows = peak(Rows.of(rows.student, teacher, labels), torch.tensor([20, 16_390, 8191]), 14.0, sides="student")
    check_logits(without(rows, student=excluded), case, backend, per_row=ROW)


@each("case", DISTINCT)
def test_student_without_label(case: Case, backend: str) -> None:
    """The label's is the only logit of −inf in the student's row, beside rows that have none."""
    rows = unrelated(4, 129, std=3.0, ignored=False)
    student = rows.student.clone()
    student[[0, 2], rows.labels[[0, 2]]] = -INF
    check_logits(Rows.of(student, rows.teacher, rows.labels), case, backend)


def test_floor_under_nothing(backend: str) -> None:
    """A teacher row of nothing but −inf compares nothing: 0, with a gradient of 0."""
    place = device(backend)
    teacher = torch.randn(3, 40)
    teacher[1] = -INF
    student = torch.randn(3, 40).to(place).requires_grad_()
    labels = torch.tensor([1, 2, 3]).to(place)
    loss = fusedkd.kd_loss(
        student, teacher.to(place), labels, divergence="rkl", support="floor", reduction="none", backend=backend
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


@each("case", DISTINCT)
def test_all_three_kinds_at_once(case: Case, backend: str) -> None:
    """Teacher only, both, and student only, in one row."""
    rows = without(supported(5, 129), teacher=slice(1, None, 4), student=slice(1, None, 8))
    check_logits(without(rows, student=slice(3, None, 16)), case, backend)


@each("case", DISTINCT)
def test_label_outside_support(case: Case, backend: str) -> None:
    """The target term is 0 and everything is non-target."""
    rows = supported(5, 129)
    labels = torch.where(rows.labels >= 0, rows.labels // 2 * 2 + 1, rows.labels).clamp(max=127)
    rows = without(Rows.of(rows.student, rows.teacher, labels), teacher=ODD_COLUMNS)
    check_logits(rows, case, backend, skip=("student_logprob", "teacher_logprob"))


@each("case", DISTINCT)
@each("left", ["label", "another"])
def test_support_of_one_column(case: Case, left: str, backend: str) -> None:
    """One column cannot be wrong: exact zeros, whether or not it is the label."""
    rows = unrelated(2, 129, ignored=False)
    columns = rows.labels if left == "label" else (rows.labels + 1) % 129
    teacher = torch.full_like(rows.teacher, -INF).scatter(1, columns[:, None], rows.teacher)
    # Entropies of one column are 0 up to rounding; loss and gradients are 0.
    skip = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
    check_logits(Rows.of(rows.student, teacher, rows.labels), case, backend, skip=skip)


@each("exponents", [*POLES, *BESIDE_POLES, *CORNERS])
@each("distance", [None, 1.4e-2])
def test_ab(exponents: tuple[float, float], distance: float | None, backend: str) -> None:
    """α-β at its poles, beside them and at its named corners."""
    case = ("ab", dict(zip(("alpha", "beta"), exponents, strict=True)))
    rows = unrelated(4, 129, std=2.0) if distance is None else near(distance, 4, 129)
    check_logits(rows, case, backend)


@each("exponents", NEGATIVE)
def test_ab_negative(exponents: tuple[float, float], backend: str) -> None:
    """A negative exponent lets the least likely token rule; finite where the rows are mild."""
    case = ("ab", dict(zip(("alpha", "beta"), exponents, strict=True)))
    check_logits(unrelated(4, 129, std=1.0), case, backend)


@each("twin", [((1.0, 0.0), "fkl"), ((0.0, 1.0), "rkl")])
def test_ab_contains_both_kl(twin: tuple[tuple[float, float], str], backend: str) -> None:
    """AB(1, 0) is KL(p‖q) and AB(0, 1) is KL(q‖p): the truth of the one bounds the other."""
    (alpha, beta), name = twin
    rows, place = near(0.14, 4, 129), device(backend)
    truth = oracle.distill(rows.student, rows.teacher, rows.labels, oracle.meaning(name))
    leaf = rows.student.to(place, torch.float32).requires_grad_()
    loss = fusedkd.kd_loss(
        leaf,
        rows.teacher.to(leaf),
        rows.labels.to(place),
        divergence=fusedkd.divergence("ab", alpha=alpha, beta=beta),
        reduction="none",
        backend=backend,
    )
    loss.backward(torch.ones(4).to(place))
    assert_close(loss, truth.loss, 2e-5)
    assert_close(leaf.grad, truth.gradient(torch.ones(4)), 2e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_golden_drkl(gamma: float, backend: str) -> None:
    """Three tokens by hand (docs/mathematics.md#drkl); with γ = 1 only the non-target part grows."""
    place = device(backend)
    student = torch.tensor([[0.55, 0.30, 0.15]]).log().to(place).requires_grad_()
    teacher = torch.tensor([[0.45, 0.35, 0.20]]).log().to(place)
    loss, stats = fusedkd.kd_loss(
        student,
        teacher,
        torch.tensor([0]).to(place),
        divergence=fusedkd.divergence("drkl", gamma=gamma),
        backend=backend,
        return_stats=True,
    )
    loss.backward()
    binary, rest = float(stats.target_loss), float(stats.nontarget_loss)
    assert binary + 0.5 * rest == pytest.approx(0.021071845260, rel=1e-5)
    assert loss.item() == pytest.approx(binary + gamma * rest, rel=1e-6)
    assert float(student.grad[0, 0]) == pytest.approx(0.09933199, rel=1e-5)
    if gamma == 0.5:
        assert student.grad[0].tolist() == pytest.approx([0.09933199, -0.05138451, -0.04794749], rel=1e-5)
