"""fusedkd.compat.trl against TRL's formulas, rewritten here, and `patch` on modules that look like TRL's."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HEAD, ROW, VALUE, each, near, random_labels, side, unrelated
from compare import assert_close, relative, rounding
from originals import DTYPES, check, gkd_summands
from test_memory import measure
from torch import Tensor

import fusedkd.compat.trl as shim

BETAS = (0.0, 0.3, 1.0)
SHAPE = (2, 5, 61)


def trl_reduced(summands: Tensor, counted: Tensor | None, reduction: str, num_items: Any) -> Tensor:
    """TRL's four reductions and num_items_in_batch."""
    summands = summands if counted is None else summands[counted]
    if num_items is not None:
        return summands.sum() / num_items
    if reduction == "batchmean":
        return summands.sum() / (len(summands) if counted is None else counted.sum())
    return {"sum": summands.sum(), "mean": summands.mean()}.get(reduction, summands)


def trl_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> Tensor:
    """GKDTrainer.generalized_jsd_loss."""
    logq, logp = ((x / temperature).log_softmax(-1) for x in (student_logits, teacher_logits))
    counted = None if labels is None else labels != -100
    return trl_reduced(gkd_summands(logp, logq, beta), counted, reduction, num_items_in_batch)


def logits(*shape: int) -> dict[str, Tensor]:
    """Rows of unrelated models."""
    rows = unrelated(*shape)
    return {"student_logits": rows.student, "teacher_logits": rows.teacher}


@each("dtype", DTYPES)
@each("reduction", ["batchmean", "sum", "mean", "none"])
@each("labelled", [True, False])
@each("beta", BETAS)
def test_generalized_jsd_loss(beta: float, labelled: bool, reduction: str, dtype: torch.dtype) -> None:
    labels = random_labels(SHAPE[:-1], SHAPE[-1]) if labelled else None
    options = {"labels": labels, "beta": beta, "reduction": reduction}
    check(shim.generalized_jsd_loss, trl_jsd, logits(*SHAPE), ("student_logits",), dtype, **options)


@each("reduction", ["batchmean", "none"])
@each("items", [37, torch.tensor(37)])
def test_the_number_of_items_overrides_the_reduction(items: Any, reduction: str) -> None:
    options = {"labels": random_labels(SHAPE[:-1], 61), "reduction": reduction, "num_items_in_batch": items}
    check(shim.generalized_jsd_loss, trl_jsd, logits(*SHAPE), ("student_logits",), torch.float32, **options)


@each("reduction", ["batchmean", "none"])
def test_temperature_divides_and_is_not_squared(reduction: str) -> None:
    options = {"temperature": 2.5, "beta": 0.3, "reduction": reduction}
    check(shim.generalized_jsd_loss, trl_jsd, logits(*SHAPE), ("student_logits",), torch.float32, **options)


def test_nothing_of_the_logits_size_but_the_gradient() -> None:
    """TRL holds both log-softmaxes, their mixture and its summands."""
    given = {name: x.float() for name, x in logits(2, 1024, 3000).items()}
    given["student_logits"].requires_grad_()
    count = {}
    for function in (shim.generalized_jsd_loss, trl_jsd):
        sizes = measure(lambda function=function: function(**given).backward()).sizes
        count[function] = sum(size >= 4 * 2 * 1024 * 3000 for size in sizes)
        given["student_logits"].grad = None
    assert count[shim.generalized_jsd_loss] == 1
    assert count[trl_jsd] > 4


@each("distance", [1.0, 1e-2])
@each("reduction", ["batchmean", "none"])
def test_symmetry_at_one_half(reduction: str, distance: float) -> None:
    """Both orders are as close to their common truth as any value is."""
    rows = near(distance, *SHAPE)
    sides = rows.student.float(), rows.teacher.float()
    one, other = (shim.generalized_jsd_loss(*x, beta=0.5, reduction=reduction) for x in (sides, sides[::-1]))
    assert_close(one, other.double(), 2 * VALUE)


def test_two_dimensional_logits() -> None:
    check(shim.generalized_jsd_loss, trl_jsd, logits(7, 61), ("student_logits",), torch.float32)


