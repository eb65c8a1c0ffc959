"""The row work of the streaming schedule in plain torch, with the interface of kernels/device/vocab_chunks.py.

The sweeps are those of torch_rows.py, over a chunk's columns; here is what joins the chunks of a row.
"""

import torch
from torch import Tensor

from ..kernels.device.args import (
    CARRY,
    Carry,
    Dominant,
    RowScalars,
    TermSums,
    columns_of,
    extras_of,
)
from ..kernels.device.rows import Logits, Problem
from ..kernels.device.vocab_chunks import online_of
from ..kernels.maths.centering import merge_maxima
from ..kernels.maths.decomposition import ABSENT
from ..kernels.maths.moments import entropies_advance
from ..kernels.maths.quantities import Centre, EntropySums, LogNorms, Maxima, RowNorms
from .torch_rows import (
    PIECE,
    WORKERS,
    Call,
    Held,
    Inputs,
    Kind,
    Reach,
    Rows,
    Statistics,
    at_column,
    counted,
    each,
    kind_of,
    numbers_at,
    or_unknown,
    row_gradients,
    statistics,
    term_sums,
    tree,
    uncounted_zeroed,
)
from .torch_rows import row_parameters as rows_row_parameters

WHOLE = 1 << 22  # logits of which a GPU makes the parameters that need all columns
_SHARE = 128  # rows of a thread: of fewer, a product takes as long as reading the weight


