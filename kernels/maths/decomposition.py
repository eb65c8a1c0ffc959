"""From row sums to loss, gradient coefficients and the target/non-target split: derived once, for every divergence.

A divergence is D(p, q) = Σ_k f(p_k, q_k) with phi = ∂f/∂log q (p teacher, q student, z = student logit / τ). The label
column y is always held out of the vocabulary sweeps: F = Σ_{k≠y} f_k, Φ = Σ_{k≠y} phi_k. Write P = 1 − p_y,
Q = 1 − q_y, and hats for the rows renormalised without y. Two structures cover the literature:

joint       L = w_T L_T + w_N L_N with L_T = f(p_y, q_y) + f(P, Q) (D of the binary pair) and L_N = F − f(P, Q), so
            that D = L_T + L_N exactly. With h = ∂L/∂log q (the log q taken as free) and H = Σ h,
            dL/dz_k = h_k − q_k H:
              dL/dz_k = w_N phi_k + [(w_T − w_N) phi(P,Q)/Q − H] q_k          (k ≠ y)
              dL/dz_y = w_T [Q phi_y − q_y phi(P,Q)] − w_N q_y [Φ − phi(P,Q)]
decoupled   L = w_T L_T + w_N D(p̂, q̂): the non-target rows are renormalised, their weight no longer depends on q.
              dL/dz_y = T = w_T [Q phi_y − q_y phi(P,Q)]
              dL/dz_k = w_N phi(p̂_k, q̂_k) − (w_N Φ̂ + T) q̂_k                 (k ≠ y)

Where D is a function g of its sum (definition.outer), L_T = g(f(p_y, q_y) + f(P, Q)), L_N = D − L_T, or g(F) of the
renormalised rows, and every phi counts with the slope g′ of the sum that it stands in.

Either way the gradient sweep is dL/dz_k = a·phi_k + b·q_k with phi and q taken at the row's own offsets, and T at y.
The forms above subtract nothing that cancels when q_y → 1; h_y − q_y H would.

Offsets: log q_k = z_k − c_s − l_s and δ_k = log p_k − log q_k = d_k − r, where d is centred on the two row maxima and
r = log(Z_t/Z_s) comes from second-order sums (moments.py), never from a difference of two log-sum-exps.

Sources: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7 (decoupled FKL: TCKD, NCKD); Luong, Tran and
Chen, arXiv 2604.00223 (decoupled RKL with a constant weight). The two structures for a general f are derived here.
"""

from ..language import formula, tl
from .centering import centre_of, target_terms
from .elementary import expm1, log1p, softplus
from .moments import log_sum
from .quantities import Binary, Decomposition, LogNorms, OwnTerms, RowNorms, SideStats

ABSENT = -1e30  # log-probability of a column that is not there; finite, so that 0 · ABSENT = 0


@formula
def binary(log_zs, log_zt, r, zy, uy, dy):
    """Binary: log q_y, log p_y, δ_y, log Q, log P, δ_Q of the target against the rest.

    zy, uy, dy are the label's centred student logit, teacher logit and their difference; ABSENT, ABSENT, r if no label
    is held out.
    """
    odds_q = zy - log_zs
    odds_p = uy - log_zt
    gap = dy - r  # log-odds of p minus log-odds of q, without cancellation
    logq_y = -softplus(-odds_q)
    log_rest_q = -softplus(odds_q)
    logp_y = -softplus(-odds_p)
    log_rest_p = -softplus(odds_p)
    near = tl.abs(gap) < 0.5
    small = tl.where(near, gap, 0.0)
    delta_y = tl.where(near, -log1p(tl.exp(log_rest_q) * expm1(-small)), logp_y - logq_y)
    delta_rest = tl.where(near, -log1p(tl.exp(logq_y) * expm1(small)), log_rest_p - log_rest_q)
    return Binary(logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest)


@formula
def offsets(log_zs, log_zt, r, log_rest_q, log_rest_p, delta_rest, DECOUPLED: tl.constexpr):
    """LogNorms at which the non-target columns are evaluated: conditional if decoupled, full otherwise."""
    if DECOUPLED:
        return LogNorms(log_zs, log_zt, r)
    else:
        return LogNorms(log_zs - log_rest_q, log_zt - log_rest_p, r - delta_rest)


@formula
def finalize_normalizers(maxima, state, s_y, t_y, in_support, inv_tau, mix, RATIO, DECOUPLED: tl.constexpr):
    """RowNorms of a row whose Maxima and online state are those of all its columns."""
    centre = centre_of(maxima, inv_tau, mix)
    log_zs = log_sum(state[0])
    log_zt = log_sum(state[1])
    r = RATIO(state)
    zy, uy, dy, own_uy = target_terms(s_y, t_y, in_support, centre, inv_tau, mix, r)
    pair = binary(log_zs, log_zt, r, zy, uy, dy)
    log_norms = offsets(log_zs, log_zt, r, pair.log_rest_q, pair.log_rest_p, pair.delta_rest, DECOUPLED)
    return RowNorms(centre, log_norms, pair, OwnTerms(log_zs, zy, own_uy))


@formula
def _or_unknown(x, loss):
    """x, NaN where the loss is."""
    return tl.where(loss == loss, x, loss)


