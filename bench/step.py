"""A whole training step of a small transformers model: teacher and student forward, loss head, backward, optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..cli.demo import Budget, Plan, Recipe, build
from . import shapes
from .cases import STD, Answer, Case, HeadInputs, Loss, answer, errors, truth
from .measure import in_fresh_process, peak_bytes
from .rivals import Rival, chosen, named

# (width, layers) of student and teacher, batch, length
SIZES = {
    "cuda": ((1024, 4), (2048, 4), 8, 1024),
    "cpu": ((256, 2), (512, 2), 4, 128),
    "quick": ((32, 1), (64, 1), 2, 12),
}


def case_of(device: str, quick: bool) -> Case:
    """Return the loss head inside the step."""
    (hidden, layers), (teacher_hidden, teacher_layers), batch, length = SIZES["quick" if quick else device]
    vocab = shapes.QUICK.vocab if quick else shapes.QWEN3.vocab
    name = f"Qwen3, {layers} layers {hidden} wide from {teacher_layers} layers {teacher_hidden} wide"
    shape = shapes.Shape(name, batch * length, vocab, hidden, teacher_hidden)
    return Case("heads", shape, "float32" if device == "cpu" else "bfloat16", "fkl")


class TrainingStep:
    """Random Qwen3 models with the vocabulary of the real ones; the learning rate is 0, so every step is the same."""

    floor_name = "the same step with a sum in place of the loss head"

    def __init__(self, device: str, quick: bool, families: tuple[str, ...]) -> None:
        *widths, batch, length = SIZES["quick" if quick else device]
        student, teacher = (Recipe(hidden, layers, 0.0, Budget()) for hidden, layers in widths)
        self.device, self.quick = device, quick
        self.case = case_of(device, quick)
        self.rivals = chosen(self.case, families)
        torch.manual_seed(0)
        plan = Plan(device=device, length=length)
        vocab = self.case.shape.vocab
        self.student, self.teacher = (self._model(recipe, vocab, plan) for recipe in (student, teacher))
        self.teacher.requires_grad_(False)
        self.ids = torch.randint(vocab, (batch, length), device=device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0)
        self.exact: Answer | None = None

    def _model(self, recipe: Recipe, vocab: int, plan: Plan) -> Any:
        """An untrained model whose logits spread as a trained one's do."""
        model = build(recipe, vocab, plan).to(getattr(torch, self.case.dtype))
        torch.nn.init.normal_(model.lm_head.weight, std=STD / math.sqrt(recipe.hidden))
        return model

    def inputs(self) -> HeadInputs:
        """Run both bodies; the student's with a graph behind its hidden states."""
        with torch.no_grad():
            teacher_hidden = self.teacher.model(input_ids=self.ids).last_hidden_state.flatten(0, 1)
        hidden = self.student.model(input_ids=self.ids).last_hidden_state.flatten(0, 1)
        labels = self.ids.roll(-1, 1).flatten()
        return HeadInputs(hidden, self.student.lm_head.weight, teacher_hidden, self.teacher.lm_head.weight, labels)

    def check(self, loss: Loss) -> dict[str, float]:
        """Errors of the loss head on the models' own hidden states."""
        given = self.inputs()
        hidden, weight = (x.detach().requires_grad_() for x in given.leaves.values())
        given = given._replace(hidden=hidden, weight=weight)
        if self.exact is None:
            self.exact = truth(given, self.case.divergence)
        return errors(answer(given, loss), self.exact)

    def forget_truth(self) -> None:
        """Free the float64 gradients."""
        self.exact = None

    def run(self, loss: Loss) -> Mapping[str, Tensor]:
        """One training step; the parameters' gradients are freed in it, so none is left to be named."""
        return self._step(lambda: loss(self.inputs()))

    def floor(self) -> Callable[[], object]:
        """Return the step without its loss head."""
        return lambda: self._step(lambda: self.inputs().hidden.float().sum())

    def _step(self, loss: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {}

    def peak(self, rival: Rival, loss: Loss) -> int:
        """In this process on a GPU, in a fresh one on a CPU."""
        if self.device == "cpu":
            return in_fresh_process(_peak_of, self.quick, rival.name)
        return peak_bytes(lambda: self.run(loss), self.device)


def _peak_of(quick: bool, name: str) -> int:
    """The peak on a CPU, after two steps that make the optimiser's state and start libraries and threads."""
    rival = named("heads", name)
    step = TrainingStep("cpu", quick, (rival.family,))
    loss = rival.loss(step.case.divergence)
    step.run(loss)
    step.run(loss)
    return peak_bytes(lambda: step.run(loss), "cpu")
