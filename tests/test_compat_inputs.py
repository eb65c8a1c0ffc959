"""Every drop-in with inputs that trainers do make: inference tensors, other defaults of torch, nothing to count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cases import IGNORE, each
from torch import Tensor

from fusedkd.compat import (
    abkd,
    amid,
    automodel,
    axolotl,
    distillkit,
    distillm,
    distillm2,
    kdflow,
    liger,
    megatron,
    minillm,
    modelopt,
    swift,
    taid,
    torchtune,
    trl,
    veomni,
    verl,
)

B, T, V = 2, 5, 16


class Given(NamedTuple):
    """Leaves of a student, and all that no gradient flows to: logits (B, T, V), which also serve as hidden states."""

    student: Tensor
    weight: Tensor  # (V, V)
    bias: Tensor  # (V,)
    teacher: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    teacher_logprobs: Tensor
    teacher_probs: Tensor
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where labels count
    weights: Tensor  # (B, T) float32, 0 where labels do not count
    count: Tensor  # () int64
    ids: Tensor  # (B, T, K) the teacher's likeliest tokens
    listed: Tensor  # (B, T, K) and their log-probabilities, −inf where labels do not count


LEARNS = ("student", "weight", "bias")
Call = Callable[[Given], Any]


def given(batch: int = B, tokens: int = T, *, counted: bool = True) -> Given:
    """Ordinary inputs; of other sizes, or with nothing that counts."""
    student, teacher = 2 * torch.randn(2, batch, tokens, V)
    labels = torch.randint(V, (batch, tokens))
    labels[:, 1::3] = IGNORE
    if not counted:
        labels[:] = IGNORE
    mask = (labels != IGNORE).long()
    listed, ids = teacher.log_softmax(-1).topk(4)
    return Given(
        student,
        *torch.randn(2, V, V)[:1],
        torch.randn(V),
        teacher,
        torch.randn(V, V),
        torch.randn(V),
        teacher.log_softmax(-1),
        teacher.softmax(-1),
        labels,
        mask,
        mask * (0.5 + torch.rand(batch, tokens)),
        mask.sum(),
        ids,
        listed.masked_fill((labels == IGNORE).unsqueeze(-1), -torch.inf),
    )


def trainer(x: Given, forbidden: Tensor | None = None) -> Any:
    """As much of MiniLLM's Loss as its method reads."""
    answers = SimpleNamespace(compute_logits_and_log_probs=lambda *a, **k: x.teacher)
    return SimpleNamespace(trainer=answers, args=SimpleNamespace(model_parallel=False))


