"""Each definition by itself, in float64: phi against f, f against the reference, the reference against the literature.

And the elementary functions of kernels/maths/elementary.py, in both of their forms, over the whole range of float32.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL, device, each
from torch import Tensor

import fusedkd
from fusedkd.backends.torch_rows import Whole
from fusedkd.kernels.divergences import REGISTRY, definitions
from fusedkd.kernels.language import jit, tl
from fusedkd.kernels.maths import elementary
from fusedkd.kernels.maths.centering import centre_of, centred, no_maxima, raise_maxima
from fusedkd.kernels.maths.definition import Definition, Derived
from fusedkd.kernels.maths.mixture import SATURATING
from fusedkd.kernels.maths.moments import log_sum
from fusedkd.kernels.maths.quantities import LogNorms

FILES = sorted((Path(__file__).parent.parent / "kernels/divergences").glob("[!_]*.py"))
AB_LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, -0.3), (0.0, 0.0), (0.0, 0.6), (0.6, 0.0), (0.01, 0.8), (1, 1)]
FURTHER: dict[str, list[tuple[float, ...]]] = {
    "ab": AB_LIMITS,
    "jsd": [(0.0,), (1.0,), (0.1,), (0.9,)],
    "skl": [(0.0,), (0.5,), (0.9,)],
    "srkl": [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0)],
    "frkl": [(0.0,), (1.0,), (0.2,)],
    "renyi_rows": [(1.0, 0.0), (0.9, 0.1), (1.4, -0.4)],
    "eopd_rows": [(0.0,), (9.0,)],
}
SPREADS = (1e-3, 0.3, 3.0)  # how far the student is from the teacher: in the series, around its edge, beyond it
SERIES = 2**-22  # what the series leave out at their edge: made for float32


def settings() -> list[tuple[Definition, tuple[float, ...]]]:
    """Every definition at its defaults, at the limits of its parameters, and as the derived divergences use it."""
    found: list[tuple[Definition, tuple[float, ...]]] = []
    for definition in definitions().values():
        found.append((definition, tuple(float(p.default) for p in definition.parameters)))
        found.extend((definition, values) for values in FURTHER.get(definition.name, []))
    for name, params in ALL:
        if isinstance(REGISTRY[name], Derived):
            form = fusedkd.divergence(name, **params).form
            found.append((form.definition, tuple(map(float, form.theta))))
    return list({(definition.name, values): (definition, values) for definition, values in found}.values())


def ids(members: list[tuple[Definition, tuple[float, ...]]]) -> list[str]:
    """Names and parameters."""
    return ["-".join([d.name, *map(str, values)]) for d, values in members]


def over(members: list[tuple[Definition, tuple[float, ...]]]) -> pytest.MarkDecorator:
    """Parametrise over definitions with parameters."""
    assert members
    return pytest.mark.parametrize(("definition", "theta"), members, ids=ids(members))


SETTINGS = settings()
FAR_FORM = [(d, values) for d, values in SETTINGS if d.row_parameters is SATURATING]
ONE_SWEEP = [(d, values) for d, values in SETTINGS if d.sweep(values).sums is not None]
# A mixture or a weight that is taken for a constant: phi is not the derivative of f then.
WITH_DERIVATIVE = [(d, values) for d, values in SETTINGS if not (d.name == "todi" or (d.name == "srkl" and values[1]))]
every_definition = over(SETTINGS)


def pair(spread: float, rows: int = 6, vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    """Logits of teacher and student."""
    teacher = 2 * torch.randn(rows, vocabulary, dtype=torch.float64)
    return teacher, teacher + spread * torch.randn(rows, vocabulary, dtype=torch.float64)


def extras(
    definition: Definition, theta: tuple[float, ...], logp: Tensor, logq: Tensor, far: float = 0.0
) -> tuple[Tensor, ...]:
    """What rows (n, V) add to theta, each (n, 1): whether they are far, or what they find."""
    if definition.row_parameters is None:
        return ()
    if definition.row_parameters is SATURATING:
        return (torch.full_like(logp[:, :1], far),)
    whole = Whole(*statistics(definition, logp, logq), lambda: logp, lambda: columns(logp, logq))
    found = definition.row_parameters.torch(whole, numbers_of(theta))
    assert len(found) == definition.extras
    return found


def columns(logp: Tensor, logq: Tensor) -> tuple[Tensor, ...]:
    """What `term` takes of rows."""
    return logq.exp(), logp.exp(), logq, logp, logp - logq


def statistics(definition: Definition, logp: Tensor, logq: Tensor) -> tuple[tuple[Any, ...], LogNorms]:
    """The online state of normalised rows (n, V), one tile measured from 0, and their offsets."""
    q, p, z, u, d = columns(logp, logq)
    zero = torch.zeros_like(logp[:, :1])
    online, still = definition.online, (zero, zero, zero)
    state = online.advance.torch(online.init.torch(), still, z, u, d, q, p, True, definition_defaults(definition))
    return state, LogNorms(zero, zero, zero)


def definition_defaults(definition: Definition) -> tuple[Tensor, ...]:
    """Its parameters' defaults."""
    return numbers_of(tuple(p.default for p in definition.parameters))


