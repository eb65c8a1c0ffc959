"""What kernels take and keep: names for their arguments, for what a row gathers, and for its numbers in memory.

Names only. Triton carries a NamedTuple as a tuple with field names, and compiles the same code as for a bare tuple. A
member that is compiled in (None, or a stride of 1) stays so while it is read by name, `side.stride_v`: unpacking, or
another tuple built around it in a kernel, would turn it into a number.

theta, the parameters of a divergence, and an online state have as many members as their divergence says: plain tuples.
The functions of a divergence are arguments of their own, never members: Triton's cache key would not see them edited.

Scalars of a row have no shape. While a thread keeps sums of its own (thread_sums.py) each is a (T,) tensor, T threads.
"""

from typing import Any, NamedTuple, TypeVar

import torch

from ..language import constant, formula, jit, tl
from ..maths.quantities import SideStats

# Arguments


class LogitsArg(NamedTuple):
    """Logits of one side (rows.Logits): row n is [(first + n) // inner, (first + n) % inner] of (outer, inner, V)."""

    ptr: Any
    first: Any
    inner: Any
    stride_outer: Any
    stride_n: Any
    stride_v: Any
    bias_ptr: Any = None  # (V,)
    scale: Any = None
    softcap: Any = None
    floor_ptr: Any = None  # (N,), teacher only
    congruent: Any = None  # 1, teacher only: rows of all tensors begin alike (vectors.py)


class GradArg(NamedTuple):
    """The gradient by the student's stored logits, (N, width)."""

    ptr: Any
    stride_n: Any
    stride_v: Any
    width: Any


class CrossEntropyArg(NamedTuple):
    """Cross-entropy with the labels, added to the loss: over all columns of the student, which may be more than V."""

    weight: Any
    width: Any


class ScalesArg(NamedTuple):
    """1/temperature, the factor of the divergence in the loss, and the cross-entropy in it (None: none)."""

    inv_tau: Any
    factor: Any
    ce: Any = None


class WeightsArg(NamedTuple):
    """Weights of the two terms of a divergence (decomposition.py)."""

    target: Any
    nontarget: Any


class ParametersArg(NamedTuple):
    """The parameters of a loss: floats, or pointers to one float per row (loads.row_values).

    mix is (the teacher's weight in a mixed teacher,), or () for the teacher itself.
    """

    theta: Any
    weights: Any
    mix: Any


class ValueArg(NamedTuple):
    """Where the value of each row goes."""

    loss_ptr: Any  # (N,)
    stats_ptr: Any  # (N, STATS), or None


class WorkspaceArg(NamedTuple):
    """What the programs that share a row leave each other (split_rows.py)."""

    partial_ptr: Any  # (N, num_splits, CARRY + online state)
    sums_ptr: Any  # (N, num_splits, TERM_SUMS)
    dominant_ptr: Any  # (N, num_splits, DOMINANT)
    arrived_ptr: Any  # (N,) int32: how many programs of a row have written their gradient
    num_splits: Any  # programs per row


# What a row gathers


class RowPtrs(NamedTuple):
    """A row's index, and the addresses of one of its columns."""

    row: Any
    student: Any
    teacher: Any
    first: Any  # that column, from which others are counted


class RowVectors(NamedTuple):
    """A row's columns that lie in whole vectors (vectors.py)."""

    ptrs: Any  # RowPtrs of the first of them
    V: Any  # how many of them are compared
    width: Any  # how many there are


class TileOrder(NamedTuple):
    """The order of a row's tiles (tile_order.py)."""

    num_full: Any  # tiles that need no mask
    num_masked: Any
    low: Any  # the full tiles with a column that is held out; `full` where there is none
    high: Any
    full: Any  # index of the first tile that is not full


class RowContext(NamedTuple):
    """What the sweeps after the first need of a row, beside LogitsArg of both sides, which no tuple may hold."""

    ptrs: Any  # RowPtrs
    y: Any  # the held-out column
    V: Any
    inv_tau: Any
    mix: Any
    centre: Any  # Centre


