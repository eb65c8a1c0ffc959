"""Memory as a program sees it: its row's logits and numbers, loaded.

Every sweep goes through here. A tile is (R, T, V) as thread_sums.tile_columns lays it out, or one axis of columns.
"""

from ..language import jit, tl
from ..maths.centering import at_offsets
from ..maths.elementary import tanh
from .args import LogitTile, RowPtrs


@jit
def row_values(values, row):
    """A tuple of floats and of pointers to one float per row, read at `row`."""
    out = ()
    for i in tl.static_range(len(values)):
        value = values[i]
        if value.dtype.is_ptr():
            out = out + (tl.load(value + row),)
        else:
            out = out + (value,)
    return out


@jit
def as_numbers(values):
    """Compile-time constants as numbers, which a loop can carry from a caller."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.full((), values[i], tl.float32),)
    return out


@jit
def spread(cols, stride):
    """Column offsets, 64-bit only where a stride could carry them past 2³¹.

    The stride is to be read by name, `side.stride_v`: unpacking would turn a compile-time 1 into a number.
    """
    if isinstance(stride, tl.constexpr):  # 1 and no other number is compiled in
        return cols
    else:
        return tl.cast(cols, tl.int64) * stride


@jit
def row_start(side, row):
    """The address at which a row of LogitsArg begins."""
    at = row + side.first
    return side.ptr + at // side.inner * side.stride_outer + at % side.inner * side.stride_n


@jit
def row_ptrs(student, teacher, row):
    """RowPtrs of a row: a division that no compiler takes out of a loop."""
    return RowPtrs(row, row_start(student, row), row_start(teacher, row), 0)


@jit
def load_logits(side, start, first, cols, mask):
    """Logits at `cols`, −inf where masked (None: nowhere), and their derivative by the stored number.

    start: the address of the column `first`, from which `cols` are counted.

    Returns two tiles of the shape of `cols`, float32; the derivative is a number where there is no softcap.
    """
    at = start + spread(cols, side.stride_v)
    if mask is None:
        x = tl.load(at).to(tl.float32)
    else:
        x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if side.bias_ptr is not None:
        if mask is None:
            x += tl.load(side.bias_ptr + first + cols).to(tl.float32)
        else:
            x += tl.load(side.bias_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    if side.scale is not None:
        x *= side.scale
        slope = slope * side.scale
    if side.softcap is not None:
        bent = tanh(x / side.softcap)
        if mask is None:
            x = side.softcap * bent
        else:
            x = tl.where(mask, side.softcap * bent, float("-inf"))
        slope = slope * (1.0 - bent * bent)
    return x, slope


@jit
def load_raw(student, teacher, ptrs, cols, mask, student_mask):
    """LogitTile at `cols`, logits −inf where they are or where they are masked (None: nowhere)."""
    s, slope = load_logits(student, ptrs.student, ptrs.first, cols, student_mask)
    t, teacher_slope = load_logits(teacher, ptrs.teacher, ptrs.first, cols, mask)
    live = t != float("-inf")
    if teacher.floor_ptr is not None:
        live = live | (s != float("-inf"))
        floor = tl.load(teacher.floor_ptr + ptrs.row)
        t = tl.where(t < floor, floor, t)
    if mask is not None and (teacher.floor_ptr is not None or teacher.scale is not None):
        live = mask & live  # else a masked logit is −inf
    return LogitTile(s, t, live, slope)


@jit
def load_pair(student, teacher, ptrs, cols, mask, student_mask):
    """LogitTile at `cols` with −inf as a finite −1e30."""
    x = load_raw(student, teacher, ptrs, cols, mask, student_mask)
    return LogitTile(finite(x.s), finite(x.t), x.live, x.slope)


@jit
def finite(x):
    """−1e30 for −inf."""
    return tl.where(x < -1e30, -1e30, x)


@jit
def short(student, teacher):
    """Whether logits have no more digits than half precision: known when a kernel is compiled."""
    WIDEST: tl.constexpr = max(
        student.ptr.dtype.element_ty.primitive_bitwidth, teacher.ptr.dtype.element_ty.primitive_bitwidth
    )
    ADDED: tl.constexpr = student.bias_ptr is not None or teacher.bias_ptr is not None
    SCALED: tl.constexpr = student.scale is not None or teacher.scale is not None
    BENT: tl.constexpr = student.softcap is not None or teacher.softcap is not None
    return WIDEST == 16 and not (ADDED or SCALED or BENT)


@jit
def load_normalized(student, teacher, ctx, log_norms, cols):
    """NormalizedTile of a row at `cols`, given its LogNorms; which columns count (not the held-out one); t."""
    x = load_pair(student, teacher, ctx.ptrs, cols, cols < ctx.V, cols < ctx.V)
    SHORT: tl.constexpr = short(student, teacher)
    of_row = at_offsets(x.s, x.t, ctx.centre, log_norms, ctx.inv_tau, ctx.mix, SHORT)
    return of_row, x.live & (cols != ctx.y), x.t


@jit
def upstream_of(upstream_ptr, row):
    """Returns the row's upstream gradient, 1 if none is given."""
    if upstream_ptr is None:
        return 1.0
    else:
        return tl.load(upstream_ptr + row)


@jit
def label_of(label_ptr, row):
    """Returns (label, whether the row counts): (−1, True) without labels."""
    if label_ptr is None:
        return -1, True
    else:
        y = tl.load(label_ptr + row).to(tl.int32)
        return y, y >= 0