@each("reduction", ["batchmean", "sum", "mean"])
def test_nothing_counted_is_zero(reduction: str) -> None:
    """TRL's mean is 0/0 there."""
    student, teacher = torch.randn(2, *SHAPE).unbind()
    student.requires_grad_()
    labels = torch.full(SHAPE[:-1], -100)
    loss = shim.generalized_jsd_loss(student, teacher, labels, reduction=reduction)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert not student.grad.any()
    assert trl_jsd(student, teacher, labels, reduction="mean").isnan()


@each("reduction", ["batchmean", "mean", "none"])
@each("beta", BETAS)
def test_padded_vocabularies(beta: float, reduction: str) -> None:
    """Rows of a padded head are no tokens; TRL raises."""
    student, teacher = torch.randn(2, *SHAPE).unbind()
    padded = torch.cat((teacher, torch.randn(*SHAPE[:-1], 3)), -1)
    options = {"beta": beta, "reduction": reduction}
    assert torch.equal(
        shim.generalized_jsd_loss(student, padded, **options), shim.generalized_jsd_loss(student, teacher, **options)
    )
    with pytest.raises(RuntimeError, match=r"must match the size|to be equal size"):
        trl_jsd(student, padded, **options)


@each("reduction", ["batchmean", "none"])
@each("beta", BETAS)
def test_a_masked_teacher(beta: float, reduction: str) -> None:
    """A teacher logit of −inf takes its column out; TRL's value is NaN, or infinite for the reverse KL."""
    student, teacher = torch.randn(2, *SHAPE).unbind()
    teacher[..., 7] = -torch.inf
    student.requires_grad_()
    loss = shim.generalized_jsd_loss(student, teacher, beta=beta, reduction=reduction)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    kept = torch.arange(61) != 7
    wanted = trl_jsd(student.detach()[..., kept].double(), teacher[..., kept].double(), beta=beta, reduction=reduction)
    assert_close(loss[..., kept] if reduction == "none" else loss, wanted, VALUE)
    assert not trl_jsd(student, teacher, beta=beta).isfinite()


@each("reduction", ["batchmean", "none"])
@each("beta", BETAS)
def test_ignored_rows_are_not_read(beta: float, reduction: str) -> None:
    """In TRL what is left of a NaN in a padded row is a NaN in its gradient."""
    student, teacher = torch.randn(2, *SHAPE).unbind()
    labels = random_labels(SHAPE[:-1], 61)
    for x in (student, teacher):
        x[labels == -100] = torch.nan
    student.requires_grad_()
    shim.generalized_jsd_loss(student, teacher, labels, beta, reduction=reduction).sum().backward()
    assert student.grad is not None
    assert student.grad[labels != -100].all()
    assert not student.grad[labels == -100].any()
    (theirs,) = torch.autograd.grad(trl_jsd(student, teacher, labels, beta), student)
    assert theirs.isnan().any()


HEADS = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")


def trl_chunked(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Any = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor:
    """The loss of TRL's _chunked_divergence_loss, or the entropy beside it, from whole logits."""

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
        logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return (logits / temperature).log_softmax(-1)[completion_mask != 0]

    logq = logprobs(
        student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale,
        student_final_logit_softcapping,
    )  # fmt: skip
    if entropy:
        return -(logq.exp() * logq).sum()
    logp = logprobs(
        teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale,
        teacher_final_logit_softcapping,
    )  # fmt: skip
    items = (completion_mask != 0).sum() if num_items_in_batch is None else num_items_in_batch
    return gkd_summands(logp, logq, beta).sum() / items


def heads(bias: bool = False) -> dict[str, Tensor]:
    """Hidden states and output layers of two models of different widths."""
    inputs = {}
    for name, width in (("student", 16), ("teacher", 24)):
        head = side((2, 6), 97, width, bias=bias)
        inputs |= {f"{name}_hidden_states": head.hidden, f"{name}_lm_head_weight": head.weight}
        if head.bias is not None:
            inputs[f"{name}_lm_head_bias"] = head.bias
    return inputs


MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]])
TRANSFORMS = {
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 2.0,
    "student_final_logit_softcapping": 8.0,
    "teacher_final_logit_softcapping": 12.0,
    "temperature": 1.7,
}


