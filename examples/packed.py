"""Distil on packed sequences: several documents in a row, none of which predicts the first word of the next.

    python examples/packed.py

Positions that start again keep transformers' attention within a document; -100 as the label of a document's last token
keeps its prediction out of the loss.
"""

from collections.abc import Iterator

import tiny
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import fusedkd


def paragraphs() -> list[Tensor]:
    """Ids of what is between empty lines, of at most a row."""
    documents: list[list[str]] = [[]]
    for word in tiny.words():
        if word.count("\n") > 1:
            documents.append([])
        else:
            documents[-1].append(word)
    return [tiny.numbered(document) for document in documents if 2 <= len(document) <= tiny.LENGTH]


def packed(documents: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of ids, labels and positions (LENGTH,), as many documents in order as fit; what is left over is padding."""
    row: list[Tensor] = []
    for document in documents:
        if sum(map(len, row)) + len(document) > tiny.LENGTH:
            yield pack(row)
            row = []
        row.append(document)


def pack(documents: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One row."""
    padding = torch.zeros(tiny.LENGTH - sum(map(len, documents)), dtype=torch.long)
    parts = [*documents, padding]  # the padding is a document none of whose tokens counts
    shifted = [torch.cat((part[1:], part.new_full((1,), tiny.IGNORED))) for part in documents]
    labels = torch.cat((*shifted, torch.full_like(padding, tiny.IGNORED)))
    return torch.cat(parts), labels, torch.cat([torch.arange(len(part)) for part in parts])


def loss(student: Qwen2ForCausalLM, teacher: Qwen2ForCausalLM, *row: Tensor, reduction: str = "mean") -> Tensor:
    """The divergence of rows of ids, labels and positions, in nats."""
    ids, labels, positions = row
    with torch.no_grad():
        target = fusedkd.Head(teacher.model(ids, position_ids=positions).last_hidden_state, teacher.lm_head.weight)
    hidden = student.model(ids, position_ids=positions).last_hidden_state
    return fusedkd.kd_loss(fusedkd.Head(hidden, student.lm_head.weight), target, labels, reduction=reduction)


def main() -> None:
    """Train the teacher, compare a packed row with its documents, distil the student, say what that did."""
    steps = tiny.steps(__doc__)
    student, teacher = tiny.pair(tiny.text()[0], steps)
    documents = paragraphs()
    ids, labels, positions = (torch.stack(x).to(tiny.DEVICE) for x in zip(*packed(documents), strict=True))
    test = [x[-4 * tiny.BATCH :] for x in (ids, labels, positions)]

    together = loss(student, teacher, ids[:1], labels[:1], positions[:1], reduction="sum")
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    pieces = [[x[:1, a:b] for x in (ids, labels, positions)] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    alone = sum(loss(student, teacher, *piece, reduction="sum") for piece in pieces)
    print(f"{len(pieces)} documents in a row: {together:.4f} nats, one by one {alone:.4f}")
    torch.testing.assert_close(together, alone)

    with torch.no_grad():
        before = loss(student, teacher, *test).item()
    optimizer = torch.optim.AdamW(student.parameters(), 4e-3)
    for _ in tiny.shown(range(steps), "student", steps):
        chosen = torch.randint(len(ids) - len(test[0]), (tiny.BATCH,), device=ids.device)
        loss(student, teacher, ids[chosen], labels[chosen], positions[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tiny.report("KL(teacher || student)", steps, before, loss(student, teacher, *test).item())


if __name__ == "__main__":
    main()
