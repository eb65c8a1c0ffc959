"""Drop-ins of top-k losses against the originals' formulas in float64, clamps included."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cases import HEAD, IGNORE, VALUE, each
from compare import assert_close, relative, rounding
from originals import DTYPES, gkd_summands, kl_summands
from torch import Tensor

import fusedkd
from fusedkd.compat import axolotl, distillkit, megatron, modelopt, swift, trl, veomni, verl

B, T, V, K = 2, 6, 67, 5
GONE = -torch.inf
NOTHING = 1e-12  # of a gradient, beside upstream gradients of 1


class Sparse(NamedTuple):
    """A student, and what is known of its teacher: float64, but exact in the dtypes that a shim takes."""

    student: Tensor  # (B, T, V)
    teacher: Tensor
    ids: Tensor  # (B, T, K) of the teacher's likeliest tokens
    logp: Tensor  # (B, T, K), exact in float32
    labels: Tensor  # (B, T)

    def valid(self) -> Tensor:
        """(B, T, K) a mask of places, some tokens without any."""
        mask = torch.arange(K) < torch.randint(1, K + 1, (B, T, 1), generator=torch.Generator().manual_seed(1))
        return mask & (self.labels != IGNORE).unsqueeze(-1)


def sparse(kind: str = "ordinary") -> Sparse:
    """Ordinary rows; or one side, or both, so sure of a few tokens that nothing is left for the others."""
    student, teacher = 3 * torch.randn(2, B, T, V, dtype=torch.float64)
    student, teacher = student.bfloat16().double(), teacher.bfloat16().double()
    if kind in ("sure student", "both sure"):
        student[..., :3] += 40
    if kind in ("sure teacher", "both sure"):
        teacher[..., :3] += 40
    logp, ids = teacher.log_softmax(-1).float().topk(K)
    labels = torch.randint(V, (B, T))
    labels[:, 2::3] = IGNORE
    return Sparse(student, teacher, ids, logp.double(), labels)


def listed(student: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log q of some tokens."""
    return (student / temperature).log_softmax(-1).gather(-1, ids)


def tailed(logp: Tensor, most: float = -1e-7) -> Tensor:
    """TRL's tail bucket: log(1 − Σ p), log Σ p at most `most`."""
    total = torch.logsumexp(logp, -1, keepdim=True).clamp(max=most)
    return torch.cat((logp, torch.log(-torch.expm1(total))), -1)


def whole(logp: Tensor) -> Tensor:
    """Renormalised."""
    return logp - torch.logsumexp(logp, -1, keepdim=True)


def ghosted(logp: Tensor, least: float = 1e-8) -> Tensor:
    """Megatron's ghost token: log(1 − Σ p), 1 − Σ p at least `least`."""
    return torch.cat((logp, (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=least).log()), -1)


def distilled(
    name: str,
    student: Tensor,
    x: Sparse,
    mask: Tensor,
    missing: str,
    log_target: bool,
    t: float,
    of_t: float,
    of_s: float,
) -> Tensor:
    """DistillKit's three losses, eps as it is by default."""
    eps, alpha = 1e-8, of_t / t
    values = x.logp if log_target else x.teacher.gather(-1, x.ids)
    logq = listed(student * of_s, x.ids, t)
    if missing == "symmetric_uniform":
        left = (1 - values.exp().sum(-1, keepdim=True)).clamp(0, 1)
        powers = (alpha * values).exp().sum(-1, keepdim=True) + left**alpha
        logp = values if alpha == 1 else alpha * values - powers.log()
    else:
        logp = whole(alpha * values)
    p, q = logp.exp(), logq.exp()
    rest_p, rest_q = (1 - x.sum(-1).clamp(eps, 1 - eps) for x in (p, q))
    if missing == "zero":
        rest_p, rest_q = torch.zeros_like(rest_p), 1 - q.sum(-1)
    if name == "sparse_kl_div":
        each = (p * (logp - logq)).sum(-1)
        each = each + (rest_p * (rest_p / rest_q).log() if missing != "zero" else 0)
    elif name == "sparse_js_div":
        both = [torch.cat((y, rest.unsqueeze(-1)), -1) for y, rest in ((p, rest_p), (q, rest_q))]
        m = ((both[0] + both[1]) / 2).clamp_min(eps)
        each = sum(torch.where(y > eps, y * (y.clamp_min(eps) / m).log(), 0).sum(-1) for y in both) / 2
    else:
        each = ((p - q).abs().sum(-1) + (rest_p - rest_q).abs()) / 2
    return (each * mask).sum()


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ p (log p − log q), 0 where p is."""
    return torch.where(logp > GONE, logp.exp() * (logp - logq), 0).sum(-1)


class Shim(NamedTuple):
    """A shim and its original as functions of the student's logits and the rest."""

    ours: Callable[[Any, Sparse], Tensor]
    original: Callable[[Tensor, Sparse], Tensor]