@pytest.mark.smoke
@each("dtype", DTYPES)
@each("beta", BETAS)
@each("items", [None, 100, torch.tensor(100)])
def test_chunked_divergence_loss(items: Any, beta: float, dtype: torch.dtype) -> None:
    options = {"completion_mask": MASK, "beta": beta, "num_items_in_batch": items}
    check(shim.chunked_divergence_loss, trl_chunked, heads(), HEADS[:2], dtype, **options)


@each("dtype", DTYPES)
@each("beta", BETAS)
def test_chunked_divergence_loss_with_everything(beta: float, dtype: torch.dtype) -> None:
    inputs = heads(bias=True)
    options = {"completion_mask": MASK, "beta": beta, **TRANSFORMS}
    check(shim.chunked_divergence_loss, trl_chunked, inputs, HEADS, dtype, **options)
    given = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    _, entropy, count = shim.chunked_divergence_loss(**given, **options)
    wanted = trl_chunked(**{name: x.detach().double() for name, x in given.items()}, **options, entropy=True)
    assert_close(entropy, wanted, VALUE, what="entropy")
    assert not entropy.requires_grad
    assert count == MASK.sum()


def test_a_weight_in_another_dtype() -> None:
    """As with a float32 master weight beside bfloat16 hidden states: cast, and the gradient comes back in its own."""
    inputs = {name: x.bfloat16() for name, x in heads().items()}
    options = {"completion_mask": MASK, "beta": 0.5}
    master = inputs["student_lm_head_weight"].float().requires_grad_()
    loss, _, _ = shim.chunked_divergence_loss(**inputs | {"student_lm_head_weight": master}, **options)
    assert torch.equal(loss, shim.chunked_divergence_loss(**inputs, **options)[0])
    loss.backward()
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.any()


@each("bias", [torch.float32, torch.float64, torch.float16])
def test_a_bias_in_another_dtype(bias: torch.dtype) -> None:
    """Added in float32, as by TRL, whatever the hidden states are: in bfloat16 a bias of 3 loses two digits."""
    exact = {
        name: (3 * x if name.endswith("bias") else x).to(bias if name.endswith("bias") else torch.bfloat16).double()
        for name, x in heads(bias=True).items()
    }
    given = {name: x.to(bias if name.endswith("bias") else torch.bfloat16) for name, x in exact.items()}
    options = {"completion_mask": MASK, "beta": 0.5}
    for inputs in (exact, given):
        for name in HEADS:
            inputs[name].requires_grad_()
    truth, (loss, _, _) = trl_chunked(**exact, **options), shim.chunked_divergence_loss(**given, **options)
    truth.backward()
    loss.backward()
    assert_close(loss, truth.detach(), VALUE + HEAD)
    for name in HEADS:
        wanted, dtype = exact[name].grad, given[name].dtype
        assert wanted is not None
        assert_close(given[name].grad, wanted, VALUE + HEAD + rounding(wanted, dtype), dtype=dtype, what=name)


def test_a_sharded_weight() -> None:
    """What has a full_tensor, as a DTensor does, is asked for it."""
    inputs = {name: x.float() for name, x in heads(bias=True).items()}
    options = {"completion_mask": MASK, "beta": 0.5}
    wanted = shim.chunked_divergence_loss(**inputs, **options)[0]
    for name in ("student_lm_head_weight", "teacher_lm_head_weight", "student_lm_head_bias", "teacher_lm_head_bias"):
        shard = torch.zeros(3)
        shard.full_tensor = lambda x=inputs[name]: x  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(shim.chunked_divergence_loss(**inputs | {name: shard}, **options)[0], wanted)


def test_no_completion_is_zero() -> None:
    inputs = {name: x.float().requires_grad_() for name, x in heads().items()}
    loss, entropy, count = shim.chunked_divergence_loss(**inputs, completion_mask=torch.zeros_like(MASK), beta=0.5)
    loss.backward()
    assert loss == entropy == count == 0
    assert inputs["student_hidden_states"].grad is not None
    assert not inputs["student_hidden_states"].grad.any()