class LogitTile(NamedTuple):
    """Columns of both sides."""

    s: Any  # student logits
    t: Any  # teacher logits
    live: Any  # whether the column is compared: among the V, and in the support
    slope: Any  # derivative of s by the stored number


class RowSums(NamedTuple):
    """What the first sweep gathers of a row for its divergence."""

    maxima: Any
    state: Any  # the online state: at least Z_s, Z_t
    entropies: Any


class TermSums(NamedTuple):
    """Σ f, Σ phi and the largest d of the columns."""

    total: Any
    mass: Any
    widest: Any


class Totals(NamedTuple):
    """Sums over all of a row's columns."""

    total: Any  # F
    mass: Any  # Φ
    cross: Any  # LogSumExp of the student's logits at temperature 1
    label_s: Any  # the label's student logit


class Target(NamedTuple):
    """The held-out column."""

    s: Any  # student logit
    t: Any  # teacher logit
    in_support: Any  # whether it is in the support
    has_target: Any  # whether a column is held out


class TargetLogs(NamedTuple):
    """log q, log p and δ of the held-out column, and whether it is in the support."""

    logq: Any
    logp: Any
    delta: Any
    in_support: Any


class RowValue(NamedTuple):
    """What the value of a row leaves to its gradient."""

    y: Any  # target
    mix: Any
    theta: Any  # with extras
    extras: Any
    scalars: Any  # RowScalars


class SharedRow(NamedTuple):
    """A row all of whose splits have stored their statistics."""

    norms: Any  # RowNorms
    acc: Any  # RowSums
    cross: Any  # LogSumExp
    target: Any  # Target
    extras: Any  # parameters that the row found for itself


class Dominant(NamedTuple):
    """The token that holds more than half of a row's mass: its entry of the gradient is minus the sum of the others."""

    token: Any  # −1: there is none
    rest: Any  # the sum of the others
    logit: Any
    slope: Any  # of its logit by the stored number


# Numbers of a row in memory, float32


class RowScalars(NamedTuple):
    """What a row's gradient needs of its value."""

    c_s: Any
    c_t: Any
    k: Any
    m: Any
    l_s: Any
    l_t: Any
    r: Any
    a: Any
    b: Any
    grad_y: Any
    ce_lse: Any  # log-sum-exp of all the student's logits at temperature 1
    top_col: Any  # first column of the tile with the student's largest logit; −1: not known; forward.EDGE: in none


class Carry(NamedTuple):
    """What a row has gathered of some of its columns (RowSums, LogSumExp, Target); its online state follows."""

    top_s: Any
    top_t: Any
    top_mixed: Any
    entropy_s: Any
    entropy_t: Any
    sum_t: Any
    ce_top: Any
    ce_total: Any
    label_s: Any  # −inf where the label is not among the columns
    label_t: Any  # likewise, or not in the support


class TokenStats(NamedTuple):
    """Statistics of a row, in the order of fusedkd.KDStats."""

    loss: Any
    target_loss: Any
    nontarget_loss: Any
    target_grad: Any
    nontarget_grad: Any
    student_entropy: Any
    teacher_entropy: Any
    student_logprob: Any
    teacher_logprob: Any
    student_lse: Any
    teacher_lse: Any


class TokenScalars(NamedTuple):
    """What the gradient of a token's log-probability and entropy needs (token_logprobs.py)."""

    centre: Any
    lse: Any  # above the centre
    logprob: Any
    entropy: Any


@formula
def empty_carry():
    """Carry of no columns."""
    return Carry(-1e20, -1e20, -1e20, 0.0, 0.0, 0.0, -1e20, 0.0, float("-inf"), float("-inf"))


EMPTY = empty_carry.torch()
MOST_EXTRAS = 2  # parameters that a row finds for itself (definition.RowParameters)
SAVED = len(RowScalars._fields) + 1 + MOST_EXTRAS  # RowScalars, the target, extras
CARRY = len(Carry._fields)  # without the online state
TERM_SUMS = len(TermSums._fields)
STATS = len(TokenStats._fields)
TOKEN_SAVED = len(TokenScalars._fields)
DOMINANT = len(Dominant._fields)

