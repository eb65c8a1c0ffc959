"""The row work in plain torch: `backend="torch"`, same results and the same interface as kernels/rows.py.

Rows are taken a block at a time (many short rows, or one long one), a block in column tiles of about 2¹⁶ logits, so
that every elementwise pass stays in cache and nothing of N·V elements is made. A block's tiles stay at hand, so no
online form is needed: maxima, normalisers, then f and phi of the divergence's own `term` at the final offsets, then the
gradient from the same phi. Computed in float32 (float64 for float64 logits); ignored rows are not read.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .kernels.rows import Problem, Side
from .kernels.split import ABSENT, assemble, binary, offsets

TILE = 1 << 16  # logits per side and tile: 256 KiB, above which the allocator returns every temporary to the system


class _Tile(NamedTuple):
    """Some columns of a block: e^z, e^u and d = u − z, with columns that do not count at weight 0."""

    cols: slice
    ez: torch.Tensor  # (n, width)
    eu: torch.Tensor
    d: torch.Tensor
    logs: tuple[torch.Tensor, torch.Tensor] | None  # z, u, where the term reads logarithms
    label: torch.Tensor | None  # (n, 1) the label's place in the tile, if it is one
    inside: torch.Tensor | None  # (n, 1) whether it is
    dead: torch.Tensor | None  # columns outside the support
    holes: torch.Tensor | None  # columns with q = 0 < p


class _Block(NamedTuple):
    """Rows that are worked on together, and what is known of them before any sum."""

    rows: torch.Tensor  # (n,) indices
    y: torch.Tensor | None  # (n, 1) labels
    special: bool  # some logit is −inf
    centre: tuple[torch.Tensor, ...]  # (n,) c_s, c_t, k, k_lo
    present: torch.Tensor  # (n,) the label is in the support
    at_label: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (n,) z, u, d of the label


def value(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss` (N,), the row scalars `saved` (N, 11) and `stats` (N, 11), as kernels.rows.value."""
    _clear(loss, stats, saved)
    for rows in _row_blocks(problem, labels, loss.shape[0], loss.device):
        block = _open(problem, student, teacher, labels, rows, loss.dtype)
        _, scalars = _evaluate(problem, student, teacher, block, loss, stats, keep=False)
        if saved is not None:
            saved[rows] = torch.stack(scalars, -1)


def gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), as kernels.rows.gradient."""
    for rows in _row_blocks(problem, labels, out.shape[0], out.device, out):
        scalars = saved[rows].unbind(-1)
        block = _open(problem, student, teacher, labels, rows, saved.dtype, scalars[:4])
        for tile in _tiles(problem, student, teacher, block):
            phi, _ = _term(problem, block, tile, *(x.unsqueeze(-1) for x in scalars[4:7]))
            _write(problem, student, block, tile, phi, scalars, upstream, out)
        _write_rest(problem, student, block, scalars, upstream, out)


def value_and_gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss`, `stats` and `out`, as kernels.rows.value_and_gradient."""
    _clear(loss, stats)
    for rows in _row_blocks(problem, labels, out.shape[0], out.device, out):
        block = _open(problem, student, teacher, labels, rows, loss.dtype)
        tiles, scalars = _evaluate(problem, student, teacher, block, loss, stats, keep=True)
        for tile, phi in tiles:
            _write(problem, student, block, tile, phi, scalars, upstream, out)
        _write_rest(problem, student, block, scalars, upstream, out)


