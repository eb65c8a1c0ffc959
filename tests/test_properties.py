"""Laws that hold for every input, on inputs that nobody chose."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import ALL, IGNORE, VALUE, Case, Rows, check_logits, device, named
from compare import relative
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedkd

EXAMPLES = {"torch": 25, "triton": 8}
GRID = 256  # logits on this grid take an integer shift without rounding
SEPARABLE = [(name, params) for name, params in ALL if name not in ("amid", "akl", "tvd", "taid")]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A drawn problem; the numbers come from the seed, the structure from hypothesis."""

    lead: tuple[int, ...]
    vocabulary: int
    std: float
    distance: float | None
    seed: int

    def rows(self) -> Rows:
        """Logits on the grid, every fourth row ignored when there are that many."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*self.lead, self.vocabulary)
        teacher = self.std * torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        student = self.std * noise if self.distance is None else teacher + self.distance * noise
        labels = torch.randint(self.vocabulary, self.lead, generator=generator)
        labels.view(-1)[3::4] = IGNORE
        return Rows.of(*((x * GRID).round() / GRID for x in (student, teacher)), labels)


problems = st.builds(
    Problem,
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    vocabulary=st.integers(1, 300),
    std=st.sampled_from([0.5, 3.0, 10.0]),
    distance=st.sampled_from([None, 0.5, 0.02]),
    seed=st.integers(0, 2**31),
)
cases = st.sampled_from(SEPARABLE)


def run(rows: Rows, case: Case, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Per-token loss and the gradient of its sum."""
    name, params = case
    place = device(backend)
    leaf = rows.student.to(place, torch.float32).requires_grad_()
    made = fusedkd.divergence(name, **params)
    options = {"divergence": made, "reduction": "none", "backend": backend} | options
    loss = fusedkd.kd_loss(leaf, rows.teacher.to(leaf.detach()), rows.labels.to(place), **options)
    loss.sum().backward()
    return loss.detach().double().cpu(), leaf.grad.double().cpu()


def drawn(backend: str, *strategies: Any) -> Any:
    """@given with the number of examples that the backend can afford; the interpreter is too slow to shrink one."""
    phases = [phase for phase in Phase if backend == "torch" or phase is not Phase.shrink]
    return lambda test: settings(max_examples=EXAMPLES[backend], phases=phases)(given(*strategies)(test))


