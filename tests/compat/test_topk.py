"""Top-k losses beside the functions that they replace, as released on PyPI, each file of which runs alone.

The programs themselves want a GPU or a cluster; `make test-compat` installs them without what they depend on, and what
a file imports of its own program beside the loss is a stand-in here. DistillKit is not on PyPI: its formulas are in
tests/test_compat_topk.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from beside import FLOAT32, B, K, T, V, rows, same
from compare import relative
from torch import Tensor
from trl.experimental.async_distillation import async_distillation_trainer
from trl.experimental.sdft import loss_utils as sdft
from trl.experimental.sdpo import loss_utils as sdpo
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

from fusedkd.compat import axolotl, megatron, modelopt, swift, trl, veomni, verl

pytest_plugins = ["alone"]
pytestmark = pytest.mark.unpoisoned


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("clamp", [None, -10.0, -4.0])
def test_verl(clamp: float | None, chunked: bool, original: Callable[..., Any]) -> None:
    """All five results, of nested tensors, which verl requires."""
    parallel = {"get_ulysses_sequence_parallel_world_size": lambda: 1}
    theirs = original(
        "verl", "verl.trainer.distillation.fsdp.losses", {"verl.utils.ulysses": parallel, "verl.workers.config": {}}
    )
    settings = SimpleNamespace(log_prob_min_clamp=clamp, use_chunked_topk=chunked, chunked_topk_chunk_size=4)
    student, _, ids, logp = rows()
    student = student.view(1, B * T, V)
    nested = [torch.nested.nested_tensor(list(x), layout=torch.jagged) for x in (logp, ids)]
    functions = [theirs.compute_forward_kl_topk, verl.compute_forward_kl_topk]
    found = [f(student, *nested, SimpleNamespace(distillation_loss=settings), "thd") for f in functions]
    assert [*found[0]] == [*found[1]]
    for name, value in found[0].items():
        assert found[1][name].shape == value.shape
        assert relative(found[1][name], value.double()) < FLOAT32
    calls = [
        lambda s, f=f: f(s, *nested, SimpleNamespace(distillation_loss=settings), "thd")["distillation_losses"]
        for f in functions
    ]
    same(calls, [student])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("clamp", [None, -4.0])
def test_veomni(clamp: float | None, shifted: bool, original: Callable[..., Any]) -> None:
    """Five results and their gradients by hidden states and weight."""
    state = {"get_parallel_state": lambda: SimpleNamespace(sp_enabled=False)}
    room = "veomni.ops.kernels.cross_entropy"
    stands = {"veomni.distributed.parallel_state": state, "veomni.utils.device": {}, "veomni.utils.logging": {}}
    original("veomni", f"{room}.chunk_logprobs", stands)
    theirs = original("veomni", f"{room}.chunk_topk_distill")
    _, _, ids, logp = rows()
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    leaves = [torch.randn(B, T, 16), torch.randn(V, 16)]
    for i in range(5):

        def call(hidden: Tensor, weight: Tensor, f: Any, i: int = i) -> Tensor:
            found = f(hidden, weight, labels, ids, logp, 4, -100, labels if shifted else None, 1.5, clamp)
            return found[i] if i < 3 else found[i] + 0 * found[0]

        functions = [
            lambda *x, f=f: call(*x, f)
            for f in (theirs.chunk_topk_distill_function, veomni.chunk_topk_distill_function)
        ]
        if i < 3:
            same(functions, leaves)
        else:
            one, other = (function(*leaves) for function in functions)
            assert relative(other, one.double()) < FLOAT32


@pytest.mark.parametrize("reverse", [False, True])
def test_modelopt(reverse: bool, original: Callable[..., Any]) -> None:
    """The loss, and what Megatron is told with it."""
    names = ("megatron.core", "megatron.core.pipeline_parallel.schedules", "megatron.core.transformer",
             "megatron.core.utils", "modelopt.torch.distill", "modelopt.torch.distill.config",
             "modelopt.torch.quantization.nn")  # fmt: skip
    theirs = original("nvidia-modelopt", "modelopt.torch.distill.plugins.megatron", {name: {} for name in names})
    config = SimpleNamespace(tensor_model_parallel_size=1, hidden_size=16)
    losses = [kind(config, 1.5, reverse, K) for kind in (theirs.TopKLogitsKLLoss, modelopt.TopKLogitsKLLoss)]
    student, teacher, _, _ = rows()
    assert losses[0](student, teacher)[1:] == losses[1](student, teacher)[1:]
    same([lambda s, loss=loss: loss(s, teacher)[0] for loss in losses], [student])


@pytest.mark.parametrize("ghost", [False, True])
def test_megatron(ghost: bool, original: Callable[..., Any]) -> None:
    """Cached log-probabilities, with places that hold no token."""
    room = "megatron.training"
    names = ("megatron.core", "megatron.core.models.common.language_module.language_module", f"{room}.utils")
    sentinel = {"CACHED_LOGITS_LOGPROB_SENTINEL": megatron.SENTINEL}
    stands = {**{name: {} for name in names}, f"{room}.distillation.utils_logits": sentinel}
    theirs = original("megatron-core", f"{room}.distillation.cached_logits_loss", stands)
    student, _, ids, logp = rows()
    places = torch.arange(K) >= torch.randint(1, K + 1, (B, T, 1))
    ids, logp = ids.masked_fill(places, -1), logp.masked_fill(places, megatron.SENTINEL)
    # Megatron's changes its logits in place, which no leaf may be.
    functions = (theirs.topk_kl_div, megatron.topk_kl_div)
    same([lambda s, f=f: f(1 * s, logp, ids, 1, 0, None, ghost) for f in functions], [student])


@pytest.mark.parametrize("items", [-1, 9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_axolotl(temperature: float, items: int, original: Callable[..., Any]) -> None:
    theirs = original("axolotl", "axolotl.integrations.kd.topk_logprob.forward_kl")
    student, _, ids, logp = rows()
    mask = torch.rand(B, T, K) < 0.7
    same([lambda s, f=f: f(s, ids, logp, mask, items, temperature) for f in (theirs.loss, axolotl.loss)], [student])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_axolotl_fused(beta: float, normalize: bool, original: Callable[..., Any]) -> None:
    """The value with its T², and the gradient with the T² that axolotl's lacks."""
    original("axolotl", "axolotl.integrations.kd.utils")
    theirs = original("axolotl", "axolotl.integrations.kd.kernels.liger")
    _, _, ids, logp = rows()
    logp = logp - logp.logsumexp(-1, keepdim=True)
    mask = (torch.rand(B, T, 1) < 0.7).expand(B, T, K)
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    leaves = [torch.randn(V, 16), torch.randn(B, T, 16), torch.randn(V)]
    kinds = (theirs.LigerFusedLinearKLTopKLogprobLoss, axolotl.LigerFusedLinearKLTopKLogprobLoss)
    for hard, soft, temperature, scale in ((0.3, 0.6, 1.0, 1.0), (0.0, 0.6, 2.0, 4.0)):
        losses = [kind(hard, soft, temperature, beta, compiled=False, normalize_topk=normalize) for kind in kinds]
        same([lambda w, h, b, f=f: f(w, h, ids, logp, mask, labels, b) for f in losses], leaves, (scale,))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_swift(beta: float, listed: bool, original: Callable[..., Any]) -> None:
    """Loss and count, of a teacher that read another prompt; full logits too."""
    theirs = original("ms-swift", "swift.rlhf_trainers.gkd_loss")
    student, teacher, ids, logp = rows()
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    logp[0, 3] = -torch.inf
    output = theirs.TeacherOutput(topk_logprobs=logp.roll(1, 1), topk_indices=ids.roll(1, 1), labels=labels.roll(1, 1))
    if not listed:
        output = theirs.TeacherOutput(full_logits=teacher, labels=labels)
    functions = [theirs.gkd_loss, swift.gkd_loss]
    counts = [f(student, output, labels, beta, 2.0)[1] for f in functions]
    assert torch.equal(*counts)
    same([lambda s, f=f: f(s, output, labels, beta, 2.0)[0] for f in functions], [student])


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("utilities", [sdft, sdpo])
def test_trl_self_distillation(utilities: Any, alpha: float, tail: bool) -> None:
    student, teacher, _, _ = rows()
    options = {"distillation_topk": K, "distillation_alpha": alpha, "distillation_add_tail": tail}
    functions = (utilities.compute_topk_self_distillation_loss, trl.compute_topk_self_distillation_loss)
    same([lambda s, f=f: f(s, teacher, **options) for f in functions], [student])


