"""Two divergences that the package does not have, written as a user would: everything works once they are registered.

Pearson's χ² brings a one-sweep form of its own, the squared Hellinger distance has none and takes two sweeps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import Case, Rows, check_heads, check_logits, device, each, expected, near, random_labels, side, unrelated
from compare import assert_close
from torch import Tensor

import fusedkd
from fusedkd.kernels.divergences import REGISTRY
from fusedkd.kernels.language import formula, jit, tl
from fusedkd.kernels.maths.definition import Definition, OnlineForm
from fusedkd.kernels.maths.elementary import expm1, expm1_product, log1p
from fusedkd.kernels.maths.moments import log_sum
from fusedkd.kernels.maths.reductions import thread_sum


@formula
def chi_squared_term(q, p, logq, logp, delta, theta):
    """f = (p − q)²/q, phi = q − p²/q = −f − 2 (p − q)."""
    gap = expm1_product(q, p, delta)
    f = gap * expm1(delta)
    return f, -f - 2.0 * gap


@formula
def chi_squared_init():
    """Z_s, Z_t, E = Σ w·expm1(d), S = Σ w·expm1(d)² with w = e^z."""
    return 0.0, 0.0, 0.0, 0.0


@formula
def _shifted(zeroth, first, second, x):
    """Σ w·expm1(d − x) and Σ w·expm1(d − x)²: expm1(d − x) = g·expm1(d) + h."""
    g = tl.exp(-x)
    h = expm1(-x)
    return g * first + h * zeroth, g * g * second + 2.0 * g * h * first + h * h * zeroth


@formula
def chi_squared_advance(state, move, z, u, d, ez, eu, live, theta):
    """Rescale, shift, add a tile."""
    z_s, z_t, first, second = state
    log_s, log_t, x = move
    first, second = _shifted(z_s, first, second, x)
    scale = tl.exp(log_s)
    gap = expm1_product(ez, eu, d)
    z_s = scale * z_s + thread_sum(tl.where(live, ez, 0.0))
    z_t = tl.exp(log_t) * z_t + thread_sum(tl.where(live, eu, 0.0))
    first = scale * first + thread_sum(tl.where(live, gap, 0.0))
    second = scale * second + thread_sum(tl.where(live, gap * expm1(d), 0.0))
    return z_s, z_t, first, second


@formula
def chi_squared_ratio(state):
    """r = log(Z_t/Z_s): Z_t = Z_s + E where the two are close."""
    z_s, z_t, first, second = state
    near = second < 0.1 * z_s
    return tl.where(near, log1p(tl.where(near, first / z_s, 0.0)), log_sum(z_t) - log_sum(z_s))


@formula
def chi_squared_sums(state, l_s, l_t, r, theta):
    """F and Φ = −F − 2 Σ (p − q) at the row's own offsets."""
    z_s, _, first, second = state
    first, second = _shifted(z_s, first, second, r)
    w = tl.exp(-l_s)
    return w * second, -w * second - 2.0 * w * first


