"""Distil by TAID: a teacher mixed with the student, which moves from the one to the other as training goes on.

    python examples/taid.py

Shing et al., TAID, ICLR 2025.
"""

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd


def head(model: Qwen2ForCausalLM, ids: Tensor) -> fusedkd.Head:
    """Hidden states and output layer, in place of logits."""
    return fusedkd.Head(model.model(ids).last_hidden_state, model.lm_head.weight)


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)

    def kl(ids: Tensor, labels: Tensor) -> Tensor:
        """From the teacher itself: that of the mixed one is small at first, whatever the student knows."""
        return fusedkd.kd_loss(head(student, ids), head(teacher, ids), labels)

    before = tiny.held_out_loss(kl, held_out)
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    schedule = fusedkd.TAIDSchedule(total_steps=steps)  # state_dict() belongs in a checkpoint
    for ids, labels in tiny.shown(tiny.batches(rows, steps), "student", steps):
        with torch.no_grad():
            target = head(teacher, ids)
        mixed = fusedkd.divergence("taid", t=schedule.t)  # t·teacher + (1 − t)·student, of logits, as a constant
        loss = fusedkd.kd_loss(head(student, ids), target, labels, divergence=mixed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.update(loss)  # once per optimizer step, with the loss of all its micro-batches
    print(f"t: {schedule.t_start:.2f} -> {schedule.t:.2f}")
    tiny.report("KL(teacher || student)", steps, before, tiny.held_out_loss(kl, held_out))


if __name__ == "__main__":
    main()
