"""Distil by DistiLLM-2 (CALD): pull the student up on the teacher's responses, push it down on its own.

    python examples/cald.py

Both models answer the same prompts before an epoch. Ko et al., DistiLLM-2, ICML 2025.
"""

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd

PROMPT, RESPONSE = 16, 32  # tokens


@torch.no_grad()
def answers(model: Qwen2ForCausalLM, prompts: Tensor) -> Tensor:
    """(B, PROMPT + RESPONSE) ids, sampled from the model's whole distribution."""
    options = dict(do_sample=True, top_k=0, use_cache=True, max_new_tokens=RESPONSE, min_new_tokens=RESPONSE)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def labels_of(ids: Tensor) -> Tensor:
    """The tokens that follow `ids[:, :-1]`, of which the prompt's do not count."""
    labels = ids[:, 1:].clone()
    labels[:, : PROMPT - 1] = tiny.IGNORED
    return labels


def head(model: Qwen2ForCausalLM, ids: Tensor) -> fusedkd.Head:
    """Hidden states and output layer, in place of logits."""
    return fusedkd.Head(model.model(ids[:, :-1]).last_hidden_state, model.lm_head.weight)


def main() -> None:
    """Train both models, the student less, have them answer, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    tiny.train(student, tiny.batches(rows, steps), steps, "student, before")  # it has to answer, too

    def loss(chosen: Tensor, rejected: Tensor, beta: float = 1.0) -> Tensor:
        with torch.no_grad():
            target_chosen, target_rejected = head(teacher, chosen), head(teacher, rejected)
        return fusedkd.cald_loss(
            head(student, chosen), target_chosen, labels_of(chosen),
            head(student, rejected), target_rejected, labels_of(rejected), beta=beta,
        )  # fmt: skip

    tests = held_out[:64, :PROMPT].to(tiny.DEVICE)
    tests_chosen, tests_rejected = answers(teacher, tests), answers(student, tests)
    with torch.no_grad():
        before = loss(tests_chosen, tests_rejected).item()

    prompts = rows[torch.randperm(len(rows))[: 4 * tiny.BATCH], :PROMPT].to(tiny.DEVICE)
    chosen, rejected = (answers(model, prompts).split(tiny.BATCH) for model in (teacher, student))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for step in tiny.shown(range(steps), "student", steps):
        beta = 1.0 + 0.5 * step / steps  # the authors' raise
        loss(chosen[step % len(chosen)], rejected[step % len(chosen)], beta).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tiny.report("CALD loss", steps, before, loss(tests_chosen, tests_rejected).item())


if __name__ == "__main__":
    main()