def of_verl(clamp: float | None) -> Any:
    """As much of a DistillationConfig as the loss reads."""
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp))


def truncated(logq: Tensor, logp: Tensor, clamp: float | None) -> Tensor:
    """verl's and VeOmni's sum."""
    return kl(logp, logq) if clamp is None else kl(logp.clamp_min(clamp), logq.clamp_min(clamp))


def of_model(**given: Any) -> Any:
    """A TransformerConfig, or a trainer."""
    return SimpleNamespace(tensor_model_parallel_size=given.pop("ranks", 1), **given)


def teacher_output(x: Sparse, **given: Any) -> Any:
    """ms-swift's."""
    fields = {"topk_logprobs": None, "topk_indices": None, "full_logits": None, "labels": None}
    return SimpleNamespace(**fields | {"topk_logprobs": x.logp.float(), "topk_indices": x.ids} | given)


def self_distilled(student: Tensor, x: Sparse, alpha: float, tail: bool) -> Tensor:
    """SDFT's and SDPO's loss."""
    ids = student.topk(K, dim=-1).indices
    ends = tailed if tail else whole
    return gkd_summands(ends(listed(x.teacher, ids)), ends(listed(student, ids)), alpha).sum(-1)


def served(student: Tensor, x: Sparse, tail: bool) -> Tensor:
    """The server trainer at β = 0, with some places absent."""
    absent = ~x.valid()
    logq, logp = (y.masked_fill(absent, GONE) for y in (listed(student, x.ids), x.logp))
    if tail:
        logq, logp = (tailed(y) for y in (logq, logp))
    else:
        some = (~absent).any(-1, keepdim=True)
        logq, logp = (torch.where(some, whole(y), GONE) for y in (logq, logp))
    # Tokens that are absent on both sides have no term, not −inf less −inf.
    each = torch.where(logp > GONE, logp.exp() * (logp - logq.clamp_min(-1e30)), 0).sum(-1)
    counted = x.labels != IGNORE
    return each[counted].sum() / counted.sum()


def served_top_1(student: Tensor, x: Sparse, beta: float, tail: bool) -> Tensor:
    """The server trainer at β > 0: the teacher's likeliest token and the student's, once where they are one."""
    taken = x.ids[..., :1].where(torch.arange(T).unsqueeze(-1) % 2 == 0, x.ids[..., 2:3])
    of_taken = x.teacher.log_softmax(-1).float().double().gather(-1, taken)
    total = 0.0
    for b in range(B):
        for t in range(T):
            if x.labels[b, t] == IGNORE:
                continue
            pairs = {int(taken[b, t]): of_taken[b, t]}
            if beta != 1:
                pairs = {int(x.ids[b, t, 0]): x.logp[b, t, :1]} | pairs
            logq = student[b, t].log_softmax(-1)[list(pairs)]
            ends = tailed if tail else whole
            total = total + gkd_summands(ends(torch.cat(list(pairs.values()))), ends(logq), beta).sum()
    return total / (x.labels != IGNORE).sum()  # pyright: ignore[reportReturnType]


def ours_top_1(student: Tensor, x: Sparse, beta: float, tail: bool) -> Tensor:
    taken = x.ids[..., :1].where(torch.arange(T).unsqueeze(-1) % 2 == 0, x.ids[..., 2:3])
    of_taken = x.teacher.log_softmax(-1).float().gather(-1, taken)
    return trl.server_sparse_top_1_divergence_loss(
        of_model(beta=beta, loss_add_tail=tail), student, x.ids[..., 0], x.logp[..., 0].float(), taken[..., 0],
        of_taken[..., 0], x.labels,
    )  # fmt: skip