_Numbers = TypeVar("_Numbers", bound=NamedTuple)


def columns_of(kind: type[_Numbers], memory: torch.Tensor, keepdim: bool = False) -> _Numbers:
    """The numbers of a kind that each row of `memory` (N, its fields or more) begins with, as views.

    (N,) each; with keepdim (N, 1), which stands beside columns.
    """
    columns = memory[:, : len(kind._fields)]
    return kind._make(columns.split(1, -1) if keepdim else columns.unbind(-1))


def extras_of(saved: torch.Tensor, count: int, keepdim: bool = False) -> tuple[torch.Tensor, ...]:
    """The parameters that rows found for themselves, as views of `saved` (N, SAVED), likewise."""
    first = len(RowScalars._fields) + 1
    return tuple(_column(saved, first + i, keepdim) for i in range(count))


def target_of(saved: torch.Tensor) -> torch.Tensor:
    """The token that was the row's target, (N, 1), a view of `saved` (N, SAVED)."""
    return _column(saved, len(RowScalars._fields), True)


def _column(memory: torch.Tensor, i: int, keepdim: bool) -> torch.Tensor:
    return memory[:, i : i + 1] if keepdim else memory[:, i]


# The same for kernels, which take constants of compile time only.
_SAVED = constant(SAVED)
_SCALARS = constant(len(RowScalars._fields))
_EXTRAS_AT = constant(len(RowScalars._fields) + 1)
_STATS = constant(STATS)
# Of the student, the teacher's comes next; Decomposition's first numbers lie before.
_ENTROPY, _LOGPROB, _LSE = (constant(TokenStats._fields.index(f"student_{name}")) for name in SideStats._fields)
_TOKEN_SAVED = constant(TOKEN_SAVED)
_CARRY = constant(CARRY)
_LABEL_S, _LABEL_T = (constant(Carry._fields.index(name)) for name in ("label_s", "label_t"))
_TERM_SUMS = constant(TERM_SUMS)
_DOMINANT = constant(DOMINANT)
_TOKEN, _REST, _LOGIT, _SLOPE = (constant(Dominant._fields.index(name)) for name in ("token", "rest", "logit", "slope"))
# Triton's cache key has the constants that a function names, not the fields of a class. Functions whose code depends on
# the order of fields in memory name this, so that another order is another key.
_IN_MEMORY = (RowScalars, Carry, TermSums, Dominant, TokenScalars)
_LAYOUTS = constant(repr([kind._fields for kind in _IN_MEMORY]))


@jit
def load_numbers(ptr, COUNT: tl.constexpr):
    """The first COUNT numbers behind a pointer."""
    tl.static_assert(_LAYOUTS != "")
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(ptr + i),)
    return out


@jit
def store_numbers(ptr, members):
    """All members of a tuple, one behind the other."""
    tl.static_assert(_LAYOUTS != "")
    for i in tl.static_range(len(members)):
        tl.store(ptr + i, members[i])


@jit
def load_scalars(saved_ptr, row):
    """RowScalars of a row."""
    return RowScalars(*load_numbers(saved_ptr + row * _SAVED, _SCALARS))


@jit
def load_target(saved_ptr, row):
    """The token that was the row's target."""
    return tl.load(saved_ptr + row * _SAVED + _SCALARS).to(tl.int32)


@jit
def load_extras(saved_ptr, row, EXTRAS: tl.constexpr):
    """The parameters that the row found for itself."""
    return load_numbers(saved_ptr + row * _SAVED + _EXTRAS_AT, EXTRAS)


@jit
def store_saved(saved_ptr, row, scalars, y, extras):
    """RowScalars, target and extras of a row, zeros behind them."""
    tl.static_assert(_LAYOUTS != "")
    members = scalars + (y + 0.0,) + extras
    for i in tl.static_range(_SAVED):
        if i < len(members):
            tl.store(saved_ptr + row * _SAVED + i, members[i])
        else:
            tl.store(saved_ptr + row * _SAVED + i, 0.0)