def server(beta: float, tail: bool) -> Any:
    """As much of the trainer as its methods read."""
    reduce = ServerDistillationTrainer._reduce_divergence_loss
    return SimpleNamespace(beta=beta, loss_add_tail=tail, _reduce_divergence_loss=reduce)


@pytest.mark.parametrize("tail", [False, True])
def test_trl_server(tail: bool) -> None:
    """Forward KL, with places that hold no token."""
    student, _, ids, logp = rows()
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    logp = logp.masked_fill(torch.arange(K) >= torch.randint(1, K + 1, (B, T, 1)), -torch.inf)
    given = {"topk_token_ids": ids, "topk_logprobs": logp}
    functions = (ServerDistillationTrainer._compute_server_forward_kl_loss, trl.server_forward_kl_loss)
    same([lambda s, f=f: f(server(0.0, tail), given, s.log_softmax(-1), labels) for f in functions], [student])


@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_trl_server_top_1(beta: float, tail: bool, items: int | None) -> None:
    """The likeliest and the taken token, which are the same one at some places."""
    student, teacher, ids, logp = rows()
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    taken = torch.where(torch.rand(B, T) < 0.5, ids[..., 0], ids[..., 2])
    of_taken = teacher.log_softmax(-1).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
    given = (ids[..., 0], logp[..., 0], taken, of_taken, labels, items)
    functions = (
        ServerDistillationTrainer._compute_sparse_top_1_divergence_loss,
        trl.server_sparse_top_1_divergence_loss,
    )
    same([lambda s, f=f: f(server(beta, tail), s.log_softmax(-1), *given) for f in functions], [student])


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_chunked_jsd_loss(beta: float, tail: bool) -> None:
    """Five results, with logit scale, softcap, temperature and several teachers."""
    _, _, ids, logp = (x.flatten(0, 1) for x in rows())
    valid = torch.arange(K) < torch.randint(1, K + 1, (B * T, 1))
    which = torch.randint(3, (B * T,))
    leaves = [torch.randn(B * T, 16), torch.randn(V, 16), torch.randn(V)]
    given = (0.7, 9.0, ids, logp, valid, beta, 1.5, tail, which, 3, 4)
    functions = (async_distillation_trainer._chunked_jsd_loss, trl.chunked_jsd_loss)
    one, other = (f(*leaves, *given) for f in functions)
    for theirs, ours in zip(one, other, strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs.double()) < FLOAT32
    same([lambda *x, f=f: f(*x, *given)[0] for f in functions], leaves)


def test_trl_is_patched() -> None:
    """The names of TRL 1.16 are where `patch` expects them."""
    trl.patch("server_distillation", "async_distillation", "sdft", "sdpo")
    try:
        assert async_distillation_trainer._chunked_jsd_loss is trl.chunked_jsd_loss
        assert ServerDistillationTrainer._compute_server_forward_kl_loss is trl.server_forward_kl_loss
    finally:
        trl.unpatch()
    assert async_distillation_trainer._chunked_jsd_loss is not trl.chunked_jsd_loss
