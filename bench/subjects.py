"""A case made ready to be run: one training step of the loss head, with its floor, its check and its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .cases import Answer, Case, HeadInputs, ListedInputs, Loss, RowInputs, answer, errors, make_inputs, truth
from .measure import in_fresh_process, peak_bytes
from .rivals import Rival, chosen, named


class Subject(Protocol):
    """What the sections check, measure and time."""

    case: Case
    device: str
    rivals: list[Rival]
    floor_name: str

    def check(self, loss: Loss) -> dict[str, float]:
        """Relative errors against float64."""
        ...

    def forget_truth(self) -> None:
        """Free what only `check` needs."""
        ...

    def run(self, loss: Loss) -> Mapping[str, Tensor]:
        """What is timed; the gradients."""
        ...

    def floor(self) -> Callable[[], object]:
        """The least work that there is."""
        ...

    def peak(self, rival: Rival, loss: Loss) -> int:
        """Peak memory above the inputs and the gradients."""
        ...


FLOORS = {
    "heads": "four bare matrix products",
    "rows": "one addition of the two, read and written once",
    "top-k heads": "three bare matrix products",
    "top-k rows": "one product with a number, read and written once",
}


class LossHead:
    """Inputs in, loss and gradients out."""

    def __init__(self, case: Case, device: str, families: tuple[str, ...]) -> None:
        self.case = case
        self.device = device
        self.rivals = chosen(case, families)
        self.inputs = make_inputs(case, device)
        self.exact: Answer | None = truth(self.inputs, case.divergence)
        self.floor_name = FLOORS[case.kind]

    def check(self, loss: Loss) -> dict[str, float]:
        """Errors of the loss and of every gradient, at the size that is timed."""
        assert self.exact is not None
        return errors(answer(self.inputs, loss), self.exact)

    def forget_truth(self) -> None:
        """Free the float64 gradients."""
        self.exact = None

    def run(self, loss: Loss) -> Mapping[str, Tensor]:
        """Loss and gradients."""
        return answer(self.inputs, loss).gradients

    def floor(self) -> Callable[[], object]:
        """Return what no exact implementation can do without, into buffers that are there."""
        inputs = self.inputs
        if isinstance(inputs, ListedInputs):
            sides = inputs.sides
            return bare_gemms(sides, 1) if isinstance(sides, HeadInputs) else bare_product(sides)
        return bare_gemms(inputs) if isinstance(inputs, HeadInputs) else bare_sweep(inputs)

    def peak(self, rival: Rival, loss: Loss) -> int:
        """In this process on a GPU, in a fresh one on a CPU."""
        if self.device == "cpu":
            return in_fresh_process(_peak_of, self.case, rival.name)
        return peak_bytes(lambda: self.run(loss), self.device)


def _peak_of(case: Case, name: str) -> int:
    """The peak on a CPU, in a process that has run nothing large before."""
    rival = named(case.kind, name)
    loss = rival.loss(case.divergence)
    inputs = make_inputs(case, "cpu")
    # Libraries load and threads start here, not in the measurement. The compiler's own memory is not the loss's either,
    # and it compiles for sizes.
    answer(inputs if rival.compiles else make_inputs(case.small(), "cpu"), loss)
    return peak_bytes(lambda: answer(inputs, loss).gradients, "cpu")


def bare_gemms(inputs: HeadInputs, sides: int = 2) -> Callable[[], None]:
    """Return the products forward, of both sides or of the student alone, and the two backward."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs[:4])
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        if sides == 2:
            torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return run


def bare_sweep(inputs: RowInputs) -> Callable[[], Tensor]:
    """Return a sweep that reads both sides' logits once and writes as much as a gradient."""
    student, teacher = inputs.student.detach(), inputs.teacher
    gradient = torch.empty_like(student)
    return lambda: torch.add(student, teacher, out=gradient)


def bare_product(inputs: RowInputs) -> Callable[[], Tensor]:
    """Return a sweep that reads the student's logits once and writes as much as a gradient."""
    student = inputs.student.detach()
    gradient = torch.empty_like(student)
    return lambda: torch.mul(student, 0.5, out=gradient)
