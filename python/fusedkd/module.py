"""`DistillationLoss`: kd_loss with its options held by a module."""

from collections.abc import Sequence
from typing import Any

import torch

from .divergence import Divergence, as_divergence
from .head import Side
from .loss import kd_loss
from .sparse import TopK


class DistillationLoss(torch.nn.Module):
    """nn.Module shell of `kd_loss`: options at construction, (student, teacher, labels) at call.

    Any option of `kd_loss` can be given again at call time (num_items and token_weights usually are; weight_grad, a
    buffer that a copy of the module would not share, must be).
    """

    def __init__(self, divergence: str | Divergence = "fkl", **options: Any) -> None:
        super().__init__()
        check_options("DistillationLoss", options)
        self.divergence = as_divergence(divergence)
        self.options = options

    def forward(
        self,
        student: Side,
        teacher: Side | TopK | Sequence[Side | TopK],
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """kd_loss(student, teacher, labels) with this module's options, `options` on top."""
        chosen: dict[str, Any] = {"divergence": self.divergence, **self.options, **options}
        return kd_loss(student, teacher, labels, **chosen)

    def extra_repr(self) -> str:
        """The divergence and the options that differ from kd_loss's defaults."""
        return ", ".join([repr(self.divergence), *(f"{key}={value!r}" for key, value in self.options.items())])


def check_options(owner: str, options: dict[str, Any]) -> None:
    """What a module may hold: options of kd_loss, but for a buffer that a copy of the module would not share."""
    unknown = options.keys() - (kd_loss.__kwdefaults__ or {}).keys()
    if unknown:
        raise TypeError(f"{owner} has no option {sorted(unknown)[0]!r}; options are those of kd_loss")
    if "weight_grad" in options:
        raise TypeError("weight_grad belongs to one weight: give it at call time, module(..., weight_grad=buffer)")
