"""The row work in plain torch: `backend="torch"`, same results and the same interface as kernels/device/rows.py.

Rows are taken a block of about BLOCK logits at a time, so that nothing of N·V elements is made. A block's logits are at
hand, so no online form is needed: maxima, normalisers, then Σ f and phi of the divergence's own `term` at the final
offsets, then the gradient from the same phi. Where all rows of a block are far from p == q plain differences are
accurate and cost half as much; the primitives of kernels/maths/elementary.py choose that for themselves. Computed in
float32 (float64 for float64 logits), the scalars of a few long rows in Python's numbers; ignored rows are not read.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..kernels.device.rows import Logits, Problem
from ..kernels.maths.decomposition import ABSENT, binary, decompose, offsets, or_infinite
from ..kernels.maths.elementary import Summand, exp, row_dots, softplus, tanh

BLOCK = 3 << 18  # logits per side and block: fewer, and the scalar work of a block shows; more, and caches overflow
_FEW = 16  # rows whose scalars Python calculates faster than torch does
_NEAR = 0.1  # KL(q‖p) below which the quotient of the normalisers is not exact enough for r
# Logits from here down are masks of some kind: no sum of a row may meet their size unprepared.
_MASK = {torch.float32: -1e15, torch.float64: -1e300}
_NOTHING = -1e20  # the maximum of a row without a column, as in the kernels
_PIECE = 128  # columns of which torch finds the largest in less time than where it is


class _Block(NamedTuple):
    """Some rows without their label column: q̂ and p̂, their logs, d = log p̂ − log q̂ + r and what surrounds them."""

    rows: torch.Tensor | slice  # which of the call's
    q: torch.Tensor  # (n, V) e^z = q̂·Z_s
    p: torch.Tensor  # e^u = p̂·Z_t
    log_z: tuple[torch.Tensor, torch.Tensor]  # (n,) log Z_s, log Z_t
    logs: tuple[torch.Tensor, torch.Tensor] | None  # z and u, where the term reads them
    d: torch.Tensor  # u − z + k
    k: torch.Tensor | float  # (n,) 0 where d was brought to 0 where both maxima stand
    r: torch.Tensor  # (n,) log p̂ − log q̂ = d − k − r
    lse: tuple[torch.Tensor, torch.Tensor]  # (n,) of the student's and the teacher's logits
    y: torch.Tensor | None  # (n, 1) targets
    label: torch.Tensor | None  # (n, 1) labels
    in_support: torch.Tensor  # (n,) the target is in the support
    at_target: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (n,) z − lse, u − lse, and d of the target
    raw: tuple[torch.Tensor, torch.Tensor]  # (n,) z and u of the target
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # p̂, lse, u − lse of a teacher that p mixes
    teacher: torch.Tensor  # (n, V) its logits
    dead: torch.Tensor | None  # (n, V) columns outside the support
    holes: torch.Tensor | None  # (n, V) columns with q = 0 < p
    no_columns: torch.Tensor | None  # (n,) nothing to compare but the label
    confident: torch.Tensor  # (n,) some q̂ exceeds one half
    near: torch.Tensor  # (n,) KL(q̂‖p̂) is small


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss` (N,), the row scalars `saved` (N, SAVED) and `stats` (N, STATS), as device.rows.value."""
    clear(loss, stats, saved)
    workspace = _workspace(problem, loss)
    for rows in row_blocks(problem.vocab_size, labels, loss.shape[0], loss.device):
        block = _open(problem, student, teacher, labels, rows, workspace)
        _, _, scalars = _evaluate(problem, student, block, loss, stats)
        if saved is not None:
            saved[rows, : len(scalars)] = torch.stack(scalars, -1)


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), as device.rows.gradient."""
    workspace = _workspace(problem, saved)
    for rows in row_blocks(problem.vocab_size, labels, out.shape[0], out.device, out):
        scalars = saved[rows].unbind(-1)
        block = _open(problem, student, teacher, labels, rows, workspace)
        columns = _place(problem, block, *scalars[:3])
        extras = scalars[7 : 7 + problem.definition.extras]
        _, phi = _term(problem, block, columns, (*values_at(problem.parameters, rows, saved), *extras))
        _write(problem, student, block, columns.q, phi, scalars, upstream, out)


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss`, `stats` and `out`, as device.rows.value_and_gradient."""
    clear(loss, stats)
    workspace = _workspace(problem, loss)
    for rows in row_blocks(problem.vocab_size, labels, out.shape[0], out.device, out):
        block = _open(problem, student, teacher, labels, rows, workspace)
        q, phi, scalars = _evaluate(problem, student, block, loss, stats)
        _write(problem, student, block, q, phi, scalars, upstream, out)