def shims() -> dict[str, Shim]:
    """Every shim of logits, in every option that has code of its own."""
    table = {}
    for clamp in (None, -4.0):
        table[f"verl-{clamp}"] = Shim(
            lambda s, x, clamp=clamp: verl.compute_forward_kl_topk(s, x.logp.float(), x.ids, of_verl(clamp), "bshd")[
                "distillation_losses"
            ],
            lambda s, x, clamp=clamp: truncated(listed(s, x.ids), x.logp, clamp),
        )
    for ghost in (False, True):
        table[f"megatron-topk_kl_div-{ghost}"] = Shim(
            lambda s, x, ghost=ghost: megatron.topk_kl_div(s, x.logp.float(), x.ids, 1, 0, None, ghost),
            lambda s, x, ghost=ghost: kl(*(ghosted(y) if ghost else y for y in (x.logp, listed(s, x.ids)))).transpose(
                0, 1
            ),
        )
    for reverse in (False, True):
        loss = modelopt.TopKLogitsKLLoss(of_model(), 2.0, reverse, K)
        table[f"modelopt-{reverse}"] = Shim(
            lambda s, x, loss=loss: loss(s, x.teacher.to(s.dtype if isinstance(s, Tensor) else torch.float32))[0],
            lambda s, x, reverse=reverse: kl(
                *(whole(y.gather(-1, x.ids) / 2) for y in ((s, x.teacher) if reverse else (x.teacher, s)))
            ).transpose(0, 1),
        )
    for items in (-1, 7):
        table[f"axolotl-{items}"] = Shim(
            lambda s, x, items=items: axolotl.loss(s, x.ids, x.logp.float(), x.valid(), items, 2.0),
            lambda s, x, items=items: (
                (kl_summands(x.logp, listed(s, x.ids, 2.0)) * x.valid()).sum()
                / (items if items > 0 else x.valid().sum())
            ),
        )
    for name in ("sparse_kl_div", "sparse_js_div", "sparse_tvd"):
        for missing, log_target, *temperatures in (
            ("zero", True, 1.0, 1.0, 1.0), ("zero", True, 2.0, 1.0, 1.5), ("zero", False, 2.0, 1.0, 1.5),
            ("symmetric_uniform", True, 1.0, 1.0, 1.0), ("symmetric_uniform", True, 2.0, 0.9, 1.5),
        ):  # fmt: skip
            options = (missing, log_target, *temperatures)
            table[f"distillkit-{name}-{missing}-{log_target}-{temperatures[0]}"] = Shim(
                lambda s, x, name=name, options=options: getattr(distillkit, name)(
                    s, x.ids, x.logp.float() if options[1] else x.teacher.gather(-1, x.ids).float(),
                    x.labels != IGNORE, 1e-8, SimpleNamespace(value=options[0]), *options[1:],
                ),
                lambda s, x, name=name, options=options: distilled(name, s, x, x.labels != IGNORE, *options),
            )  # fmt: skip
    for tail in (False, True):
        for alpha in (0.0, 0.3, 1.0):
            table[f"trl-compute_topk-{alpha}-{tail}"] = Shim(
                lambda s, x, alpha=alpha, tail=tail: trl.compute_topk_self_distillation_loss(
                    s, x.teacher.to(s.dtype), distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=tail
                ),
                lambda s, x, alpha=alpha, tail=tail: self_distilled(s, x, alpha, tail),
            )
            if alpha:
                table[f"trl-server-top_1-{alpha}-{tail}"] = Shim(
                    lambda s, x, alpha=alpha, tail=tail: ours_top_1(s, x, alpha, tail),
                    lambda s, x, alpha=alpha, tail=tail: served_top_1(s, x, alpha, tail),
                )
        table[f"trl-server-{tail}"] = Shim(
            lambda s, x, tail=tail: trl.server_forward_kl_loss(
                of_model(loss_add_tail=tail),
                {"topk_token_ids": x.ids, "topk_logprobs": x.logp.float().masked_fill(~x.valid(), GONE)},
                s, x.labels,
            ),
            lambda s, x, tail=tail: served(s, x, tail),
        )  # fmt: skip
    for beta in (0.0, 0.3, 1.0):
        table[f"swift-{beta}"] = Shim(
            lambda s, x, beta=beta: swift.gkd_loss(s, teacher_output(x), x.labels, beta, 2.0)[0],
            lambda s, x, beta=beta: gkd_summands(whole(x.logp / 2), whole(s.gather(-1, x.ids) / 2), beta)[
                x.labels != IGNORE
            ].sum(),
        )
    return table


SHIMS = shims()
FLOORED = [name for name in SHIMS if any(part in name for part in ("ghost", "-True", "symmetric", "verl", "zero"))]


def check(shim: Shim, x: Sparse, dtype: torch.dtype) -> None:
    """Value and gradient under a random upstream gradient."""
    leaf, exact = x.student.to(dtype).requires_grad_(), x.student.clone().requires_grad_()
    value, wanted = shim.ours(leaf, x), shim.original(exact, x)
    upstream = torch.randn(wanted.shape)
    value.backward(upstream)
    wanted.backward(upstream.double())
    assert exact.grad is not None
    assert_close(value, wanted.detach(), VALUE, what="value")
    assert leaf.grad is not None
    # Where a side is sure a whole gradient may be a few 1e-17, of which float64 leaves differences of equal numbers.
    gap = (leaf.grad.double() - exact.grad).norm()
    assert gap <= (VALUE + rounding(exact.grad, dtype)) * exact.grad.norm() + NOTHING