def floor_rows(problem: Problem, teacher: Side, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp, as kernels.rows.floor_rows."""
    for rows in _row_blocks(problem, None, out.shape[0], out.device):
        total = torch.full((len(rows),), -torch.inf, dtype=out.dtype, device=out.device)
        for cols in _columns(problem.vocab_size, len(rows)):
            t, _ = _logits(teacher, rows, cols, out.dtype)
            total = torch.logaddexp(total, torch.logsumexp(t / problem.temperature, -1))
        out[rows] = (total - depth) * problem.temperature


def _clear(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


def _row_blocks(
    problem: Problem, labels: torch.Tensor | None, n: int, device: torch.device, out: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Indices of the counted rows, a block at a time; the other rows of `out` are zeroed."""
    rows = torch.arange(n, device=device)
    if labels is not None:
        if out is not None:
            out[labels < 0] = 0
        rows = rows[labels >= 0]
    if len(rows):
        yield from rows.split(max(1, TILE // problem.vocab_size))


def _columns(width: int, rows: int, start: int = 0) -> Iterator[slice]:
    """Column tiles of equal width from `start` to `width`."""
    count = max(1, math.ceil((width - start) * rows / TILE))
    step = math.ceil((width - start) / count)
    for first in range(start, width, max(1, step)):
        yield slice(first, min(first + step, width))


def _logits(
    side: Side, rows: torch.Tensor, cols: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A side's logits at some rows and columns, maybe a view of its memory, and their slope by the stored numbers."""
    inner = side.x.shape[1]
    first, last = int(rows[0]) + side.first, int(rows[-1]) + side.first
    if last - first + 1 == len(rows) and first // inner == last // inner:
        x = side.x[first // inner, first % inner : last % inner + 1, cols]
    else:
        at = rows + side.first
        x = side.x[at // inner, at % inner, cols]
    x = x.to(dtype)
    slope: torch.Tensor | float = 1.0
    if side.bias is not None:
        x = x + side.bias[cols]
    if side.scale is not None:
        x = x * side.scale
        slope = side.scale
    if side.softcap is not None:
        bent = torch.tanh(x / side.softcap)
        x, slope = bent * side.softcap, (1 - bent * bent) * slope
    return x, slope


def _pair(
    student: Side, teacher: Side, rows: torch.Tensor, cols: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    s, _ = _logits(student, rows, cols, dtype)
    t, _ = _logits(teacher, rows, cols, dtype)
    return s, t


def _without_infinities(
    s: torch.Tensor, t: torch.Tensor, teacher: Side, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """s and t with −inf made finite, the columns outside the support, and those with q = 0 < p."""
    dead, holes = t == -torch.inf, s == -torch.inf
    if teacher.floor is not None:
        dead &= holes
        t = torch.maximum(t, teacher.floor[rows].to(t.dtype).unsqueeze(-1))
    holes &= ~dead
    return s.masked_fill(dead | holes, ABSENT), t.masked_fill(dead, ABSENT), dead, holes


def _hide_label(
    s: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, cols: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Copies of s and t with the label column made ABSENT, where it stands, and in which rows; as they are without."""
    if y is None:
        return s, t, None, None
    inside = (y >= cols.start) & (y < cols.stop)
    if not inside.any():
        return s, t, None, None
    place = (y - cols.start).clamp(0, s.shape[1] - 1)
    s, t = s.clone(), t.clone()
    for x in (s, t):
        x.scatter_(1, place, torch.where(inside, ABSENT, x.gather(1, place)))
    return s, t, place, inside


def _open(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    rows: torch.Tensor,
    dtype: torch.dtype,
    centre: tuple[torch.Tensor, ...] | None = None,
) -> _Block:
    """A block's label logits and, unless `centre` is known, its maxima."""
    y = None if labels is None else labels[rows].unsqueeze(-1)
    nothing = torch.full((len(rows),), ABSENT, dtype=dtype, device=rows.device)
    s_y, t_y, present = nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool)
    c_s, c_t = nothing.clamp(min=-1e20), nothing.clamp(min=-1e20)
    special = teacher.floor is not None
    for cols in _columns(problem.vocab_size, len(rows)):
        s, t = _pair(student, teacher, rows, cols, dtype)
        dead = None
        if special or s.amin() == -torch.inf or t.amin() == -torch.inf:
            special = True
            s, t, dead, _ = _without_infinities(s, t, teacher, rows)
        hidden_s, hidden_t, place, inside = _hide_label(s, t, y, cols)
        if place is not None and inside is not None:
            here = inside.squeeze(-1)
            s_y = torch.where(here, s.gather(1, place).squeeze(-1), s_y)
            t_y = torch.where(here, t.gather(1, place).squeeze(-1), t_y)
            present |= here if dead is None else here & ~dead.gather(1, place).squeeze(-1)
        c_s, c_t = torch.maximum(c_s, hidden_s.amax(-1)), torch.maximum(c_t, hidden_t.amax(-1))
    if centre is None:
        k = torch.floor((c_t - c_s) * 4 + 0.5) / 4  # coarse, so that t − k is exact where it matters
        centre = (c_s, c_t, k, (c_t - k) - c_s)
    return _Block(rows, y, special, centre, present, _centred(problem, s_y, t_y, *centre))


def _centred(problem: Problem, s: Any, t: Any, c_s: Any, c_t: Any, k: Any, k_lo: Any) -> tuple[Any, Any, Any]:
    """z, u and d = u − z, fresh (see kernels/online.py for how d keeps its digits)."""
    d = (t - s if not k.any() else (t - k).sub_(s)).sub_(k_lo)
    z, u = s - c_s, t - c_t
    if problem.temperature != 1.0:
        for x in (z, u, d):
            x.div_(problem.temperature)
    return z, u, d


def _tiles(problem: Problem, student: Side, teacher: Side, block: _Block) -> Iterator[_Tile]:
    centre = [x.unsqueeze(-1) for x in block.centre]
    for cols in _columns(problem.vocab_size, len(block.rows)):
        s, t = _pair(student, teacher, block.rows, cols, centre[0].dtype)
        dead = holes = None
        if block.special:
            s, t, dead, holes = _without_infinities(s, t, teacher, block.rows)
        s, t, label, inside = _hide_label(s, t, block.y, cols)
        z, u, d = _centred(problem, s, t, *centre)
        if problem.definition.reads_logs:
            yield _Tile(cols, z.exp(), u.exp(), d, (z, u), label, inside, dead, holes)
        else:
            yield _Tile(cols, z.exp_(), u.exp_(), d, None, label, inside, dead, holes)


def _term(
    problem: Problem, block: _Block, tile: _Tile, l_s: torch.Tensor, l_t: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi and f of a tile at the row offsets, 0 where a column does not count; the tile's weights become q and p."""
    theta = tuple(x.unsqueeze(-1) if x.dim() else x for x in _values(problem.parameters, block.rows, tile.ez))
    logs = (None, None) if tile.logs is None else (tile.logs[0].sub_(l_s), tile.logs[1].sub_(l_t))
    q, p = tile.ez.mul_((-l_s).exp()), tile.eu.mul_((-l_t).exp())
    f, phi = problem.definition.term.torch(q, p, *logs, tile.d.sub_(r), theta)
    if tile.label is not None and tile.inside is not None:
        for x in (f, phi):
            x.scatter_(1, tile.label, torch.where(tile.inside, 0.0, x.gather(1, tile.label)))
    if tile.dead is not None:
        f.masked_fill_(tile.dead, 0.0)
        phi.masked_fill_(tile.dead, 0.0)
    return phi, f


def _evaluate(
    problem: Problem,
    student: Side,
    teacher: Side,
    block: _Block,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
    keep: bool,
) -> tuple[list[tuple[_Tile, torch.Tensor]], tuple[torch.Tensor, ...]]:
    """Loss and statistics of a block; its tiles with their phi if `keep`, and the row scalars of its gradient."""
    tiles = list(_tiles(problem, student, teacher, block))
    z_s, z_t = _total(t.ez.sum(-1) for t in tiles), _total(t.eu.sum(-1) for t in tiles)
    empty = z_t == 0
    tiny = torch.finfo(loss.dtype).tiny
    log_zs, log_zt = z_s.clamp(min=tiny).log(), z_t.clamp(min=tiny).log()
    r = _log_ratio(tiles, z_s.clamp(min=tiny), log_zt - log_zs)
    zy, uy, dy = block.at_label
    zy, uy = torch.where(block.present, zy, ABSENT), torch.where(block.present, uy, ABSENT)
    pair = binary.torch(log_zs, log_zt, r, zy, uy, torch.where(block.present, dy, r))
    logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest = pair
    term, theta = problem.definition.term.torch, _values(problem.parameters, block.rows, loss)
    f_y, phi_y = term(logq_y.exp(), logp_y.exp(), logq_y, logp_y, delta_y, theta)
    f_y = torch.where(block.present, torch.where(f_y > 1e25, torch.inf, f_y), 0.0)
    phi_y = torch.where(block.present, phi_y, 0.0)
    f_rest, phi_rest = term(log_rest_q.exp(), log_rest_p.exp(), log_rest_q, log_rest_p, delta_rest, theta)
    entropies = None
    if stats is not None:
        entropies = _entropies(tiles, log_zs - log_rest_q, log_zt - log_rest_p, logq_y, logp_y, zy, uy)

    at = offsets.torch(log_zs, log_zt, r, log_rest_q, log_rest_p, delta_rest, problem.decoupled)
    total, mass, kept = torch.zeros_like(z_s), torch.zeros_like(z_s), []
    while tiles:
        tile = tiles.pop(0)
        phi, f = _term(problem, block, tile, *(x.unsqueeze(-1) for x in at))
        total += f.sum(-1)
        mass += phi.sum(-1)
        if tile.holes is not None:
            total = torch.where(tile.holes.any(-1) & (total > 1e10), torch.inf, total)
        if keep:
            kept.append((tile, phi))
    weights = _values(problem.weights, block.rows, loss)
    result, *split, a, b, grad_y = assemble.torch(
        total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, *weights, problem.decoupled
    )
    result = torch.where(empty, 0.0, result)
    out, ce_lse = result * problem.factor, torch.zeros_like(result)
    if problem.ce_weight:
        assert block.y is not None
        ce_lse, s_label = _cross_entropy(student, block, loss.dtype)
        out = out + problem.ce_weight * (ce_lse - s_label)
    loss[block.rows] = out
    if stats is not None and entropies is not None:
        temperature = problem.temperature
        lses = (
            torch.where(empty, zy, log_zs - log_rest_q) + block.centre[0] / temperature,
            torch.where(empty, uy, log_zt - log_rest_p) + block.centre[1] / temperature,
        )
        about_label = [torch.where(empty, 0.0, x) for x in split]
        logprobs = [torch.where(block.present, x, -torch.inf) for x in (logq_y, logp_y)]
        if block.y is None:
            about_label, logprobs = [torch.full_like(result, torch.nan)] * 4, [torch.full_like(result, torch.nan)] * 2
        columns = [result, *about_label, *(torch.where(empty, 0.0, x) for x in entropies), *logprobs, *lses]
        stats[block.rows] = torch.stack(columns, -1)
    live = (~empty).to(out.dtype)
    return kept, (*block.centre, *at, live * a, live * b, live * grad_y, ce_lse)


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum(0)


def _entropies(
    tiles: list[_Tile],
    full_s: torch.Tensor,
    full_t: torch.Tensor,
    logq_y: torch.Tensor,
    logp_y: torch.Tensor,
    zy: torch.Tensor,
    uy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies of q and p: lse − E[z], the label's share added."""
    warmth_s = _total(torch.xlogy(t.ez, t.ez).sum(-1) for t in tiles)
    warmth_t = _total(torch.xlogy(t.eu, t.eu).sum(-1) for t in tiles)
    return (
        full_s - warmth_s * (-full_s).exp() - logq_y.exp() * zy,
        full_t - warmth_t * (-full_t).exp() - logp_y.exp() * uy,
    )


def _log_ratio(tiles: list[_Tile], z_s: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """r = log(Z_t/Z_s): log1p(E_q[expm1(d)]) where the distributions are close, the quotient where they are not."""
    mean = _total(torch.linalg.vecdot(t.ez, t.d) for t in tiles) / z_s
    near = far - mean < 0.5  # the naive KL(q‖p): good enough to choose
    if not near.any():
        return far
    x = _total(torch.linalg.vecdot(t.d.clamp(max=80.0).expm1_(), t.ez) for t in tiles) / z_s
    return torch.where(near, torch.log1p(x), far)


def _cross_entropy(student: Side, block: _Block, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the student's full vocabulary at temperature 1, and the label's logit."""
    assert block.y is not None
    y = block.y.squeeze(-1)
    lse = torch.full(y.shape, -torch.inf, dtype=dtype, device=y.device)
    s_label = torch.zeros_like(lse)
    for cols in _columns(student.x.shape[2], len(y)):
        s, _ = _logits(student, block.rows, cols, dtype)
        lse = torch.logaddexp(lse, s.logsumexp(-1))
        inside = (y >= cols.start) & (y < cols.stop)
        place = (y - cols.start).clamp(0, s.shape[1] - 1).unsqueeze(-1)
        s_label = torch.where(inside, s.gather(1, place).squeeze(-1), s_label)
    return lse, s_label


def _write(
    problem: Problem,
    student: Side,
    block: _Block,
    tile: _Tile,
    phi: torch.Tensor,
    scalars: tuple[torch.Tensor, ...],
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The gradient of a tile, into `out`. Uses up the tile."""
    a, b, grad_y, ce_lse = (x.unsqueeze(-1) for x in scalars[7:])
    up: Any = 1.0 if upstream is None else upstream[block.rows].to(phi.dtype).unsqueeze(-1)
    scale = up * (problem.factor / problem.temperature)
    g = phi.mul_(a * scale).add_(tile.ez.mul_(b * scale))
    if tile.label is not None and tile.inside is not None:
        at_label = torch.where(block.present.unsqueeze(-1), grad_y * scale, 0.0)
        g.scatter_(1, tile.label, torch.where(tile.inside, at_label, g.gather(1, tile.label)))
    if tile.holes is not None:
        g.masked_fill_(tile.holes, 0.0)
    s, slope = (None, 1.0)
    if problem.ce_weight or student.scale is not None or student.softcap is not None:
        s, slope = _logits(student, block.rows, tile.cols, g.dtype)
    if problem.ce_weight and s is not None:
        g += _ce_gradient(problem, block, s, tile.cols, ce_lse) * up
    if not isinstance(slope, float) or slope != 1.0:
        g.mul_(slope)
    _place(out, block.rows, tile.cols, g)


def _ce_gradient(problem: Problem, block: _Block, s: torch.Tensor, cols: slice, ce_lse: torch.Tensor) -> torch.Tensor:
    """ce_weight · (softmax − onehot) at some columns."""
    assert block.y is not None
    g = (s - ce_lse).exp_()
    inside = (block.y >= cols.start) & (block.y < cols.stop)
    place = (block.y - cols.start).clamp(0, s.shape[1] - 1)
    return g.scatter_add_(1, place, -inside.to(g.dtype)).mul_(problem.ce_weight)


def _write_rest(
    problem: Problem,
    student: Side,
    block: _Block,
    scalars: tuple[torch.Tensor, ...],
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The student's columns beyond the compared ones: cross-entropy only, or zero."""
    V, width = problem.vocab_size, out.shape[1]
    if width == V:
        return
    if not problem.ce_weight:
        _place(out, block.rows, slice(V, width), torch.zeros((), dtype=out.dtype, device=out.device))
        return
    up: Any = 1.0 if upstream is None else upstream[block.rows].to(scalars[0].dtype).unsqueeze(-1)
    for cols in _columns(width, len(block.rows), V):
        s, slope = _logits(student, block.rows, cols, scalars[0].dtype)
        _place(out, block.rows, cols, _ce_gradient(problem, block, s, cols, scalars[10].unsqueeze(-1)) * up * slope)


def _place(out: torch.Tensor, rows: torch.Tensor, cols: slice, values: torch.Tensor) -> None:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        out[first : last + 1, cols] = values
    else:
        out[rows, cols] = values.to(out.dtype)


def _values(values: tuple[Any, ...], rows: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parameters as 0-d tensors, or as (n,) where they are per row."""
    return tuple(
        value[rows].to(like.dtype)
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=like.dtype, device=like.device)
        for value in values
    )
