"""Gradient accumulation that is one big batch: every micro-batch divides by the tokens of all of them.

    python examples/accumulation.py

The mean of micro-batches' means is another loss, in which a token of a micro-batch with few of them weighs more.
"""

from functools import partial

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd

MICRO = 4  # rows at a time


def distillation_loss(
    student: Qwen2ForCausalLM,
    teacher: Qwen2ForCausalLM,
    ids: Tensor,
    labels: Tensor,
    num_items: Tensor | None = None,
) -> Tensor:
    """Σ over counted tokens / num_items; without it the mean over those given."""
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state
    student_hidden = student.model(ids).last_hidden_state
    return fusedkd.kd_loss(
        fusedkd.Head(student_hidden, student.lm_head.weight),
        fusedkd.Head(teacher_hidden, teacher.lm_head.weight),
        labels,
        num_items=num_items,
    )


def with_prompts(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of prompts of all lengths do not count: micro-batches have different numbers of tokens."""
    at = torch.arange(labels.shape[1], device=labels.device)
    lengths = torch.linspace(0, labels.shape[1] - 1, len(labels), device=labels.device)
    return ids, labels.masked_fill(at < lengths.unsqueeze(-1), tiny.IGNORED)


def main() -> None:
    """Train the teacher, compare one gradient, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    loss = partial(distillation_loss, student, teacher)

    def accumulate(ids: Tensor, labels: Tensor) -> None:
        """Add the gradient of the whole batch to the parameters'."""
        count = (labels != tiny.IGNORED).sum()  # under data parallelism: of all ranks
        for micro in zip(ids.split(MICRO), labels.split(MICRO), strict=True):
            loss(*micro, num_items=count).backward()

    def gradient() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
        return found

    batch = with_prompts(*next(tiny.batches(rows, 1)))
    loss(*batch).backward()
    whole = gradient()
    accumulate(*batch)
    apart = ((gradient() - whole).norm() / whole.norm()).item()
    print(f"gradient of {tiny.BATCH // MICRO} micro-batches and of the whole batch: {apart:.1e} apart")
    assert apart < 1e-5

    before = tiny.held_out_loss(loss, held_out)
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    for ids, labels in tiny.shown(tiny.batches(rows, steps), "student", steps):
        accumulate(*with_prompts(ids, labels))
        optimizer.step()
        optimizer.zero_grad()
    tiny.report("KL(teacher || student)", steps, before, tiny.held_out_loss(loss, held_out))


if __name__ == "__main__":
    main()
