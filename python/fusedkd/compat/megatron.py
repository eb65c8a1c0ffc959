"""Losses of Megatron-LM, and those of ModelOpt's Megatron plugin.

`LogitsKLLoss` and `TopKLogitsKLLoss` are modelopt.torch.distill.plugins.megatron's of nvidia-modelopt 0.47.0,
`topk_kl_div` is megatron.training.distillation.cached_logits_loss's of megatron-core 0.19.2.

Under tensor parallelism every rank has its V/tp of the vocabulary's columns, in the order of the ranks.
"""

from importlib import import_module
from typing import Any

import torch
from torch.nn.modules.loss import _Loss

from .. import checks
from ..divergence import divergence
from ..head import Head, Side
from ..loss import kd_loss
from ..shard import VocabShard
from . import _listed

SENTINEL = -1e3  # the log-probability of a place in Megatron's cache that holds no token
_GHOST = 1e-8  # the least mass of the ghost token
_STATE = "megatron.core.parallel_state"
_SHARDS: dict[tuple[str, int], VocabShard] = {}  # by the name of the group and the columns of a rank


class LogitsKLLoss(_Loss):
    """KL(softmax(targets/T)‖softmax(predictions/T)) per token, in nats and float32, without T².

    Args:
        model_config: the student's TransformerConfig, of which `tensor_model_parallel_size` is read. Above 1, logits
            and the weights of Heads are this rank's part of the vocabulary (a whole teacher is cut), and
            megatron.core.parallel_state is asked for the group at the first call.
        temperature: T > 0.
        reverse: KL(student‖teacher) instead.
        vocab_size: how many columns of the whole vocabulary are tokens: Megatron pads it to a multiple of 128·tp, and
            columns beyond get no mass and no gradient. None: all of them, as in the original, which has no such option.
        hidden_grad: as in `kd_loss`, for a student Head under tensor parallelism: "reduce" gives hidden states their
            whole gradient; "partial" is for those that came through copy_to_tensor_model_parallel_region or
            gather_from_sequence_parallel_region, whose backward adds the ranks' parts up.

    Differences: a column where the teacher's logit is −inf is removed from both sides, where the original's value is
    NaN. Under tensor parallelism the loss is complete on every rank, where the original's is the sum over the rank's
    columns and asks Megatron to add them up (`tp_reduce`). The gradient is the same.

    Raises ImportError where a group is needed and megatron.core is not there, ValueError where it is of another size.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        *,
        vocab_size: int | None = None,
        hidden_grad: str = "reduce",
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        checks.one_of("hidden_grad", hidden_grad, ("reduce", "partial"))
        if vocab_size is not None:
            checks.integer("vocab_size", vocab_size)
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse
        self._vocab_size = vocab_size
        self._hidden_grad = hidden_grad

    def forward(self, predictions: Any, targets: Any) -> tuple[torch.Tensor, bool, bool]:
        """The loss of the student's and the teacher's logits (s, b, V), or (s, b, V/tp).

        Args:
            predictions, targets: logits, or both tuples that start with them (a ColumnParallelLinear returns its bias
                too); either a `fusedkd.Head` of hidden states (s, b, D), the same on every rank.

        Returns: ((b, s) loss, contiguous; tp_reduce; False). The last two are the original's flags: whether Megatron
        sums the loss over the tensor-parallel group, which is True, as there, only for a size of 1, where the sum
        changes nothing; and `is_sequence_parallel`.
        """
        predictions, targets = _logits_of(predictions, targets)
        sharding = self._sharding(predictions)
        loss = kd_loss(
            predictions,
            targets,
            divergence="rkl" if self._reverse else "fkl",
            temperature=self._temperature,
            reduction="none",
            vocab_size=self._vocab_size,
            **sharding,
        )
        return loss.transpose(0, 1).contiguous(), not sharding, False

    def _sharding(self, predictions: Any) -> dict[str, Any]:
        """What kd_loss has to be told of the ranks: nothing where there is one."""
        ranks = self._config.tensor_model_parallel_size
        if ranks == 1:
            return {}
        checks.side("predictions", predictions)
        shard = _shard("model_config.tensor_model_parallel_size", ranks, _group(ranks), predictions)
        return {"shard": shard, "hidden_grad": self._hidden_grad if isinstance(predictions, Head) else "reduce"}


class TopKLogitsKLLoss(LogitsKLLoss):
    """The same of both sides renormalised on the teacher's likeliest tokens: what either has elsewhere costs nothing.

    Args:
        model_config, temperature, reverse, vocab_size, hidden_grad: as for `LogitsKLLoss`.
        top_k: how many tokens, at most the vocabulary and 4096.

    Differences: a token of which the teacher's logit is −inf is no token, where the original's value is NaN. Under
    tensor parallelism the gradient is that of the loss; in the original every rank's copy of the loss adds to it, so
    that it is tp times that.

    Cost under tensor parallelism: beside that of `kd_loss`, every rank is sent top_k logits and ids of every other.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        top_k: int = 1024,
        *,
        vocab_size: int | None = None,
        hidden_grad: str = "reduce",
    ) -> None:
        super().__init__(model_config, temperature, reverse, vocab_size=vocab_size, hidden_grad=hidden_grad)
        checks.integer("top_k", top_k)
        checks.within("top_k", top_k, 1, checks.MOST_LISTED)
        self.top_k = top_k

    def forward(self, predictions: Any, targets: Any) -> tuple[torch.Tensor, bool, bool]:
        """The loss of the student's and the teacher's logits (s, b, V), or (s, b, V/tp), as `LogitsKLLoss.forward`.

        The student may be a `fusedkd.Head`, the teacher has logits: under tensor parallelism this rank's part of them.
        Returns: ((b, s) loss; False; False).
        """
        predictions, targets = _logits_of(predictions, targets)
        if isinstance(targets, Head):
            raise NotImplementedError("targets is a Head, of which the likeliest tokens are not known: pass its logits")
        checks.side("targets", targets)
        sharding = self._sharding(predictions)
        shard: VocabShard | None = sharding.get("shard")
        if shard is not None and targets.shape[-1] != shard.width:
            raise ValueError(
                f"targets has {targets.shape[-1]} columns and predictions {shard.width} on this rank: pass the same "
                f"{shard.width} columns of the teacher"
            )
        columns = targets.shape[-1] if shard is None else shard.vocab_size
        columns = checks.compared(self._vocab_size, columns)
        if self.top_k > columns:
            raise ValueError(f"top_k must be at most the vocabulary of targets, {columns}, got {self.top_k}")
        values, ids = _likeliest(targets.detach(), self.top_k, columns, shard)
        chosen = divergence("rkl" if self._reverse else "fkl")
        logp = values.float() / self._temperature
        ids = _listed.present(ids, values)
        loss = _listed.renormalized(predictions, ids, logp, chosen, self._temperature, **sharding)
        return loss.transpose(0, 1).contiguous(), False, False