@pytest.mark.smoke
@each("name", list(SHIMS))
@each("dtype", DTYPES)
def test_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    """The original's value, and the gradient of that value."""
    check(SHIMS[name], sparse(), dtype)


@each("kind", ["sure student", "sure teacher", "both sure"])
@each("name", FLOORED)
def test_nothing_is_left_for_other_tokens(name: str, kind: str) -> None:
    """Where an original's clamps hold its bucket up, so do ours: the value is theirs, and no gradient flows there.

    log p of a sure teacher in float32 leaves 1 − Σ p with few digits, on which rkl and the forms of JSD are built; an
    original that computes in float32 has as few.
    """
    x = sparse(kind)
    check(SHIMS[name], x, torch.float32)


@each("name", ["verl-None", "megatron-topk_kl_div-True", "trl-compute_topk-0.3-True", "swift-0.3"])
def test_float64(name: str) -> None:
    """Logits of float64 have float64 results; log-probabilities keep the digits of float32."""
    x = sparse()
    leaf, exact = (x.student.clone().requires_grad_() for _ in range(2))
    value, wanted = SHIMS[name].ours(leaf, x), SHIMS[name].original(exact, x)
    assert value.dtype == torch.float64
    value.sum().backward()
    wanted.sum().backward()
    assert relative(value.detach(), wanted.detach()) < VALUE
    assert exact.grad is not None and leaf.grad is not None
    assert relative(leaf.grad, exact.grad) < VALUE


HEADS = ["megatron-topk_kl_div-False", "megatron-topk_kl_div-True", "modelopt-True", "axolotl-7", "swift-0.3"]
HEADS += [name for name in SHIMS if name.startswith("distillkit") and name.endswith("True-1.0")]


@each("name", HEADS)
def test_heads(name: str) -> None:
    """A Head in the place of logits: the gradient goes to hidden states, weight and bias."""
    x = sparse()
    parts = [torch.randn(B, T, 8), torch.randn(V, 8), torch.randn(V)]
    ours = [y.clone().requires_grad_() for y in parts]
    exact = [y.double().requires_grad_() for y in parts]
    capped = 20 * torch.tanh(0.8 * (exact[0] @ exact[1].T + exact[2]) / 20)
    value, wanted = SHIMS[name].ours(fusedkd.Head(*ours, 0.8, 20.0), x), SHIMS[name].original(capped, x)
    value.sum().backward()
    wanted.sum().backward()
    assert_close(value, wanted.detach(), VALUE + HEAD)
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        assert relative(one.grad, other.grad) < VALUE + HEAD


def test_autocast() -> None:
    """What a clamp looks at is rounded as the loss is: hidden states and weights to bfloat16 as they are multiplied."""
    x = sparse()
    parts = [torch.randn(B, T, 8), 3 * torch.randn(V, 8)]
    found = []
    for rounds in (True, False):
        hidden, weight = (y if rounds else y.bfloat16() for y in parts)
        with torch.autocast("cpu", enabled=rounds):
            *_, losses, masses, _ = veomni.chunk_topk_distill_function(
                hidden, weight, x.labels, x.ids, x.logp.float(), shift_labels=x.labels
            )
        found.append((losses, masses[x.labels != IGNORE].log()))
    for one, other in zip(*found, strict=True):
        assert relative(one, other.double()) < VALUE


@each("alpha", [0.0, 0.3, 1.0])
def test_a_teacher_without_a_tail(alpha: float) -> None:
    """Its tail has TRL's least mass, which is what reverse KL divides the student's tail by."""
    x = sparse()
    x.student[..., :K] += 5
    x.teacher[..., 0] += 40
    shim = SHIMS[f"trl-compute_topk-{alpha}-True"]
    assert (1 - listed(x.student, x.student.topk(K).indices).exp().sum(-1)).mean() > 1e-2
    check(shim, x, torch.float32)


