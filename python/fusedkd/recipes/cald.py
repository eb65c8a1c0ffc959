"""`cald_loss`: the contrastive loss of DistiLLM-2 on teacher responses and student responses."""

from typing import Any

import torch

from .. import checks
from ..divergence import divergence
from ..head import Side
from ..loss import kd_loss

_LEAST = 1e-2  # the authors' lower end of an adapted λ


def cald_loss(
    student_chosen: Side,
    teacher_chosen: Side,
    labels_chosen: torch.Tensor,
    student_rejected: Side,
    teacher_rejected: Side,
    labels_rejected: torch.Tensor,
    *,
    alpha1: float = 0.1,
    alpha2: float = 0.1,
    beta: float = 1.0,
    anchor1: float | None = None,
    anchor2: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    **options: Any,
) -> Any:
    """Contrastive approach for LLM distillation (CALD): pull up on teacher responses, push down on student responses.

        loss = mean_b [(2 − β)·SKL_λ1(chosen_b) + β·SRKL_λ2(rejected_b)]

    Each sequence's loss is the mean over its counted tokens; SKL_λ = KL(p‖λp + (1−λ)q), SRKL_λ = KL(q‖λq + (1−λ)p) with
    the student inside the reverse mixture a constant, as in the authors' code. No factor ½ (the paper's eq. 5 has one).

    Args:
        student_chosen, teacher_chosen: (B, T, V) logits or Heads (B, T, D) on the teacher's responses.
        labels_chosen: (B, T) int64, already shifted; a sequence of nothing but `ignore_index` counts as 0, and so
            does the mean over no sequence.
        student_rejected, teacher_rejected, labels_rejected: the same on the student's own responses, with T of its own.
        alpha1, alpha2: λ of the two halves, in [0, 1].
        beta: weight of the student responses, in [0, 2]; the authors raise it from 1 to 1.5 over training.
        anchor1, anchor2: turn on the authors' update of λ per sequence (`update_alpha`), each for its half:
            λ_b = clip(1 − (1 − λ)·anchor/(Δ_b + 1e-5), 0.01, λ) with Δ_b = exp(mean log p) − exp(mean log q) over the
            labels for the teacher responses and its negative for the student responses. An anchor is the mean of Δ
            over the data, which the authors carry from the epoch before. λ is a constant for the gradient here.
        reduction: "mean" over sequences, "sum", or "none" -> (B,).
        options: others of `kd_loss`: temperature, vocab_size, support, memory_budget, drop_ignored, logits_dtype,
            backend and, where both halves share one student weight, weight_grad.

    Returns:
        float32 scalar, or (B,).

    Source: Ko et al., DistiLLM-2, ICML 2025 (arXiv 2503.07067), eq. 5-8 and the authors' code.
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    for name in ("return_stats", "token_weights", "num_items", "divergence", "ce_weight"):
        if name in options:
            raise TypeError(f"cald_loss has no option {name!r}: it averages the tokens of each sequence itself")
    for name, value, most in (("alpha1", alpha1, 1), ("alpha2", alpha2, 1), ("beta", beta, 2)):
        checks.within(name, value, 0, most)
    for name, value in (("anchor1", anchor1), ("anchor2", anchor2)):
        if value is not None:
            checks.number(name, value)
    halves = (
        ("chosen", student_chosen, teacher_chosen, labels_chosen),
        ("rejected", student_rejected, teacher_rejected, labels_rejected),
    )
    sizes = []
    for name, student, _, labels in halves:
        checks.side(f"student_{name}", student)
        shape = checks.leading(student)
        if len(shape) != 2:
            raise ValueError(f"student_{name} must have the leading shape (batch, tokens), got {tuple(shape)}")
        checks.labels(labels, shape, checks.device(student), ignore_index, checks.width(student), f"labels_{name}")
        sizes.append(shape[0])
    if sizes[0] != sizes[1]:
        raise ValueError(f"student_rejected must have as many sequences as student_chosen, {sizes[0]}, got {sizes[1]}")
    options["ignore_index"] = ignore_index
    lam1, lam2 = (
        alpha if anchor is None else _adapted(student, teacher, labels, alpha, anchor, sign, options)
        for (_, student, teacher, labels), alpha, anchor, sign in zip(
            halves, (alpha1, alpha2), (anchor1, anchor2), (1.0, -1.0), strict=True
        )
    )
    chosen = kd_loss(
        student_chosen,
        teacher_chosen,
        labels_chosen,
        divergence=divergence("skl", lam=lam1),
        reduction="none",
        **options,
    )
    rejected = kd_loss(
        student_rejected, teacher_rejected, labels_rejected, reduction="none",
        divergence=divergence("srkl", lam=lam2, detach_mixture=True), **options,
    )  # fmt: skip
    pulled, pushed = (
        _per_sequence(rows, labels, ignore_index)
        for rows, labels in ((chosen, labels_chosen), (rejected, labels_rejected))
    )
    each = (2.0 - beta) * pulled + beta * pushed
    if reduction == "none":
        return each
    return each.sum() / max(len(each), 1) if reduction == "mean" else each.sum()


def _per_sequence(rows: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """(B,) means over the counted tokens; 0 where there is none."""
    return rows.sum(-1) / (labels != ignore_index).sum(-1).clamp(min=1)


def _adapted(
    student: Side,
    teacher: Side,
    labels: torch.Tensor,
    alpha: float,
    anchor: float,
    sign: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """(B, 1) λ of each sequence, from the label probabilities of both models: one value pass more."""
    with torch.no_grad():
        _, stats = kd_loss(student, teacher, labels, reduction="none", return_stats=True, **options)
        means = [
            _per_sequence(x, labels, options["ignore_index"]).exp()
            for x in (stats.teacher_logprob, stats.student_logprob)
        ]
        return adapted_skew(sign * (means[0] - means[1]), alpha, anchor).unsqueeze(-1)


def adapted_skew(gap: torch.Tensor, alpha: float, anchor: float | torch.Tensor) -> torch.Tensor:
    """(B,) λ for the gaps Δ (B,) between the label probabilities of the two models: the authors' rule."""
    return (1 - (1 - alpha) * anchor / (gap + 1e-5)).clamp(min(_LEAST, alpha), alpha)
