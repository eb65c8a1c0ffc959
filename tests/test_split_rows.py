"""A row shared by several programs: the same numbers as the oracle's, whatever the order in which programs run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from cases import DISTINCT, Case, Rows, check_logits, each, unrelated
from compare import relative

import fusedkd
from fusedkd.backends import interpreted, triton
from fusedkd.kernels.device import rows, split_rows

if not interpreted():
    pytest.skip("on a GPU tests/test_gpu.py runs these paths", allow_module_level=True)

LEAD, VOCABULARY = (2, 3), 515
CASES = [case for case in DISTINCT if case[0] not in ("amid", "akl") and "target_token" not in case[1]]
ONE_SWEEP, TWO_SWEEPS, MIXED = ("rkl", {}), ("jsd", {}), ("taid", {"base": "fkl"})


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every row is shared by five programs; which functions ran."""
    ran: list[str] = []
    monkeypatch.setattr(triton, "shares_rows", lambda problem, x: split_rows.serves(problem))
    monkeypatch.setattr(split_rows, "SMALLEST", 128)
    for name in ("value", "gradient", "value_and_gradient"):
        original = getattr(split_rows, name)
        monkeypatch.setattr(
            split_rows, name, lambda *args, name=name, original=original: (ran.append(name), original(*args))
        )
    return ran


def _noted(name: str, function: Any, ran: list[str]) -> Any:
    def call(*args: Any) -> None:
        ran.append(name)
        function(*args)

    return call


@each("case", CASES)
@each("options", [{}, {"temperature": 2.0, "ce_weight": 0.5, "vocab_size": 400}])
def test_against_the_oracle(case: Case, options: dict[str, Any], shared: list[str]) -> None:
    """Value, statistics and gradient, through autograd."""
    problem = unrelated(*LEAD, VOCABULARY)
    if "vocab_size" in options:
        problem = dataclasses.replace(problem, labels=problem.labels.clamp(max=399))
    check_logits(problem, case, "triton", **options)
    assert shared == ["value", "gradient"]


@pytest.mark.smoke
@each("case", [ONE_SWEEP, TWO_SWEEPS, MIXED, ("drkl", {})])
def test_hard_rows(case: Case) -> None:
    """A teacher without some tokens, one label among them; all mass on the label; nothing but the label; p = q."""
    student, teacher = 5 * torch.randn(5, VOCABULARY).double(), 5 * torch.randn(5, VOCABULARY).double()
    labels = torch.tensor([300, 7, 514, 0, 100])
    teacher[0, 100:420] = -torch.inf
    student[1, 7] += 60.0
    teacher[2, :-1] = -torch.inf
    teacher[3] = student[3]
    check_logits(Rows.of(student, teacher, labels), case, "triton")


@each("case", [ONE_SWEEP, TWO_SWEEPS])
@each("dtype", [torch.float32, torch.bfloat16])
def test_without_labels(case: Case, dtype: torch.dtype) -> None:
    """Nothing is held out."""
    problem = unrelated(*LEAD, VOCABULARY, dtype=dtype)
    check_logits(dataclasses.replace(problem, labels=None), case, "triton")


def both(case: Case, way: Any, *, in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient, loss and statistics by one of the ways of value and gradient, in poisoned memory."""
    torch.manual_seed(3)
    name, params = case
    form = fusedkd.divergence(name, **params).form
    problem = rows.Problem(
        form.definition, form.decoupled, tuple(map(float, form.theta)), (float(form.target), float(form.nontarget)),
        VOCABULARY - 5, 2.0, 4.0, 0.5, form.mix,
    )  # fmt: skip
    student, teacher = 5 * torch.randn(1, 4, VOCABULARY), 5 * torch.randn(1, 4, VOCABULARY - 5)
    labels, upstream = torch.tensor([3, -1, 500, 128]), torch.tensor([1.0, 2.0, -0.5, 0.25])
    gradient = student[0] if in_place else torch.full((4, VOCABULARY), torch.nan)
    loss, stats = torch.full((4,), torch.nan), torch.full((4, rows.STATS), torch.nan)
    way(problem, rows.Logits(student), rows.Logits(teacher), labels, upstream, gradient, loss, stats)
    return gradient, loss, stats


@contextlib.contextmanager
def shuffled() -> Iterator[dict[int, list[int]]]:
    """Programs of every launch of the interpreter in a random order; the order of the last one, by its size."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    original, orders = builder.set_grid_idx, defaultdict[int, list[int]](list)
    generator = numpy.random.default_rng(5)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        size = self.grid_dim[0]
        if x == 0:
            orders[size] = generator.permutation(size).tolist()
        original(self, orders[size][x], y, z)

    builder.set_grid_idx = set_grid_idx
    try:
        yield orders
    finally:
        builder.set_grid_idx = original


@each("case", CASES)
def test_as_one_program_per_row(case: Case) -> None:
    """Value and gradient in a call, over the width of the student."""
    shared, alone = both(case, split_rows.value_and_gradient), both(case, rows.value_and_gradient)
    for ours, theirs in zip(shared, alone, strict=True):
        assert not ours.isnan().any()
        assert relative(ours, theirs.double()) < 1e-5


def test_in_place() -> None:
    """The gradient may lie over the logits: no program reads what another has written."""
    fresh, over = (both(ONE_SWEEP, split_rows.value_and_gradient, in_place=in_place) for in_place in (False, True))
    for one, other in zip(fresh, over, strict=True):
        assert torch.equal(one, other)


@pytest.mark.interpreter("it shuffles the programs of Triton's interpreter; the emulator's blocks take turns anyway")
@each("case", [ONE_SWEEP, TWO_SWEEPS, ("ab", {}), MIXED])
def test_any_order(case: Case) -> None:
    """Programs that run in another order give the same bits."""
    usual = both(case, split_rows.value_and_gradient)
    with shuffled() as orders:
        for one, other in zip(usual, both(case, split_rows.value_and_gradient), strict=True):
            assert torch.equal(one, other)
    assert any(order != sorted(order) for order in orders.values())


def test_refuses_what_needs_a_whole_row() -> None:
    """A search over the row, or sweeps of its own."""
    with pytest.raises(ValueError, match="needs a whole row in one program"):
        both(("akl", {}), split_rows.value_and_gradient)


def test_few_rows_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per program wherever there are rows enough, and on every other device."""
    monkeypatch.undo()

    class Logits:
        """A tensor as the choice sees it."""

        def __init__(self, rows: int, *, is_cuda: bool) -> None:
            self.shape, self.is_cuda = (1, rows, VOCABULARY), is_cuda

    def chosen(name: str, rows_: int, *, is_cuda: bool) -> Any:
        form = fusedkd.divergence(name).form
        problem = rows.Problem(form.definition, form.decoupled, form.theta, (1.0, 1.0), VOCABULARY)
        return triton.kernels(problem, Logits(rows_, is_cuda=is_cuda))  # type: ignore[arg-type]

    assert chosen("rkl", triton.FEW_ROWS, is_cuda=True) is split_rows
    assert chosen("rkl", triton.FEW_ROWS + 1, is_cuda=True) is rows
    assert chosen("rkl", 1, is_cuda=False) is rows
    assert chosen("akl", 1, is_cuda=True) is rows