@each("clamp", [None, -4.0])
def test_verl_metrics(clamp: float | None) -> None:
    """Masses before the clamp, the tokens that both sides have among their likeliest, and nested tensors."""
    x = sparse()
    found = verl.compute_forward_kl_topk(x.student.float(), x.logp.float(), x.ids, of_verl(clamp), "bshd")
    logq = listed(x.student, x.ids)
    assert_close(found["student_mass"], logq.exp().sum(-1), VALUE)
    assert_close(found["teacher_mass"], x.logp.exp().sum(-1), VALUE)
    p, q = (x.logp, logq) if clamp is None else (x.logp.clamp_min(clamp), logq.clamp_min(clamp))
    likeliest = x.student.topk(K).indices
    shared = torch.tensor([[[i in row for i in ids] for ids, row in zip(a, b, strict=True)]
                           for a, b in zip(x.ids.tolist(), likeliest.tolist(), strict=True)])  # fmt: skip
    assert torch.equal(found["overlap_count"], shared.sum(-1))
    advantage = torch.where(shared, -kl_summands(p, q), 0).sum(-1) / shared.sum(-1).clamp(min=1)
    assert_close(found["overlap_token_advantage"], advantage, VALUE)
    # As verl calls it: sequences of a batch one after another, the teacher's rows nested.
    nested = [torch.nested.nested_tensor(list(y), layout=torch.jagged) for y in (x.logp.float(), x.ids)]
    packed = verl.compute_forward_kl_topk(x.student.float().view(1, B * T, V), *nested, of_verl(clamp), "thd")
    for name, value in packed.items():
        assert torch.equal(value.view(B, T), found[name])


@each("shifted", [False, True])
@each("clamp", [None, -4.0])
@each("dtype", DTYPES)
def test_veomni(dtype: torch.dtype, clamp: float | None, shifted: bool) -> None:
    """Five results and the gradients of three, beside the same from logits."""
    x = sparse()
    parts = [torch.randn(B, T, 8).to(dtype), torch.randn(V, 8).to(dtype)]
    ours = [y.clone().requires_grad_() for y in parts]
    exact = [y.double().requires_grad_() for y in parts]
    found = veomni.chunk_topk_distill_function(
        *ours, x.labels, x.ids, x.logp.float(), shift_labels=x.labels if shifted else None, temperature=1.5,
        log_prob_min_clamp=clamp,
    )  # fmt: skip
    labels, ids, logp, logits = x.labels, x.ids, x.logp, (exact[0] @ exact[1].T) / 1.5
    if not shifted:
        labels, ids, logp, logits = labels[:, 1:], ids[:, 1:], logp[:, 1:], logits[:, :-1]
    whole_q = logits.log_softmax(-1)
    logq = whole_q.gather(-1, ids)
    rows = (
        whole_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        -(whole_q.exp() * whole_q).sum(-1),
        truncated(logq, logp, clamp),
        logq.exp().sum(-1),
        logp.exp().sum(-1),
    )
    wanted = [torch.where(labels != IGNORE, row, 0) for row in rows]
    wanted = wanted if shifted else [torch.nn.functional.pad(row, (0, 1)) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other.detach(), VALUE + HEAD)
    assert not any(y.requires_grad for y in found[3:])
    up = torch.randn(3, B, T)
    sum((y * u).sum() for y, u in zip(found[:3], up, strict=True)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    sum((y * u).sum() for y, u in zip(wanted[:3], up.double(), strict=True)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        # In half precision the gradients of the three results are rounded, each before they are added.
        assert relative(one.grad, other.grad) < VALUE + HEAD + (0 if dtype == torch.float32 else 2**-7)


@each("options", [(beta, tail) for beta in (0.0, 0.3, 1.0) for tail in (False, True)])
def test_trl_chunked_jsd_loss(options: tuple[float, bool]) -> None:
    """All fourteen arguments: loss, entropies, numbers of each teacher, and the gradients."""
    beta, tail = options
    x = sparse()
    valid = x.valid()
    valid[..., 0] = True
    ids, logp, valid = (y.flatten(0, 1) for y in (x.ids.masked_fill(~valid, 0), x.logp, valid))
    parts = [torch.randn(B * T, 8), torch.randn(V, 8), torch.randn(V)]
    which = torch.arange(B * T) % 3
    ours = [y.clone().requires_grad_() for y in parts]
    exact = [y.double().requires_grad_() for y in parts]
    found = trl.chunked_jsd_loss(*ours, 0.8, 20.0, ids, logp.float(), valid, beta, 1.5, tail, which, 4, 7)
    logits = 20 * torch.tanh(0.8 * (exact[0] @ exact[1].T + exact[2]) / 20) / 1.5
    logq = logits.log_softmax(-1)
    each_loss, of_teacher = [], []
    for row in range(B * T):
        ends = tailed if tail else whole
        p, q = (ends(y[row][valid[row]]) for y in (logp, logq.gather(-1, ids)))
        each_loss.append(gkd_summands(p, q, beta).sum())
        of_teacher.append(-(p.exp() * p).sum())
    losses, entropies = torch.stack(each_loss), torch.stack(of_teacher)
    stats = [[float(y[which == i].sum()) for y in (torch.ones(B * T), losses.detach(), entropies)] for i in range(4)]
    wanted = (
        losses.sum(),
        losses.sum(),
        -(logq.exp() * logq).sum(),
        entropies.sum(),
        torch.tensor(stats, dtype=torch.float64).view(-1),
    )
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other.detach().double(), VALUE + HEAD)
    assert not any(y.requires_grad for y in found[1:])
    found[0].backward()
    wanted[0].backward()
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        assert relative(one.grad, other.grad) < VALUE + HEAD
    alone = trl.chunked_jsd_loss(*ours, 0.8, 20.0, ids, logp.float(), valid, beta, 1.5, tail, None, 4, 7)
    assert torch.equal(alone[-1], torch.zeros(12))


@each("normalize", [False, True])
@each("beta", [0.0, 0.3, 1.0])
def test_axolotl_fused(beta: float, normalize: bool) -> None:
    """T² on the value, and, unlike axolotl's, on the gradient; the cross-entropy with the next token."""
    x = sparse()
    parts = [torch.randn(V, 8), torch.randn(B, T, 8), torch.randn(V)]
    ours = [y.clone().requires_grad_() for y in parts]
    exact = [y.double().requires_grad_() for y in parts]
    logp = whole(x.logp) if 0 < beta < 1 and normalize else x.logp
    mask = (x.labels != IGNORE).unsqueeze(-1).expand(B, T, K)
    loss = axolotl.LigerFusedLinearKLTopKLogprobLoss(0.3, 0.6, 2.0, beta, compiled=False, normalize_topk=normalize)
    value = loss(ours[0], ours[1], x.ids, logp.float(), mask, x.labels, ours[2])
    logits = exact[1] @ exact[0].T + exact[2]
    logq = listed(logits, x.ids, 2.0)
    logq = whole(logq) if normalize else logq
    soft = gkd_summands(logp, logq, beta).sum(-1)[x.labels != IGNORE].sum()
    hard = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), x.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE
    )
    wanted = 0.6 * 4.0 * soft + 0.3 * hard
    assert_close(value, wanted.detach(), VALUE + HEAD)
    value.backward()
    wanted.backward()
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        assert relative(one.grad, other.grad) < VALUE + HEAD