def floor_rows(problem: Problem, teacher: Logits, labels: torch.Tensor | None, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp, as device.rows.floor_rows."""
    out.zero_()
    for rows in row_blocks(problem.vocab_size, labels, out.shape[0], out.device):
        t, _ = logits(teacher, rows, problem.vocab_size, out.dtype)
        out[rows] = (torch.logsumexp(t / problem.temperature, -1) - depth) * problem.temperature


def clear(*tensors: torch.Tensor | None) -> None:
    """Zeros, for the rows that do not count."""
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


def _workspace(problem: Problem, like: torch.Tensor) -> torch.Tensor:
    """What the blocks of a call use in turn: q, p, d, z, u. New memory for each would cost page faults.

    The last two lie over the first two where the term does not read them. One piece, because glibc keeps what is freed
    in smaller ones, the temporaries, once it got back a larger one.
    """
    rows = min(_step(problem.vocab_size), max(len(like), 1))
    return like.new_empty((5 if problem.definition.reads_logs else 3, rows, problem.vocab_size))


def _step(width: int, shared: bool = False) -> int:
    """Rows of a block: equally many for each thread, or one for each if rows are what they share and few fit."""
    rows, threads = max(2, BLOCK // max(width, 1)), torch.get_num_threads()
    if rows < threads:
        return min(threads, 4 * rows) if shared else rows
    return rows - rows % threads


def row_blocks(
    width: int,
    labels: torch.Tensor | None,
    n: int,
    device: torch.device,
    out: torch.Tensor | None = None,
    shared: bool = False,
) -> Iterator[torch.Tensor | slice]:
    """The counted rows, a block at a time, as a slice where they are neighbours; other rows of `out` are zeroed."""
    step = _step(width, shared)
    if labels is None or bool((labels >= 0).all()):
        yield from (slice(i, min(i + step, n)) for i in range(0, n, step))
        return
    if out is not None:
        out[labels < 0] = 0
    rows = torch.arange(n, device=device)[labels >= 0]
    for part in rows.split(step) if len(rows) else ():
        first, last = int(part[0]), int(part[-1])
        yield slice(first, last + 1) if last - first + 1 == len(part) else part


def logits(
    side: Logits, rows: torch.Tensor | slice, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A side's first `width` logits at some rows, maybe a view, and their derivative by the stored numbers."""
    bias = None if side.bias is None else side.bias[:width]
    return shaped(stored(side, rows, width).to(dtype), bias, side.scale, side.softcap)


def stored(side: Logits, rows: torch.Tensor | slice, width: int) -> torch.Tensor:
    """What lies in memory of a side's first `width` columns at some rows, a view where they are neighbours."""
    inner = side.x.shape[1]
    if not isinstance(rows, slice):
        return side.x[(rows + side.first) // inner, (rows + side.first) % inner, :width]
    first, last = rows.start + side.first, rows.stop + side.first - 1
    if first // inner == last // inner:
        return side.x[first // inner, first % inner : last % inner + 1, :width]
    at = torch.arange(first, last + 1, device=side.x.device)
    return side.x[at // inner, at % inner, :width]


def shaped(x: torch.Tensor, bias: Any, scale: Any, softcap: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Logits from stored numbers, and their derivative by these."""
    slope: torch.Tensor | float = 1.0
    if bias is not None:
        x = x + bias
    if scale is not None:
        x = x * scale
        slope = scale
    if softcap is not None:
        bent = tanh.torch(x / softcap)
        x, slope = bent * softcap, (1 - bent * bent) * slope
    return x, slope


def _bounded(
    s: torch.Tensor, t: torch.Tensor, teacher: Logits, rows: torch.Tensor | slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """s and t not below ABSENT, the columns outside the support, and the others that the student excludes.

    Only a teacher's −inf takes a column out: dtypes' least numbers, with which others mask, are probabilities of 0.
    """
    dead = t == -torch.inf
    if teacher.floor is not None:
        dead &= s == -torch.inf
        t = torch.maximum(t, teacher.floor[rows].to(t.dtype).unsqueeze(-1))
    s, t = (x.masked_fill(dead, ABSENT).clamp_(min=ABSENT) for x in (s, t))
    return s, t, dead, (s <= ABSENT) & ~dead


def _open(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    rows: torch.Tensor | slice,
    workspace: torch.Tensor,
) -> _Block:
    """A block's distributions, in `workspace`; with care where a logit is a mask."""
    V, tau = problem.vocab_size, problem.temperature
    like = workspace[0]
    s, _ = logits(student, rows, V, like.dtype)
    t, _ = logits(teacher, rows, V, like.dtype)
    dead = holes = None
    least = torch.minimum(s.amin(), t.amin())  # or NaN
    special = teacher.floor is not None or not bool(least > _MASK[like.dtype])
    if special:
        s, t, dead, holes = _bounded(s, t, teacher, rows)
    n = len(s)
    nothing = like.new_full((n, 1), ABSENT)
    s_y, t_y, in_support = nothing, nothing, torch.zeros(n, dtype=torch.bool, device=like.device)
    no_columns = None if dead is None else (t <= ABSENT).all(-1)
    label = None if labels is None else labels[rows].unsqueeze(-1)
    y = t.argmax(-1, keepdim=True) if problem.argmax else label
    if y is not None:
        s_y, t_y = (or_unknown(x.gather(1, y)) for x in (s, t))
        in_support = ~in_support if dead is None else ~dead.gather(1, y).squeeze(-1)
        if dead is not None or V == 1:
            no_columns = (t.scatter(1, y, ABSENT) <= ABSENT).all(-1) & ~(s_y + t_y).isnan().squeeze(-1)
    tops = (_tops(s, y, s_y), _tops(t, y, t_y))
    if special:
        tops = (tops[0].clamp(min=_NOTHING), tops[1].clamp(min=_NOTHING))
    into_q, into_p, d, z, u = (workspace[i % len(workspace), :n] for i in range(5))
    for to, x, top in ((z, s, tops[0]), (u, t, tops[1])):
        torch.sub(x, top, out=to)
        if tau != 1.0:
            to.div_(tau)
        if y is not None:
            to.scatter_(1, y, ABSENT)
    k = shift = (tops[1] - tops[0]) / tau
    tiny = torch.finfo(like.dtype).tiny
    z_y, u_y = (s_y - tops[0]) / tau, (t_y - tops[1]) / tau
    own = mix = None
    peak: torch.Tensor | float = 0.0
    lse_t = tops[1].squeeze(-1) / tau
    if problem.mix is not None:
        (mix,) = columnwise((problem.mix,), rows, like)
        p = exp.torch(u) if not special else exp.torch(u).masked_fill_(t <= ABSENT, 0.0)
        log_zt = p.sum(-1, keepdim=True).clamp(min=tiny).log()
        own = (p.div_(log_zt.exp()), lse_t + log_zt.squeeze(-1), (u_y - log_zt).squeeze(-1))
        u, u_y = torch.lerp(z, u, mix), torch.lerp(z_y, u_y, mix)
        peak = u.amax(-1, keepdim=True)
        u, u_y = u.sub_(peak), u_y - peak
    q, p = exp.torch(z, out=into_q), exp.torch(u, out=into_p)
    if special:
        q.masked_fill_(s <= ABSENT, 0.0)  # a row with nothing but −inf has its maximum there
        p.masked_fill_(t <= ABSENT, 0.0)
    z_s, z_t = q.sum(-1).clamp(min=tiny), p.sum(-1).clamp(min=tiny)
    log_zs, log_zt = z_s.log(), z_t.log()

    def difference(s: torch.Tensor, t: torch.Tensor, anchored: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        d = _difference(problem, s, t, tops, anchored, out)
        return d if mix is None else d.mul_(mix).sub_(peak)

    if bool((k.abs() < 8).all()):
        torch.sub(t, s, out=d)
        if tau != 1.0:
            d.div_(tau)
        if mix is not None:
            d.mul_(mix)
            k = k * mix + peak
    else:
        d, k = difference(s, t, True, d), torch.zeros_like(k)
    if y is not None:
        d.scatter_(1, y, 0.0)
    r = torch.where(z_s > tiny, (z_t / z_s).log(), log_zt - log_zs)  # the quotient of an empty sum may be infinite
    near = r - (row_dots(q, d) / z_s - k.squeeze(-1)) < _NEAR
    if near.any():
        if bool((shift.abs() > 0.125).any()):
            d = difference(s, t, True, d)
            if y is not None:
                d.scatter_(1, y, 0.0)
        else:
            d.sub_(k)
        k = torch.zeros_like(k)
        r = torch.where(near, torch.log1p(d.clamp(max=80.0).expm1_().mul_(q).sum(-1) / z_s), r)
    # An unlikely target stands far from both maxima: without a large offset its plain difference is the exact one.
    d_y = torch.where(shift.abs() < 8, difference(s_y, t_y, anchored=False), difference(s_y, t_y, anchored=True))
    return _Block(
        rows,
        q,
        p,
        (log_zs, log_zt),
        (z, u) if problem.definition.reads_logs else None,
        d,
        k.squeeze(-1),
        r,
        lse=(tops[0].squeeze(-1) / tau + log_zs, lse_t + log_zt),
        y=y,
        label=label,
        in_support=in_support,
        at_target=((z_y.squeeze(-1) - log_zs), (u_y.squeeze(-1) - log_zt), d_y.squeeze(-1)),
        raw=(s_y.squeeze(-1) / tau, t_y.squeeze(-1) / tau),
        own=own,
        teacher=t,
        dead=dead,
        holes=holes,
        no_columns=no_columns,
        confident=(z_s > 0.5) & (z_s < 2),  # a maximum counts 1, nothing at all counts less
        near=near,
    )


def or_unknown(x: torch.Tensor) -> torch.Tensor:
    """NaN for +inf, which is no logit: beside it every other column's share is 0 and its own inf/inf."""
    return x.masked_fill(x == torch.inf, torch.nan)


def _tops(x: torch.Tensor, y: torch.Tensor | None, x_y: torch.Tensor) -> torch.Tensor:
    """The rows' maxima (n, 1) without the target's column."""
    tops = x.amax(-1, keepdim=True)
    if y is not None:
        again = ~(x_y < tops).flatten()
        if again.any():
            tops[again] = x[again].scatter_(1, y[again], ABSENT).amax(-1, keepdim=True)
    return tops


def _difference(
    problem: Problem,
    s: torch.Tensor,
    t: torch.Tensor,
    tops: tuple[torch.Tensor, torch.Tensor],
    anchored: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """d = u − z; `anchored` brings each side near 0 first, so that a large offset rounds nothing (moments.py)."""
    if anchored:
        c_s, c_t = (torch.floor(x * 4 + 0.5) / 4 for x in tops)
        d = torch.sub(t, c_t, out=out).sub_(s - c_s).sub_((tops[1] - c_t) - (tops[0] - c_s))
    else:
        d = torch.sub(t, s, out=out).sub_(tops[1] - tops[0])
    return d if problem.temperature == 1.0 else d.div_(problem.temperature)


class Columns(NamedTuple):
    """A block's columns at the row's final offsets, the target's left out."""

    q: torch.Tensor
    p: torch.Tensor
    logs: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
    delta: torch.Tensor


def _place(problem: Problem, block: _Block, shift_s: torch.Tensor, shift_t: torch.Tensor, r: torch.Tensor) -> Columns:
    """A block moved to the row offsets, in its own memory."""
    offsets = [(log_z + shift).unsqueeze(-1) for log_z, shift in zip(block.log_z, (shift_s, shift_t), strict=True)]
    q, p = (x.mul_((-offset).exp()) for x, offset in zip((block.q, block.p), offsets, strict=True))
    logs = (None, None) if block.logs is None else (block.logs[0].sub_(offsets[0]), block.logs[1].sub_(offsets[1]))
    return Columns(q, p, logs, block.d.sub_((r + block.k).unsqueeze(-1)))


def _term(
    problem: Problem, block: _Block, columns: Columns, theta: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor | Summand, torch.Tensor]:
    """f, and phi, which is 0 where a column does not count."""
    per_row = tuple(x.unsqueeze(-1) if x.dim() else x for x in theta)
    f, phi = problem.definition.term.torch(columns.q, columns.p, *columns.logs, columns.delta, per_row)
    if block.y is not None:
        phi.scatter_(1, block.y, 0.0)
    if block.dead is not None:
        phi.masked_fill_(block.dead, 0.0)
    return f, phi


def _total(block: _Block, f: torch.Tensor | Summand) -> torch.Tensor:
    """Σ f (n,) over the columns that count."""
    if isinstance(f, Summand) and block.dead is None:
        return f.row_sums()  # where q = p = 0, and δ is finite, nothing is added
    if block.y is not None:
        f = f.scatter_(1, block.y, 0.0)
    if block.dead is not None:
        f = f.masked_fill_(block.dead, 0.0)
    return f.sum(-1)


class Whole(NamedTuple):
    """A block as `RowParameters.torch` sees it."""

    near: torch.Tensor  # (n,) q̂ and p̂ are close
    dtype: torch.dtype
    teacher: torch.Tensor  # (n, V) logits
    y: torch.Tensor | None  # (n, 1) targets
    without: Columns
    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (n,) log q, log p and δ of the target

    def columns(self) -> list[Any]:
        """q, p, log q, log p, δ with the target's column in its place."""
        whole = [self.without.q, self.without.p, *self.without.logs, self.without.delta]
        if self.y is None:
            return whole
        logq, logp, delta = (x.unsqueeze(-1) for x in self.target)
        entries = (logq.exp(), logp.exp(), logq, logp, delta)
        return [None if x is None else x.scatter(1, self.y, entry) for x, entry in zip(whole, entries, strict=True)]


def _row_parameters(
    problem: Problem, block: _Block, columns: Columns, theta: tuple[torch.Tensor, ...], target: tuple[Any, ...]
) -> tuple[torch.Tensor, ...]:
    """The parameters that the rows decide; `target` are log q, log p and δ of the target."""
    row_parameters = problem.definition.row_parameters
    if row_parameters is None:
        return ()
    whole = Whole(block.near, block.r.dtype, block.teacher, block.y, columns, target)
    per_row = tuple(x.unsqueeze(-1) if x.dim() else x for x in theta)
    return row_parameters.torch(whole, per_row)


def _evaluate(
    problem: Problem, student: Logits, block: _Block, loss: torch.Tensor, stats: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss and statistics of a block; q, phi and the row scalars of its gradient."""
    zero = torch.zeros_like(block.r)
    log_rest_q = log_rest_p = delta_rest = delta_y = zero
    logq_y = logp_y = torch.full_like(zero, ABSENT)
    if block.y is not None:
        zy, uy, dy = (
            torch.where(block.in_support, x, absent)
            for x, absent in zip(block.at_target, (logq_y, logp_y, block.r), strict=True)
        )
        pair = by_row(binary, (zero, zero, block.r, zy, uy, dy))
        logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest = pair
    about = _statistics(block, logq_y, logp_y, log_rest_q, log_rest_p) if stats is not None else None
    at = offsets.torch(zero, zero, block.r, log_rest_q, log_rest_p, delta_rest, problem.decoupled)
    columns = _place(problem, block, *at)
    theta = values_at(problem.parameters, block.rows, loss)
    extras = _row_parameters(problem, block, columns, theta, (logq_y, logp_y, delta_y))
    theta = (*theta, *extras)
    f, phi = _term(problem, block, columns, theta)
    total, mass = _total(block, f), phi.sum(-1)
    if block.holes is not None:
        total = or_infinite.torch(total, columns.delta.amax(-1))
    pair = (logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest)
    no_columns = torch.zeros_like(block.in_support) if block.no_columns is None else block.no_columns
    result, split, (a, b, grad_y) = finish_rows(
        problem, block.rows, pair, block.in_support, no_columns, theta, total, mass
    )
    out, ce_lse = result * problem.factor, zero
    if problem.ce_weight:
        assert block.label is not None
        whole, _ = logits(student, block.rows, student.x.shape[2], loss.dtype)
        ce_lse = or_unknown(whole.logsumexp(-1))
        out = out + problem.ce_weight * (ce_lse - whole.gather(1, block.label).squeeze(-1))
    loss[block.rows] = out
    if stats is not None and about is not None:
        terms = [torch.where(no_columns, 0.0, x) for x in split]
        if block.y is None:
            terms = [torch.full_like(result, torch.nan)] * 4
        entropies, logprobs, lses = about
        lses = [torch.where(no_columns, x, lse) for x, lse in zip(block.raw, lses, strict=True)]
        columns_of_stats = [result, *terms, *(torch.where(no_columns, 0.0, x) for x in entropies), *logprobs, *lses]
        stats[block.rows] = torch.stack(columns_of_stats, -1)
    return columns.q, phi, (*at, a, b, grad_y, ce_lse, *extras)


def finish_rows(
    problem: Problem,
    rows: torch.Tensor | slice,
    pair: tuple[torch.Tensor, ...],
    in_support: torch.Tensor,
    no_columns: torch.Tensor,
    theta: tuple[torch.Tensor, ...],
    total: torch.Tensor,
    mass: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Loss; L_T, L_N and their slopes at the target; the gradient's a, b, T: from the target's pair and the sums.

    Loss, a, b and T are 0 where a row is empty.
    """
    weights = values_at(problem.weights, rows, total)
    numbers = (total, mass, pair, in_support, theta, *weights)
    result, *split, a, b, grad_y = by_row(decompose, numbers, problem.definition.term, problem.decoupled)
    result, a, b, grad_y = (torch.where(no_columns, 0.0, x) for x in (result, a, b, grad_y))
    return result, split, (a, b, grad_y)


def by_row(formula: Any, numbers: tuple[Any, ...], *constants: Any) -> tuple[torch.Tensor, ...]:
    """A formula of numbers per row, tensors (n,) or 0-d in maybe nested tuples; its results as (n,).

    Few rows on a CPU go one by one through Python's numbers: a call of torch takes as long as a row of a formula.
    """
    like, *_ = numbers
    version = "scalar" if like.device.type == "cpu" and 0 < len(like) <= _FEW else "torch"
    constants = tuple(getattr(constant, version, constant) for constant in constants)
    if version == "torch":
        return formula.torch(*numbers, *constants)
    results = [formula.scalar(*row, *constants) for row in _numbers_of(numbers, len(like))]
    return like.new_tensor(results).unbind(1)


def _numbers_of(values: tuple[Any, ...], n: int) -> list[tuple[Any, ...]]:
    """The same tuple for each of n rows, of Python's numbers."""
    columns = [_numbers_of(x, n) if isinstance(x, tuple) else x.tolist() if x.dim() else [x.item()] * n for x in values]
    return list(zip(*columns, strict=True)) if columns else [()] * n


def _statistics(
    block: _Block, logq_y: torch.Tensor, logp_y: torch.Tensor, log_rest_q: torch.Tensor, log_rest_p: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Entropies, log-probabilities of the target and log-sum-exps of student and teacher (the unmixed one)."""
    q, p = (x * (-log_z).exp().unsqueeze(-1) for x, log_z in zip((block.q, block.p), block.log_z, strict=True))
    lse_t = block.lse[1]
    if block.own is not None:
        p, lse_t, odds = block.own
        if block.y is not None:
            odds = torch.where(block.in_support, odds, ABSENT)
            logp_y, log_rest_p = -softplus.torch(-odds), -softplus.torch(odds)
    logs = [logq_y, logp_y]
    entropies = [_entropy(q, logq_y, log_rest_q), _entropy(p, logp_y, log_rest_p)]
    logprobs = [torch.where(block.in_support & ~(x <= ABSENT / 10), x, -torch.inf) for x in logs]
    if block.y is None:
        logprobs = [torch.full_like(logq_y, torch.nan)] * 2
    return entropies, logprobs, [block.lse[0] - log_rest_q, lse_t - log_rest_p]


def _entropy(hat: torch.Tensor, log_y: torch.Tensor, log_rest: torch.Tensor) -> torch.Tensor:
    """Entropy of a distribution from its label's log-probability and its renormalised rest."""
    rest, y = log_rest.exp(), log_y.exp()
    return rest * (torch.special.entr(hat).sum(-1) - log_rest) - torch.where(y > 0, y * log_y, 0.0)


def _write(
    problem: Problem,
    student: Logits,
    block: _Block,
    q: torch.Tensor,
    phi: torch.Tensor,
    scalars: tuple[torch.Tensor, ...],
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The gradient of a block, over the student's width. Uses up q and phi."""
    a, b, grad_y, ce_lse = (x.unsqueeze(-1) for x in scalars[3:7])
    V, width = problem.vocab_size, out.shape[1]
    up: Any = 1.0 if upstream is None else upstream[block.rows].to(phi.dtype).unsqueeze(-1)
    scale = up * (problem.factor / problem.temperature)
    g = phi if bool((a * scale == 1).all()) else phi.mul_(a * scale)
    bent = problem.ce_weight or student.scale is not None or student.softcap is not None
    direct = isinstance(block.rows, slice) and out.dtype == phi.dtype and not bent
    g = torch.addcmul(g, q, b * scale, out=out[block.rows, :V] if direct else g)
    if block.y is not None:
        g.scatter_(1, block.y, torch.where(block.in_support.unsqueeze(-1), grad_y * scale, 0.0))
    rows = block.confident.nonzero().flatten()
    if len(rows):
        # a·phi + b·q cancels in a token with most of the mass; the gradient of a row sums to 0, and the rest does not.
        tops = _at_rows(_likeliest, q, rows)
        g[rows, tops] = 0.0
        g[rows, tops] = -_at_rows(_sums, g, rows)
    if block.holes is not None:
        g.masked_fill_(block.holes, 0.0)
    if block.no_columns is not None:
        g.masked_fill_(block.no_columns.unsqueeze(-1), 0.0)
    if bent:
        s, slope = logits(student, block.rows, width if problem.ce_weight else V, g.dtype)
        if problem.ce_weight:
            assert block.label is not None
            ce = exp.torch(s - ce_lse).scatter_add_(1, block.label, torch.full_like(ce_lse, -1.0))
            ce.mul_(up * problem.ce_weight)
            ce[:, :V] += g
            g = ce
        g.mul_(slope)
    if upstream is not None and bool((up == 0).any()):
        g.masked_fill_(up == 0, 0.0)  # also where the row is not finite
    if isinstance(block.rows, slice):
        if not direct:
            out[block.rows, : g.shape[1]] = g
        out[block.rows, g.shape[1] :] = 0
    else:
        out[block.rows] = torch.nn.functional.pad(g, (0, width - g.shape[1])).to(out.dtype)


def _at_rows(reduce: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What `reduce` makes of some rows of x (n, V): of all, where so many are wanted that copying them takes longer."""
    return reduce(x[rows]) if 4 * len(rows) < len(x) else reduce(x)[rows]


def _sums(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


def _likeliest(q: torch.Tensor) -> torch.Tensor:
    """Where the rows of q (n, V) are largest: torch looks for a maximum's place one by one, for its size at many."""
    width = q.shape[1]
    if width <= _PIECE:
        return q.argmax(-1)
    whole = width - width % _PIECE
    largest = q[:, :whole].unflatten(-1, (-1, _PIECE)).amax(-1)
    if whole < width:
        largest = torch.cat((largest, q[:, whole:].amax(-1, keepdim=True)), -1)
    first = largest.argmax(-1, keepdim=True) * _PIECE
    piece = torch.arange(_PIECE, device=q.device) + first
    return q.gather(1, piece.clamp_(max=width - 1)).argmax(-1) + first.squeeze(-1)


def values_at(values: tuple[Any, ...], rows: torch.Tensor | slice, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parameters as 0-d tensors, or as (n,) where they are per row."""
    return tuple(
        value[rows].to(like.dtype)
        if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=like.dtype, device=like.device)
        for value in values
    )


def columnwise(values: tuple[Any, ...], rows: torch.Tensor | slice, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same beside columns: per-row values as (n, 1)."""
    return tuple(x.unsqueeze(-1) if x.dim() else x for x in values_at(values, rows, like))