def most_threads(rows: int) -> int:
    """How many threads may work on the vocabulary's chunks, each on rows of its own."""
    return max(1, min(WORKERS, rows // _SHARE))


def shares(rows: int, device: torch.device) -> list[slice]:
    """Rows of each thread that does."""
    threads = min(torch.get_num_threads(), most_threads(rows)) if device.type == "cpu" else 1
    step = max(1, -(-rows // threads))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def absorb(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    carry: Tensor,
    first: int,
    with_stats: bool,
) -> None:
    """Adds a chunk to `carry`, as device.vocab_chunks.absorb."""
    call = _chunk(problem, student, teacher, labels, carry, first)
    kind, rows = kind_of(call.problem, carry.dtype, with_stats), counted(labels, None, len(carry))
    found = torch.empty_like(carry)

    def work(part: Rows) -> None:
        found[part] = _gathered(call.inputs(part), kind)

    each(work, call, kind, rows)
    carry[rows] = merged(call.problem, rows, (carry[rows], found[rows]), with_stats)


def add_sums(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    saved: Tensor,
    sums: Tensor,
    first: int,
) -> None:
    """Adds a chunk's Σ f and Σ phi, as device.vocab_chunks.add_sums."""
    call, kind = _chunk(problem, student, teacher, labels, saved, first), kind_of(problem, saved.dtype)

    def work(part: Rows) -> None:
        scalars = columns_of(RowScalars, saved[part], keepdim=True)
        extras = extras_of(saved[part], kind.definition.extras, keepdim=True)
        norms = Centre(*scalars[:4]), LogNorms(*scalars[4:7])
        before = columns_of(TermSums, sums[part], keepdim=True)
        found = term_sums(call.inputs(part), kind, None, *norms, extras)
        widest = torch.maximum(before.widest, found.widest)
        sums[part] = torch.cat((before.total + found.total, before.mass + found.mass, widest), -1)

    each(work, call, kind, counted(labels, None, len(saved)))


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    saved: Tensor,
    upstream: Tensor,
    dominant: Tensor,
    out: Tensor,
    first: int,
) -> None:
    """A chunk's dZ without the dominant token, as device.vocab_chunks.gradient."""
    call = _chunk(problem, student, teacher, labels, saved, first)
    kind = kind_of(call.problem, saved.dtype)

    def work(part: Rows) -> None:
        to = out[part]  # a view where the rows are neighbours
        found = row_gradients(call.inputs(part), kind, saved[part], upstream[part].unsqueeze(-1), to)
        has = found.token >= 0
        at_column(to, Held(found.token.clamp(min=0), has), 0.0)
        if not isinstance(part, slice):
            out[part] = to
        before = columns_of(Dominant, dominant[part], keepdim=True)
        rest = before.rest + found.rest
        here = found._replace(token=found.token + float(first), rest=rest)
        dominant[part] = torch.where(has, torch.cat(here, -1), torch.cat(before._replace(rest=rest), -1))

    each(work, call, kind, uncounted_zeroed(labels, upstream, out))


def row_parameters(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    first: int,
    state: tuple[Tensor, ...],
    norms: RowNorms,
    reach: Reach,
    widest: int,
) -> tuple[Tensor, ...]:
    """The parameters (N,) that rows find from all their columns, of which those from `first` on are here.

    state, norms: of the whole rows, (N,) each. `reach` is asked about as many rows at a time as have WHOLE logits where
    they are `widest`: the same on every rank.
    """
    like = state[0]
    if not len(like):
        return (like,) * problem.definition.extras
    step = max(1, (PIECE if like.is_cpu else WHOLE) // max(widest, 1))
    call = _chunk(problem, student, teacher, labels, like, first)
    kind = kind_of(call.problem, like.dtype)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(like), step):
        piece = slice(start, min(start + step, len(like)))

        def at_piece(x: Tensor, piece: slice = piece) -> Tensor:
            return x[piece].unsqueeze(-1)

        own_state, own_norms = tree(at_piece, state), tree(at_piece, norms)
        found.append(rows_row_parameters(call.inputs(piece), kind, own_state, own_norms, None, reach))
    return tuple(torch.cat(members)[:, 0] for members in zip(*found, strict=True))


def _chunk(problem: Problem, student: Logits, teacher: Logits, labels: Tensor | None, like: Tensor, first: int) -> Call:
    """A chunk as rows take it. Where none of its columns is compared, one is, outside the support."""
    if not problem.vocab_size:
        problem = problem._replace(vocab_size=1)
        teacher = Logits(like.new_full((1, 1, 1), -torch.inf).expand(1, len(like), 1))
        student = student if student.x.shape[2] else teacher
    return Call(problem, student, teacher, labels, like.dtype, first)


def _gathered(inputs: Inputs, kind: Kind) -> Tensor:
    """What `carry` (n, CARRY + online state) would be after these columns alone."""
    found: Statistics = statistics(inputs, kind)
    zero = torch.zeros_like(found.label_s)
    entropies = found.entropy_sums or EntropySums(zero, zero, zero)
    has_ce = inputs.numbers.ce is not None
    ce = (found.ce_lse, torch.ones_like(zero)) if has_ce else (zero, zero)
    label_s = label_t = torch.full_like(zero, -torch.inf)
    if inputs.label is not None:
        here = inputs.label.here
        assert here is not None  # some columns of a row
        s_y = or_unknown(found.label_s.clamp(min=ABSENT)) if has_ce else found.target.s
        label_s = torch.where(here, s_y, -torch.inf)
        label_t = torch.where(here & found.target.in_support, found.target.t, -torch.inf)
    return torch.cat((*Carry(*found.maxima, *entropies, *ce, label_s, label_t), *found.state), -1)


def merged(problem: Problem, rows: Rows, parts: tuple[Tensor, ...], with_stats: bool) -> Tensor:
    """What was gathered of some columns and of others, (n, CARRY + online state), as kernels merge a row's splits."""
    numbers, online = numbers_at(problem, rows, parts[0].dtype), online_of(problem)

    def beside(x: Tensor) -> Tensor:  # four axes, the parts last: no formula takes it for columns of a row
        return x[:, None, None]

    both = torch.stack(parts, -1)  # (n, CARRY + online state, 2)
    carry = Carry(*(beside(x) for x in both[:, :CARRY].unbind(1)))
    state = tuple(beside(x) for x in both[:, CARRY:].unbind(1))
    theta, mix = (
        tuple(x[..., None, None] if isinstance(x, Tensor) else x for x in xs) for xs in (numbers.theta, numbers.mix)
    )
    raised = merge_maxima.torch(Maxima(*carry[:3]), numbers.inv_tau, mix)
    none = torch.zeros_like(carry.top_s)
    live = none > 0
    entropies = EntropySums(*carry[3:6])
    move = raised.move
    if with_stats:
        entropies = entropies_advance.torch(entropies, state[0], move.log_s, raised.own_log_t, none, none, live)
    state = online.advance.torch(state, move, none, none, none, none, none, live, theta)
    top = carry.ce_top.amax(-1, keepdim=True)
    total = (carry.ce_total * (carry.ce_top - top).exp()).sum(-1, keepdim=True)
    sums = (x.sum(-1, keepdim=True) for x in (*entropies, *state))
    labels = (x.amax(-1, keepdim=True) for x in (carry.label_s, carry.label_t))
    entropy = [next(sums) for _ in EntropySums._fields]
    return torch.cat((*raised.maxima, *entropy, top, total, *labels, *sums), -1)[:, 0, 0]