@each("full", [False, True])
def test_swift_labels_elsewhere(full: bool) -> None:
    """The teacher read another prompt: its counted tokens are the student's in order. Rows of −inf do not count."""
    x = sparse()
    moved = x.labels.roll(1, 1)
    rolled = (
        {"full_logits": x.teacher.float()} if full else {"topk_logprobs": x.logp.float().clone(), "topk_indices": x.ids}
    )
    here = x.labels != IGNORE
    if not full:
        rolled["topk_logprobs"][0, 0] = GONE
        rolled["topk_logprobs"][1, 1, 1:] = GONE
    given = {name: y.roll(1, 1) for name, y in rolled.items()}
    if full:
        given |= {"topk_logprobs": None, "topk_indices": None}
    value, count = swift.gkd_loss(x.student.float(), teacher_output(x, **given, labels=moved), x.labels, 0.3, 2.0)
    if full:
        wanted = gkd_summands(*((y / 2).log_softmax(-1) for y in (x.teacher, x.student)), 0.3)[here].sum()
    else:
        here[0, 0] = False
        here[1, 1] = False  # one token, renormalised, is certain on both sides
        wanted = gkd_summands(whole(x.logp / 2), whole(x.student.gather(-1, x.ids) / 2), 0.3)[here].sum()
    assert_close(value, wanted, VALUE)
    assert int(count) == int((x.labels != IGNORE).sum()) - (0 if full else 1)
    assert count.dtype == torch.int64


def test_a_clamped_teacher_may_sum_above_one() -> None:
    """A floor of e⁻³ under five tokens and a sure one."""
    teacher = torch.zeros(1, 1, V)
    teacher[..., 0] = 9.0
    logp, ids = teacher.log_softmax(-1).topk(K)
    assert logp.clamp_min(-3).exp().sum() > 1.1
    student = torch.randn(1, 1, V)
    found = verl.compute_forward_kl_topk(student, logp, ids, of_verl(-3.0), "bshd")["distillation_losses"]
    wanted = truncated(listed(student.double(), ids), logp.double(), -3.0)
    assert_close(found, wanted, VALUE)


def test_absent_tokens_are_not_nan() -> None:
    """−inf, or Megatron's sentinel, is no token, where the originals' 0·∞ is NaN."""
    x = sparse()
    logp, ids = x.logp.float(), x.ids.clone()
    assert kl_summands(torch.tensor(GONE), torch.tensor(0.0)).isnan()
    wanted = kl(x.logp[..., :-1], listed(x.student, x.ids[..., :-1]))
    logp[..., -1] = GONE
    found = verl.compute_forward_kl_topk(x.student.float(), logp, ids, of_verl(None), "bshd")
    assert_close(found["distillation_losses"], wanted, VALUE)
    logp[..., -1], ids[..., -1] = megatron.SENTINEL, -1
    found = megatron.topk_kl_div(x.student.float(), logp.half().float(), ids, 1, 0, None)
    assert relative(found, wanted.transpose(0, 1)) < 1e-2  # the cache holds float16