@formula
def combine(total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, target, nontarget, DECOUPLED: tl.constexpr):
    """Decomposition: loss, L_T, L_N, dL_T/dz_y, dL_N/dz_y, and the gradient's a, b, T, from F = total and Φ = mass.

    A loss of NaN makes b and T NaN, and with them the whole row of the gradient: a phi may compare and see no NaN.
    """
    q_y = tl.exp(logq_y)
    rest = tl.exp(log_rest_q)
    target_loss = f_y + f_rest
    target_grad = rest * phi_y - q_y * phi_rest
    if DECOUPLED:
        nontarget_loss = total
        nontarget_grad = 0.0 * q_y
        loss = target * target_loss + nontarget * total
        grad_y = target * target_grad
        slope = -nontarget * mass - grad_y
    else:
        nontarget_loss = tl.where(tl.abs(total) == float("inf"), total, total - f_rest)
        nontarget_grad = -q_y * (mass - phi_rest)
        skew = target - nontarget
        loss = target * f_y + nontarget * total + tl.where(skew == 0, 0.0, skew * f_rest)
        grad_y = target * target_grad + nontarget * nontarget_grad
        per_q = tl.where(rest > 0, phi_rest / tl.where(rest > 0, rest, 1.0), 0.0)
        slope = skew * per_q * q_y - (target * phi_y + nontarget * mass)  # phi_PQ/Q − phi_PQ = phi_PQ q_y/Q
    slope = _or_unknown(slope, loss)
    grad_y = _or_unknown(grad_y, loss)
    a = nontarget + 0.0 * q_y
    return Decomposition(loss, target_loss, nontarget_loss, target_grad, nontarget_grad, a, slope, grad_y)


@formula
def combine_outer(
    total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, theta, target, nontarget, OUTER,
    DECOUPLED: tl.constexpr,
):  # fmt: skip
    """`combine` where D is a function of its sum: OUTER(Σ f, Σ phi, theta) is its value and its slope."""
    q_y = tl.exp(logq_y)
    rest = tl.exp(log_rest_q)
    target_loss, of_pair = OUTER(f_y + f_rest, phi_y + phi_rest, theta)
    target_grad = of_pair * (rest * phi_y - q_y * phi_rest)
    if DECOUPLED:
        nontarget_loss, of_sum = OUTER(total, mass, theta)
        nontarget_grad = 0.0 * q_y
        loss = target * target_loss + nontarget * nontarget_loss
        grad_y = target * target_grad
        slope = -nontarget * of_sum * mass - grad_y
    else:
        whole, of_sum = OUTER(f_y + total, phi_y + mass, theta)
        nontarget_loss = tl.where(tl.abs(whole) == float("inf"), whole, whole - target_loss)
        skew = target - nontarget
        loss = nontarget * whole + tl.where(skew == 0, 0.0, skew * target_loss)
        whole_grad = of_sum * (rest * phi_y - q_y * mass)
        nontarget_grad = whole_grad - target_grad
        grad_y = nontarget * whole_grad + skew * target_grad
        per_q = tl.where(rest > 0, phi_rest / tl.where(rest > 0, rest, 1.0), 0.0)
        slope = skew * of_pair * (per_q * q_y - phi_y) - nontarget * of_sum * (phi_y + mass)
    slope = _or_unknown(slope, loss)
    grad_y = _or_unknown(grad_y, loss)
    a = nontarget * of_sum
    return Decomposition(loss, target_loss, nontarget_loss, target_grad, nontarget_grad, a, slope, grad_y)


@formula
def decompose(total, mass, pair, in_support, theta, target, nontarget, TERM, OUTER, DECOUPLED: tl.constexpr):
    """Decomposition from F, Φ and Binary: `combine` with the terms of the target and of the rest evaluated."""
    logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest = pair
    f_y, phi_y = TERM(tl.exp(logq_y), tl.exp(logp_y), logq_y, logp_y, delta_y, theta)
    f_y = tl.where(in_support, tl.where(f_y > 1e25, float("inf"), f_y), 0.0)
    phi_y = tl.where(in_support, phi_y, 0.0)
    f_rest, phi_rest = TERM(tl.exp(log_rest_q), tl.exp(log_rest_p), log_rest_q, log_rest_p, delta_rest, theta)
    if OUTER is None:
        return combine(total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, target, nontarget, DECOUPLED)
    else:
        return combine_outer(
            total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, theta, target, nontarget, OUTER, DECOUPLED
        )


@formula
def or_infinite(total, widest):
    """F, infinite where a column with q = 0 < p, whose d is 1e30/τ, made it huge; float64's logits may go further."""
    return tl.where((widest > 1e20) & (widest < 3e38) & (total > 1e10), float("inf"), total)


@formula
def side_stats(log_z, entropy_sum, x_y, shift, target_logit, in_support, no_columns):
    """SideStats: entropy, log-probability of the target and log-sum-exp of one side.

    log_z and entropy_sum = Σ e^x x are of the other columns, x_y is the target's, all above `shift`; where there are no
    other columns the log-sum-exp is target_logit.
    """
    logprob = -softplus(log_z - x_y)
    lse = log_z + softplus(x_y - log_z)
    about_target = tl.where(in_support, tl.exp(logprob) * x_y, 0.0)
    entropy = tl.where(no_columns, 0.0, lse - entropy_sum * tl.exp(-lse) - about_target)
    logprob = tl.where(in_support, tl.where(logprob <= -1e29, float("-inf"), logprob), float("-inf"))
    return SideStats(entropy, logprob, tl.where(no_columns, target_logit, lse + shift))