def chi_squared_reference(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ p²/q − 1 (Pearson 1900), every summand completed to a square."""
    p, q = logp.exp(), logq.exp()
    return ((p - q) ** 2 / q).sum(-1)


@formula
def distance_term(q, p, logq, logp, delta, theta):
    """f = (√p − √q)², phi = q − √(pq) = −√q (√p − √q)."""
    root = tl.exp(0.5 * logq)
    gap = expm1_product(root, tl.exp(0.5 * logp), 0.5 * delta)
    return gap * gap, -root * gap


def distance_reference(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ (√p − √q)² (Hellinger 1909)."""
    return ((logp / 2).exp() - (logq / 2).exp()).square().sum(-1)


CUSTOM = {
    "toy_chi_squared": Definition(
        "toy_chi_squared",
        chi_squared_term,
        chi_squared_reference,
        reads_logs=False,
        online=OnlineForm(chi_squared_init, chi_squared_advance, chi_squared_ratio, chi_squared_sums),
    ),
    "toy_distance": Definition("toy_distance", distance_term, distance_reference),
}
SETTINGS: list[Case] = [
    *((name, {}) for name in CUSTOM),
    *((name, {"target": 0.3, "nontarget": 1.7}) for name in CUSTOM),
    *(("decoupled", {"base": name, "target": 1.0, "nontarget": 0.5}) for name in CUSTOM),
]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one step that makes a definition known."""
    for name, definition in CUSTOM.items():
        monkeypatch.setitem(REGISTRY, name, definition)


def mild(*shape: int) -> Rows:
    """Unrelated rows, but not so far that Σ p²/q is one entry."""
    return unrelated(*shape, std=1.5)


def calm(lead: tuple[int, ...], vocabulary: int, width: int, **options: Any) -> Any:
    """A head whose logits have standard deviation 1.5."""
    made = side(lead, vocabulary, width, **options)
    return dataclasses.replace(made, weight=0.3 * made.weight)


def test_they_are_new() -> None:
    """Listed like the others, with the weights every separable divergence has."""
    assert fusedkd.divergences()["toy_distance"] == {"target": 1.0, "nontarget": 1.0}
    assert REGISTRY["toy_chi_squared"].online.sums is not None
    assert REGISTRY["toy_distance"].online.sums is None


@jit
def _whole_sum(x):
    return tl.sum(x)


@jit
def careless_advance(state, move, z, u, d, ez, eu, live, theta):
    """Counts a row once for each thread, through a helper."""
    return (state[0] + _whole_sum(tl.where(live, ez, 0.0)),)


@each("advance", [careless_advance, _whole_sum])
def test_a_sum_over_all_threads_is_refused(advance: Any) -> None:
    """A definition whose one-sweep form would be wrong on a GPU is not made, and the error says what to write."""
    online = CUSTOM["toy_chi_squared"].online._replace(advance=advance)
    with pytest.raises(ValueError, match=r"'toy' reduces a tile by tl\.sum in _whole_sum.*thread_sum"):
        Definition("toy", chi_squared_term, chi_squared_reference, online=online)


@pytest.mark.smoke
@each("case", SETTINGS)
@each("vocabulary", [3, 300])
def test_logits(case: Case, vocabulary: int, backend: str) -> None:
    """Value, statistics and gradient, in one tile and in several."""
    check_logits(mild(5, vocabulary), case, backend)


@each("case", SETTINGS)
def test_several_tiles(case: Case, backend: str) -> None:
    """Running maxima that move: the tiles of one row have different offsets."""
    rows = mild(2, 9001)
    for x, slope in ((rows.student, 3.0), (rows.teacher, 2.5)):
        x += slope * torch.linspace(0, 1, 9001, dtype=torch.float64)
    check_logits(Rows.of(rows.student, rows.teacher, rows.labels), case, backend)


@each("case", SETTINGS)
@each("distance", [0.1, 1e-3])
def test_close_rows(case: Case, distance: float, backend: str) -> None:
    """A small divergence keeps its digits."""
    check_logits(near(distance, 5, 260), case, backend)


@each("case", SETTINGS)
def test_no_labels(case: Case, backend: str) -> None:
    """Nothing is held out; what needs a target says so."""
    rows = mild(3, 129)
    rows = Rows.of(rows.student, rows.teacher, None)
    if fusedkd.divergence(case[0], **case[1]).needs_target:
        with pytest.raises(ValueError, match="labels"):
            check_logits(rows, case, backend)
    else:
        check_logits(rows, case, backend)


@each("case", SETTINGS)
@each("options", [{}, {"temperature": 2.0, "temperature_squared": True, "ce_weight": 0.4}])
def test_options(case: Case, options: dict[str, Any], backend: str) -> None:
    """Bfloat16 logits with holes in the teacher, under the options that change numbers."""
    rows = unrelated(5, 260, std=1.5, dtype=torch.bfloat16)
    rows.teacher[:, 1::3] = -torch.inf
    rows.labels[rows.labels >= 0] -= rows.labels[rows.labels >= 0] % 3
    check_logits(rows, case, backend, **options)


@each("case", SETTINGS)
@each("reduction", ["mean", "none"])
def test_heads(case: Case, reduction: str, backend: str) -> None:
    """A head on both sides."""
    labels = random_labels((5,), 129)
    student = calm((5,), 129, 16, bias=True)
    check_heads(student, calm((5,), 129, 24, softcap=8.0), labels, case, backend, reduction=reduction)


@each("name", CUSTOM)
def test_value_and_grad(name: str, backend: str) -> None:
    """The one-launch form."""
    rows, place = mild(4, 260), device(backend)
    labels = rows.labels.to(place)
    loss, grad = fusedkd.kd_value_and_grad(
        rows.student.to(place).float(), rows.teacher.to(place).float(), labels, divergence=name, backend=backend
    )
    truth, value, weights = expected(rows.student, rows.teacher, rows.labels, (name, {}), {})
    assert_close(loss, value, 2e-5)
    assert_close(grad, truth.gradient(weights), 2e-5)
