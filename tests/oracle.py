"""What every number of fusedkd should be: float64, one row at a time, from the published formulas.

Nothing is shared with the package except the definition of a divergence whose formula is not written out here
(`meaning` then falls back to its `reference`). Gradients come from autograd, never from a closed form.
"""

from __future__ import annotations

import dataclasses
import functools
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
    """The α-β divergence of Cichocki, with its limits (docs/mathematics.md#the-alpha-beta-family)."""
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


def mixture(logp: Tensor, logq: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 − weight)·q)."""
    share = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
    return torch.logaddexp(share[0] + logp, share[1] + logq)


def to_mixture(logp: Tensor, logq: Tensor, weight: float) -> Tensor:
    """KL(p‖weight·p + (1 − weight)·q), with log(m/p) from the ratio q/p where it is small: near 1 its logarithm is."""
    gap = logq - logp
    close = gap.abs() < 1
    near = ((1 - weight) * torch.where(close, gap, 0.0).expm1()).log1p()
    if weight == 1:
        near = 0 * near
    apart = mixture(logp, torch.where(close, logp, logq), weight) - logp
    return -(logp.exp() * torch.where(close, near, apart)).sum()


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """β KL(p‖M) + (1−β) KL(q‖M); the ends as GKD has them."""
    if beta in (0, 1):
        return rkl(logp, logq) if beta else fkl(logp, logq)
    return beta * to_mixture(logp, logq, beta) + (1 - beta) * to_mixture(logq, logp, 1 - beta)


def skl(logp: Tensor, logq: Tensor, lam: float) -> Tensor:
    """KL(p‖λp + (1−λ)q)."""
    return to_mixture(logp, logq, lam)


def srkl(logp: Tensor, logq: Tensor, lam: float, detach_mixture: float = False) -> Tensor:
    """KL(q‖λq + (1−λ)p)."""
    if detach_mixture:
        return (logq.exp() * (logq - mixture(logq.detach(), logp, lam))).sum()
    return to_mixture(logq, logp, lam)


def tvd(logp: Tensor, logq: Tensor) -> Tensor:
    """½ Σ |p − q|."""
    return (logp.exp() - logq.exp()).abs().sum() / 2


def hellinger(logp: Tensor, logq: Tensor) -> Tensor:
    """1 − Σ √(pq), as the sum that does not cancel."""
    return ((logp / 2).exp() - (logq / 2).exp()).square().sum() / 2


def triangular(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ (p − q)²/(p + q): by tanh where p and q are close, else by 4/(1/p + 1/q), whose slope does not cancel."""
    p, q, ratio = logp.exp(), logq.exp(), logp - logq
    mean = 4 * (-torch.logaddexp(-logp, -logq)).exp()
    value = torch.where(ratio.abs() < 1, (p - q) * (ratio / 2).tanh(), p + q - mean).sum()
    return value if value < 0.5 else 2 - mean.sum()  # far apart p + q = 2 is a constant that autograd must not see


