"""Which of a row's columns lie in whole vectors, of 16 bytes of the student: those that a sweep's tiles are made of.

Where Triton knows that every row begins at a multiple of 16 bytes and that V ends a vector, they are all columns.
Elsewhere, if rows of both sides and of the gradient begin alike (LogitsArg.congruent), tiles begin with a row's first
vector and end with its last. The few columns before and behind, its edges, follow in a tile with a column for each
thread, (1, T, 1).
"""

from ..language import constant, jit, tl
from .args import RowPtrs, RowVectors

# In the place of a column that there is not: columns before the first vector are negative, but not that far.
NOWHERE = constant(-16)


@jit
def row_vectors(student, teacher, ptrs, V, width):
    """RowVectors of a row of `width` columns, V compared."""
    if teacher.congruent is None:
        return RowVectors(ptrs, V, width)
    else:
        NEIGHBOURS: tl.constexpr = 128 // student.ptr.dtype.element_ty.primitive_bitwidth
        behind = (ptrs.student.to(tl.int64) & 15).to(tl.int32)  # bytes past a boundary
        first = tl.minimum(((16 - behind) & 15) // (16 // NEIGHBOURS), V)
        columns = tl.multiple_of((V - first) // NEIGHBOURS * NEIGHBOURS, NEIGHBOURS)
        student_ptr = vector_ptr(ptrs.student, first, NEIGHBOURS)
        teacher_ptr = vector_ptr(ptrs.teacher, first, NEIGHBOURS)
        return RowVectors(RowPtrs(ptrs.row, student_ptr, teacher_ptr, first), columns, columns)


@jit
def vector_ptr(start, first, NEIGHBOURS: tl.constexpr):
    """The address of the column `first` of a row, where NEIGHBOURS columns begin that are loaded or stored at once."""
    BYTES: tl.constexpr = NEIGHBOURS * start.dtype.element_ty.primitive_bitwidth // 8
    # The sum is formed here because a hint about a function's argument is lost.
    return tl.multiple_of(start + first, BYTES if BYTES < 16 else 16)


@jit
def edge_columns(vectors, i, THREADS: tl.constexpr):
    """The i-th THREADS columns of those that lie in no whole vector, (1, T, 1), the row's first ones first.

    Columns before the first vector are negative: -1 is the one beside it.
    """
    at = i * THREADS + tl.arange(0, THREADS)[None, :, None] - vectors.ptrs.first
    return tl.where(at < 0, at, at + vectors.V)
