"""TRL's GKDTrainer, half of whose batches the student writes, with its loss replaced: two lines more than without.

    python examples/trl_gkd.py

Needs trl 1.16. Losses and weights are TRL's to float32 rounding.
"""

import tempfile
from functools import partial

import tiny
import torch
from datasets import Dataset
from loop import distillation_loss
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fusedkd.compat.trl

PROMPT, RESPONSE = 16, 32  # tokens


def conversations(words: list[str]) -> Dataset:
    """Text, cut into prompts and what comes after them."""
    made = []
    for start in range(0, len(words), tiny.LENGTH):
        prompt, response = words[start : start + PROMPT], words[start + PROMPT : start + PROMPT + RESPONSE]
        user = {"role": "user", "content": "".join(prompt)}
        made.append({"messages": [user, {"role": "assistant", "content": "".join(response)}]})
    return Dataset.from_list(made)


def main() -> None:
    """Train both models, the student less, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    tiny.train(student, tiny.batches(rows, steps), steps, "student, before")  # it has to write, too

    fusedkd.compat.trl.patch("gkd")
    loss = partial(distillation_loss, student, teacher)
    before = tiny.held_out_loss(loss, held_out)
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder, max_steps=steps, per_device_train_batch_size=tiny.BATCH, learning_rate=1e-3, lmbda=0.5, beta=0.5,
            max_new_tokens=RESPONSE, max_length=tiny.LENGTH, bf16=torch.cuda.is_available(),
            gradient_checkpointing=False, save_strategy="no", report_to=[],
        )  # fmt: skip
        trainer = GKDTrainer(
            student, teacher, args, train_dataset=conversations(tiny.words()[:64_000]),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        trainer.train()
    tiny.report("Jensen-Shannon divergence", steps, before, tiny.held_out_loss(loss, held_out))


if __name__ == "__main__":
    main()