def of_sums(definition: Definition, theta: tuple[Any, ...], f: Tensor, phi: Tensor) -> tuple[Tensor, Any]:
    """D and its slope by Σ f, (n, 1) each or a number, from what `term` makes of rows; theta with extras."""
    total, mass = f.sum(-1, keepdim=True), phi.sum(-1, keepdim=True)
    return (total, 1.0) if definition.outer is None else definition.outer.torch(total, mass, theta)


def numbers_of(theta: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Parameters as a CPU backend passes them."""
    return tuple(torch.tensor(float(value), dtype=torch.float64) for value in theta)


def evaluate(
    definition: Definition,
    theta: tuple[float, ...],
    logp: Tensor,
    logq: Tensor,
    far: float = 0.0,
    more: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """f and phi (n, V) of the torch twin of `term`, at the extras of the same rows unless others are given."""
    more = extras(definition, theta, logp, logq, far) if more is None else more
    return definition.term.torch(logq.exp(), logp.exp(), logq, logp, logp - logq, (*numbers_of(theta), *more))


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative, of the whole."""
    assert ours.shape == truth.shape
    assert truth.norm() > 0
    return float((ours - truth).norm() / truth.norm())


def slope(difference: Callable[[float], Tensor], h: float) -> Tensor:
    """The derivative from x ↦ g(x) − g(−x), by central differences of fourth order."""
    return (8 * difference(h) - difference(2 * h)) / (12 * h)


@over([(d, values) for d, values in WITH_DERIVATIVE if d.splits])
@each("spread", SPREADS)
def test_phi_is_the_derivative_of_f(definition: Definition, theta: tuple[float, ...], spread: float) -> None:
    """phi = ∂f/∂log q at fixed p and extras, entry by entry."""
    teacher, student = pair(spread)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq)
    _, phi = evaluate(definition, theta, logp, logq, more=more)

    def difference(x: float) -> Tensor:
        above, below = (evaluate(definition, theta, logp, logq + step, more=more)[0] for step in (x, -x))
        return above - below

    h = 1e-3 * min(1.0, 30 * spread)
    # |p − q| has no derivative at q = p.
    smooth = (logp - logq).abs() > 3 * h if definition.name == "tvd" else torch.ones_like(phi, dtype=torch.bool)
    assert smooth.float().mean() > 0.5
    assert error(slope(difference, h)[smooth], phi[smooth]) < 1e-6


