"""Distil in a plain training loop: two Heads in place of two tensors of logits.

    python examples/loop.py

Every other example changes one thing of this.
"""

from functools import partial

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd


def distillation_loss(student: Qwen2ForCausalLM, teacher: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean over counted tokens, in nats. The bodies of both models run as ever; neither makes logits."""
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state
    student_hidden = student.model(ids).last_hidden_state
    return fusedkd.kd_loss(
        fusedkd.Head(student_hidden, student.lm_head.weight),
        fusedkd.Head(teacher_hidden, teacher.lm_head.weight),
        labels,  # labels[:, i] is the token after ids[:, i]
        divergence="jsd",
    )


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    loss = partial(distillation_loss, student, teacher)

    before = tiny.held_out_loss(loss, held_out)
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    for ids, labels in tiny.shown(tiny.batches(rows, steps), "student", steps):
        loss(ids, labels).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tiny.report("Jensen-Shannon divergence", steps, before, tiny.held_out_loss(loss, held_out))


if __name__ == "__main__":
    main()
