"""Adaptive KL: forward and reverse KL of each token, weighted by where teacher and student disagree.

    AKL = s₁/(s₁+s₂)·KL(p‖q) + s₂/(s₁+s₂)·KL(q‖p),  s₁ = Σ_head |p−q|, s₂ = Σ_tail |p−q|

The head is what the teacher holds likeliest: its argmax, always, and, with F(u) = Σ_{u_j ≥ u} p_j,

    head="exclusive"    every token with F(u_k) ≤ μ, the author's code: the token that crosses μ is in the tail
    head="inclusive"    every token whose likelier tokens hold less than μ: the one that crosses it is in the head, as
                        in the copies of DSKD, KDFlow and ToDi, which sum p upwards to α = 1 − μ

Equal logits have equal F: they are in the head together or not at all (a sort splits them by chance); of several that
are largest the first is in, if no rule has more of them.
Gradient: that of frkl.py at w = s₂/(s₁+s₂); the weights are constants, as the author detaches them.
The cut is found without sorting: F falls as the logit rises, so bisection on the logit's order-preserving integer image
finds it exactly, two bits a sweep: 16 sweeps over the teacher's row alone, which stays in cache. The image below the
cut is that of the token that crosses it. One sweep of both then adds s₁ and s₂; F and Φ come from frkl's one-sweep
form.
Edge cases: p = q has no disagreement to weigh: w = ½. μ = 0 leaves the argmax in the head, μ = 1 is forward KL.
A sum over tokens only at given weights, so no target/non-target weights of its own; the statistics split frkl(w).
Source: Wu et al., Rethinking KL divergence in knowledge distillation for LLMs, COLING 2025 (arXiv 2404.02657), eq. 11
to 13, and the author's code (μ = 0.5); the other head: songmzhang/DSKD and KDFlow.
"""

from typing import Any

import torch

from ..device.loads import load_normalized, load_pair
from ..language import formula, jit, tl
from ..maths.definition import Definition, Derived, Form, Parameter, RowParameters
from ..maths.elementary import expm1_product
from .fkl import sums as forward_sums
from .fkl import term as forward_term
from .frkl import FRKL
from .rkl import sums as reverse_sums
from .rkl import term as reverse_term


@formula
def term(q, p, logq, logp, delta, theta):
    """Both KLs at the row's own weights, the last of theta; two of them, because 1 − w would lose a small one."""
    of_forward, of_reverse = theta[len(theta) - 2], theta[len(theta) - 1]
    forward, forward_phi = forward_term(q, p, logq, logp, delta, ())
    reverse, reverse_phi = reverse_term(q, p, logq, logp, delta, ())
    return of_forward * forward + of_reverse * reverse, of_forward * forward_phi + of_reverse * reverse_phi


@formula
def sums(state, l_s, l_t, r, theta):
    """F and Φ from frkl's moments; a part without weight leaves its infinity behind."""
    of_forward, of_reverse = theta[len(theta) - 2], theta[len(theta) - 1]
    z_s, z_t, first, second, teacher_first, teacher_second = state
    forward, forward_mass = forward_sums((z_s, z_t, teacher_first, teacher_second), l_s, l_t, r, ())
    reverse, reverse_mass = reverse_sums((z_s, z_t, first, second), l_s, l_t, r, ())
    total = tl.where(of_forward == 0, 0.0, of_forward * forward) + of_reverse * reverse
    return total, of_forward * forward_mass + of_reverse * reverse_mass


