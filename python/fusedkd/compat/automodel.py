"""The distillation loss of NeMo Automodel (signature of nemo-automodel 0.7.0).

_target_: fusedkd.compat.automodel.KDLoss
"""

from typing import Any

import torch

from .. import checks
from ..head import Head, Side
from ..loss import kd_loss
from ..shard import VocabShard
from ._shared import as_labels


class KDLoss(torch.nn.Module):
    """T²·KL(softmax(teacher/T)‖softmax(student/T)) averaged over the tokens that count, in nats.

    Args:
        ignore_index: the label of tokens that do not count.
        temperature: T > 0.
        fp32_upcast, chunk_size: ways of the original to save memory. Both change nothing here: the arithmetic is
            float32 and no float32 copy of the logits is made, whatever they are.
        tp_group: the ranks that share the vocabulary, for plain tensors: each rank has the same tokens and its part of
            the columns, in the order of the ranks, equal parts of which the last may be shorter. One KDLoss is for one
            vocabulary then. None: that of DTensor logits whose vocabulary is sharded, else none.

    The loss is complete on every rank, and the gradient of a rank's logits that of this one loss.

    Differences: where nothing counts the 0 is float32 and not NaN for infinite logits. Vocabularies may differ in size:
    the columns of both are compared. Beside a sharded student a teacher that is whole is cut. DTensors whose vocabulary
    is not sharded are gathered, as in the original without a tp_group.

    Raises ValueError for shards that do not fit together, and for a tp_group that is not the DTensors'.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size
        self._shard: VocabShard | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the shard: no process group can be copied, and the next call makes it again."""
        return self.__dict__ | {"_shard": None}

    def forward(
        self,
        student_logits: Side,
        teacher_logits: Side,
        labels: torch.Tensor,
        num_batch_labels: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of logits (..., V), or Heads, with labels (...); V is the rank's part where it is shared.

        num_batch_labels replaces the number of counted tokens in the mean. Returns: float32 scalar.
        """
        student, teacher, labels, shard = self._local(student_logits, teacher_logits, labels)
        return kd_loss(
            student,
            teacher,
            as_labels(labels != self.ignore_index).reshape(checks.leading(student)),
            temperature=self.temperature,
            temperature_squared=True,
            num_items=num_batch_labels,
            support="floor",
            shard=shard,
        )

    def _local(self, student: Any, teacher: Any, labels: Any) -> tuple[Any, Any, Any, VocabShard | None]:
        """All three as kd_loss takes them, and the shard where it does not see itself that there is one."""
        several = self.tp_group is not None and self.tp_group.size() > 1
        axis = _vocabulary_axis(student)
        if axis is None and (not several or _is_dtensor(student)):
            return _full(student), _full(teacher), _full(labels), None
        of_mesh = None if axis is None else student.device_mesh.get_group(axis)
        if of_mesh is not None and self.tp_group is not None and not _alike(of_mesh, self.tp_group):
            raise ValueError("tp_group is not the group of the mesh over which student_logits is sharded: leave it out")
        if axis is not None and student.device_mesh.ndim == 1:  # kd_loss knows the columns of these
            return student, teacher if _vocabulary_axis(teacher) == axis else _full(teacher), _full(labels), None
        # What else a mesh shards are tokens: each rank has its own, of all three.
        group = self.tp_group if of_mesh is None else of_mesh
        if self._shard is None or self._shard.group is not group:
            self._shard = VocabShard(group)
        return _own(student), _own(teacher), _own(labels), self._shard


def _alike(one: Any, other: Any) -> bool:
    """Whether two groups have the same ranks."""
    ranks = torch.distributed.get_process_group_ranks
    return ranks(one) == ranks(other)


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def _vocabulary_axis(side: Any) -> int | None:
    """The dimension of the mesh of several ranks over which the vocabulary of logits is sharded."""
    if isinstance(side, Head) or not _is_dtensor(side):
        return None
    mesh, last = side.device_mesh, side.dim() - 1
    axes = (axis for axis, placement in enumerate(side.placements) if placement.is_shard(last))
    return next((axis for axis in axes if mesh.size(axis) > 1), None)


def _full(value: Any) -> Any:
    return value.full_tensor() if _is_dtensor(value) else value


def _own(value: Any) -> Any:
    return value.to_local() if _is_dtensor(value) else value
