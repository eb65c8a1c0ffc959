"""Distil with Hugging Face's Trainer: one method is replaced.

    python examples/hf_trainer.py

Needs accelerate. Right under gradient accumulation and DDP; where FSDP shards the weights, the loss belongs in a
module's forward (fsdp.py).
"""

import tempfile
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, Trainer, TrainingArguments

import fusedkd


class DistillationTrainer(Trainer):
    """A Trainer with a teacher in place of cross-entropy."""

    def __init__(self, *args: Any, teacher: Qwen2ForCausalLM, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher = teacher.to(self.args.device).eval()

    def head(self, model: nn.Module, inputs: dict[str, Tensor]) -> fusedkd.Head:
        """By the model's own forward, in which DDP gets ready for the gradients; it makes the logits of one token."""
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        states = model(**kept, output_hidden_states=True, logits_to_keep=1).hidden_states
        return fusedkd.Head(states[-1], self.accelerator.unwrap_model(model).lm_head.weight)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence. Trainer counts the tokens of all micro-batches and devices; its labels are not shifted."""
        with torch.no_grad():
            teacher = self.head(self.teacher, inputs)
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=tiny.IGNORED)
        loss = fusedkd.kd_loss(self.head(model, inputs), teacher, labels, num_items=num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # of whose gradients the mean is taken
        return (loss, {}) if return_outputs else loss


def dataset(rows: Tensor) -> list[dict[str, Tensor]]:
    """In which unknown words do not count."""
    return [{"input_ids": row, "labels": torch.where(row == 0, tiny.IGNORED, row)} for row in rows]


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=4, learning_rate=4e-3,
            prediction_loss_only=True, save_strategy="no", report_to=[],
        )  # fmt: skip
        trainer = DistillationTrainer(
            student, args, train_dataset=dataset(rows), eval_dataset=dataset(held_out[:128]), teacher=teacher
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        tiny.report("KL(teacher || student)", steps, before, trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    main()