@jit
def _image(x):
    """An integer that orders as the float32 does."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # −0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@formula
def _beyond(mass, mu, inclusive):
    """Whether what has this mass, with all that is likelier, is beyond the cut."""
    return (mass > mu) | ((mass == mu) & (inclusive > 0))


@jit
def row_parameters(student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """The weights of both KLs."""
    mu, inclusive = theta
    low = tl.full((), -2147483648, tl.int64)  # F is beyond the cut here, unless everything is in the head
    high = tl.full((), 2147483648, tl.int64)  # and is not here
    for _ in range(0, 16):
        part = (high - low + 3) // 4
        first, second, third = 0.0, 0.0, 0.0
        for start in range(0, ctx.V, BLOCK):
            cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
            x = load_pair(student, teacher, ctx.ptrs, cols, cols < ctx.V, cols < 0)
            u = ((x.t - ctx.centre.c_t) - ctx.centre.k) * ctx.inv_tau
            p = tl.where(x.live, tl.exp(u - log_norms.l_t), 0.0)
            image = _image(x.t)
            first += tl.sum(tl.where(image >= low + part, p, 0.0))
            second += tl.sum(tl.where(image >= low + 2 * part, p, 0.0))
            third += tl.sum(tl.where(image >= low + 3 * part, p, 0.0))
        beyond1, beyond2 = _beyond(first, mu, inclusive), _beyond(second, mu, inclusive)
        beyond3 = _beyond(third, mu, inclusive)
        new_high = low + tl.where(beyond1, tl.where(beyond2, 3 * part, 2 * part), part)
        new_low = low + tl.where(beyond1, tl.where(beyond2, tl.where(beyond3, 3 * part, 2 * part), part), 0)
        high = tl.where(beyond3, high, tl.minimum(new_high, high))
        low = new_low
    high = tl.where(inclusive > 0, high - 1, high)
    high = tl.where(mu >= 1, -2147483648, high)

    gap_y = tl.abs(expm1_product(tl.exp(label.logq), tl.exp(label.logp), label.delta))
    head, tail, gap_argmax = 0.0, 0.0, 0.0
    top = tl.full((), -2147483649, tl.int64)
    for start in range(0, ctx.V, BLOCK):
        cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
        x, live, t = load_normalized(student, teacher, ctx, log_norms, cols)
        gap = tl.where(live, tl.abs(expm1_product(x.q, x.p, x.delta)), 0.0)
        is_label = (cols == ctx.y) & label.in_support
        gap = tl.where(is_label, gap_y, gap)
        image = tl.where(live | is_label, _image(t), -2147483649)
        head += tl.sum(tl.where(image >= high, gap, 0.0))
        tail += tl.sum(tl.where(image >= high, 0.0, gap))
        best = tl.max(image)
        where = tl.min(tl.where(image == best, cols, 2147483647))
        gap_argmax = tl.where(best > top, tl.sum(tl.where(cols == where, gap, 0.0)), gap_argmax)
        top = tl.maximum(top, best)
    both = head + tail
    head = tl.where(top < high, gap_argmax, head)  # a head of nothing gets the argmax
    tail = tl.where(top < high, tl.maximum(both - gap_argmax, 0.0), tail)
    sure = tl.where(both > 0, both, 1.0)
    return (tl.where(both > 0, head / sure, 0.5), tl.where(both > 0, tail / sure, 0.5)), ()


_DIGIT = 8  # bits of the image that a sweep settles: as many sums as this has values


def _row_parameters_torch(whole: Any, theta: tuple[Any, ...]) -> tuple[Any, ...]:
    """The weights on whole rows: the same cut, some bits of the image at a time.

    Of the numbers that share the bits settled so far, those with larger next bits are in the head up to the cut; those
    that are left in the end are what crosses it.
    """
    q, p, logq, logp, delta = whole.columns()
    del logq, logp  # whose memory the search takes
    mu, inclusive = (x + torch.zeros_like(p[:, :1]) for x in theta)
    teacher = whole.teacher()
    integer = torch.int64 if teacher.dtype == torch.float64 else torch.int32
    image = (teacher + 0.0).contiguous().view(integer)
    image = torch.where(image < 0, image ^ torch.iinfo(integer).max, image)
    size, values = torch.iinfo(integer).bits, 1 << _DIGIT
    head, above = torch.zeros_like(p, dtype=torch.bool), torch.zeros_like(mu, dtype=torch.float64)
    undecided = ~head
    for shift in range(size - _DIGIT, -1, -_DIGIT):
        digit = ((image >> shift) & (values - 1)).long()
        if shift == size - _DIGIT:  # the sign's
            digit ^= values >> 1
        # In float64 the order of a GPU's additions decides nothing but ties.
        masses = p.new_zeros((len(p), values), dtype=torch.float64)
        masses = whole.reach.total(masses.scatter_add_(1, digit, torch.where(undecided, p, 0.0).double()))
        larger = masses.flip(-1).cumsum(-1).flip(-1)
        larger = above + torch.cat((larger[:, 1:], torch.zeros_like(above)), -1)  # F above each value of the digit
        cut = _beyond.torch(larger, mu, inclusive).sum(-1, keepdim=True).clamp(max=values - 1)
        above = larger.gather(1, cut)
        head |= undecided & (digit > cut)
        undecided &= digit == cut
    head |= undecided & (inclusive > 0) | (mu >= 1)
    argmax = whole.reach.largest(teacher)
    here = head.gather(1, argmax.at) | (True if argmax.here is None else argmax.here)
    head.scatter_(1, argmax.at, here)
    gap = expm1_product.torch(q, p, delta).abs()
    parts = [torch.where(x, gap, 0.0).sum(-1, keepdim=True) for x in (head, ~head)]
    parts = whole.reach.total(torch.cat(parts, -1)).split(1, -1)
    both = parts[0] + parts[1]
    sure = torch.where(both > 0, both, 1.0)
    return tuple(torch.where(both > 0, part / sure, 0.5) for part in parts)


def reference(logp: torch.Tensor, logq: torch.Tensor, mu: float, inclusive: float) -> torch.Tensor:
    """The author's rule, or that of the copies, by sorting; weights detached."""
    p, q = logp.exp(), logq.detach().exp()
    order = torch.sort(p, dim=-1, descending=True, stable=True).indices
    sorted_p = p.gather(-1, order)
    reached = sorted_p.cumsum(-1)
    inside = reached - sorted_p < mu if inclusive else reached <= mu
    in_head = inside | (mu >= 1)  # a sum of all may round above 1
    in_head[..., 0] = True
    gap = (p - q).abs().gather(-1, order)
    head, tail = torch.where(in_head, gap, 0.0).sum(-1), torch.where(in_head, 0.0, gap).sum(-1)
    both = head + tail
    w = torch.where(both > 0, tail / both, 0.5)
    forward, reverse = FRKL.reference(logp, logq, 0.0), FRKL.reference(logp, logq, 1.0)
    return torch.lerp(forward, reverse, w)


MASS = Parameter("mu", 0.5, "probability mass of the head", low=0.0, high=1.0)
HEAD = Parameter(
    "head", "exclusive", "whether the token that crosses mu is in the head", words=("exclusive", "inclusive")
)
ADAPTIVE = Definition(
    "akl_rows",
    term,
    reference,
    parameters=(MASS, Parameter("inclusive", 0.0, "1: the token that crosses mu is in the head", low=0.0, high=1.0)),
    online=FRKL.online._replace(sums=sums),
    reads_logs=False,
    row_parameters=RowParameters(row_parameters, _row_parameters_torch, 2, reads=(16, 1)),
    separable=False,
)


def form(mu: Any, head: str) -> Form:
    """Every token's own mean of both KLs."""
    return Form(ADAPTIVE, (mu, float(head == "inclusive")))


AKL = Derived("akl", form, (MASS, HEAD), definitions=(ADAPTIVE,))
