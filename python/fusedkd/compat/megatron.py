"""The logits loss of ModelOpt's Megatron plugin: modelopt.torch.distill.plugins.megatron of nvidia-modelopt 0.47.0."""

from typing import Any

import torch
from torch.nn.modules.loss import _Loss

from .. import checks
from ..head import Head
from ..loss import kd_loss


class LogitsKLLoss(_Loss):
    """KL(softmax(targets/T)‖softmax(predictions/T)) per token, in nats and float32, without T².

    Args:
        model_config: the student's TransformerConfig; its `tensor_model_parallel_size` must be 1.
        temperature: T > 0.
        reverse: KL(student‖teacher) instead.

    Differences: a column where the teacher's logit is −inf is removed from both sides, where the original's value is
    NaN.

    Raises NotImplementedError for a tensor-parallel vocabulary. `TopKLogitsKLLoss` is not here: it needs a sparse
    teacher.
    """

    def __init__(self, model_config: Any, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        ranks = model_config.tensor_model_parallel_size
        if ranks > 1:
            raise NotImplementedError(
                f"model_config.tensor_model_parallel_size is {ranks}: a vocabulary sharded by tensor parallelism is "
                "not supported yet: use a tensor-parallel size of 1, or keep ModelOpt's LogitsKLLoss"
            )
        checks.positive("temperature", temperature)
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse

    def forward(self, predictions: Any, targets: Any) -> tuple[torch.Tensor, bool, bool]:
        """The loss of the student's and the teacher's logits (s, b, V).

        Args:
            predictions, targets: logits, or both tuples that start with them (a ColumnParallelLinear returns its bias
                too); either a `fusedkd.Head` of hidden states (s, b, D).

        Returns: ((b, s) loss, contiguous; True; False): the last two are the original's `tp_reduce`, whether Megatron
        sums the loss over the tensor-parallel group, and `is_sequence_parallel`.
        """
        if isinstance(predictions, tuple) and not isinstance(predictions, Head):
            predictions, targets = predictions[0], targets[0]
        loss = kd_loss(
            predictions,
            targets,
            divergence="rkl" if self._reverse else "fkl",
            temperature=self._temperature,
            reduction="none",
        )
        return loss.transpose(0, 1).contiguous(), True, False