@over([(d, values) for d, values in WITH_DERIVATIVE if not d.splits])
@each("spread", SPREADS)
def test_phi_is_the_derivative_of_rows(definition: Definition, theta: tuple[float, ...], spread: float) -> None:
    """phi − q Σ phi = ∂(Σ f)/∂z where extras move with q: one logit of the student after the other."""
    teacher, student = pair(spread)
    rows, columns = teacher.shape
    _, phi = evaluate(definition, theta, teacher.log_softmax(-1), student.log_softmax(-1))
    gradient = phi - student.softmax(-1) * phi.sum(-1, keepdim=True)
    one = torch.eye(columns, dtype=torch.float64).repeat(rows, 1)
    t, s = (x.repeat_interleave(columns, 0) for x in (teacher, student))

    def difference(x: float) -> Tensor:
        above, below = (
            evaluate(definition, theta, t.log_softmax(-1), (s + step * one).log_softmax(-1))[0] for step in (x, -x)
        )
        return (above.sum(-1) - below.sum(-1)).view(rows, columns)

    assert error(slope(difference, 1e-3), gradient) < 1e-6


@every_definition
@each("spread", SPREADS)
def test_gradient_is_that_of_the_reference(definition: Definition, theta: tuple[float, ...], spread: float) -> None:
    """dL/dz = phi − q Φ is the derivative of the reference by the logits, and it sums to zero."""
    teacher, student = pair(spread)
    student.requires_grad_()
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq.detach())
    f, phi = evaluate(definition, theta, logp, logq.detach(), more=more)
    ours, weight = of_sums(definition, (*numbers_of(theta), *more), f, phi)
    value = definition.reference(logp, logq, *theta)
    (wanted,) = torch.autograd.grad(value.sum(), student)
    gradient = weight * (phi - logq.detach().exp() * phi.sum(-1, keepdim=True))
    assert error(gradient, wanted) < SERIES
    assert (gradient.sum(-1).abs() <= 1e-12 * gradient.abs().sum(-1)).all()
    assert error(ours[:, 0], value.detach()) < SERIES


# κ: what phi of a far row leaves out, as a multiple of q. 0 at an end that is a plain KL and has no such part.
LEFT_OUT: dict[str, Callable[..., float]] = {
    "jsd": lambda beta: -(1 - beta) * math.log(1 - beta) if beta < 1 else 0.0,
    "skl": lambda lam: 1 - lam,
    "srkl": lambda lam, detached: -math.log(lam) - (1 - detached) * (1 - lam) if lam else 0.0,
    "tvd": lambda: 0.5,
    "hellinger": lambda: 0.5,
    "triangular": lambda: 1.0,
    "renyi_rows": lambda *_: 1.0,
}


@over(FAR_FORM)
def test_far_rows_leave_out_a_multiple_of_q(definition: Definition, theta: tuple[float, ...]) -> None:
    """The two forms of phi differ by κ q with one κ for all tokens, and f is the same."""
    teacher, student = pair(2.0)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    (f, near), (same, far) = (evaluate(definition, theta, logp, logq, x) for x in (0.0, 1.0))
    assert error(same, f) < 1e-12  # rounding: a far row takes log(m/q) from a form of its own
    kappa = LEFT_OUT[definition.name](*theta)
    assert ((near - far) / logq.exp() - kappa).abs().max() < 1e-9