def topk_kl_div(
    student_logits: Side,
    teacher_topk_logprobs: torch.Tensor,
    teacher_topk_indices: torch.Tensor,
    tp_size: int,
    tp_rank: int,
    tp_group: Any,
    add_ghost_token: bool = False,
) -> torch.Tensor:
    """Σ p (log p − log q) per token over the teacher's cached ones, with raw p and q, in nats: (B, S) of (S, B, V).

    Args:
        student_logits: (S, B, V), or this rank's (S, B, V/tp); or a `fusedkd.Head` of hidden states (S, B, D), the same
            on every rank, and its part of the weight. The gradient flows here; hidden states get the whole one.
        teacher_topk_logprobs: (S, B, K), −1e3 where the cache holds no token.
        teacher_topk_indices: (S, B, K), int32 or int64, in [0, V), or −1 where the cache holds no token.
        tp_size, tp_rank, tp_group: of the ranks that share the vocabulary. With a size of 1 the others are not looked
            at.
        add_ghost_token: one term more, of the masses that both sides have on no listed token, each at least 1e-8: then
            this is a divergence, never negative.

    Returns: float32 (B, S). With tp_size > 1 this rank's share, as in the original, whose caller adds the ranks' up:
    the sum is the loss. Here the shares are equal parts of it, there the terms of the rank's columns; the gradient is
    that of the whole.

    Differences: the student's mass elsewhere is a sum, where the original's is 1 − Σ q in float32; a log-probability of
    −inf is no token, where the original's value is NaN; float32 logits are not changed in place; an index outside the
    vocabulary is an error on a CPU, where the original drops it. Where rounding has raised Σ p above 1, the likeliest
    token is lowered by that.

    Raises: ValueError where tp_group is not of tp_size ranks of which this one is tp_rank.

    Cost: without the ghost token that of `kd_loss` with a `fusedkd.TopK`, with it one more read of the logits.
    """
    checks.side("student_logits", student_logits)
    shard = None
    if tp_size != 1:
        shard = _shard("tp_size", tp_size, tp_group, student_logits)
        if shard.rank != tp_rank:
            raise ValueError(f"tp_rank is {tp_rank}, and this rank is number {shard.rank} of tp_group")
    names = "teacher_topk_indices", "teacher_topk_logprobs"
    shape = checks.leading(student_logits)
    _listed.check_pair(names[0], teacher_topk_indices, names[1], teacher_topk_logprobs, shape)
    logprobs = teacher_topk_logprobs.float()
    ids = _listed.present(teacher_topk_indices, logprobs, logprobs != SENTINEL)
    if add_ghost_token:
        loss = _listed.bucketed(student_logits, ids, logprobs, divergence("fkl"), _GHOST, shard=shard)
    else:
        loss = _listed.truncated_kl(student_logits, ids, logprobs, shard=shard)
    if shard is not None:
        loss = _Share.apply(loss, shard.size)
    return loss.transpose(0, 1).contiguous()