REFUSED = {
    "verl-head": (NotImplementedError, "does not support student_logits=Head"),
    "verl-sharded": (NotImplementedError, "Ulysses sequence parallelism are not supported: slice"),
    "verl-shape": (ValueError, "teacher_topk_ids and teacher_topk_log_probs must both have the shape"),
    "verl-dtype": (TypeError, "teacher_topk_ids must be int32 or int64, got torch.float32"),
    "megatron-tp": (ValueError, "tp_size is 2, and the tensor-parallel group is None"),
    "modelopt-tp": (ImportError, "tensor_model_parallel_size is 2, .* install megatron-core"),
    "modelopt-k": (ValueError, "top_k must be at most the vocabulary of targets, 67, got 68"),
    "modelopt-head": (NotImplementedError, "targets is a Head"),
    "axolotl-mask": (ValueError, r"target_mask must have the shape \(2, 6, 5\)"),
    "distillkit-missing": (ValueError, "missing must be one of 'zero', 'symmetric_uniform', got 'uniform'"),
    "distillkit-logits": (ValueError, "log_target=False has logits of the listed tokens"),
    "trl-k": (ValueError, r"distillation_topk must lie in \[1, 67\], got 68"),
    "trl-scale": (NotImplementedError, "chunked_jsd_loss does not support logit_scale=-1"),
    "swift-hooks": (ImportError, "gather_fn"),
    "swift-count": (ValueError, "teacher_output.labels must count as many tokens as labels"),
    "swift-nothing": (ValueError, "teacher_output must have topk_logprobs and topk_indices, or full_logits"),
    "beyond": (ValueError, r"ids must lie in \[0, 67\)"),
    "twice": (ValueError, "ids must be distinct in each row"),
}


def refused(name: str, x: Sparse) -> Any:
    """A call that the table names."""
    s, logp, ids = x.student.float(), x.logp.float(), x.ids
    head = fusedkd.Head(torch.randn(B, T, 8), torch.randn(V, 8))
    of = of_verl(None)
    wide, one = ids.clone(), ids.clone()
    wide[0, 0, 0], one[0, 0, 0] = V, ids[0, 0, 1]
    top_k = {"distillation_topk": V + 1, "distillation_alpha": 0.0, "distillation_add_tail": True}
    return {
        "verl-head": lambda: verl.compute_forward_kl_topk(head, logp, ids, of, "bshd"),  # pyright: ignore[reportArgumentType]
        "verl-sharded": lambda: verl.compute_forward_kl_topk(s[:, :3], logp, ids, of, "bshd"),
        "verl-shape": lambda: verl.compute_forward_kl_topk(s, logp[..., 1:], ids, of, "bshd"),
        "verl-dtype": lambda: verl.compute_forward_kl_topk(s, logp, ids.float(), of, "bshd"),
        "megatron-tp": lambda: megatron.topk_kl_div(s, logp, ids, 2, 0, None),
        "modelopt-tp": lambda: modelopt.TopKLogitsKLLoss(of_model(ranks=2), top_k=K)(s, s),
        "modelopt-k": lambda: modelopt.TopKLogitsKLLoss(of_model(), top_k=V + 1)(s, s),
        "modelopt-head": lambda: modelopt.TopKLogitsKLLoss(of_model(), top_k=K)(head, head),
        "axolotl-mask": lambda: axolotl.loss(s, ids, logp, x.labels),
        "distillkit-missing": lambda: distillkit.sparse_tvd(s, ids, logp, missing="uniform"),
        "distillkit-logits": lambda: distillkit.sparse_tvd(s, ids, logp, missing="symmetric_uniform", log_target=False),
        "trl-k": lambda: trl.compute_topk_self_distillation_loss(s, s, **top_k),  # pyright: ignore[reportArgumentType]
        "trl-scale": lambda: trl.chunked_jsd_loss(
            head.hidden[0], head.weight, None, -1.0, None, ids[0], logp[0], ids[0] >= 0, 0.0, 1.0, True, None, 1, 1
        ),
        "swift-hooks": lambda: swift.gkd_loss(s, teacher_output(x), x.labels, 0.0, 1.0, gather_fn=torch.gather),
        "swift-count": lambda: swift.gkd_loss(s, teacher_output(x, labels=x.labels.clamp(min=0)), x.labels, 0.0, 1.0),
        "swift-nothing": lambda: swift.gkd_loss(s, teacher_output(x, topk_logprobs=None), x.labels, 0.0, 1.0),
        "beyond": lambda: verl.compute_forward_kl_topk(s, logp, wide, of, "bshd"),
        "twice": lambda: megatron.topk_kl_div(s, logp, one, 1, 0, None, True),
    }[name]()


