"""`TopK`: a teacher known by the log-probabilities of its likeliest tokens."""

import os
from typing import Any, NamedTuple

import torch
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ids as int32, logprobs in their dtype, and the rest as metadata.

        The file is complete or not there: it is written beside `path` and then renamed, so that what stops a save
        leaves the old file, and whoever has loaded that one keeps it. Tensors of a GPU are copied to the host first.

        Raises:
            ImportError: without safetensors (`pip install safetensors`). ValueError, TypeError: naming the field that
                no call would take. OSError: of the file system.

        Cost: 8 bytes (6 in half precision) for each entry of (..., K).
        """
        from . import caches

        caches.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> "TopK":
        """Read what `save` has written at `path`, bit for bit.

        Args:
            path: of the file. device: where the tensors are put.

        On a CPU nothing is copied: the tensors are the file mapped into memory, read as they are used, so that a cache
        may be larger than memory. Writing to them does not change the file.

        Raises:
            ImportError: without safetensors. FileNotFoundError. ValueError: naming the file and what is wrong with it:
                truncated, of another format, of a newer version, a tensor missing or of another shape or dtype.
        """
        from . import caches

        return caches.load(path, device)

    @classmethod
    def from_vllm(
        cls,
        prompt_logprobs: Any,
        *,
        k: int | None = None,
        shift: bool = False,
        tail: str = "bucket",
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> "TopK":
        """Read vLLM's `prompt_logprobs` (`SamplingParams(prompt_logprobs=k)`) of one request, or a list of them.

        Args:
            prompt_logprobs: one entry per position: a dict from token id to an object with `.logprob`, a float, or what
                vLLM's server answers in JSON, {"42": {"logprob": -0.1, ...}}; None where there is nothing, as for the
                first token. From a list of requests comes a batch, the shorter ones filled up with absent positions.
            k: keep the k likeliest of a row. vLLM adds the token that is there to its k likeliest: where it is one of
                those it is one entry, else the row has k + 1. None keeps all of them.
            shift: vLLM's entry i tells of token i, seen from those before it, which is what a student's logits of
                position i − 1 are about. True moves each row there, for logits and labels as `kd_loss` takes them of a
                whole sequence; the last position is then absent. False leaves rows where they are.
            temperature: that of the teacher's distribution. vLLM's default is 1, whatever the sampling temperature is;
                with `--logprobs-mode processed_logprobs` it is the sampling temperature.
            tail, vocab_size: fields of `TopK`.

        Returns:
            ids (S, K) or (B, S, K) int64 and logprobs float32 on the CPU, descending; K is that of the longest row.

        Raises:
            ValueError, TypeError: naming the position. OpenAI's `top_logprobs` are refused: they name tokens by their
                text, from which ids cannot be told without the teacher's tokenizer.
        """
        from . import caches

        return caches.from_vllm(prompt_logprobs, k, shift, tail, temperature, vocab_size)

    @classmethod
    def from_distillkit(
        cls,
        target_ids: Any,
        target_values: Any,
        mask: Any = None,
        *,
        log_target: bool = True,
        tail: str = "bucket",
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> "TopK":
        """Read what DistillKit has decoded (`decompress_to_sparse`, `SparseSignal`); its own files stay its affair.

        Args:
            target_ids: (..., K) int32 or int64. target_values: (..., K) float: log-probabilities, or with
                log_target=False logits (older caches), known up to a constant: tail must then be "renormalize".
            mask: (...), (..., 1) or (..., K), True or nonzero for what counts.
            tail: "bucket" is DistillKit's missing="symmetric_uniform".
            temperature: at which the values were captured: `generation_temperature` there.
            vocab_size: as in `TopK`.

        Returns:
            ids as given and logprobs float32. Rows whose quantised probabilities sum to more than 1 (to e^0.1 at most)
            are renormalised.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        from . import caches

        return caches.from_distillkit(target_ids, target_values, mask, log_target, tail, temperature, vocab_size)

    @classmethod
    def from_axolotl(
        cls,
        target_token_ids: Any,
        target_logprobs: Any,
        target_mask: Any = None,
        *,
        tail: str = "renormalize",
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> "TopK":
        """Read the columns of an axolotl data set: of a collated batch, or of rows of the data set as nested lists.

        Args:
            target_token_ids: (..., K) integers. target_logprobs: (..., K) float (the column `logprobs` before axolotl's
                own processing). target_mask: (..., K) or (...), nonzero for what counts. Lists may be ragged. The
                padding, -1e9 or −inf, is absent with or without a mask.
            tail: axolotl's processing renormalises the listed tokens, by which the mass of all others is lost: hence
                "renormalize". A column of full-softmax log-probabilities can have "bucket".
            temperature: of the log-probabilities as they are: `kd_temperature` after axolotl's processing.
            vocab_size: as in `TopK`.

        Positions are left where they are: axolotl shifts columns in its trainer or its collator, by version.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        from . import caches

        return caches.from_axolotl(target_token_ids, target_logprobs, target_mask, tail, temperature, vocab_size)

    @classmethod
    def from_megatron(
        cls,
        values: Tensor,
        indices_low: Tensor,
        bit_17: Tensor | None = None,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> "TopK":
        """Read a payload of Megatron's cached logits: the tensors in an `{iteration}.pt.zst`, decompressed and loaded.

        Args:
            values: (S, B, K) float16, bfloat16 or float32 log-probabilities; −1e3 or less is absent.
            indices_low, bit_17: (S, B, K) uint16 and bool, the low 16 bits and the 17th of the ids, for at most 131,072
                tokens. Without bit_17: whole ids, also int32 or int64, −1 absent.
            tail: "bucket" is Megatron's `add_ghost_token`.
            temperature, vocab_size: as in `TopK`.

        Returns:
            ids int32 and logprobs in the dtype of the values, (S, B, K): sequence first, as Megatron's logits are.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        from . import caches

        return caches.from_megatron(values, indices_low, bit_17, tail, temperature, vocab_size)
