"""The output layer of a model, given instead of its logits."""

from typing import NamedTuple

import torch


class Head(NamedTuple):
    """Hidden states and the output layer's weights: logits = softcap(scale · (hidden @ weight.T + bias)).

    hidden: (..., D) float; weight: (V, D) and bias: (V,) of the same dtype. scale: a positive number (Cohere's
    `logit_scale`). softcap: c in c·tanh(logits/c) (Gemma 2's `final_logit_softcapping`), or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