class _Share(torch.autograd.Function):
    """x / ranks, with the gradient of x: what has a sum over ranks that nobody differentiates."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int) -> torch.Tensor:
        """An equal share."""
        return x / ranks

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Of the sum."""
        return gradients[0], None


def _logits_of(predictions: Any, targets: Any) -> tuple[Any, Any]:
    """Both, or the first of both where a ColumnParallelLinear returned its bias too."""
    if isinstance(predictions, tuple) and not isinstance(predictions, Head):
        return predictions[0], targets[0]
    return predictions, targets


def _group(ranks: int) -> Any:
    """Megatron's tensor-parallel group of this rank."""
    try:
        state = import_module(_STATE)
    except ImportError as error:
        raise ImportError(
            f"model_config.tensor_model_parallel_size is {ranks}, and the group of these ranks is {_STATE}'s, which "
            "cannot be imported: install megatron-core, or call fusedkd.kd_loss with shard=fusedkd.VocabShard(group)"
        ) from error
    return state.get_tensor_model_parallel_group()


def _shard(name: str, ranks: int, group: Any, student: Side) -> VocabShard:
    """This rank's part of a vocabulary in equal parts. The ranks tell each other once for a group and a width."""
    if not hasattr(group, "size") or group.size() != ranks:
        what = f"has {group.size()}" if hasattr(group, "size") else f"is {group!r}"
        raise ValueError(f"{name} is {ranks}, and the tensor-parallel group {what}: pass the group of these ranks")
    width = checks.width(student)
    found = _SHARDS.get((group.group_name, width))
    if found is None or found.group is not group:  # names are used again
        found = VocabShard(group, group.rank() * width, (group.rank() + 1) * width)
        _SHARDS[group.group_name, width] = found
    return found


def _likeliest(
    logits: torch.Tensor, k: int, columns: int, shard: VocabShard | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest of the vocabulary's first `columns` tokens, logits (s, b, k) and ids, on every rank the same."""
    if shard is None:
        return logits[..., :columns].topk(k, dim=-1)
    here = shard.here(columns)
    own, local = logits[..., :here].topk(min(k, here), dim=-1)
    lacking = (0, k - own.shape[-1])  # all ranks gather as many
    own = torch.nn.functional.pad(own.float(), lacking, value=-torch.inf)
    local = torch.nn.functional.pad(local + shard.first, lacking, value=-1)
    ranks = shard.ranks
    values, ids = (ranks.gathered(x).movedim(0, -2).flatten(-2) for x in (own, local))
    best = values.topk(k, dim=-1)
    return best.values, ids.gather(-1, best.indices)
