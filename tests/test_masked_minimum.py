"""Columns masked with a dtype's least number: probability 0 in the support, whatever the temperature makes of it."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import ARGMAX, DEFAULTS, FEW, VALUE, Case, Rows, check_logits, each, expected, unrelated
from compare import assert_close
from torch import Tensor

import fusedkd

COLUMNS = slice(34, None)  # of 40; the labels are others
SIDES = ["student", "teacher", "both"]
LEAST = -1e30  # what a logit counts as from there down


def with_minimum(x: Tensor) -> Tensor:
    """A dtype's least number where the oracle has LEAST or −inf."""
    return torch.where(x <= LEAST / 2, torch.finfo(x.dtype).min, x)


def masked(side: str, dtype: torch.dtype) -> Rows:
    """As the oracle sees them: a column that the student excludes is −inf, and so is one that both do."""
    rows = unrelated(5, 40, dtype=dtype, std=2.0)
    assert rows.labels is not None
    student, teacher, labels = rows.student, rows.teacher, rows.labels.clamp(max=33)
    least = max(LEAST, torch.finfo(dtype).min)  # float16's is a number like any other
    if side != "teacher":
        student[:, COLUMNS] = least if dtype == torch.float16 else -torch.inf
    if side != "student":
        teacher[:, COLUMNS] = -torch.inf if side == "both" and dtype != torch.float16 else least
    return Rows(student, teacher, labels, dtype)


@each("case", DEFAULTS)
@each("side", SIDES)
@each("temperature", [0.1, 0.9, 3.0])
def test_every_divergence(case: Case, side: str, temperature: float) -> None:
    """Below 1 the temperature takes such a logit past the end of its dtype."""
    check_logits(masked(side, torch.float32), case, "torch", temperature=temperature, prepare=with_minimum)


@each("case", FEW)
@each("side", SIDES)
def test_in_kernels(case: Case, side: str) -> None:
    """The same numbers from Triton."""
    check_logits(masked(side, torch.float32), case, "triton", temperature=0.9, prepare=with_minimum)


