"""Who does the row work of a call: the backend itself, or what puts it to use for other teachers and for shards."""

from ..backends.protocol import Backend, RowBackend
from . import sharded, topk
from .ranks import Ranks


def row_work_of(teacher_kind: str, backend: Backend, ranks: Ranks | None) -> RowBackend:
    """The row work beside a teacher of this kind, of rows that are whole or whose columns `ranks` share."""
    if topk.is_topk(teacher_kind):
        return topk.rows_beside(teacher_kind, backend, ranks)
    return backend.rows if ranks is None else sharded.ShardedRows(backend, ranks)