@each("beta", [0.0, 1.0])
def test_models_that_agree(beta: float) -> None:
    """TRL takes the KL from two log-sum-exps, which cancel where it is small: wrong by more than a part in ten."""
    rows = near(1e-3, 4, 5, 97)
    eye = torch.eye(97)
    inputs = {
        "student_hidden_states": rows.student.float(), "teacher_hidden_states": rows.teacher.float(),
        "student_lm_head_weight": eye, "teacher_lm_head_weight": eye,
    }  # fmt: skip
    masks = torch.eye(20).view(20, 4, 5)
    exact = {name: x.double() for name, x in inputs.items()}
    losses = torch.stack([shim.chunked_divergence_loss(**inputs, completion_mask=m, beta=beta)[0] for m in masks])
    truth = torch.stack([trl_chunked(**exact, completion_mask=m, beta=beta) for m in masks])
    assert_close(losses, truth, VALUE, per_row=ROW)
    s, t = (inputs[f"{name}_hidden_states"].reshape(-1, 97) for name in ("student", "teacher"))
    first, second = (s, t) if beta else (t, s)
    cancelled = (first.softmax(-1) * (first - second)).sum(-1) - first.logsumexp(-1) + second.logsumexp(-1)
    assert relative(cancelled, truth) > 0.1


def trl_full_logit(student_logits: Tensor, teacher_logits: Tensor, distillation_alpha: float) -> Tensor:
    """compute_full_logit_self_distillation_loss."""
    return trl_jsd(student_logits, teacher_logits, beta=distillation_alpha, reduction="none").sum(-1)


@each("dtype", DTYPES)
@each("alpha", BETAS)
def test_full_logit_self_distillation(alpha: float, dtype: torch.dtype) -> None:
    check(
        shim.compute_full_logit_self_distillation_loss, trl_full_logit, logits(*SHAPE), ("student_logits",), dtype,
        distillation_alpha=alpha,
    )  # fmt: skip


