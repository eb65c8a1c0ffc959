"""AMiD: an α-β divergence between an α-mixture r of teacher and student, and the teacher or the student.

    r_k ∝ (λ p_k^c + (1−λ) q_k^c)^(1/c), c = (1−α)/2        D = base(x‖y) by `order`: pr, qr, rp, rq

α = −1 is the arithmetic mixture (pr is then SKL_λ, qr SRKL_{1−λ}), α → 1 the geometric one, r ∝ p^λ q^(1−λ). As in the
authors' code every α ≥ 1 means the geometric one, although the paper defines the mixture there too.

With a = log(m(cδ)/q^c)/c and b = a − δ (mixture.py; a = λδ at c = 0), log r = log q + a − log R, R = Σ q e^a, and
w_k = ∂(log q + a)/∂log q_k = (1−λ) e^{−ca}. The base is evaluated between r (in the student's place) and o = p or q (in
the teacher's), for the orders rp and rq with its arguments exchanged, which for α-β is (α, β) → (β, α).
Gradient: with φ = ∂f/∂log r and Φ = Σ φ, phi = w (φ − r Φ), plus ∂f/∂log q at fixed r where o = q; then
dL/dz_k = phi_k − q_k Σ phi. R and Φ belong to the row: two sweeps of their own find them (`RowParameters`), the second
one the sums too. Four reads of the logits for value and gradient, and one write.
The mixture's normaliser depends on q, so D is no sum over tokens with nothing but p and q in it: no target/non-target
split, no decoupled form; these statistics are NaN.
Edge cases: λ = 0 is r = q, λ = 1 is r = p. Base, one of the α-β family: fkl, rkl, ab, alpha.
Source: AMiD, arXiv 2510.15982, with the authors' code (α-mixture, Prop. 3.5; base ab there is (0.2, 0.7)).
"""

from typing import Any

import torch

from ..device.column_sweep import column_sweep
from ..language import formula, jit, tl
from ..maths.decomposition import or_infinite
from ..maths.definition import TWO_SWEEPS, Definition, Derived, Form, Parameter, RowParameters
from ..maths.elementary import expm1_product, log1p
from ..maths.mixture import log_mixture
from ..maths.moments import log_sum
from ..maths.reductions import thread_max, thread_sum
from .ab import AB
from .ab import term as ab_term

ORDERS = ("pr", "qr", "rp", "rq")


@formula
def mixed(logq, logp, delta, alpha, lam):
    """log(r R), a, b and w."""
    c = tl.where(alpha < 1, 0.5 * (1.0 - alpha), 0.0)
    flat = c == 0
    by = tl.where(flat, 1.0, c)
    above, beyond, _ = log_mixture(lam, c * delta, 0.0 * lam)
    share = tl.where(lam < 1, (1.0 - lam) * tl.exp(tl.where(above < -80.0, 80.0, -above)), 0.0)
    a = tl.where(flat, lam * delta, above / by)
    b = tl.where(flat, (lam - 1.0) * delta, beyond / by)
    return tl.where(delta > 0, logp + b, logq + a), a, b, share


@formula
def parts_teacher(q, p, logq, logp, delta, theta):
    """f, φ = ∂f/∂log r, w, r and what flows to log q past r: order pr, rp."""
    alpha, lam, base_alpha, base_beta, log_r_sum, mass = theta
    log_r, a, b, share = mixed(logq, logp, delta, alpha, lam)
    log_r = log_r - log_r_sum
    r = tl.exp(log_r)
    f, phi = ab_term(r, p, log_r, logp, log_r_sum - b, (base_alpha, base_beta))
    return f, phi, share, r, 0.0 * phi


@formula
def parts_student(q, p, logq, logp, delta, theta):
    """The same for o = q: order qr, rq."""
    alpha, lam, base_alpha, base_beta, log_r_sum, mass = theta
    log_r, a, b, share = mixed(logq, logp, delta, alpha, lam)
    log_r = log_r - log_r_sum
    r = tl.exp(log_r)
    f, phi = ab_term(r, q, log_r, logq, log_r_sum - a, (base_alpha, base_beta))
    _, direct = ab_term(q, r, logq, log_r, a - log_r_sum, (base_beta, base_alpha))
    return f, phi, share, r, direct


