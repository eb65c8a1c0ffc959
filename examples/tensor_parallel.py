"""Distil a small language model whose output layers are sharded over ranks by vocabulary (tensor parallelism).

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

gloo on CPUs, nccl where every rank has a GPU. Every rank has the same tokens, the same bodies of both models, and its
own rows of both output layers, so that no rank has logits of the whole vocabulary. The start and
the teacher's training are those of fsdp.py.
"""

import tiny
import torch
import torch.distributed as dist
from fsdp import start, train_teacher
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

import fusedkd


class Distillation:
    """Both models, of whose output layers this rank has some rows."""

    def __init__(self, student: Qwen2ForCausalLM, teacher: Qwen2ForCausalLM) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        start, stop = rank * tiny.VOCAB // world, (rank + 1) * tiny.VOCAB // world
        self.shard = fusedkd.VocabShard(start=start, stop=stop)
        self.student, self.teacher = student.model, teacher.model
        self.weight = nn.Parameter(student.lm_head.weight[start:stop].detach().clone())
        self.teacher_weight = teacher.lm_head.weight[start:stop].clone()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What this rank trains: the body, and its rows of the output layer."""
        return [*self.student.parameters(), self.weight]

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean in nats, the same on every rank; hidden states get their whole gradient (hidden_grad="reduce")."""
        with torch.no_grad():
            teacher_hidden = self.teacher(ids).last_hidden_state
        student_hidden = self.student(ids).last_hidden_state
        student = fusedkd.Head(student_hidden, self.weight)
        teacher = fusedkd.Head(teacher_hidden, self.teacher_weight)
        return fusedkd.kd_loss(student, teacher, labels, divergence="jsd", shard=self.shard)

    def same_gradients(self) -> None:
        """The mean of the ranks' gradients of the body, which differ only where a GPU adds in another order."""
        for parameter in self.student.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def held_out_loss(run: Distillation, rows: Tensor, device: torch.device) -> float:
    """The mean over a few batches."""
    return torch.stack([run.loss(*batch) for batch in tiny.batches(rows, 8, device)]).mean().item()


def memory(ids: Tensor, columns: int) -> str:
    """What the logits of a batch would take, and at most take on a rank."""
    whole, part = (2 * 4 * ids.numel() * width / 1e6 for width in (tiny.VOCAB, columns))
    return (
        f"float32 logits of a batch, both sides: {whole:.1f} MB whole; a rank makes those of its {columns:,} columns, "
        f"{part:.1f} MB, and never more than a chunk of tokens at a time"
    )


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps, device = start(__doc__)
    with device:
        student, teacher = tiny.model(64, 2, tied=False), tiny.model(128, 3, tied=False)
    rows, held_out = tiny.text()
    train_teacher(teacher, rows, steps, device)

    run = Distillation(student, teacher)
    optimizer = torch.optim.AdamW(run.parameters, 4e-3)
    before = held_out_loss(run, held_out, device)
    for ids, labels in tiny.shown(tiny.batches(rows, steps, device), "student", steps):
        run.loss(ids, labels).backward()
        run.same_gradients()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss(run, held_out, device)
    if dist.get_rank() == 0:
        world = dist.get_world_size()
        print(f"{world} ranks, {steps} steps: Jensen-Shannon divergence {before:.4f} -> {after:.4f} nats a token")
        print(memory(ids, len(run.weight)))
    dist.barrier()  # gloo may abort a rank whose peers have left
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
