"""TRL's DistillationTrainer, on-policy, with its loss replaced: two lines more than without.

    python examples/trl_distillation.py

Needs trl 1.16. Losses and weights are TRL's to float32 rounding.
"""

import tempfile
from functools import partial

import tiny
import torch
from datasets import Dataset
from loop import distillation_loss
from trl import DistillationConfig, DistillationTrainer

import fusedkd.compat.trl

PROMPT, RESPONSE = 16, 32  # tokens


def main() -> None:
    """Train both models, the student less, distil the student on its own text, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    tiny.train(student, tiny.batches(rows, steps), steps, "student, before")  # it has to write, too
    words = tiny.words()[: len(rows) * tiny.LENGTH]
    prompts = ["".join(words[i : i + PROMPT]) for i in range(0, len(words), tiny.LENGTH)]

    fusedkd.compat.trl.patch("distillation")
    loss = partial(distillation_loss, student, teacher)
    before = tiny.held_out_loss(loss, held_out)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            folder, max_steps=steps, per_device_train_batch_size=tiny.BATCH, learning_rate=1e-3,
            beta=1.0, max_completion_length=RESPONSE, bf16=torch.cuda.is_available(), gradient_checkpointing=False,
            save_strategy="no", report_to=[],
        )  # fmt: skip
        trainer = DistillationTrainer(
            student, teacher, args, Dataset.from_dict({"prompt": prompts}), processing_class=tiny.tokenizer()
        )
        trainer.train()
    tiny.report("Jensen-Shannon divergence", steps, before, tiny.held_out_loss(loss, held_out))


if __name__ == "__main__":
    main()