@jit
def store_nothing_saved(saved_ptr, row):
    """Zeros for a row that does not count."""
    for i in tl.static_range(_SAVED):
        tl.store(saved_ptr + row * _SAVED + i, 0.0)


@jit
def store_terms(stats_ptr, row, terms, has_target, no_columns):
    """TokenStats from Decomposition: 0 where no column but the target is compared, NaN about a target that is not."""
    at = stats_ptr + row * _STATS
    tl.store(at, tl.where(no_columns, 0.0, terms.loss))
    for i in tl.static_range(1, _ENTROPY):
        tl.store(at + i, tl.where(has_target, tl.where(no_columns, 0.0, terms[i]), float("nan")))


@jit
def store_side_stats(stats_ptr, row, SIDE: tl.constexpr, stats, has_target):
    """TokenStats from the SideStats of the student (0) or the teacher (1), likewise."""
    at = stats_ptr + row * _STATS + SIDE
    tl.store(at + _ENTROPY, stats.entropy)
    tl.store(at + _LOGPROB, tl.where(has_target, stats.logprob, float("nan")))
    tl.store(at + _LSE, stats.lse)


@jit
def store_no_stats(stats_ptr, row):
    """Zeros for a row that does not count."""
    for i in tl.static_range(_STATS):
        tl.store(stats_ptr + row * _STATS + i, 0.0)


@jit
def store_token_scalars(saved_ptr, row, scalars):
    """TokenScalars of a row."""
    store_numbers(saved_ptr + row * _TOKEN_SAVED, scalars)


@jit
def load_token_scalars(saved_ptr, row):
    """TokenScalars of a row."""
    return TokenScalars(*load_numbers(saved_ptr + row * _TOKEN_SAVED, _TOKEN_SAVED))


@jit
def carry_at(carry_ptr, i, COUNT: tl.constexpr):
    """The address of the i-th Carry, which an online state of COUNT numbers follows."""
    tl.static_assert(_LAYOUTS != "")
    return carry_ptr + i * (_CARRY + COUNT)


@jit
def load_carry(at):
    """Carry."""
    return Carry(*load_numbers(at, _CARRY))


@jit
def load_carried_state(at, COUNT: tl.constexpr):
    """The online state behind a Carry."""
    return load_numbers(at + _CARRY, COUNT)


@jit
def store_carried(at, sums, cross):
    """RowSums and LogSumExp: Carry but for the label's logits, and the online state."""
    store_numbers(at, sums.maxima + sums.entropies + cross)
    store_numbers(at + _CARRY, sums.state)


@jit
def store_carried_label(at, s, t, here):
    """The label's logits in Carry, where `here`."""
    tl.store(at + _LABEL_S, s, mask=here)
    tl.store(at + _LABEL_T, t, mask=here)


@jit
def sums_at(sums_ptr, i):
    """The address of the i-th TermSums."""
    tl.static_assert(_LAYOUTS != "")
    return sums_ptr + i * _TERM_SUMS


@jit
def load_sums(sums_ptr, row):
    """TermSums of a row."""
    return TermSums(*load_numbers(sums_at(sums_ptr, row), _TERM_SUMS))


@jit
def store_sums(sums_ptr, row, sums):
    """TermSums of a row."""
    store_numbers(sums_at(sums_ptr, row), sums)


@jit
def dominant_at(dominant_ptr, i):
    """The address of the i-th Dominant."""
    tl.static_assert(_LAYOUTS != "")
    return dominant_ptr + i * _DOMINANT


@jit
def load_rest(at):
    """`rest` of Dominant."""
    return tl.load(at + _REST)


@jit
def store_chunk_dominant(at, rest, dominant, first):
    """Dominant: `rest`, and the dominant token of a chunk that begins with the column `first`, where there is one."""
    tl.store(at + _REST, rest)
    tl.store(at + _TOKEN, dominant.token + first + 0.0, mask=dominant.token >= 0)
    tl.store(at + _LOGIT, dominant.logit, mask=dominant.token >= 0)
    tl.store(at + _SLOPE, dominant.slope, mask=dominant.token >= 0)