@each("name", list(REFUSED))
def test_what_is_refused_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, what it was, and what works."""
    monkeypatch.setattr(swift, "ORIGINAL", "no_such_package.gkd_loss")
    swift._original.cache_clear()
    error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        refused(name, sparse())


@pytest.mark.parametrize("parallel", [False, True])
def test_veomni_knows_its_sequence_parallelism(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where VeOmni is loaded and shards sequences, labels are shifted already."""
    state = SimpleNamespace(get_parallel_state=lambda: SimpleNamespace(sp_enabled=parallel))
    monkeypatch.setitem(sys.modules, "veomni.distributed.parallel_state", state)
    x = sparse()
    given = (torch.randn(B, T, 8), torch.randn(V, 8), x.labels, x.ids, x.logp.float())
    found = veomni.chunk_topk_distill_function(*given)
    wanted = veomni.chunk_topk_distill_function(*given, shift_labels=x.labels if parallel else None)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


SIGNATURES = {
    verl.compute_forward_kl_topk: "student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format",
    veomni.chunk_topk_distill_function: "hidden_states, weights, labels, teacher_topk_ids, teacher_topk_log_probs, "
    "chunk_size=1024, ignore_index=-100, shift_labels=None, temperature=1.0, log_prob_min_clamp=None",
    megatron.topk_kl_div: "student_logits, teacher_topk_logprobs, teacher_topk_indices, tp_size, tp_rank, tp_group, "
    "add_ghost_token=False",
    modelopt.TopKLogitsKLLoss: "model_config, temperature=1.0, reverse=False, top_k=1024, vocab_size=None, "
    "hidden_grad='reduce'",
    axolotl.loss: "student_logits, target_token_ids, target_logprobs, target_mask, num_items_in_batch=-1, "
    "kd_temperature=1.0",
    axolotl.LigerFusedLinearKLTopKLogprobLoss: "weight_hard_loss=0.5, weight_soft_loss=0.5, temperature=1.0, beta=1.0, "
    "ignore_index=-100, compiled=True, chunk_size=1024, compute_ce_loss=True, normalize_topk=True",
    axolotl.LigerFusedLinearKLTopKLogprobLoss.forward: "self, lm_head_weight, student_hidden_states, target_token_ids, "
    "target_logprobs, target_mask, true_labels, student_bias=None",
    swift.gkd_loss: "student_logits, teacher_output, labels, beta, temperature, gather_fn=None, log_softmax_fn=None, "
    "kl_div_fn=None, chunk_size=512",
}


@pytest.mark.parametrize("shim", SIGNATURES, ids=lambda shim: f"{shim.__module__}.{shim.__qualname__}")
def test_signatures(shim: Callable[..., Any]) -> None:
    """Names, order and defaults of the released originals."""
    parameters = inspect.signature(shim).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters) == SIGNATURES[shim]


@pytest.mark.parametrize("name", ["sparse_kl_div", "sparse_js_div", "sparse_tvd"])
def test_signatures_of_distillkit(name: str) -> None:
    parameters = inspect.signature(getattr(distillkit, name)).parameters
    assert [*parameters] == [
        "logits", "target_ids", "target_values", "mask", "eps", "missing", "log_target", "temperature",
        "target_generation_temperature", "student_generation_temperature", "chunk_length",
    ]  # fmt: skip
    defaults = [None, 1e-8, "zero", True, 1.0, 1.0, 1.0, None]
    assert [x.default for x in [*parameters.values()][3:]] == defaults


@pytest.mark.parametrize("module", [axolotl, distillkit, megatron, veomni, verl], ids=lambda m: m.__name__)
def test_nothing_of_the_originals_is_imported(module: Any) -> None:
    """torch, the standard library and fusedkd, at any depth of the file."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) if not node.level]
    assert names
    assert {name.split(".")[0] for name in names} <= {"torch"} | sys.stdlib_module_names


def test_sure_rows_are_sure() -> None:
    """The rows on which the clamps are tested do reach them."""
    for kind, side in (("sure student", "student"), ("sure teacher", "teacher")):
        x = sparse(kind)
        rest = 1 - getattr(x, side).softmax(-1)[..., :3].sum(-1)
        assert rest.abs().max() < 1e-8
    assert math.isfinite(trl._FLOOR)
