"""On-policy distillation: reverse KL on what the student itself writes, with the whole of its gradient.

    python examples/on_policy.py

The student takes part in the divergence of every token, and in which tokens come later. The first is a gradient of the
divergence; the second a policy gradient, in which a token costs what comes after it (Gu et al., MiniLLM, ICLR 2024):

    ∇ E Σ_t KL_t = E Σ_t [∇KL_t + (KL_{t+1} + KL_{t+2} + ...)·∇log q(y_t)],    KL_t = KL(student || teacher) at token t
"""

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd

PROMPT, RESPONSE = 16, 32  # tokens


@torch.no_grad()
def rollout(student: Qwen2ForCausalLM, prompts: Tensor) -> Tensor:
    """(B, PROMPT + RESPONSE) ids, sampled from the student's whole distribution: else the gradient is another."""
    options = dict(do_sample=True, top_k=0, use_cache=True, max_new_tokens=RESPONSE, min_new_tokens=RESPONSE)
    return student.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def response_head(model: Qwen2ForCausalLM, ids: Tensor) -> fusedkd.Head:
    """What the model says at the positions before each token of the response."""
    return fusedkd.Head(model.model(ids[:, :-1]).last_hidden_state[:, PROMPT - 1 :], model.lm_head.weight)


def surrogate(kl: Tensor, logprobs: Tensor) -> Tensor:
    """(B, RESPONSE) numbers whose sum has the gradient above; the value of the second term means nothing."""
    later = kl.detach().flip(1).cumsum(1).flip(1) - kl.detach()  # what comes after each token
    return kl + (later - later.mean(0)) * logprobs  # the mean only takes noise away: E ∇log q = 0


def main() -> None:
    """Train both models, the student less, distil the student on its own text, say what that did."""
    steps = tiny.steps(__doc__)
    rows, held_out = tiny.text()
    student, teacher = tiny.pair(rows, steps)
    tiny.train(student, tiny.batches(rows, steps), steps, "student, before")  # it has to write, too

    def divergence(ids: Tensor) -> tuple[fusedkd.Head, Tensor]:
        """The student's side, and KL(student || teacher) at each token of the responses (B, RESPONSE)."""
        with torch.no_grad():
            target = response_head(teacher, ids)
        side = response_head(student, ids)
        return side, fusedkd.kd_loss(side, target, divergence="rkl", reduction="none")

    def held_out_loss(ids: Tensor, labels: Tensor) -> Tensor:
        return divergence(rollout(student, ids[:, :PROMPT]))[1].mean()

    before = tiny.held_out_loss(held_out_loss, held_out)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for prompts, _ in tiny.shown(tiny.batches(rows[:, : PROMPT + 1], steps), "student", steps):
        ids = rollout(student, prompts)
        side, kl = divergence(ids)
        surrogate(kl, fusedkd.token_logprobs(side, ids[:, PROMPT:])).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tiny.report("KL(student || teacher)", steps, before, tiny.held_out_loss(held_out_loss, held_out))


if __name__ == "__main__":
    main()