@each("dtype", DTYPES)
@each("reduction", ["batchmean", "sum", "mean", "none"])
@each("masked", [True, False])
def test_single_step_decomposition(masked: bool, reduction: str, dtype: torch.dtype) -> None:
    """Behind the log_softmax that MiniLLM takes first, in float32 as bfloat16 models give it under autocast."""
    mask = MASK[:, :5] != 0 if masked else None

    def ours(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        logprobs = [x.float().log_softmax(-1) for x in (student_logits, teacher_logits)]
        return shim.single_step_decomposition_loss(logprobs[0], logprobs[1].detach(), mask, reduction)

    def theirs(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        logq, logp = (x.log_softmax(-1) for x in (student_logits, teacher_logits))
        return trl_reduced(gkd_summands(logp, logq, 1.0), mask, reduction, None)

    check(ours, theirs, logits(*SHAPE), ("student_logits",), dtype)


@each("dtype", DTYPES)
@each("reduction", ["batchmean", "sum", "mean", "none"])
@each("masked", [True, False])
def test_single_step_decomposition_of_some_columns(masked: bool, reduction: str, dtype: torch.dtype) -> None:
    """Log-probabilities are taken as they are: rows that do not sum to 1 have TRL's value and gradient."""
    mask = MASK[:, :5] != 0 if masked else None
    rows = {name: x.log_softmax(-1)[..., :40] for name, x in logits(*SHAPE).items()}
    inputs = {name.replace("logits", "log_probs"): x for name, x in rows.items()}

    def ours(**inputs: Tensor) -> Tensor:
        return shim.single_step_decomposition_loss(**inputs, mask=mask, reduction=reduction)

    def theirs(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return trl_reduced(gkd_summands(teacher_log_probs, student_log_probs, 1.0), mask, reduction, None)

    check(ours, theirs, inputs, ("student_log_probs",), dtype)


@each("function", [shim.generalized_jsd_loss, shim.single_step_decomposition_loss])
def test_an_unknown_reduction(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="'none', got 'token_mean'"):
        function(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), reduction="token_mean")


@each("name", ["student_logit_scale", "teacher_logit_scale"])
def test_a_scale_of_zero(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"does not support {name}=0.0"):
        shim.chunked_divergence_loss(**heads(), completion_mask=MASK, beta=0.5, **{name: 0.0})


def test_a_partitioned_weight() -> None:
    inputs = heads()
    inputs["teacher_lm_head_weight"].ds_id = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NotImplementedError, match="teacher_lm_head_weight is partitioned by DeepSpeed"):
        shim.chunked_divergence_loss(**inputs, completion_mask=MASK, beta=0.5)


def original_chunked_divergence_loss(
    student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, completion_mask, beta,
    num_items_in_batch=None, student_lm_head_bias=None, teacher_lm_head_bias=None, student_logit_scale=1.0,
    teacher_logit_scale=1.0, student_final_logit_softcapping=None, teacher_final_logit_softcapping=None,
    temperature=1.0,
):  # fmt: skip
    raise NotImplementedError


def original_jsd_loss(
    student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
    num_items_in_batch=None,
):  # fmt: skip
    raise NotImplementedError


def original_full_logit(student_logits, teacher_logits, *, distillation_alpha):
    raise NotImplementedError


def original_top_k(student_logits, teacher_logits, *, distillation_topk, distillation_alpha, distillation_add_tail):
    raise NotImplementedError


def original_server_forward(self, teacher_result, student_log_probs, labels):
    raise NotImplementedError


def original_server_top_1(
    self, student_log_probs, teacher_top1_token_ids, teacher_top1_logprobs, reverse_token_ids, reverse_teacher_logprobs,
    labels, num_items_in_batch=None,
):  # fmt: skip
    raise NotImplementedError


def original_chunked_jsd(
    hidden_valid, lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping, target_ids, teacher_target_logps,
    valid_candidate_mask, beta, temperature, add_tail_bucket, teacher_id_idx, num_teachers, chunk_size,
):  # fmt: skip
    raise NotImplementedError


FULL_LOGIT = "compute_full_logit_self_distillation_loss"
TOP_K = "compute_topk_self_distillation_loss"


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with the names and the signatures of TRL 1.16."""

    class GKDTrainer:
        generalized_jsd_loss = staticmethod(original_jsd_loss)

    class ServerDistillationTrainer:
        _compute_server_forward_kl_loss = original_server_forward
        _compute_sparse_top_1_divergence_loss = original_server_top_1

    contents = {
        "trl.experimental.gkd.gkd_trainer": {"GKDTrainer": GKDTrainer},
        "trl.trainer.distillation_trainer": {"_chunked_divergence_loss": original_chunked_divergence_loss},
        "trl.experimental.sdft.sdft_trainer": {FULL_LOGIT: original_full_logit, TOP_K: original_top_k},
        "trl.experimental.sdpo.sdpo_trainer": {FULL_LOGIT: original_full_logit, TOP_K: original_top_k},
        "trl.experimental.server_distillation.server_distillation_trainer": {
            "ServerDistillationTrainer": ServerDistillationTrainer
        },
        "trl.experimental.async_distillation.async_distillation_trainer": {"_chunked_jsd_loss": original_chunked_jsd},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name.split(".")[-1].removesuffix("_trainer")] = module = types.ModuleType(name)
        vars(module).update(attributes)
        for i in range(1, name.count(".") + 1):
            monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), types.ModuleType("parent"))
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    shim.unpatch()


def calls(trl: dict[str, Any]) -> list[Any]:
    """What the trainers would call."""
    return [
        trl["gkd"].GKDTrainer.generalized_jsd_loss,
        trl["gkd"].GKDTrainer().generalized_jsd_loss,
        trl["distillation"]._chunked_divergence_loss,
        getattr(trl["sdft"], FULL_LOGIT),
        getattr(trl["sdpo"], FULL_LOGIT),
        getattr(trl["sdft"], TOP_K),
        getattr(trl["sdpo"], TOP_K),
    ]


OURS = [
    shim.generalized_jsd_loss,
    shim.generalized_jsd_loss,
    shim.chunked_divergence_loss,
    shim.compute_full_logit_self_distillation_loss,
    shim.compute_full_logit_self_distillation_loss,
    shim.compute_topk_self_distillation_loss,
    shim.compute_topk_self_distillation_loss,
]


def test_patch_and_unpatch(trl: dict[str, Any]) -> None:
    before = calls(trl)
    shim.patch()
    shim.patch()
    assert calls(trl) == OURS
    shim.unpatch()
    assert calls(trl) == before
    shim.unpatch()


def test_patch_some(trl: dict[str, Any]) -> None:
    before = calls(trl)
    shim.patch("gkd")
    assert calls(trl) == [*OURS[:2], *before[2:]]
    shim.patch()
    assert calls(trl) == OURS
    shim.unpatch()
    assert calls(trl) == before


def test_patch_trainers_with_a_server(trl: dict[str, Any]) -> None:
    """They are patched where they are named; methods see their trainer."""
    before = calls(trl)
    shim.patch("server_distillation", "async_distillation")
    assert calls(trl) == before
    trainer = trl["server_distillation"].ServerDistillationTrainer
    assert trl["async_distillation"]._chunked_jsd_loss is shim.chunked_jsd_loss
    assert trainer()._compute_server_forward_kl_loss.__func__ is shim.server_forward_kl_loss
    assert trainer._compute_sparse_top_1_divergence_loss is shim.server_sparse_top_1_divergence_loss
    shim.unpatch()
    assert trl["async_distillation"]._chunked_jsd_loss is original_chunked_jsd
    assert trainer._compute_server_forward_kl_loss is original_server_forward
    shim.patch()
    assert trainer._compute_server_forward_kl_loss is original_server_forward


def reload(trl: dict[str, Any]) -> None:
    """What importlib.reload leaves of the modules: the same modules, with TRL's functions and another class."""
    trl["gkd"].GKDTrainer = type("GKDTrainer", (), {"generalized_jsd_loss": staticmethod(original_jsd_loss)})
    trl["distillation"]._chunked_divergence_loss = original_chunked_divergence_loss
    for name in ("sdft", "sdpo"):
        setattr(trl[name], FULL_LOGIT, original_full_logit)
        setattr(trl[name], TOP_K, original_top_k)


def test_patch_after_a_reload(trl: dict[str, Any]) -> None:
    """What the reload undid is patched again, and unpatch also gives back what a class from before still holds."""
    before, old = calls(trl), trl["gkd"].GKDTrainer
    shim.patch()
    reload(trl)
    assert calls(trl) == before
    shim.patch()
    assert calls(trl) == OURS
    shim.unpatch()
    assert calls(trl) == before
    assert old.generalized_jsd_loss is original_jsd_loss


def test_unpatch_leaves_what_others_assigned(trl: dict[str, Any]) -> None:
    before = calls(trl)
    shim.patch()
    trl["gkd"].GKDTrainer.generalized_jsd_loss = staticmethod(other_jsd_loss)
    trl["distillation"]._chunked_divergence_loss = original_full_logit
    shim.unpatch()
    assert calls(trl) == [other_jsd_loss, other_jsd_loss, original_full_logit, *before[3:]]


def other_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=0.9, reduction="batchmean"):
    raise NotImplementedError


