"""Distil a small language model on several ranks whose weights are sharded (FSDP2), heads included.

    torchrun --nproc-per-node 2 examples/fsdp.py

gloo on CPUs, nccl and bfloat16 where every rank has a GPU. The text is Python's standard library: nothing is fetched.
A teacher is trained first, replicated (DDP); then student and teacher are sharded as one module, whose forward calls
`fusedkd.DistillationHead`: inside it the weights of both output layers are whole.
"""

import argparse
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

import fusedkd

IGNORED = -100
VOCAB, LENGTH, BATCH = 4096, 64, 16  # BATCH rows of LENGTH tokens: all ranks together


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


def read_text(files: int = 150) -> Tensor:
    """(rows, LENGTH + 1) ids of the library's commonest words, spaces and signs; 0 is every other one."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    words = [word for path in paths for word in re.findall(r"\w+|\s+|[^\w\s]", path.read_text(errors="ignore"))]
    known = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1), 1)}
    ids = torch.tensor([known.get(word, 0) for word in words])
    return ids.unfold(0, LENGTH + 1, LENGTH)


def batches(rows: Tensor, steps: int, device: torch.device, split: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches, or this rank's part of each: ids, and labels, in which unknown words do not count."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (BATCH,), generator=generator)][rank::world].to(device)
        labels = chosen[:, 1:]
        yield chosen[:, :-1], torch.where(labels == 0, IGNORED, labels)


def model(width: int, layers: int, tied: bool = True) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, whose output layer is its embedding unless it is not `tied`."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def shown(items: Iterable[tuple[Tensor, Tensor]], what: str, steps: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The items, with a progress bar on the first rank where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, what, steps, disable=True if dist.get_rank() else None)  # None: only where it can be seen


def train_teacher(teacher: Qwen2ForCausalLM, rows: Tensor, steps: int, device: torch.device) -> None:
    """Next words, by cross-entropy."""
    replica = DistributedDataParallel(teacher)
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3)
    for ids, labels in shown(batches(rows, steps, device), "teacher", steps):
        logits = replica(ids).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
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
    count = (labels != IGNORED).sum()
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
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the teacher and of the student (default: 60)")
    steps = parser.parse_args().steps
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights on every rank
    return steps, device


def main() -> None:
    """Train the teacher, distil the student, say what that did."""
    steps, device = start(__doc__)
    rank, world = dist.get_rank(), dist.get_world_size()
    with device:
        student, teacher = model(64, 2), model(128, 3)
    text = read_text()
    rows, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    train_teacher(teacher, rows, steps, device)

    root = Distillation(student, teacher)
    shard(root, device)
    # Of the shards: after sharding, and before a forward without backward, which leaves the root's parameters whole.
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    before = held_out_loss(root, held_out, device)
    for ids, labels in shown(batches(rows, steps, device), "student", steps):
        (world * loss_of(root, ids, labels)).backward()  # gradients are averaged over ranks: world times that is a sum
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss(root, held_out, device)
    if rank == 0:
        print(f"{world} ranks, {steps} steps: Jensen-Shannon divergence {before:.4f} -> {after:.4f} nats a token")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
