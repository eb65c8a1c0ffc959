"""What every number of fusedkd should be: float64, one row at a time, from the published formulas.

Nothing is shared with the package except the definition of a divergence whose formula is not written out here
(`meaning` then falls back to its `reference`). Gradients come from autograd, never from a closed form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedkd

FLOOR = -50.0
# Where a student logit of -inf is evaluated. q is exactly 0 at both depths, so a finite value is the same at both.
DEPTHS = (1e4, 1e5)
TARGET_FIELDS = (
    "target_loss",
    "nontarget_loss",
    "target_grad",
    "nontarget_grad",
    "student_logprob",
    "teacher_logprob",
)
FIELDS = ("loss", *TARGET_FIELDS, "student_entropy", "teacher_entropy", "student_lse", "teacher_lse")


def fkl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q)."""
    return (logp.exp() * (logp - logq)).sum()


def rkl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p)."""
    return (logq.exp() * (logq - logp)).sum()


def ab(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    """The α-β divergence of Cichocki, with the limits of formulas.md section 3."""
    both = alpha + beta
    ratio = logq - logp
    if alpha == 0 and beta == 0:
        return 0.5 * (ratio**2).sum()
    if alpha == 0:
        q, p = (beta * logq).exp(), (beta * logp).exp()
        return (q * beta * ratio - q + p).sum() / beta**2
    if beta == 0:
        q, p = (alpha * logq).exp(), (alpha * logp).exp()
        return (-p * alpha * ratio - p + q).sum() / alpha**2
    if both == 0:
        return (alpha * ratio + (-alpha * ratio).exp() - 1).sum() / alpha**2
    exponents = (alpha * logp + beta * logq, both * logp, both * logq)
    mixed, p, q = (x.exp() for x in exponents)
    far = mixed - alpha / both * p - beta / both * q
    mixed, p, q = (x.expm1() for x in exponents)  # the ones cancel: 1 = α/(α+β) + β/(α+β)
    near = mixed - alpha / both * p - beta / both * q
    small = torch.stack([x.detach().abs() for x in exponents]).amax(0) < 1
    return -torch.where(small, near, far).sum() / (alpha * beta)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a divergence stands for: a naive value and the two weights of its target split."""

    value: Callable[..., Tensor]
    parameters: tuple[float | Tensor, ...] = ()
    decoupled: bool = False
    target: float | Tensor = 1.0
    nontarget: float | Tensor = 1.0


def meaning(name: str, **params: Any) -> Meaning:
    """The `Meaning` of `fusedkd.divergence(name, **params)`, read from the formulas where they are written here."""
    if name == "drkl":
        return dataclasses.replace(meaning("rkl"), decoupled=True, nontarget=params.get("gamma", 0.5))
    if name == "dkd":
        weights = {"target": params.get("alpha", 1.0), "nontarget": params.get("beta", 8.0)}
        return dataclasses.replace(meaning("fkl"), decoupled=True, **weights)
    if name == "decoupled":
        base = {key: value for key, value in params.items() if key != "base"}
        return dataclasses.replace(meaning(params.get("base", "rkl"), **base), decoupled=True)
    naive = {"fkl": (fkl, {}), "rkl": (rkl, {}), "ab": (ab, {"alpha": 0.2, "beta": 0.7})}
    if name in naive:
        value, defaults = naive[name]
        weights = {key: params[key] for key in ("target", "nontarget") if key in params}
        unknown = params.keys() - defaults.keys() - weights.keys()
        assert not unknown, f"the oracle knows no parameter {unknown} of {name}"
        return Meaning(value, tuple(params.get(key, default) for key, default in defaults.items()), **weights)
    made = fusedkd.divergence(name, **params)
    return Meaning(made.definition.reference, tuple(made.parameters), made.decoupled, made.target, made.nontarget)


def log_softmax(x: Tensor) -> Tensor:
    """Log-probabilities of one row; the largest through log1p, so that log(1 − 1e-18) is −1e-18 and not 0."""
    if x.numel() == 1:
        return x - x
    top = int(x.detach().argmax())
    rest = torch.cat((x[:top], x[top + 1 :])).logsumexp(0)
    spill = (rest - x[top]).exp().log1p()
    is_top = torch.arange(x.numel()) == top
    return torch.where(is_top, -spill, x - (x[top] + spill))


