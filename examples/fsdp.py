"""Distil a small language model on several ranks whose weights are sharded (FSDP2), heads included.

    torchrun --nproc-per-node 2 examples/fsdp.py

gloo on CPUs, nccl and bfloat16 where every rank has a GPU. The text is Python's standard library: nothing is fetched.
A teacher is trained first, replicated (DDP); then student and teacher are sharded as one module, whose forward calls
`fusedkd.DistillationHead`: inside it the weights of both output layers are whole.
"""

import os
from collections.abc import Iterator

import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2ForCausalLM

import fusedkd


class Distillation(nn.Module):
    """Both models and their loss: what is sharded as a whole."""

    def __init__(self, student: Qwen2ForCausalLM, teacher: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.head = fusedkd.DistillationHead(student.lm_head, teacher.lm_head, "jsd")

    def forward(self, ids: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
        """Σ over this rank's tokens / num_items, in nats."""
        with torch.no_grad():
            teacher_hidden = self.teacher.model(ids).last_hidden_state
        student_hidden = self.student.model(ids).last_hidden_state
        return self.head(student_hidden, teacher_hidden, labels, num_items=num_items)


def batches(rows: Tensor, steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of `steps` random batches."""
    return tiny.batches(rows, steps, device, slice(dist.get_rank(), None, dist.get_world_size()))


def train_teacher(teacher: Qwen2ForCausalLM, rows: Tensor, steps: int, device: torch.device) -> None:
    """Next words, on all ranks alike."""
    tiny.train(DistributedDataParallel(teacher), batches(rows, steps, device), steps)
    teacher.requires_grad_(False)


def shard(root: Distillation, device: torch.device) -> None:
    """Each layer is a unit; the root is the one with what is left: embeddings, norms and output layers."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (*root.student.model.layers, *root.teacher.model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)


def loss_of(root: Distillation, ids: Tensor, labels: Tensor) -> Tensor:
    """This rank's share of the mean over the tokens of all ranks: the shares add up to it."""
    count = (labels != tiny.IGNORED).sum()
    dist.all_reduce(count)
    return root(ids, labels, count)


@torch.no_grad()
def held_out_loss(root: Distillation, rows: Tensor, device: torch.device) -> float:
    """The mean over a few batches."""
    losses = [loss_of(root, *batch) for batch in batches(rows, 8, device)]
    dist.all_reduce(total := torch.stack(losses).mean())
    return total.item()


def start(about: str | None) -> tuple[int, torch.device]:
    """The command line's number of steps, and this rank's device, once the ranks have met."""
    steps = tiny.steps(about)  # and the seed: every rank has the same weights
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    return steps, device


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps, device = start(__doc__)
    rank, world = dist.get_rank(), dist.get_world_size()
    with device:
        student, teacher = tiny.model(64, 2), tiny.model(128, 3)
    rows, held_out = tiny.text()
    train_teacher(teacher, rows, steps, device)

    root = Distillation(student, teacher)
    shard(root, device)
    # Of the shards: after sharding, and before a forward without backward, which leaves the root's parameters whole.
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    before = held_out_loss(root, held_out, device)
    for ids, labels in tiny.shown(batches(rows, steps, device), "student", steps):
        (world * loss_of(root, ids, labels)).backward()  # gradients are averaged over ranks: world times that is a sum
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss(root, held_out, device)
    if rank == 0:
        print(f"{world} ranks, {steps} steps: Jensen-Shannon divergence {before:.4f} -> {after:.4f} nats a token")
    dist.barrier()  # gloo may abort a rank whose peers have left
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