def test_patch_refuses_other_signatures(trl: dict[str, Any]) -> None:
    trl["gkd"].GKDTrainer.generalized_jsd_loss = staticmethod(other_jsd_loss)
    before = calls(trl)
    with pytest.raises(
        RuntimeError, match=r"TRL 1\.16, where .*GKDTrainer\.generalized_jsd_loss takes .*0\.9"
    ) as error:
        shim.patch()
    assert str(inspect.signature(original_jsd_loss)) in str(error.value)
    assert calls(trl) == before
    shim.patch("distillation")
    assert calls(trl)[2] == OURS[2]


def test_patch_refuses_what_is_not_there(trl: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    del trl["distillation"]._chunked_divergence_loss
    with pytest.raises(RuntimeError, match=r"_chunked_divergence_loss does not exist: nothing was patched"):
        shim.patch()
    with pytest.raises(ValueError, match=r"trainers must be among 'gkd', .*, got 'gold'"):
        shim.patch("gold")
    with pytest.raises(TypeError, match=r'names one by one, as in patch\("gkd", "distillation"\), got a list'):
        shim.patch(["gkd", "distillation"])
    monkeypatch.setitem(sys.modules, "trl.experimental.sdpo.sdpo_trainer", None)
    with pytest.raises(ImportError, match=r"TRL 1\.16, and trl\.experimental\.sdpo\.sdpo_trainer cannot be imported"):
        shim.patch("gkd", "sdpo")
    assert trl["gkd"].GKDTrainer.generalized_jsd_loss is original_jsd_loss