@over(ONE_SWEEP)
@each("spread", SPREADS)
def test_one_sweep_form(definition: Definition, theta: tuple[float, ...], spread: float) -> None:
    """r, F and Φ from tiles, each of which raises the maxima, are those of `term` on the row but for one likely column.

    That column is held out of the tiles, so that Φ of forward KL is not 0.
    """
    teacher, student = (x.sort(-1).values for x in pair(spread, vocabulary=60))
    teacher = teacher - 3.0
    held = teacher[:, -1:] + 1.0, student[:, -1:] + 1.5
    logp, logq = (torch.cat(x, -1).log_softmax(-1)[:, :-1] for x in ((teacher, held[0]), (student, held[1])))
    numbers = numbers_of(theta)
    zero = torch.zeros_like(logp[:, :1])
    maxima = tuple(zero + x for x in no_maxima.torch())
    state = tuple(zero + x for x in definition.online.init.torch())
    centre, live = (zero,) * 4, torch.ones(6, 20, dtype=torch.bool)
    for s, t in zip(student.split(20, -1), teacher.split(20, -1), strict=True):
        before = maxima[0]
        maxima, centre, move, _ = raise_maxima.torch(maxima, centre_of.torch(maxima, 1.0, ()), s, t, live, 1.0, ())
        assert (maxima[0] > before).all()
        z, u, d = centred.torch(s, t, centre, 1.0, ())
        state = definition.online.advance.torch(state, move, z, u, d, z.exp(), u.exp(), live, numbers)
    c_s, c_t, k, _ = centre
    lse_s, lse_t = (x.logsumexp(-1, keepdim=True) - c for x, c in ((student, c_s), (teacher, c_t + k)))
    at_s, at_t = (student - c_s - logq)[:, :1], (teacher - c_t - k - logp)[:, :1]
    r = definition.online.ratio.torch(state)
    assert error(log_sum.torch(state[0]), lse_s) < 1e-9
    assert error(log_sum.torch(state[1]), lse_t) < 1e-9
    assert error(r, lse_t - lse_s) < SERIES
    more = extras(definition, theta, logp, logq)
    total, mass = definition.online.sums.torch(state, at_s, at_t, at_t - at_s, (*numbers, *more))
    f, phi = evaluate(definition, theta, logp, logq, more=more)
    assert error(total, f.sum(-1, keepdim=True)) < SERIES
    assert error(mass, phi.sum(-1, keepdim=True)) < SERIES


