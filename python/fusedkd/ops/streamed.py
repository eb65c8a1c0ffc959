"""A Head on at least one side, some of the vocabulary at a time (schedules/vocab_chunks.py)."""

from torch import Tensor

from ..call import LossCall, empty_rows
from ..schedules import partial_rows, token_chunks, topk, vocab_chunks
from .operator import no_gradients, operator


@operator("streamed")
def streamed(call: LossCall) -> partial_rows.Rows:
    """Token weights are ignored."""
    return vocab_chunks.forward(call)


@streamed.register_fake
def _(call: LossCall) -> partial_rows.Rows:
    loss, stats = empty_rows(call)
    width = topk.saved_width(call.teacher_kind, call.teacher)
    return partial_rows.Rows(loss, stats, saved=loss.new_empty((loss.shape[0], width)))


@operator("streamed_gradient", mutates_args=("weight_grad",))
def streamed_gradient(call: LossCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of Σ upstream_n · loss_n in the operands' dtypes; the weight's is added to `weight_grad` if given."""
    return vocab_chunks.backward(call, saved, upstream)


streamed_gradient.register_fake(lambda call, saved, upstream: vocab_chunks.empty_gradients(call))


def _backward(call: LossCall, made: partial_rows.Rows, upstream: Tensor) -> LossCall:
    found = streamed_gradient(call, made.saved, upstream.contiguous())
    return no_gradients(LossCall)._replace(
        student=found.x if call.needs_student else None,
        student_weight=found.weight if call.needs_weight and call.weight_grad is None else None,
        student_bias=found.bias if call.needs_bias else None,
    )


streamed.register_autograd(lambda call, made: (call, made._replace(loss=None, stats=None)), _backward)
