"""Compiled kernels run by the emulator, for test_compiled_code.py: `python emulated.py CHECK [ORDER]`.

In a process of its own, because Triton's interpreter and its compiler exclude each other. In "greedy" order one warp
runs as far as it gets, so that what no barrier orders comes out in the wrong order.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import emulator
import torch

import fusedkd
from fusedkd.kernels.device import rows, split_rows, vocab_chunks
from fusedkd.kernels.device import token_logprobs as logprobs

emulator.install(90, order=sys.argv[2] if len(sys.argv) > 2 else "lockstep")
WAYS = {"rows": rows.value_and_gradient, "split rows": split_rows.value_and_gradient}
ANY_V = 1003  # no multiple of anything
NAN = torch.nan


def problem(name: str, vocabulary: int, temperature: float = 1.0, ce_weight: float = 0.0, **params: Any) -> Any:
    form = fusedkd.divergence(name, **params).form
    weights = (float(form.target), float(form.nontarget))
    theta = tuple(map(float, form.theta))
    return rows.Problem(
        form.definition, form.decoupled, theta, weights, vocabulary, temperature, 1.0, ce_weight, form.mix
    )


def races() -> list[str]:
    return [" ".join(map(str, finding)) for finding in emulator.findings() if finding.kind not in emulator.BENIGN]


def token_logprobs() -> dict[str, Any]:
    """The token's entry, where the tile that holds its column is written by another warp than the entry."""
    vocabulary, ids = 5008, torch.tensor([11, 1800, 4097, 5000])
    x = (5 * torch.randn(4, vocabulary)).bfloat16()
    saved, out = torch.full((4, logprobs.SAVED), NAN), torch.full((4, vocabulary), NAN, dtype=torch.bfloat16)
    logprobs.value(rows.Logits(x[None]), ids, saved, 1.0)
    upstream = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    logprobs.gradient(rows.Logits(x[None]), ids, saved, upstream, out, 1.0)
    wanted = 1 - x.double().softmax(-1)
    at = torch.arange(4), ids
    return {"error": float((out[at].double() / wanted[at] - 1).abs().max())}


def over_its_logits() -> dict[str, Any]:
    """Value and gradient at once, the gradient over the student's logits and in memory of its own."""
    worst = 0.0
    for name in ("rkl", "jsd"):
        student, teacher = 5 * torch.randn(2, 4, ANY_V)
        found = []
        for in_place in (False, True):
            x = student.clone()
            grad, loss = x if in_place else torch.full_like(x, NAN), torch.full((4,), NAN)
            asked = problem(name, ANY_V, ce_weight=0.5)
            labels = torch.tensor([3, 250, 600, 1002])
            rows.value_and_gradient(
                asked, rows.Logits(x[None]), rows.Logits(teacher[None]), labels, torch.ones(4), grad, loss, None
            )
            found.append(torch.cat((loss[:, None], grad), 1))
        worst = max(worst, float((found[0] - found[1]).abs().max()))
    return {"error": worst}


def chunks() -> dict[str, Any]:
    """What a row's sum of the gradient's entries is, over chunks, that one warp writes and all read."""
    student, teacher = 5 * torch.randn(2, 3, ANY_V)
    labels, asked = torch.tensor([3, 250, 600]), problem("rkl", ANY_V)
    loss, saved = torch.full((3,), NAN), torch.full((3, rows.SAVED), NAN)
    rows.value(asked, rows.Logits(student[None]), rows.Logits(teacher[None]), labels, loss, saved, None)
    found = torch.zeros(3, vocab_chunks.DOMINANT)
    sums = []
    for first, last in ((0, 512), (512, ANY_V)):
        s, t = (x[None, :, first:last] for x in (student, teacher))
        out = torch.full((3, last - first), NAN)
        part = asked._replace(vocab_size=last - first)
        vocab_chunks.gradient(part, rows.Logits(s), rows.Logits(t), labels, saved, torch.ones(3), found, out, first)
        sums.append(out.double().sum(-1))
    return {"error": float((found[:, 1] - sum(sums)).abs().max())}


def taid_of_equals() -> dict[str, Any]:
    """The largest loss or entry of the gradient where student and teacher are the same.

    As compiled, and with every product and its sum made one operation, as ptxas may.
    """
    largest = 0.0
    for base, t, vocabulary, dtype, temperature, ways in (
        ("fkl", 0.4, ANY_V, torch.float32, 1.7, ("rows",)),
        ("fkl", 0.7, 5008, torch.bfloat16, 0.9, ("rows",)),
        ("rkl", 0.4, ANY_V, torch.float32, 1.0, tuple(WAYS)),
        ("jsd", 0.4, ANY_V, torch.float32, 1.7, ("rows",)),
    ):
        student = (5 * torch.randn(2, vocabulary)).to(dtype)
        asked, labels = problem("taid", vocabulary, temperature, base=base, t=t), torch.tensor([3, vocabulary - 1])
        for way, emulator.settings.fuse in itertools.product(ways, (False, True)):
            grad, loss = torch.full_like(student, NAN), torch.full((2,), NAN)
            sides = rows.Logits(student[None]), rows.Logits(student.clone()[None])
            WAYS[way](asked, *sides, labels, torch.ones(2), grad, loss, None)
            entries = torch.cat((loss, grad.float().flatten()))
            largest = max(largest, float(entries.abs().max()) if entries.isfinite().all() else float("inf"))
    return {"largest": largest}


def nan() -> dict[str, Any]:
    """Ways and divergences in which a row with NaN lost it: a GPU's maximum is that of the numbers."""
    lost = []
    for name in ("rkl", "tvd", "taid"):
        for way, function in WAYS.items():
            student, teacher = 5 * torch.randn(2, 5, ANY_V)
            labels = torch.full((5,), 600)
            student[0], student[1, 7], student[2, 600], teacher[3, 7], teacher[4, 600] = NAN, NAN, NAN, NAN, NAN
            grad, loss = torch.zeros_like(student), torch.zeros(5)
            asked = problem(name, ANY_V)
            function(
                asked, rows.Logits(student[None]), rows.Logits(teacher[None]), labels, torch.ones(5), grad, loss, None
            )
            if not (loss.isnan().all() and grad.isnan().any(-1).all()):
                lost.append(f"{name} {way}")
    return {"lost": lost}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    check.__name__: check for check in (token_logprobs, over_its_logits, chunks, taid_of_equals, nan)
}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({**CHECKS[sys.argv[1]](), "races": races()}))