@formula
def term_teacher(q, p, logq, logp, delta, theta):
    """f and phi = w (φ − r Φ)."""
    f, phi, share, r, direct = parts_teacher(q, p, logq, logp, delta, theta)
    return f, share * (phi - r * theta[5])


@formula
def term_student(q, p, logq, logp, delta, theta):
    """f and phi = w (φ − r Φ) + ∂f/∂log q."""
    f, phi, share, r, direct = parts_student(q, p, logq, logp, delta, theta)
    return f, share * (phi - r * theta[5]) + direct


@formula
def growth(q, logq, logp, delta, theta):
    """q (e^a − 1) and q e^a: what R is made of."""
    log_r, a, b, share = mixed(logq, logp, delta, theta[0], theta[1])
    r = tl.exp(log_r)
    return expm1_product(q, r, a), r


@formula
def log_total(near, far):
    """log R from Σ q (e^a − 1) and Σ q e^a."""
    close = tl.abs(near) < 0.5
    return tl.where(close, log1p(tl.where(close, near, 0.0)), log_sum(far))


@jit
def _add_growth(sums, x, live, theta, FORMULA):
    """Σ q (e^a − 1) and Σ q e^a with a NormalizedTile's."""
    near, far = sums
    more, r = growth(x.q, x.logq, x.logp, x.delta, theta)
    return near + thread_sum(tl.where(live, more, 0.0)), far + thread_sum(tl.where(live, r, 0.0))


@jit
def _add_parts(sums, x, live, known, PARTS):
    """F, Φ, what Σ phi is made of and the largest d, with a NormalizedTile's."""
    total, mass, shared, weight, direct, widest = sums
    f, phi, share, r, past = PARTS(x.q, x.p, x.logq, x.logp, x.delta, known)
    total += thread_sum(tl.where(live, f, 0.0))
    mass += thread_sum(tl.where(live, phi, 0.0))
    shared += thread_sum(tl.where(live, share * phi, 0.0))
    weight += thread_sum(tl.where(live, share * r, 0.0))
    direct += thread_sum(tl.where(live, past, 0.0))
    return total, mass, shared, weight, direct, tl.maximum(widest, thread_max(tl.where(live, x.delta, 0.0)))


