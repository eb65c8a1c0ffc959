"""Self-distillation: a student learns from words and from a teacher that is the moving average of itself.

    python examples/ema.py

The student reads a text with gaps, the teacher the whole of it. Embedding and output layer are one tensor in both
models, held once; the rest of the teacher follows the student (mean teacher, Tarvainen and Valpola, 2017).
"""

import copy

import tiny
import torch
from torch import Tensor, nn

import fusedkd

GAPS, DECAY = 0.1, 0.9


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher ← decay·teacher + (1 − decay)·student, for all that they do not share."""
    for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
        if theirs is not ours:
            theirs.lerp_(ours, 1 - decay)


def main() -> None:
    """Train the student beside its average, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student = tiny.model(64, 2).to(tiny.DEVICE)
    body, weight = student.model, student.lm_head.weight
    teacher = copy.deepcopy(body, {id(body.embed_tokens): body.embed_tokens})  # all but the embedding is a copy

    def cross_entropy(ids: Tensor, labels: Tensor) -> Tensor:
        head = fusedkd.Head(body(ids).last_hidden_state, weight)
        return -fusedkd.token_logprobs(head, labels).sum() / (labels != tiny.IGNORED).sum()

    before = tiny.held_out_loss(cross_entropy, held_out)
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    for ids, labels in tiny.shown(tiny.batches(rows, steps), "student", steps):
        with torch.no_grad():
            teacher_hidden = teacher(ids).last_hidden_state
        gapped = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < GAPS, 0)
        loss = fusedkd.kd_loss(
            fusedkd.Head(body(gapped).last_hidden_state, weight),
            fusedkd.Head(teacher_hidden, weight),  # no gradient flows here: the weight learns as the student's
            labels,
            ce_weight=1.0,  # cross-entropy with the labels, in the same sweep over the same logits
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, body, DECAY)
    tiny.report("cross-entropy", steps, before, tiny.held_out_loss(cross_entropy, held_out))


if __name__ == "__main__":
    main()
