"""`TopK`: a teacher known by the log-probabilities of its likeliest tokens."""

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The K likeliest tokens of each position, in the place of a teacher's logits or Head.

    ids: (..., K) int32 or int64, distinct in a row; −1: absent, for rows of fewer tokens. A row without any is ignored,
    as one whose label is `ignore_index`. logprobs: (..., K) float32, bfloat16 or float16, log p of the teacher's full
    softmax at `temperature`, in nats. K from 1 to 4096; the leading shape is the student's. vocab_size: columns that
    the softmax had, for a student that has more.

    Ids out of range or twice in a row, and probabilities of a sum above 1, are errors on a CPU and under
    FUSEDKD_CHECK=1. Elsewhere nobody looks: an id out of range is left to the bucket, one that is there twice is
    counted twice.

    tail: what becomes of the tokens that are not listed, whose masses are P_r = 1 − Σ p and Q_r.

    "bucket": they are one outcome more. D is that of K + 1 outcomes: never negative, 0 at p == q, the dense one where
        the ids are the whole vocabulary, else, for an f-divergence, a lower bound of it (data processing inequality).
        A bucket that the teacher leaves empty has the log-probability −50, as with support="floor".
    "renormalize": both sides are renormalised on the listed tokens. What the student puts elsewhere costs nothing. Any
        `temperature` of the loss will do, since that of the teacher can be taken out again.
    "truncate": Σ over the listed tokens of the published integrand with raw p and q (for fkl p·log(p/q)); fkl, rkl,
        frkl and jsd only. Not a divergence: it can be negative, and is not smallest at p == q.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str = "bucket"
    temperature: float = 1.0
    vocab_size: int | None = None