@jit
def _row_parameters(student, teacher, ctx, log_norms, label, theta, PARTS, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """(log R, Φ), (F, Σ phi): two sweeps over the columns, the label's added by hand."""
    logq_y, logp_y, delta_y, in_support = label.logq, label.logp, label.delta, label.in_support
    q_y = tl.exp(logq_y)
    near, far = growth(q_y, logq_y, logp_y, delta_y, theta)
    sums = (tl.where(in_support, near, 0.0), tl.where(in_support, far, 0.0))
    near, far = column_sweep(student, teacher, ctx, log_norms, sums, theta, _add_growth, None, BLOCK, THREADS)
    log_r_sum = log_total(tl.sum(near), tl.sum(far))
    known = theta + (log_r_sum, 0.0)
    f_y, phi_y, share_y, r_y, direct_y = PARTS(q_y, tl.exp(logp_y), logq_y, logp_y, delta_y, known)
    sums = (0.0, tl.where(in_support, phi_y, 0.0), 0.0, 0.0, 0.0, 0.0)
    total, mass, shared, weight, direct, widest = column_sweep(
        student, teacher, ctx, log_norms, sums, known, _add_parts, PARTS, BLOCK, THREADS
    )
    mass = tl.sum(mass)
    past = tl.sum(shared) - mass * tl.sum(weight) + tl.sum(direct)
    return (log_r_sum, mass), (or_infinite(tl.sum(total), tl.max(widest)), past)


@jit
def row_parameters_teacher(
    student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr, THREADS: tl.constexpr
):
    """For orders pr and rp."""
    return _row_parameters(student, teacher, ctx, log_norms, label, theta, parts_teacher, BLOCK, THREADS)


@jit
def row_parameters_student(
    student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr, THREADS: tl.constexpr
):
    """For orders qr and rq."""
    return _row_parameters(student, teacher, ctx, log_norms, label, theta, parts_student, BLOCK, THREADS)


def _whole_rows(parts: Any) -> Any:
    def row_parameters(whole: Any, theta: tuple[Any, ...]) -> tuple[Any, ...]:
        columns = whole.columns()
        near, far = growth.torch(columns[0], *columns[2:], theta)
        grown = torch.cat((near.sum(-1, keepdim=True), far.sum(-1, keepdim=True)), -1)
        log_r_sum = log_total.torch(*whole.reach.total(grown).split(1, -1))
        _, phi, _, _, _ = parts.torch(*columns, (*theta, log_r_sum, 0.0 * log_r_sum))
        return log_r_sum, whole.reach.total(phi.sum(-1, keepdim=True))

    return row_parameters


def reference_teacher(
    logp: torch.Tensor, logq: torch.Tensor, alpha: float, lam: float, base_alpha: float, base_beta: float
) -> torch.Tensor:
    """The base between p and the mixture, normalised by softmax."""
    return AB.reference(logp, _mixture(logp, logq, alpha, lam), base_alpha, base_beta)


def reference_student(
    logp: torch.Tensor, logq: torch.Tensor, alpha: float, lam: float, base_alpha: float, base_beta: float
) -> torch.Tensor:
    """The base between q and the mixture."""
    return AB.reference(logq, _mixture(logp, logq, alpha, lam), base_alpha, base_beta)


def _mixture(logp: torch.Tensor, logq: torch.Tensor, alpha: float, lam: float) -> torch.Tensor:
    if lam in (0, 1):
        return logp if lam else logq
    if alpha >= 1:
        return (lam * logp + (1 - lam) * logq).log_softmax(-1)
    c, weight = (1 - alpha) / 2, torch.tensor([lam, 1 - lam], dtype=logp.dtype).log()
    return (torch.logaddexp(weight[0] + c * logp, weight[1] + c * logq) / c).log_softmax(-1)


ALPHA = Parameter("alpha", 0.5, "of the mixture; 1: geometric, -1: arithmetic; float32 overflows beyond", low=-16.0)
LAM = Parameter("lam", 0.5, "0: the mixture is the student, 1: the teacher", low=0.0, high=1.0)
BASE = (Parameter("base_alpha", 1.0, "alpha of ab"), Parameter("base_beta", 0.0, "beta of ab"))


def _definition(name: str, term: Any, reference: Any, row_parameters: Any, parts: Any) -> Definition:
    return Definition(
        name,
        term,
        reference,
        parameters=(ALPHA, LAM, *BASE),
        online=TWO_SWEEPS._replace(tile="many"),
        row_parameters=RowParameters(row_parameters, _whole_rows(parts), 2, reads=(1, 0, 1, 0)),
        separable=False,
        splits=False,
    )


TEACHER = _definition("amid_teacher", term_teacher, reference_teacher, row_parameters_teacher, parts_teacher)
STUDENT = _definition("amid_student", term_student, reference_student, row_parameters_student, parts_student)
_FAMILY = {"fkl": lambda: (1.0, 0.0), "rkl": lambda: (0.0, 1.0), "ab": lambda alpha, beta: (alpha, beta)}


def form(alpha: Any, lam: Any, base: Form, order: str) -> Form:
    """The definition for the other argument, and the base's exponents in its order."""
    if not (base.plain and base.definition.name in _FAMILY):
        raise ValueError("base of 'amid' must be one of fkl, rkl, ab, alpha (without weights)")
    exponents = _FAMILY[base.definition.name](*base.theta)
    if order[0] == "r":
        exponents = exponents[::-1]
    return Form(TEACHER if "p" in order else STUDENT, (alpha, lam, *exponents))


AMID = Derived(
    "amid",
    form,
    (
        ALPHA,
        LAM,
        Parameter("base", "fkl", "fkl, rkl, ab or alpha"),
        Parameter("order", "pr", "the arguments of the base: p, q, or r for the mixture", words=ORDERS),
    ),
    definitions=(TEACHER, STUDENT),
)