def terms(z: Tensor, u: Tensor, y: int | None, m: Meaning, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(L_T, L_N) of one row of scaled logits; everything is L_N when no column is held out."""
    whole = m.value(log_softmax(u), log_softmax(z), *params)
    if y is None:
        return whole * 0, whole
    if z.numel() == 1:
        return whole * 0, whole * 0
    z_rest, u_rest = (torch.cat((x[:y], x[y + 1 :])) for x in (z, u))
    pair_z, pair_u = (torch.stack((x[y], rest.logsumexp(0))) for x, rest in ((z, z_rest), (u, u_rest)))
    target = m.value(log_softmax(pair_u), log_softmax(pair_z), *params)
    if m.decoupled:
        return target, m.value(log_softmax(u_rest), log_softmax(z_rest), *params)
    return target, whole - target


@dataclasses.dataclass(frozen=True)
class Truth:
    """Per-token values of one call, before token weights and reduction."""

    loss: Tensor  # (...)
    stats: dict[str, Tensor]  # name -> (...)
    width: int  # V
    leaves: list[Tensor]  # N rows (V,)
    graphs: list[Tensor | None]  # N scalars; None for an ignored row

    def gradient(self, upstream: Tensor) -> Tensor:
        """Gradient with respect to the student logits for a given gradient of `loss`, (..., V)."""
        rows = torch.zeros(len(self.leaves), self.width, dtype=torch.float64)
        for i, (leaf, graph, up) in enumerate(zip(self.leaves, self.graphs, upstream.reshape(-1), strict=True)):
            if graph is not None:
                (grad,) = torch.autograd.grad(graph, leaf, up.double(), retain_graph=True, allow_unused=True)
                rows[i] = 0 if grad is None else grad
        return rows.reshape(*self.loss.shape, self.width)


def distill(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    m: Meaning,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    support: str = "teacher",
) -> Truth:
    """The truth about `kd_loss(student, teacher, labels, ...)` for logits (..., V)."""
    assert student.dtype == teacher.dtype == torch.float64
    lead = student.shape[:-1]
    columns = min(student.shape[-1], teacher.shape[-1]) if vocab_size is None else vocab_size
    s_rows, t_rows = (x.detach().reshape(-1, x.shape[-1]) for x in (student, teacher))
    y_rows = [None] * len(s_rows) if labels is None else labels.reshape(-1).tolist()

    def at(value: float | Tensor, i: int) -> float:
        return float(value.broadcast_to(lead).reshape(-1)[i]) if isinstance(value, Tensor) else float(value)

    leaves, graphs, values, stats = [], [], [], []
    for i, (s, t, y) in enumerate(zip(s_rows, t_rows, y_rows, strict=True)):
        leaf = s.clone().requires_grad_()
        leaves.append(leaf)
        if y == ignore_index and labels is not None:
            graphs.append(None)
            values.append(0.0)
            stats.append(dict.fromkeys(FIELDS, 0.0))
            continue
        u = t[:columns] / temperature
        dead = s[:columns] == -torch.inf
        keep = u > -torch.inf if support == "teacher" else (u > -torch.inf) | ~dead
        held = int(keep[:y].sum()) if y is not None and y < columns and keep[y] else None
        params = tuple(at(value, i) for value in m.parameters)
        losses, inner = [], {}
        for depth in DEPTHS if dead.any() else DEPTHS[:1]:
            z = leaf[:columns] / temperature
            z = torch.where(dead, z.detach().max() - depth, z)[keep]
            inner = _inner(z, u[keep], held, m, params, support, at(m.target, i), at(m.nontarget, i))
            losses.append({key: float(value.detach()) for key, value in inner.items()})
        grew = {key: abs(losses[-1][key] - losses[0][key]) > 1e-9 * (1 + abs(losses[0][key])) for key in losses[0]}
        row = {key: torch.inf if grew[key] else losses[-1][key] for key in losses[0]}
        if labels is None:
            row |= dict.fromkeys(TARGET_FIELDS, torch.nan)
        factor = temperature**2 if temperature_squared else 1.0
        graph, value = factor * inner["loss"], factor * row["loss"]
        if ce_weight:
            cross_entropy = leaf.logsumexp(0) - leaf[y]
            graph, value = graph + ce_weight * cross_entropy, value + ce_weight * float(cross_entropy.detach())
        graphs.append(graph)
        values.append(value)
        stats.append(row)
    table = {key: torch.tensor([row[key] for row in stats], dtype=torch.float64).reshape(lead) for key in FIELDS}
    return Truth(torch.tensor(values, dtype=torch.float64).reshape(lead), table, student.shape[-1], leaves, graphs)


def _inner(
    z: Tensor,
    u: Tensor,
    held: int | None,
    m: Meaning,
    params: tuple[float, ...],
    support: str,
    w_target: float,
    w_nontarget: float,
) -> dict[str, Tensor]:
    """Loss and statistics of the compared columns of one row."""
    if z.numel() == 0:
        zero = z.sum()
        outside = {"student_logprob": zero - torch.inf, "teacher_logprob": zero - torch.inf}
        lse = {"student_lse": zero - torch.inf, "teacher_lse": zero - torch.inf}
        return {key: zero for key in FIELDS} | outside | lse
    logq, logp = log_softmax(z), log_softmax(u)
    floored = logp.clamp(min=FLOOR) if support == "floor" else u
    target, nontarget = terms(z, floored, held, m, params)
    grads = {"target_grad": 0 * z[0], "nontarget_grad": 0 * z[0]}
    if held is not None:
        for key, term in zip(grads, (target, nontarget), strict=True):
            (grad,) = torch.autograd.grad(term, z, retain_graph=True)
            grads[key] = grad[held]
    inside = (lambda x: x[held]) if held is not None else (lambda x: x[0] * 0 - torch.inf)
    seen = logp > -torch.inf
    return {
        "loss": w_target * target + w_nontarget * nontarget,
        "target_loss": target,
        "nontarget_loss": nontarget,
        **grads,
        "student_entropy": -(logq.exp() * logq).sum(),
        "teacher_entropy": -(logp[seen].exp() * logp[seen]).sum(),
        "student_logprob": inside(logq),
        "teacher_logprob": inside(logp),
        "student_lse": z.logsumexp(0),
        "teacher_lse": u.logsumexp(0),
    }


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The bare product (hidden @ weight.T + bias) and softcap(scale · product), float64, keeping the graph."""
    product = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = scale * product
    return product, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reduce(
    truth: Truth,
    labels: Tensor | None,
    *,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The reduced loss and the gradient of it with respect to the per-token losses."""
    weights = torch.ones_like(truth.loss) if token_weights is None else token_weights.double()
    if reduction == "mean":
        counted = truth.loss.numel() if labels is None else int((labels != ignore_index).sum())
        weights = weights / (max(counted, 1) if num_items is None else float(num_items))
    weighted = weights * truth.loss
    return (weighted if reduction == "none" else weighted.sum()), weights