class Model:
    """A teacher that answers with its logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def eval(self) -> None: ...

    def __call__(self, **batch: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


CONTEXT = SimpleNamespace(
    trainer=SimpleNamespace(global_step=0, estimated_stepping_batches=10), tokenizer=SimpleNamespace(pad_token_id=4)
)


def adaptive(x: Given) -> Tensor:
    """The loss of a TAID that has seen none before; its buffers lie where the inputs do."""
    with torch.device("cpu"):
        module = taid.TAID()
    return module(CONTEXT, x.student, x.teacher, x.mask)["distil_loss"]


def named(loss: Any) -> str:
    """module.name"""
    return f"{loss.__module__.split('.')[-1]}.{loss.__name__}"


def calls() -> dict[str, Call]:
    """Every drop-in, in each of its reductions that has code of its own."""
    table: dict[str, Call] = {}
    logp = lambda x: x.student.log_softmax(-1)[..., : x.teacher_probs.shape[-1]]  # noqa: E731

    for reduction in trl.REDUCTIONS:
        table[f"trl.generalized_jsd_loss-{reduction}"] = lambda x, r=reduction: trl.generalized_jsd_loss(
            x.student, x.teacher, x.labels, reduction=r
        )
        table[f"trl.generalized_jsd_loss-{reduction}-unlabelled"] = lambda x, r=reduction: trl.generalized_jsd_loss(
            x.student, x.teacher, reduction=r
        )
        table[f"trl.single_step_decomposition_loss-{reduction}"] = lambda x, r=reduction: (
            trl.single_step_decomposition_loss(logp(x), x.teacher_logprobs, x.mask, r)
        )
        table[f"liger.LigerKLDIVLoss-{reduction}"] = lambda x, r=reduction: liger.LigerKLDIVLoss(reduction=r)(
            logp(x), x.teacher_probs
        )
        table[f"liger.LigerKLDIVLoss-{reduction}-log"] = lambda x, r=reduction: liger.LigerKLDIVLoss(
            reduction=r, log_target=True
        )(logp(x), x.teacher_logprobs)
        table[f"liger.LigerTVDLoss-{reduction}"] = lambda x, r=reduction: liger.LigerTVDLoss(r)(
            logp(x).exp(), x.teacher_probs, x.labels
        )
        table[f"modelopt-{reduction}"] = lambda x, r=reduction: modelopt.LogitsDistillationLoss(2.0, r)(
            x.student, x.teacher
        )
    table["trl.generalized_jsd_loss-items"] = lambda x: trl.generalized_jsd_loss(
        x.student, x.teacher, x.labels, num_items_in_batch=x.count
    )
    for items in (False, True):
        table[f"trl.chunked_divergence_loss-{items}"] = lambda x, items=items: trl.chunked_divergence_loss(
            x.student, x.teacher, x.weight, x.teacher_weight, x.mask, 0.5, x.count if items else None, x.bias,
            x.teacher_bias,
        )[0]  # fmt: skip
    table["trl.compute_full_logit_self_distillation_loss"] = lambda x: trl.compute_full_logit_self_distillation_loss(
        x.student, x.teacher, distillation_alpha=0.5
    )

    table["liger.LigerFusedLinearJSD"] = lambda x: liger.LigerFusedLinearJSD()(
        x.student, x.weight, x.teacher, x.teacher_weight, x.labels
    )
    for mix in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0)):
        table[f"liger.LigerFusedLinearJSDLoss-{mix}"] = lambda x, mix=mix: liger.LigerFusedLinearJSDLoss(
            *mix, return_soft_hard_loss=True
        )(x.student, x.weight, x.teacher, x.teacher_weight, x.labels, x.bias, x.teacher_bias)[0]
    for reduction in ("batchmean", "mean", "sum"):
        table[f"liger.LigerFusedLinearKLDivLoss-{reduction}"] = lambda x, r=reduction: liger.LigerFusedLinearKLDivLoss(
            r, temperature=2.0
        )(x.student, x.weight, x.teacher_probs, x.labels)
    for beta in (0.0, 0.5, 1.0):
        table[f"liger.LigerJSD-{beta}"] = lambda x, beta=beta: liger.LigerJSD(beta)(
            logp(x), x.teacher_logprobs, x.labels
        )
        table[f"swift-{beta}"] = lambda x, beta=beta: swift.jsd_loss(x.student, x.teacher, beta)

    for kind in ("Forward", "Reverse", "Symmetric"):
        whole, chunked = (getattr(torchtune, f"{kind}KL{name}")() for name in ("Loss", "WithChunkedOutputLoss"))
        table[f"torchtune-{kind}"] = lambda x, loss=whole: loss(x.student, x.teacher, x.labels)
        table[f"torchtune-{kind}-chunked"] = lambda x, loss=chunked: loss(
            x.student.chunk(2, 1), x.teacher.chunk(2, 1), x.labels
        )
    for reverse in (False, True):
        loss = megatron.LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1), reverse=reverse)
        table[f"megatron-{reverse}"] = lambda x, loss=loss: loss(x.student, x.teacher)[0]
    loss = modelopt.TopKLogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1), top_k=4)
    table["megatron-TopKLogitsKLLoss"] = lambda x, loss=loss: loss(x.student, x.teacher)[0]
    for ghost in (False, True):
        table[f"topk.megatron-{ghost}"] = lambda x, ghost=ghost: megatron.topk_kl_div(
            x.student, x.listed, x.ids, 1, 0, None, ghost
        )
    for tail in (False, True):
        trainer_of = SimpleNamespace(loss_add_tail=tail, beta=1.0)
        table[f"trl.compute_full_logit_and_topk-{tail}"] = lambda x, tail=tail: trl.compute_topk_self_distillation_loss(
            x.student, x.teacher, distillation_topk=4, distillation_alpha=0.0, distillation_add_tail=tail
        )
        table[f"topk.trl-server-{tail}"] = lambda x, of=trainer_of: trl.server_forward_kl_loss(
            of, {"topk_token_ids": x.ids, "topk_logprobs": x.listed}, x.student, x.labels
        )
        table[f"topk.trl-server-top_1-{tail}"] = lambda x, of=trainer_of: trl.server_sparse_top_1_divergence_loss(
            of, x.student, x.ids[..., 0], x.listed[..., 0], x.ids[..., 1], x.listed[..., 1], x.labels
        )
        table[f"topk.trl-chunked_jsd_loss-{tail}"] = lambda x, tail=tail: trl.chunked_jsd_loss(
            x.student.flatten(0, 1), x.weight, x.bias, 1.0, None, x.ids.flatten(0, 1), x.listed.flatten(0, 1),
            x.mask.flatten().bool().unsqueeze(-1), 0.5, 1.0, tail, None, 1, 8,
        )[0]  # fmt: skip
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))
    table["topk.verl"] = lambda x: verl.compute_forward_kl_topk(x.student, x.listed, x.ids, config, "bshd")[
        "distillation_losses"
    ]
    for clamp in (None, -2.0):
        table[f"topk.veomni-{clamp}"] = lambda x, clamp=clamp: sum(
            veomni.chunk_topk_distill_function(
                x.student, x.weight, x.labels, x.ids, x.listed, shift_labels=x.labels, log_prob_min_clamp=clamp
            )[:3]
        )
    table["topk.axolotl"] = lambda x: axolotl.loss(x.student, x.ids, x.listed, x.mask.unsqueeze(-1).expand(x.ids.shape))
    table["topk.axolotl-items"] = lambda x: axolotl.loss(
        x.student, x.ids, x.listed, x.mask.unsqueeze(-1).expand(x.ids.shape), x.count
    )
    for normalize in (False, True):
        fused = axolotl.LigerFusedLinearKLTopKLogprobLoss(normalize_topk=normalize)
        table[f"topk.axolotl-fused-{normalize}"] = lambda x, fused=fused: fused(
            x.weight, x.student, x.ids, x.listed, x.mask.unsqueeze(-1).expand(x.ids.shape), x.labels, x.bias
        )
    for name in ("sparse_kl_div", "sparse_js_div", "sparse_tvd"):
        for missing in distillkit.MISSING:
            table[f"topk.distillkit-{name}-{missing}"] = lambda x, name=name, missing=missing: getattr(
                distillkit, name
            )(x.student, x.ids, x.listed, x.mask, missing=missing, temperature=2.0)
    table["topk.swift"] = lambda x: swift.gkd_loss(
        x.student,
        SimpleNamespace(topk_logprobs=x.listed, topk_indices=x.ids, full_logits=None, labels=x.labels),
        x.labels, 0.3, 2.0,
    )[0]  # fmt: skip
    table["automodel"] = lambda x: automodel.KDLoss(temperature=2.0)(x.student, x.teacher, x.labels)
    table["automodel-items"] = lambda x: automodel.KDLoss()(x.student, x.teacher, x.labels, x.count)

    for loss in (
        distillm.forward_kl, distillm.reverse_kl, distillm.symmetric_kl, distillm.js_distance, distillm.tv_distance,
        distillm.skewed_forward_kl, distillm.skewed_reverse_kl, abkd.symmetric_kl, abkd.wsd, abkd.js_distance,
        abkd.bdkd,
    ):  # fmt: skip
        table[named(loss)] = lambda x, f=loss: f(x.student, x.teacher, {"label": x.labels})
    table["abkd.AKL"] = lambda x: abkd.AKL(x.teacher, x.student, {"label": x.labels})
    for loss in (abkd.ab_div, amid.ab_div):
        table[named(loss)] = lambda x, f=loss: f(x.student, x.teacher, {"label": x.labels}, 0.2, 0.7)
    table["abkd.alphanet"] = lambda x: abkd.alphanet(x.student, x.teacher, {"label": x.labels}, 0.2, 0.9)
    arguments = SimpleNamespace(amid_alpha=0.5, amid_lam=0.5, amid_div_name="fkl", amid_div_order="pr")
    table["amid.amid"] = lambda x: amid.amid(x.student, x.teacher, {"label": x.labels}, arguments)

    for reduction in ("none", "mean", "sum"):
        for name, loss in kdflow.LOSS_DICT.items():
            table[f"kdflow.{name}-{reduction}"] = lambda x, f=loss, r=reduction: f(
                x.student, x.teacher, 2.0, reduction=r, labels=x.labels
            )
        for loss in (kdflow.compute_kl_div, kdflow.compute_adaptive_kl_div):
            table[f"kdflow.chunked_loss-{loss.__name__}-{reduction}"] = lambda x, f=loss, r=reduction: (
                kdflow.chunked_loss(
                    x.student, SimpleNamespace(weight=x.weight, bias=x.bias), f, None, x.teacher,
                    SimpleNamespace(weight=x.teacher_weight, bias=x.teacher_bias), None, x.labels, 1, r,
                    lambda chunk_loss, **given: {"loss": (chunk_loss.sum(), 1)},
                )
            )  # fmt: skip
        table[f"kdflow.compute_cross_entropy-{reduction}"] = lambda x, r=reduction: kdflow.compute_cross_entropy(
            x.student, x.labels, r
        )

    for kind in ("distillm_v2", "gkd", "kd"):
        table[f"distillm2-{kind}"] = lambda x, kind=kind: torch.stack(
            distillm2.get_batch_logps(x.student, x.teacher, x.labels, True, loss_type=kind, logp_logq=0.02)
        )
    for loss in (taid.ForwardKL, taid.ReverseKL, taid.JS, taid.TVD, taid.SkewForwardKL, taid.SkewReverseKL):
        for mask in ("mask", "weights"):
            table[f"{named(loss)}-{mask}"] = lambda x, loss=loss, mask=mask: loss()(
                logits=x.student, teacher_logits=x.teacher, mask=getattr(x, mask)
            )
    table["taid.TAID"] = adaptive
    table["taid.DKD"] = lambda x: taid.DKD()(
        CONTEXT, x.student, x.teacher, x.weights,
        {"model_inputs": {"labels": torch.cat((x.labels[:, :1], x.labels), 1)}},
    )  # fmt: skip

    table["minillm.get_distil_loss"] = lambda x: minillm.get_distil_loss(
        SimpleNamespace(model_parallel=False), None, None, Model(x.teacher), {}, {"label": x.labels}, x.student
    )
    table["minillm.single_step_reg"] = lambda x: minillm.single_step_reg(
        trainer(x), x.labels, x.labels, x.weights, x.student, None, {}
    )
    table["minillm.get_log_probs"] = lambda x: minillm.get_log_probs(x.student, x.labels.clamp(min=0), x.mask)
    return table


CALLS = calls()
LABELLED = [name for name in CALLS if not name.startswith(("liger.LigerKLDIV", "modelopt", "megatron", "swift"))]
LABELLED = [name for name in LABELLED if "full_logit" not in name and "unlabelled" not in name]
COUNTED = [name for name in CALLS if name.endswith(("items", "loss-True"))]


def run(call: Call, x: Given) -> list[Tensor]:
    """The value and the gradients of the student's leaves that the call reads, for an upstream gradient of ones."""
    leaves = {name: getattr(x, name).detach().clone().requires_grad_() for name in LEARNS}
    value = call(x._replace(**leaves))
    value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal to the last bit, dtype included."""
    assert len(found) == len(wanted) >= 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def inference(x: Given) -> Given:
    """All but the student made under inference mode."""
    with torch.inference_mode():
        return Given(*(value if name in LEARNS else value.clone() for name, value in x._asdict().items()))


@each("name", list(CALLS))
def test_inference_tensors(name: str) -> None:
    """Nothing flows to a teacher, so it may come out of torch.inference_mode(), and so may labels, masks and counts."""
    x = given()
    same(run(CALLS[name], inference(x)), run(CALLS[name], x))


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """torch.set_default_dtype, as training scripts use it to build a model."""
    yield request.param
    torch.set_default_dtype(torch.float32)


@each("name", list(CALLS))
def test_the_default_dtype_is_not_read(name: str, default_dtype: torch.dtype) -> None:
    x = given()
    wanted = run(CALLS[name], x)
    torch.set_default_dtype(default_dtype)
    same(run(CALLS[name], x), wanted)


@each("name", list(CALLS))
def test_the_default_device_is_not_read(name: str) -> None:
    """What the inputs are made on is where everything happens."""
    x = given()
    wanted = run(CALLS[name], x)
    with torch.device("meta"):
        found = run(CALLS[name], x)
    same(found, wanted)


@each("size", [(0, T), (B, 0)])
@each("name", list(CALLS))
def test_empty_batches(name: str, size: tuple[int, int]) -> None:
    """0 with a graph where there is a scalar, and zero gradients."""
    found = run(CALLS[name], given(*size))
    for value in found:
        assert value.isfinite().all()
        assert not value.any()


@each("name", LABELLED)
def test_nothing_counts(name: str) -> None:
    """0 with a zero gradient; a count that came along is 0 too."""
    found = run(CALLS[name], given(counted=False))
    if not name.startswith("minillm.get_log_probs"):
        assert not found[0].any()
    for value in found[1:]:
        assert not value.any()


@each("name", COUNTED)
@each("count", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_count_of_zero(name: str, count: Any) -> None:
    """Trainers pass the count of their whole batch, as a number or a tensor."""
    found = run(CALLS[name], given(counted=False)._replace(count=count))
    for value in found:
        assert not value.any()


SUMS = [name for name in CALLS if "-sum" in name and name.replace("-sum", "-none") in CALLS]


@each("name", SUMS)
def test_none_sums_to_the_sum(name: str) -> None:
    """Rows of log-probabilities and probabilities need not be whole for that: here some columns of them."""
    x = given()
    x = x._replace(teacher_probs=x.teacher_probs[..., :9], teacher_logprobs=x.teacher_logprobs[..., :9])
    one, other = (run(CALLS[name.replace("-sum", kind)], x) for kind in ("-sum", "-none"))
    torch.testing.assert_close(other[0].sum(), one[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(other[1:], one[1:], rtol=1e-4, atol=1e-6)


def test_long_masks_in_half_precision() -> None:
    """The sum of 301 ones is 300 or 302 in bfloat16, and that of 70,000 is infinite in float16."""
    student, teacher = torch.randn(2, 1, 301, 3)
    inputs = {"lightning_module": CONTEXT, "logits": student, "teacher_logits": teacher}
    for loss in (taid.ForwardKL(), taid.JS(), taid.TAID()):
        found = [loss(**inputs, mask=torch.ones(1, 301, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
        one, other = (x["distil_loss"] if isinstance(x, dict) else x for x in found)
        assert torch.equal(one, other)
