"""The numbers of a row that formulas take and return, by name.

Triton carries a NamedTuple as a tuple with field names, and compiles the same code as for a bare tuple. Scalars of a
row have no shape; while a thread keeps sums of its own (device/thread_sums.py) each is a (T,) tensor, T threads. In
torch each is (n, 1), n rows.
"""

from typing import Any, NamedTuple


class NormalizedTile(NamedTuple):
    """Columns at the row's final normalisers."""

    q: Any
    p: Any
    logq: Any
    logp: Any
    delta: Any  # log p − log q


class Maxima(NamedTuple):
    """Running maxima: of s, of t, and of τ·u' of a mixed teacher."""

    s: Any
    t: Any
    mixed: Any


class Centre(NamedTuple):
    """What z and u are measured from: z = (s − c_s)/τ, u = (t − c_t − k)/τ; m is subtracted from a mixed u and d."""

    c_s: Any
    c_t: Any
    k: Any
    m: Any


class Move(NamedTuple):
    """By how much z, u and d move as maxima rise: log ρ_s, log ρ_t and Δ of moments.py."""

    log_s: Any
    log_t: Any
    d: Any


class Raised(NamedTuple):
    """Maxima with a tile, and what follows from them."""

    maxima: Any
    centre: Any
    move: Any
    own_log_t: Any  # by how much the unmixed u moves


class EntropySums(NamedTuple):
    """What entropies are made of: Σ e^z z, Σ e^u u and Σ e^u, u of the unmixed teacher."""

    student: Any
    teacher: Any
    z_t: Any


class LogSumExp(NamedTuple):
    """A log-sum-exp in the making: the maximum, and Σ e^(s − maximum)."""

    top: Any
    total: Any


class TargetTerms(NamedTuple):
    """z, u and d of the held-out column, and u of the unmixed teacher."""

    z: Any
    u: Any
    d: Any
    own_u: Any


class LogNorms(NamedTuple):
    """log-normalisers at which columns are evaluated: log q = z − l_s, log p = u − l_t, δ = d − r."""

    l_s: Any
    l_t: Any
    r: Any


class Binary(NamedTuple):
    """The target against the rest."""

    logq_y: Any
    logp_y: Any
    delta_y: Any
    log_rest_q: Any
    log_rest_p: Any
    delta_rest: Any


class OwnTerms(NamedTuple):
    """What the statistics of both sides take: log Z_s, z of the target, u of the target and the unmixed teacher."""

    log_zs: Any
    z_y: Any
    own_u_y: Any


class RowNorms(NamedTuple):
    """A row whose first sweep is complete."""

    centre: Any
    log_norms: Any
    binary: Any
    own: Any


class Decomposition(NamedTuple):
    """Loss, its two terms and their derivatives by z_y, and the gradient dL/dz = a·phi + b·q, grad_y at the target."""

    loss: Any
    target_loss: Any
    nontarget_loss: Any
    target_grad: Any
    nontarget_grad: Any
    a: Any
    b: Any
    grad_y: Any


class SideStats(NamedTuple):
    """Statistics of one side."""

    entropy: Any
    logprob: Any  # of the target
    lse: Any
