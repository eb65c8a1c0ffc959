"""The distillation losses of torchtune (signatures of 0.6.1): `kd_loss: _component_: fusedkd.compat.torchtune.…`.

The values are the originals', in float32: the forward KL plus the teacher's entropy (a cross-entropy, so not 0 at
p == q; the gradient is the KL's), the reverse KL as it is, and their weighted sum. Either side may also be a
`fusedkd.Head`, which saves the logits themselves.

Differences: a batch in which nothing counts gives 0 with a gradient graph, where the originals give a 0 without one, or
NaN (0/0) in the chunked reverse and symmetric losses; chunks may be of any lengths, and lists that do not have all
tokens raise instead of losing some. A student logit of −inf under a finite teacher gives inf in the forward KL, where
the originals leave that column out. A teacher logit of −inf is p = 0 in `ForwardKLLoss`, as in the original; in the
other two its column is removed from both sides, where the originals drop its term, keep the student's normaliser and
give NaN gradients. Vocabularies may differ in size: the columns of both are compared.
"""

from collections.abc import Sequence

import torch

from .. import checks
from ..divergence import divergence
from ..head import Side
from ..loss import kd_loss
from ._shared import as_labels, over


class _KLLoss(torch.nn.Module):
    """ratio·(KL(p‖q) + H(p)) + (1 − ratio)·KL(q‖p), averaged over the tokens whose label is not `ignore_index`."""

    def __init__(self, ratio: float, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._ratio = ratio

    def forward(
        self, student_logits: Side, teacher_logits: Side, labels: torch.Tensor, normalize: bool = True
    ) -> torch.Tensor:
        """The loss of (N, V) logits, or of any leading shape with as many labels.

        Returns: float32 scalar, the mean over counted tokens, or their sum if `normalize` is False.
        """
        counted = as_labels(labels != self.ignore_index).reshape(checks.leading(student_logits))
        if self._ratio == 0:
            total = kd_loss(student_logits, teacher_logits, counted, divergence="rkl", reduction="sum")
        else:
            mixed = divergence("frkl", w=1 - self._ratio) if self._ratio < 1 else "fkl"
            total, stats = kd_loss(
                student_logits,
                teacher_logits,
                counted,
                divergence=mixed,
                reduction="sum",
                support="floor" if mixed == "fkl" else "teacher",
                return_stats=True,
            )
            total = total + self._ratio * stats.teacher_entropy.sum()
        return _mean(total, labels, self.ignore_index) if normalize else total


class ForwardKLLoss(_KLLoss):
    """KL(teacher‖student) plus the teacher's entropy, in nats."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(1.0, ignore_index)


class ReverseKLLoss(_KLLoss):
    """KL(student‖teacher), in nats."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(0.0, ignore_index)


class SymmetricKLLoss(_KLLoss):
    """sym_kd_ratio·ForwardKLLoss + (1 − sym_kd_ratio)·ReverseKLLoss ; each logit is read once for the value."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        if not 0 <= sym_kd_ratio <= 1:
            raise ValueError(f"sym_kd_ratio must be in the range [0, 1], got {sym_kd_ratio}")
        super().__init__(sym_kd_ratio, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _ChunkedKLLoss(torch.nn.Module):
    """A loss above over logits that come in chunks of tokens."""

    def __init__(self, loss: _KLLoss, num_output_chunks: int) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks
        self.ignore_index = loss.ignore_index
        self._loss = loss

    def forward(
        self, student_logits: Sequence[Side], teacher_logits: Sequence[Side], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of lists of (B, tokens of the chunk, V) logits, and labels (B, T), which are cut as the logits are.

        Returns: float32 scalar, the mean over counted tokens. Raises ValueError if the chunks do not have T tokens
        together, or the two lists are cut differently.
        """
        lengths, others = ([_length(x, len(labels)) for x in chunks] for chunks in (student_logits, teacher_logits))
        if sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"student_logits must be a list of chunks of {labels.shape[1]} tokens together, as labels of shape "
                f"{tuple(labels.shape)} have, got chunks of {lengths}"
            )
        if others != lengths:
            raise ValueError(
                f"teacher_logits must be a list of chunks of {lengths} tokens as student_logits, got {others}"
            )
        chunks = zip(student_logits, teacher_logits, labels.split(lengths, dim=1), strict=True)
        totals = [self._loss(student, teacher, piece, normalize=False) for student, teacher, piece in chunks]
        return _mean(torch.stack(totals).sum(), labels, self.ignore_index)


class ForwardKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """`ForwardKLLoss` over lists of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks)


class ReverseKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """`ReverseKLLoss` over lists of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """`SymmetricKLLoss` over lists of chunks."""

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks)
        self.sym_kd_ratio = sym_kd_ratio


def _length(chunk: Side, batch: int) -> int:
    """Tokens of each sequence in a chunk, (B, tokens, V) or (B·tokens, V)."""
    shape = checks.leading(chunk)
    return shape[1] if len(shape) > 1 else shape.numel() // max(batch, 1)


def _mean(total: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return over(total, (labels != ignore_index).sum())