def todi(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ [w p log(p/q) + (1−w) q log(q/p)], w = sigmoid(log p/q) without a gradient."""
    ratio = logp - logq
    forward, reverse = ratio.detach().sigmoid(), (-ratio.detach()).sigmoid()
    return (forward * logp.exp() * ratio - reverse * logq.exp() * ratio).sum()


def frkl(logp: Tensor, logq: Tensor, w: float) -> Tensor:
    """(1−w) KL(p‖q) + w KL(q‖p)."""
    return (0.0 if w == 1 else (1 - w) * fkl(logp, logq)) + w * rkl(logp, logq)


def head_and_tail(logp: Tensor, logq: Tensor, mu: float, head: str) -> tuple[float]:
    """AKL's weight of the reverse KL by the author's sort or that of the copies; equal logits stay together."""
    p, q = logp.detach().exp(), logq.detach().exp()
    values, which = p.unique(return_inverse=True)
    mass = torch.zeros_like(values).index_add(0, which, p)
    reached = mass.flip(0).cumsum(0).flip(0)  # F at each distinct probability
    beyond = torch.cat((reached[1:], reached.new_zeros(1)))  # what likelier tokens hold
    inside = reached <= mu if head == "exclusive" else beyond < mu
    inside = inside[which] if mu < 1 else torch.ones_like(p, dtype=torch.bool)
    inside[p.argmax()] = True
    gap = torch.maximum(p, q) * (logq.detach() - logp.detach()).abs().neg().expm1().neg()
    return (float(gap[~inside].sum() / gap.sum()) if gap.any() else 0.5,)


def renyi(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    """log(Σ p^α q^(1−α))/(α − 1); near 1 the logarithm of a sum of what is left of it."""
    if alpha == 1:
        return fkl(logp, logq)
    tsallis = alpha * ab(logp, logq, alpha, 1 - alpha)
    if abs((alpha - 1) * float(tsallis.detach())) < 0.5:
        return ((alpha - 1) * tsallis).log1p() / (alpha - 1)
    return (alpha * logp + (1 - alpha) * logq).logsumexp(0) / (alpha - 1)


def gated(logp: Tensor, logq: Tensor, on: float) -> Tensor:
    """KL(q‖p), and KL(p‖q) where it is on."""
    return rkl(logp, logq) + (fkl(logp, logq) if on else 0.0)


def gate(logp: Tensor, logq: Tensor, threshold: float) -> tuple[float]:
    """Whether EOPD adds the forward KL."""
    seen = logp.detach()[logp > -torch.inf]
    return (float(torch.special.entr(seen.exp()).sum() > threshold),)


def amid(logp: Tensor, logq: Tensor, alpha: float, lam: float, base: str, order: str) -> Tensor:
    """A divergence between the α-mixture and one of its parts, by its name (x‖y)."""
    if lam in (0, 1):
        logr = logp + 0 * logq if lam else logq
    elif alpha >= 1:
        logr = lam * logp + (1 - lam) * logq
    else:
        c = (1 - alpha) / 2
        logr = mixture(c * logp, c * logq, lam) / c
    by_name = {"p": logp, "q": logq, "r": logr.log_softmax(0)}
    one, other = (by_name[letter] for letter in order)
    kinds = {"fkl": fkl, "rkl": rkl, "ab": lambda x, y: ab(x, y, 0.2, 0.7), "alpha": lambda x, y: ab(x, y, 0.5, 0.5)}
    return kinds[base](one, other)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a divergence stands for: a naive value and the two weights of its target split."""

    value: Callable[..., Tensor]
    parameters: tuple[float | Tensor, ...] = ()
    decoupled: bool = False
    target: float | Tensor = 1.0
    nontarget: float | Tensor = 1.0
    mix: float | Tensor = 1.0  # of the teacher, the rest is the student's own logits
    by_row: Callable[..., tuple[float, ...]] | None = None  # parameters that a whole row decides
    splits: bool = True
    argmax: bool = False  # the target is the teacher's likeliest token


NAIVE: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "fkl": (fkl, {}),
    "rkl": (rkl, {}),
    "ab": (ab, {"alpha": 0.2, "beta": 0.7}),
    "jsd": (jsd, {"beta": 0.5}),
    "skl": (skl, {"lam": 0.1}),
    "srkl": (srkl, {"lam": 0.1, "detach_mixture": False}),
    "tvd": (tvd, {}),
    "hellinger": (hellinger, {}),
    "triangular": (triangular, {}),
    "todi": (todi, {}),
    "frkl": (frkl, {"w": 0.5}),
    "renyi": (renyi, {"alpha": 0.5}),
    "alpha": (lambda logp, logq, alpha: ab(logp, logq, alpha, 1 - alpha), {"alpha": 0.5}),
}