@each("case", [*FEW, ("amid", {"base": "ab"}), ("akl", {})])
@each("side", SIDES)
@each("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(case: Case, side: str, dtype: torch.dtype) -> None:
    """Each has a least number of its own."""
    check_logits(masked(side, dtype), case, "torch", temperature=0.9, prepare=with_minimum)


@each("case", [("fkl", {}), ("rkl", {}), ("tvd", {}), ("drkl", {})])
@each("side", SIDES)
def test_without_masks_beside_them(case: Case, side: str) -> None:
    """Rows of other tokens keep their numbers beside a masked one."""
    rows = masked(side, torch.float32)
    student, teacher = unrelated(5, 40, std=2.0).student, unrelated(5, 40, std=2.0).teacher
    student[1], teacher[1] = rows.student[1], rows.teacher[1]
    check_logits(
        Rows(student, teacher, rows.labels), case, "torch", temperature=0.9, prepare=with_minimum, per_row=VALUE
    )


@pytest.mark.xdist_group("compiled")
@each("case", [("rkl", {}), ("hellinger", ARGMAX)])  # whose graphs test_compiled.py makes too
@each("side", SIDES)
def test_compiled(case: Case, side: str) -> None:
    """Compiled rows."""
    check_logits(masked(side, torch.float32), case, "compiled", temperature=0.1, prepare=with_minimum)


@each("case", FEW)
@each("side", SIDES)
@each("temperature", [0.1, 3.0])
def test_streaming(case: Case, side: str, temperature: float) -> None:
    """A vocabulary chunk at a time: the teacher's mask comes as a bias."""
    rows = masked(side, torch.float32)
    name, params = case
    options = {"reduction": "none", "temperature": temperature}
    truth, value, weights = expected(rows.student, rows.teacher, rows.labels, case, options)
    leaf = with_minimum(rows.student.float()).requires_grad_()
    hidden, bias = rows.teacher.float(), torch.zeros(40)
    if side != "student":
        hidden[:, COLUMNS], bias[COLUMNS] = 0.0, torch.finfo(torch.float32).min
    loss = fusedkd.kd_loss(
        leaf, fusedkd.Head(hidden, torch.eye(40), bias), rows.labels, divergence=fusedkd.divergence(name, **params),
        schedule="streaming", backend="torch", **options,
    )  # fmt: skip
    loss.sum().backward()
    assert leaf.grad is not None
    assert_close(loss, value, VALUE, what="loss")
    assert_close(leaf.grad, truth.gradient(weights), VALUE, what="gradient")


@each("labelled", [True, False])
def test_nothing_but_masks(labelled: bool, backend: str) -> None:
    """A teacher's row of least numbers has nothing to say: 0, as one of −inf."""
    student = torch.randn(2, 40).requires_grad_()
    teacher = torch.randn(2, 40)
    teacher[1] = torch.finfo(torch.float32).min
    labels = torch.tensor([3, 4]) if labelled else None
    loss = fusedkd.kd_loss(student, teacher, labels, temperature=0.5, reduction="none", backend=backend)
    loss.sum().backward()
    assert student.grad is not None
    assert loss.tolist()[1] == 0
    assert not student.grad[1].any()
    assert student.grad[0].any()


def test_minimum_at_the_label(backend: str) -> None:
    """A label that the teacher holds impossible: the reverse KL is infinite, and the forward one counts it."""
    student, teacher, labels = torch.randn(3, 40), torch.randn(3, 40), torch.tensor([1, 2, 3])
    teacher[1, 2] = torch.finfo(torch.float32).min
    args = (student, teacher, labels)
    options = {"temperature": 0.9, "reduction": "none", "backend": backend}
    reverse = fusedkd.kd_loss(*args, divergence="rkl", **options)
    assert reverse.isinf().tolist() == [False, True, False]
    logp, logq = ((x.double() / 0.9).log_softmax(-1) for x in (teacher, student))
    truth = torch.nn.functional.kl_div(logq, logp.clamp(min=-1e30), reduction="none", log_target=True).sum(-1)
    assert_close(fusedkd.kd_loss(*args, **options), truth, VALUE)


@each("name", ["fkl", "rkl", "drkl", "jsd"])
@each("schedule", ["chunked", "streaming"])
def test_minimum_at_the_label_of_a_head(name: str, schedule: str, backend: str) -> None:
    """Both schedules agree that such a label is in the support: the teacher's logit comes as a bias."""
    labels, bias = torch.tensor([2, 2, 2]), torch.zeros(40)
    bias[2] = torch.finfo(torch.float32).min
    student, hidden = torch.randn(3, 40), torch.randn(3, 40)
    hidden[:, 2] = 0.0
    given = {"divergence": name, "reduction": "none", "temperature": 0.9, "backend": backend}
    teacher = fusedkd.Head(hidden, torch.eye(40), bias)
    loss = fusedkd.kd_loss(fusedkd.Head(student, torch.eye(40)), teacher, labels, schedule=schedule, **given)
    truth = oracle.distill(
        student.double(), (hidden + bias.clamp(min=LEAST)).double(), labels, oracle.meaning(name), temperature=0.9
    )
    far = torch.where(truth.loss > 1e20, torch.inf, truth.loss)  # log q − log p of about 1e30 is infinite here
    assert_close(loss, far, VALUE)
    assert bool(far.isinf().any()) == (name in ("rkl", "drkl"))


@each("name", ["fkl", "rkl", "jsd", "tvd", "hellinger", "ab"])
@each("fill", [-torch.inf, torch.finfo(torch.float32).min, -5e30])
def test_a_student_that_excludes_everything(name: str, fill: float) -> None:
    """A row with q = 0 in every column: what the backends say is the same, infinite or the bound."""
    student, teacher, labels = torch.randn(3, 40), torch.randn(3, 40), torch.tensor([1, 2, 3])
    student[1] = fill
    losses = [
        fusedkd.kd_loss(student, teacher, labels, divergence=name, reduction="none", backend=backend)
        for backend in ("torch", "triton")
    ]
    assert_close(losses[0], losses[1].double(), VALUE)
    if name in ("fkl", "rkl", "tvd"):
        assert losses[0][1].item() == pytest.approx({"fkl": torch.inf, "rkl": 1.0, "tvd": 0.5}[name], rel=1e-6)


def test_large_numbers_of_float64_are_no_masks() -> None:
    """Where float32 would overflow, they are logits like others."""
    student = -1e90 * (1 + torch.rand(3, 40, dtype=torch.float64))
    teacher = torch.randn(3, 40, dtype=torch.float64)
    loss = fusedkd.kd_loss(student, teacher, reduction="none", backend="torch")
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(loss, (logp.exp() * (logp - logq)).sum(-1), rtol=1e-12, atol=0)
