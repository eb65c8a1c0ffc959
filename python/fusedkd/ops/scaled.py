"""Gradients formed in a forward pass, times the upstream scalar of the backward pass."""

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph  # pyright: ignore[reportPrivateUsage]

from ..call import LossCall
from ..schedules.token_chunks import Gradients
from .operator import no_gradients, operator


def _empty(grad: Tensor, by: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@operator("scaled")
def scaled(grad: Tensor, by: Tensor, like: Tensor) -> Tensor:
    """grad · by in the shape and dtype of `like`: one rounding, no temporary, and `grad` stays for another backward."""
    out = _empty(grad, by, like)
    grad = grad.view(like.shape)
    if out.dtype == grad.dtype or not out.is_cpu:
        torch.mul(grad, by, out=out)
    else:  # a CPU multiplies into a whole copy of the wider dtype first
        for source, target in zip(torch.split(grad, 512), torch.split(out, 512), strict=True):
            torch.mul(source, by, out=target)
    return out


scaled.register_fake(_empty)


@operator("add_scaled", mutates_args=("out",))
def add_scaled(out: Tensor, grad: Tensor, by: Tensor) -> None:
    """out += grad · by: one pass, one rounding, no temporary."""
    if out.dtype == grad.dtype or not out.is_cpu:
        out.addcmul_(grad, by)
    else:  # a CPU converts whole operands first
        for target, source in zip(torch.split(out, 512), torch.split(grad, 512), strict=True):
            target.addcmul_(source, by)


add_scaled.register_fake(lambda out, grad, by: None)


def delivered(call: LossCall, found: Gradients, by: Tensor) -> LossCall:
    """The gradients that `call` needs, times `by`; the weight's added to `weight_grad` where there is one.

    In the memory of `found` where that has the right dtype and nobody can ask for it again.
    """
    last = type(by) is Tensor and not _get_current_graph_task_keep_graph()

    def deliver(grad: Tensor, like: Tensor | None, needed: bool) -> Tensor | None:
        if like is None or not needed:
            return None
        return grad.mul_(by).view(like.shape) if last and grad.dtype == like.dtype else scaled(grad, by, like)

    gradients = no_gradients(LossCall)._replace(
        student=deliver(found.x, call.student, call.needs_student),
        student_weight=deliver(found.weight, call.student_weight, call.needs_weight and call.weight_grad is None),
        student_bias=deliver(found.bias, call.student_bias, call.needs_bias),
    )
    if call.weight_grad is not None:
        add_scaled(call.weight_grad, found.weight, by)
    return gradients
