"""The distillation loss of NeMo Automodel (signature of nemo-automodel 0.7.0).

_target_: fusedkd.compat.automodel.KDLoss
"""

from typing import Any

import torch

from .. import checks
from ..head import Side
from ..loss import kd_loss
from ._shared import as_labels


class KDLoss(torch.nn.Module):
    """T²·KL(softmax(teacher/T)‖softmax(student/T)) averaged over the tokens that count, in nats.

    Args:
        ignore_index: the label of tokens that do not count.
        temperature: T > 0.
        fp32_upcast, chunk_size: ways of the original to save memory. Both change nothing here: the arithmetic is
            float32 and no float32 copy of the logits is made, whatever they are.
        tp_group: a tensor-parallel group of more than one rank is not supported yet.

    Differences: where nothing counts the 0 is float32 and not NaN for infinite logits. Vocabularies may differ in size:
    the columns of both are compared.

    Raises NotImplementedError for a tp_group, or a DTensor whose vocabulary is sharded, over several ranks. Other
    DTensors are gathered, as in the original.
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
        if tp_group is not None and tp_group.size() > 1:
            raise NotImplementedError(_sharded(f"tp_group has {tp_group.size()} ranks"))
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: Side,
        teacher_logits: Side,
        labels: torch.Tensor,
        num_batch_labels: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of logits (..., V), or Heads, with labels (...).

        num_batch_labels replaces the number of counted tokens in the mean. Returns: float32 scalar.
        """
        student = _whole("student_logits", student_logits)
        teacher = _whole("teacher_logits", teacher_logits)
        return kd_loss(
            student,
            teacher,
            as_labels(_full(labels) != self.ignore_index).reshape(checks.leading(student)),
            temperature=self.temperature,
            temperature_squared=True,
            num_items=num_batch_labels,
            support="floor",
        )


def _whole(name: str, side: Any) -> Side:
    """A side on one rank: a DTensor is gathered unless that would undo a sharding of the vocabulary."""
    for mesh_dim, placement in enumerate(getattr(side, "placements", ())):
        if placement.is_shard(side.dim() - 1) and side.device_mesh.size(mesh_dim) > 1:
            raise NotImplementedError(_sharded(f"{name} is a DTensor sharded over the vocabulary"))
    return _full(side)


def _full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _sharded(what: str) -> str:
    return (
        f"{what}: a vocabulary sharded by tensor parallelism is not supported yet: "
        "gather the logits (full_tensor()), or keep Automodel's KDLoss"
    )