def meaning(name: str, *, target_token: str = "label", **params: Any) -> Meaning:
    """The `Meaning` of `fusedkd.divergence(name, **params)`, read from the formulas where they are written here."""
    if target_token != "label":
        return dataclasses.replace(meaning(name, **params), argmax=True)
    if name == "drkl":
        return dataclasses.replace(meaning("rkl"), decoupled=True, nontarget=params.get("gamma", 0.5))
    if name == "dkd":
        weights = {"target": params.get("alpha", 1.0), "nontarget": params.get("beta", 8.0)}
        return dataclasses.replace(meaning("fkl"), decoupled=True, **weights)
    if name in ("jeffreys", "tsallis"):  # the statistics hold the terms before these weights
        base = meaning("frkl") if name == "jeffreys" else meaning("alpha", alpha=params.get("alpha", 0.5))
        factor = 2.0 if name == "jeffreys" else params.get("alpha", 0.5)
        weights = {key: factor * params.get(key, 1.0) for key in ("target", "nontarget")}
        return dataclasses.replace(base, **weights)
    if name == "decoupled":
        base = {key: value for key, value in params.items() if key != "base"}
        return dataclasses.replace(meaning(params.get("base", "rkl"), **base), decoupled=True)
    if name == "taid":
        base = {key: value for key, value in params.items() if key not in ("base", "t")}
        return dataclasses.replace(meaning(params.get("base", "fkl"), **base), mix=params.get("t", 0.4))
    if name == "amid":
        words = (params.get("base", "fkl"), params.get("order", "pr"))
        numbers = (params.get("alpha", 0.5), params.get("lam", 0.5))
        return Meaning(lambda logp, logq, alpha, lam: amid(logp, logq, alpha, lam, *words), numbers, splits=False)
    if name == "akl":
        split = functools.partial(head_and_tail, head=params.get("head", "exclusive"))
        return Meaning(frkl, (params.get("mu", 0.5),), by_row=split)
    if name == "eopd":
        return Meaning(gated, (params.get("threshold", 1.0),), by_row=gate)
    if name in NAIVE:
        value, defaults = NAIVE[name]
        weights = {key: params[key] for key in ("target", "nontarget") if key in params}
        unknown = params.keys() - defaults.keys() - weights.keys()
        assert not unknown, f"the oracle knows no parameter {unknown} of {name}"
        return Meaning(value, tuple(params.get(key, default) for key, default in defaults.items()), **weights)
    form = fusedkd.divergence(name, **params).form
    return Meaning(form.definition.reference, tuple(form.theta), form.decoupled, form.target, form.nontarget)


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
    if m.by_row is not None:
        params = m.by_row(log_softmax(u), log_softmax(z), *params)
    whole = m.value(log_softmax(u), log_softmax(z), *params)
    if y is None or not m.splits:
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
        if m.argmax:
            y = int(u.argmax())
        held = int(keep[:y].sum()) if y is not None and y < columns and keep[y] else None
        params = tuple(at(value, i) for value in m.parameters)
        losses, inner = [], {}
        for depth in DEPTHS if dead.any() else DEPTHS[:1]:
            z = leaf[:columns] / temperature
            z = torch.where(dead, z.detach().max() - depth, z)[keep]
            weights = (at(m.target, i), at(m.nontarget, i), at(m.mix, i))
            inner = _inner(z, u[keep], held, m, params, support, *weights)
            losses.append({key: float(value.detach()) for key, value in inner.items()})
        grew = {key: abs(losses[-1][key] - losses[0][key]) > 1e-9 * (1 + abs(losses[0][key])) for key in losses[0]}
        infinite = {key: torch.inf if losses[-1][key] > losses[0][key] else -torch.inf for key in losses[0]}
        row = {key: infinite[key] if grew[key] else losses[-1][key] for key in losses[0]}
        if labels is None and not m.argmax:
            row |= dict.fromkeys(TARGET_FIELDS, torch.nan)
        if not m.splits:
            row |= dict.fromkeys(TARGET_FIELDS[:4], torch.nan)
        factor = temperature**2 if temperature_squared else 1.0
        graph, value = factor * inner["loss"], factor * row["loss"]
        if ce_weight:
            cross_entropy = leaf.logsumexp(0) - leaf[y_rows[i]]
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
    mix: float,
) -> dict[str, Tensor]:
    """Loss and statistics of the compared columns of one row."""
    if z.numel() == 0:
        zero = z.sum()
        outside = {"student_logprob": zero - torch.inf, "teacher_logprob": zero - torch.inf}
        lse = {"student_lse": zero - torch.inf, "teacher_lse": zero - torch.inf}
        return {key: zero for key in FIELDS} | outside | lse
    logq, logp = log_softmax(z), log_softmax(u)
    floored = logp.clamp(min=FLOOR) if support == "floor" else u
    if mix != 1:
        floored = mix * floored + (1 - mix) * z.detach()
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