@pytest.mark.parametrize("backend", EXAMPLES)
def test_oracle(backend: str) -> None:
    """Any shape, temperature, weights, vocabulary mismatch and holes in the teacher, against the oracle."""

    @drawn(backend, problems, cases, st.sampled_from([0.7, 1.0, 3.0]), st.booleans(), st.integers(0, 40), st.data())
    def check(problem: Problem, case: Case, tau: float, squared: bool, extra: int, data: st.DataObject) -> None:
        rows = problem.rows()
        holes = torch.tensor(data.draw(st.lists(st.integers(0, problem.vocabulary - 1), max_size=5)), dtype=torch.int64)
        teacher = rows.teacher.clone()
        if len(set(holes.tolist())) < problem.vocabulary:
            teacher[..., holes] = -torch.inf
        student = torch.cat((rows.student, torch.full((*problem.lead, extra), torch.nan).double()), -1)
        rows = Rows.of(student, teacher, rows.labels)
        skip = ("student_logprob", "teacher_logprob")  # undefined for a label in a hole
        check_logits(rows, case, backend, temperature=tau, temperature_squared=squared, skip=skip)

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_non_negative_and_sum_to_zero(backend: str) -> None:
    """With equal weights a divergence is never negative; its gradient never moves the mean of the logits."""

    @drawn(backend, problems, cases)
    @example(Problem((3,), 300, 10.0, 0.02, 1), ("rkl", {}))
    def check(problem: Problem, case: Case) -> None:
        loss, grad = run(problem.rows(), case, backend)
        if not {"target", "nontarget"} & set(case[1]) or case[0] == "decoupled":
            assert (loss >= 0).all()
        assert (grad.sum(-1).abs() <= VALUE * grad.abs().sum(-1)).all()

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_shift_invariance(backend: str) -> None:
    """A constant added to the logits of a row changes nothing."""

    @drawn(backend, problems, cases, st.integers(-200, 200), st.integers(-200, 200))
    def check(problem: Problem, case: Case, up: int, down: int) -> None:
        rows = problem.rows()
        moved = dataclasses.replace(rows, student=rows.student + up, teacher=rows.teacher + down)
        for here, there in zip(run(rows, case, backend), run(moved, case, backend), strict=True):
            assert relative(there, here) <= VALUE

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_permutation_of_the_vocabulary(backend: str) -> None:
    """The order of the tokens means nothing: the loss stays, the gradient moves with the columns."""

    @drawn(backend, problems, cases)
    def check(problem: Problem, case: Case) -> None:
        rows = problem.rows()
        order = torch.randperm(problem.vocabulary, generator=torch.Generator().manual_seed(problem.seed))
        labels = torch.where(rows.labels >= 0, order.argsort()[rows.labels.clamp(min=0)], rows.labels)
        loss, grad = run(rows, case, backend)
        there, moved = run(Rows.of(rows.student[..., order], rows.teacher[..., order], labels), case, backend)
        assert relative(there, loss) <= VALUE
        assert relative(moved, grad[..., order]) <= VALUE

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_rows_are_independent(backend: str) -> None:
    """A row gives the same numbers alone and among others; the same bits where one program owns it.

    Of 16 columns or a multiple: a row that begins elsewhere is summed in another order.
    """

    @drawn(backend, problems, cases, st.integers(0, 8))
    def check(problem: Problem, case: Case, pick: int) -> None:
        rows = problem.rows()
        sides = (x.reshape(-1, problem.vocabulary) for x in (rows.student, rows.teacher))
        flat = Rows.of(*(torch.nn.functional.pad(x, (0, -x.shape[1] % 16)) for x in sides), rows.labels.view(-1))
        i = pick % len(flat.labels)
        loss, grad = run(flat, case, backend)
        alone = run(Rows.of(*(x[i : i + 1] for x in (flat.student, flat.teacher, flat.labels))), case, backend)
        for ours, among in zip(alone, (loss[i : i + 1], grad[i : i + 1]), strict=True):
            assert relative(ours, among) <= (0 if backend == "triton" else VALUE)

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_weights_are_linear(backend: str) -> None:
    """(w_T, w_N) = w_T · (1, 0) + w_N · (0, 1), in the loss and in every entry of the gradient."""

    @drawn(backend, problems, st.sampled_from(["fkl", "rkl", "ab", "decoupled"]), st.floats(0.1, 4), st.floats(0.1, 4))
    def check(problem: Problem, name: str, target: float, nontarget: float) -> None:
        rows = problem.rows()
        pairs = [(target, nontarget), (1.0, 0.0), (0.0, 1.0)]
        whole, first, second = (run(rows, (name, {"target": a, "nontarget": b}), backend) for a, b in pairs)
        for ours, one, other in zip(whole, first, second, strict=True):
            parts = (target * one).abs().norm() + (nontarget * other).abs().norm()
            assert (ours - target * one - nontarget * other).norm() <= VALUE * parts, named((name, {}))

    check()


@pytest.mark.parametrize("backend", EXAMPLES)
def test_reductions_agree(backend: str) -> None:
    """mean · count = sum = Σ none, for the loss and the gradient."""

    @drawn(backend, problems, cases)
    def check(problem: Problem, case: Case) -> None:
        rows = problem.rows()
        count = max(int((rows.labels != IGNORE).sum()), 1)
        tokens, grad = run(rows, case, backend)
        for reduction, factor in (("sum", 1), ("mean", count)):
            total, slope = run(rows, case, backend, reduction=reduction)
            assert relative(factor * total, tokens.sum()) < 1e-6
            assert relative(factor * slope, grad) < 1e-6

    check()