def jensen(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """β KL(p‖M) + (1−β) KL(q‖M), M = βp + (1−β)q."""
    p, q = logp.exp(), logq.exp()
    mixed = beta * p + (1 - beta) * q
    return beta * (p * (p / mixed).log()).sum(-1) + (1 - beta) * (q * (q / mixed).log()).sum(-1)


def alpha_beta(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    """Cichocki's formula; a limit as the mean of the two sides of it, so that no limit is written down."""
    h = 1e-4
    if alpha * beta * (alpha + beta) == 0:
        steps = [(alpha + a * h, beta + b * h) for a, b in ((1, 1.7), (-1, -1.7))]
        return sum(alpha_beta(logp, logq, a, b) for a, b in steps) / 2
    c = alpha + beta
    p, q = logp.exp(), logq.exp()
    return -(p**alpha * q**beta - alpha / c * p**c - beta / c * q**c).sum(-1) / (alpha * beta)


def kl(one: Tensor, other: Tensor) -> Tensor:
    """Σ x log(x/y) of probabilities."""
    return (one * (one / other).log()).sum(-1)


def skew(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """KL(x‖weight·x + (1 − weight)·y)."""
    return kl(one.exp(), weight * one.exp() + (1 - weight) * other.exp())


def adaptive(logp: Tensor, logq: Tensor, mu: float, inclusive: float) -> Tensor:
    """AKL, one row after the other: tokens from the likeliest on are in the head while their masses sum to μ.

    Inclusive: while those before them sum to less.
    """
    p, q, values = logp.exp(), logq.exp(), []
    for row in range(len(p)):
        head, tail, mass = 0.0, 0.0, 0.0
        for place, k in enumerate(p[row].argsort(descending=True)):
            before, mass = mass, mass + float(p[row, k])
            gap = float((p[row, k] - q[row, k]).abs())
            inside = before < mu if inclusive else min(mass, 1.0) <= mu
            head, tail = (head + gap, tail) if place == 0 or inside else (head, tail + gap)
        values.append((head * kl(p[row], q[row]) + tail * kl(q[row], p[row])) / (head + tail))
    return torch.stack(values)


def entropy_gated(logp: Tensor, logq: Tensor, threshold: float) -> Tensor:
    """KL(q‖p), and KL(p‖q) where the teacher's entropy is above the threshold."""
    p, q = logp.exp(), logq.exp()
    return kl(q, p) + (-(p * logp).sum(-1) > threshold) * kl(p, q)


def renyi(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    """log(Σ p^α q^(1−α))/(α − 1), its limit as the mean of the two sides of it."""
    if beta == 0:
        return (renyi(logp, logq, 1 + 1e-4, -1e-4) + renyi(logp, logq, 1 - 1e-4, 1e-4)) / 2
    return (logp.exp() ** alpha * logq.exp() ** beta).sum(-1).log() / (alpha - 1)


def alpha_mixture(logp: Tensor, logq: Tensor, alpha: float, lam: float) -> Tensor:
    """log r of r ∝ (λ p^c + (1−λ) q^c)^(1/c), c = (1−α)/2; the geometric mean for α ≥ 1."""
    p, q, c = logp.exp(), logq.exp(), (1 - alpha) / 2
    r = p**lam * q ** (1 - lam) if alpha >= 1 else (lam * p**c + (1 - lam) * q**c) ** (1 / c)
    return (r / r.sum(-1, keepdim=True)).log()


# As the papers print them, from probabilities; a registered definition without a line here is checked by the rest.
PUBLISHED: dict[str, Callable[..., Tensor]] = {
    "fkl": lambda logp, logq: kl(logp.exp(), logq.exp()),
    "rkl": lambda logp, logq: kl(logq.exp(), logp.exp()),
    "ab": alpha_beta,
    "alpha": lambda logp, logq, alpha: alpha_beta(logp, logq, alpha, 1 - alpha),
    "jsd": jensen,
    "skl": skew,
    "srkl": lambda logp, logq, lam, *_: skew(logq, logp, lam),
    "tvd": lambda logp, logq: 0.5 * (logp.exp() - logq.exp()).abs().sum(-1),
    "hellinger": lambda logp, logq: 1 - (logp.exp() * logq.exp()).sqrt().sum(-1),
    "triangular": lambda logp, logq: 2 - 4 * (1 / ((-logp).exp() + (-logq).exp())).sum(-1),
    "todi": lambda logp, logq: kl(logp.exp(), logq.exp()) + kl(logq.exp(), logp.exp()),
    "frkl": lambda logp, logq, w: (1 - w) * kl(logp.exp(), logq.exp()) + w * kl(logq.exp(), logp.exp()),
    "akl_rows": adaptive,
    "eopd_rows": entropy_gated,
    "renyi_rows": renyi,
    "amid_teacher": lambda p, q, alpha, lam, a, b: alpha_beta(p, alpha_mixture(p, q, alpha, lam), a, b),
    "amid_student": lambda p, q, alpha, lam, a, b: alpha_beta(q, alpha_mixture(p, q, alpha, lam), a, b),
}


@over([(definition, values) for definition, values in SETTINGS if definition.name in PUBLISHED])
def test_reference_is_the_published_formula(definition: Definition, theta: tuple[float, ...]) -> None:
    """On rows that are far enough apart for a formula that cancels."""
    teacher, student = pair(1.5)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    if definition.name == "jsd" and theta[0] in (0.0, 1.0):
        published = kl(logp.exp(), logq.exp()) if theta[0] == 0 else kl(logq.exp(), logp.exp())
        assert error(definition.reference(logp, logq, *theta), published) < 1e-9
        return
    published = PUBLISHED[definition.name](logp, logq, *theta)
    by_exponents = ("ab", "renyi_rows", "amid_teacher", "amid_student")
    alpha, beta = theta[-2:] if definition.name in by_exponents else (1.0, 1.0)
    limit = alpha * beta * (alpha + beta) == 0
    assert error(definition.reference(logp, logq, *theta), published) < (1e-5 if limit else 1e-9)


@every_definition
def test_zero_at_equality_and_positive_elsewhere(definition: Definition, theta: tuple[float, ...]) -> None:
    """D(p, p) = 0 with no gradient; every summand is non-negative, and D > 0 where the rows differ."""
    teacher, student = pair(0.5)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    f, phi = evaluate(definition, theta, logp, logp.clone())
    assert not f.any()
    gradient = phi - logp.exp() * phi.sum(-1, keepdim=True)
    assert gradient.abs().max() <= 1e-15
    assert definition.reference(logp, logp.clone(), *theta).abs().max() < 1e-9
    f, _ = evaluate(definition, theta, logp, logq)
    assert f.min() >= 0
    assert (definition.reference(logp, logq, *theta) > 0).all()


def test_every_file_is_seen() -> None:
    """The docstrings that are checked are those of the registered divergences."""
    assert {path.stem for path in FILES} >= {"fkl", "rkl", "drkl", "ab"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring(path: Path) -> None:
    """What a reader of a divergence looks for."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("Gradient", "Edge cases", "Source"):
        assert f"{word}" in text, f"{path.name} says nothing about: {word}"


X = torch.tensor(
    [0.0, *(sign * x for sign in (1, -1) for x in (
        1e-30, 1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.1249, 0.125, 0.1251, 0.3, 0.4999, 0.5, 0.5001, 0.7, 1.0, 2.0, 3.0,
        8.0, 20.0, 50.0, 80.0,
    ))],
    dtype=torch.float32,
)  # fmt: skip
FAR = torch.tensor([1e30, -1e30])
WEIGHTS = (1.0, 0.37, 1e-6)


def weighted() -> tuple[Tensor, Tensor, Tensor]:
    """w, v = w·e^x, x: every weight at every x, and the two columns where one side is absent."""
    w, x = (side.reshape(-1) for side in torch.meshgrid(torch.tensor(WEIGHTS), X, indexing="ij"))
    v = (w.double() * x.double().exp()).float()
    seen = v.isfinite()
    w, v, x = (torch.cat((side[seen], side.new_tensor(far))) for side, far in zip(
        (w, v, x), ((0.0, 0.3), (0.3, 0.0), (1e30, -1e30)), strict=True
    ))  # fmt: skip
    return w, v, x


def weighted_fall() -> tuple[Tensor, Tensor, Tensor]:
    """w, v = w·e^−x, x."""
    w, v, x = weighted()
    return w, v, -x


def remainder(x: Tensor) -> Tensor:
    """e^x − 1 − x with its digits."""
    series = sum(x**n / torch.arange(1, n + 1).double().prod() for n in range(2, 16))
    return torch.where(x.abs() < 0.5, series, torch.expm1(x) - x)


def exact_expm1_ratio(x: Tensor) -> Tensor:
    """1 at 0."""
    return torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))


def exact_expm1_product(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """An absent w leaves v."""
    return torch.where(w == 0, v, w * torch.expm1(x))


def exact_rem2_product(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """An absent w leaves v."""
    return torch.where(w == 0, v, w * remainder(x))


# name -> arguments, float64 truth, relative error of one entry. Beyond its series e^x − 1 − x is a difference of
# numbers near 1, whose rounding is 1.5e-5 of it at the edge of the torch series (1/8), 1e-6 at the Triton one's (1/2).
Formula = tuple[Callable[[], tuple[Tensor, ...]], Callable[..., Tensor], dict[str, float]]
EXACT = {"torch": 1e-6, "triton": 1e-6}
# exp rounds x·log2(e) once, and the constant: half a unit of 115 and of 1.44, at x = 80. Compiled, so does tl.exp, from
# which expm1 and softplus are made; the interpreter's is exact.
EXP = 4e-6
REM2 = {"torch": 1.5e-5, "triton": 2e-6}
HALF = 1e-4  # what gradients in half precision are calculated to; bfloat16 rounds by 4e-3, float16 by 5e-4
FORMULAS: dict[str, Formula] = {
    "exp": (lambda: (torch.cat((X, FAR)),), torch.exp, {"torch": EXP, "triton": EXP}),
    "expm1": (lambda: (torch.cat((X, FAR)),), torch.expm1, EXACT | {"triton": EXP}),
    "log1p": (lambda: (torch.cat((X[X > -1], X.new_tensor([-0.999999, 1e30]))),), torch.log1p, EXACT),
    "softplus": (
        lambda: (torch.cat((X, FAR)),),
        lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        EXACT | {"triton": EXP},
    ),
    "tanh": (lambda: (torch.cat((X, FAR)),), torch.tanh, EXACT),
    "expm1_ratio": (lambda: (X[X.abs() < 0.5],), exact_expm1_ratio, EXACT),
    "expm1_product": (weighted, exact_expm1_product, EXACT),
    "close_expm1_product": (weighted, exact_expm1_product, EXACT | {"triton": 2e-6}),
    "fall_product": (weighted_fall, lambda w, v, x: exact_expm1_product(w, v, -x), EXACT),
    "negative": (lambda: (torch.cat((X, FAR)),), torch.neg, EXACT),
    "rem2_ratio": (lambda: (X[(X.abs() < 0.5) & (X != 0)],), lambda x: remainder(x) / x**2, EXACT),
    "rem2_product": (weighted, exact_rem2_product, REM2),
    "fall_rem2_product": (weighted_fall, lambda w, v, x: exact_rem2_product(w, v, -x), REM2),
    "log1p_exp2": (
        lambda: (torch.cat((X, FAR)),),
        lambda x: torch.log1p(torch.exp2(-x.abs())),
        EXACT | {"triton": EXP},
    ),
    "half_log1p_exp2": (
        lambda: (torch.cat((X, FAR)),),
        lambda x: torch.log1p(torch.exp2(-x.abs())),
        EXACT | {"triton": 1.5e-5},
    ),
    "half_expm1_ratio": (lambda: (X[X.abs() < 0.024],), exact_expm1_ratio, dict.fromkeys(EXACT, HALF)),
    "half_expm1_product": (weighted, exact_expm1_product, dict.fromkeys(EXACT, HALF)),
}
OTHERS = {"horner"}  # takes the coefficients of a series: the formulas above and test_kernel_terms are made of it


def test_every_formula_is_checked() -> None:
    """A new elementary function needs a line above."""
    assert {name for name, value in vars(elementary).items() if callable(getattr(value, "torch", None))} == {
        *FORMULAS,
        *OTHERS,
    }


@jit
def _apply_1(a_ptr, out_ptr, n, FN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, FN(tl.load(a_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@jit
def _apply_3(w_ptr, v_ptr, x_ptr, out_ptr, n, FN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + at, mask=at < n, other=0.0)
    v = tl.load(v_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, FN(w, v, tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


def entries(ours: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each entry; 0 where both are the same, infinities included. Underflow is allowed."""
    size = truth.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(ours.double() == truth, 0.0, (ours.double() - truth).abs() / size)


def float32_range(truth: Tensor) -> Tensor:
    """The truth as float32 can hold it: what overflows is infinite."""
    return torch.where(truth.abs() > torch.finfo(torch.float32).max, truth.sign() * torch.inf, truth)


@each("name", FORMULAS)
def test_formula(name: str, backend: str) -> None:
    """Every entry keeps its digits, near zero and at the edge of the series, and nothing overflows early."""
    make, exact, bounds = FORMULAS[name]
    arguments = make()
    truth = float32_range(exact(*(x.double() for x in arguments)))
    formula = getattr(elementary, name)
    if backend == "torch":
        ours = formula.torch(*arguments)
    else:
        place = device("triton")
        ours = torch.empty(len(truth), device=place)
        kernel = _apply_1 if len(arguments) == 1 else _apply_3
        kernel[(1,)](*(x.to(place) for x in arguments), ours, len(truth), FN=formula, BLOCK=256)
        ours = ours.cpu()
    wrong = entries(ours, truth)
    worst = int(wrong.nan_to_num(torch.inf).argmax())
    assert wrong[worst] <= bounds[backend], (
        f"{name}({[float(x[worst]) for x in arguments]}) = {ours[worst]}, not {truth[worst]}"
    )


@every_definition
@each("spread", SPREADS)
@each("far", [0.0, 1.0])
def test_slope_alone(definition: Definition, theta: tuple[float, ...], spread: float, far: float) -> None:
    """phi is the same where f is not calculated."""
    teacher, student = pair(spread)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq, far)
    _, expected = evaluate(definition, theta, logp, logq, more=more)
    numbers = (*numbers_of(theta), *more)
    _, phi = definition.term.slope(logq.exp(), logp.exp(), logq, logp, logp - logq, numbers)
    assert torch.equal(phi, expected)


@every_definition
@each("spread", SPREADS)
@each("far", [0.0, 1.0])
def test_numbers(definition: Definition, theta: tuple[float, ...], spread: float, far: float) -> None:
    """Parameters that are Python's numbers, which choose between plain and precise forms, or tensors."""
    teacher, student = pair(spread)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq, far)
    expected = evaluate(definition, theta, logp, logq, more=more)
    found = definition.term.torch(logq.exp(), logp.exp(), logq, logp, logp - logq, (*theta, *more))
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) < SERIES


@every_definition
@each("spread", SPREADS)
@each("far", [0.0, 1.0])
def test_traced_term(
    definition: Definition, theta: tuple[float, ...], spread: float, far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile sees of `term` has the numbers of what a CPU runs without it."""
    teacher, student = pair(spread)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq, far)
    expected = evaluate(definition, theta, logp, logq, more=more)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, truth in zip(evaluate(definition, theta, logp, logq, more=more), expected, strict=True):
        assert error(ours, truth) < SERIES


@every_definition
@each("spread", SPREADS)
@each("far", [0.0, 1.0])
def test_kernel_terms(definition: Definition, theta: tuple[float, ...], spread: float, far: float) -> None:
    """What kernels run in the place of `term`: series, plain powers; shorter series for half-precision gradients."""
    teacher, student = pair(spread)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    more = extras(definition, theta, logp, logq, far)
    f, phi = evaluate(definition, theta, logp, logq, more=more)
    given = (logq.exp(), logp.exp(), logq, logp, logp - logq, (*numbers_of(theta), *more))
    online = definition.sweep(theta)
    for ours, truth in zip(definition.summand(online).traced(*given), (f, phi), strict=True):
        assert error(ours, truth) < SERIES
    for half, bound in ((False, SERIES), (True, HALF)):
        _, ours = definition.gradient_summand(online, half).traced(*given)
        assert error(ours, phi) < bound


@each("name", ["expm1_product", "rem2_product"])
@each("size", [1e-8, 1e-4, 1e-2, 1.0, 20.0])
def test_row_formula(name: str, size: float) -> None:
    """The torch forms choose their arithmetic by the row: a whole row keeps its digits whatever it holds."""
    _, exact, _ = FORMULAS[name]
    w = torch.randn(8, 300).softmax(-1)
    x = size * torch.randn(8, 300)
    x -= (w * x.exp()).sum(-1, keepdim=True).log() if size < 10 else x.amax(-1, keepdim=True)
    v = (w.double() * x.double().exp()).float()
    truth = exact(*(side.double() for side in (w, v, x)))
    ours = getattr(elementary, name).torch(w.clone(), v.clone(), x.clone())
    assert ((ours.double() - truth).norm(dim=-1) <= 1e-5 * truth.norm(dim=-1)).all()
    if name == "rem2_product":
        total = truth.sum(-1)
        assert ((ours.double().sum(-1) - total).abs() <= 1e-5 * total).all()
