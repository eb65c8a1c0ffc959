"""Bytes that KDFlow's chunks hold until backward, beside those of `chunked_loss` here: docs/drop-ins/kdflow.md.

    PYTHONPATH=tests python tests/kdflow_memory.py > bench/results/kdflow.md

Counted, from the record of torch's CPU allocator. KDFlow's side is its formula in eager torch.
"""

from __future__ import annotations

import textwrap

import torch
from test_compat_kdflow import chunks_as_kdflow_has_them, model
from test_memory import measure

from fusedkd.compat import kdflow

SHAPES = ((512, 32_000, 512), (512, 32_000, 64), (1024, 32_000, 64), (2048, 32_000, 64))  # tokens, vocabulary, chunk


def counted(tokens: int, columns: int, chunk: int) -> tuple[int, int]:
    """Most bytes held at once in the loss and its backward pass, KDFlow's and ours, without inputs."""
    of = model(torch.float32, tokens, columns, columns, bias=False).to(torch.float32)

    def theirs() -> object:
        return torch.autograd.grad(chunks_as_kdflow_has_them(of, chunk), of.leaves())

    def ours() -> object:
        given = (of.hidden, of.head, kdflow.compute_kl_div, None, of.teacher_hidden, of.teacher_head)
        return torch.autograd.grad(kdflow.chunked_loss(*given, chunk_size=chunk, reduction="sum"), of.leaves())

    return measure(theirs).peak, measure(ours).peak


def row(tokens: int, columns: int, chunk: int) -> str:
    """A line of the table, in units of 10⁶ bytes; 8·n·V are two float32 matrices of the logits' size."""
    theirs, ours = counted(tokens, columns, chunk)
    return f"| {tokens} | {chunk} | {8 * tokens * columns / 1e6:.0f} | {theirs / 1e6:.0f} | {ours / 1e6:.0f} |"


def page() -> str:
    """What docs/drop-ins/kdflow.md includes."""
    version = torch.__version__.partition("+")[0]
    words = (
        f"Most MB held at once by `kl` and its backward pass, inputs not counted: V = {SHAPES[0][1]:,}, float32, one "
        f"thread of a CPU, torch {version}. Counted from the allocator's record by `tests/kdflow_memory.py`. KDFlow's "
        "side is its formula in eager torch: every chunk leaves its log-probabilities and the teacher's probabilities, "
        "8·n·V bytes in all, until backward; a larger chunk only adds what it needs for itself."
    )
    head = "| tokens n | `chunk_size` | 8·n·V | KDFlow's chunks | here |\n|---|---|---|---|---|"
    return "\n".join([*textwrap.wrap(words, 120), "", head, *(row(*shape) for shape in SHAPES)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(page())
