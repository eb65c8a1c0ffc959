"""Distil into LoRA adapters: body and output layer are frozen, and no gradient of the output layer's weight is made.

    python examples/lora_frozen_head.py

That leaves out one of the four matrix products of the loss and its (vocabulary, width) float32 result.
"""

import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fusedkd

RANK = 8


class LoRA(nn.Module):
    """A frozen layer and a product of two thin ones, which starts at 0 (Hu et al., ICLR 2022)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False, device=base.weight.device)
        self.up = nn.Linear(RANK, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the correction."""
        return self.base(x) + self.up(self.down(x))


def main() -> None:
    """Train both models, the student less, freeze it, distil into its adapters, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    tiny.train(student, tiny.batches(rows, steps // 2), steps // 2, "student, before")

    student.requires_grad_(False)  # lm_head too: it is what tells kd_loss to make no gradient for it
    for layer in student.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "down_proj")):
            setattr(parent, name, LoRA(getattr(parent, name)))
    adapters = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        student_hidden, teacher_hidden = (model.model(ids).last_hidden_state for model in (student, teacher))
        return fusedkd.kd_loss(
            fusedkd.Head(student_hidden, student.lm_head.weight),
            fusedkd.Head(teacher_hidden, teacher.lm_head.weight),
            labels,
        )

    before = tiny.held_out_loss(loss, held_out)
    optimizer = torch.optim.AdamW(adapters, 1e-2)
    for ids, labels in tiny.shown(tiny.batches(rows, steps), "adapters", steps):
        loss(ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tiny.held_out_loss(loss, held_out)

    print(f"{sum(map(torch.numel, adapters)):,} of {student.num_parameters():,} parameters trained")
    ids, labels = next(tiny.batches(held_out, 1))
    for learns in (False, True):
        student.lm_head.requires_grad_(learns)
        with FlopCounterMode(display=False) as counter:
            loss(ids, labels).backward()
        what = "with" if learns else "without"
        print(f"{counter.get_total_flops() / 1e9:.2f} GFLOPs a step {what} the gradient of lm_head.weight")
    assert student.lm_head.weight.grad is not None
    tiny.report("KL(teacher || student)", steps, before, after)


if __name__ == "__main__":
    main()
