"""TRL's own trainers on a CPU, some real steps with and without `fusedkd.compat.trl.patch()`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import relative
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import loss_utils as sdft
from trl.experimental.sdpo import loss_utils as sdpo
from trl.trainer import distillation_trainer

import fusedkd.compat.trl as shim

pytestmark = pytest.mark.unpoisoned

STEPS = 4
BFLOAT16 = 2**-7  # relative: TRL rounds the gradient of the logits, and both round what they return
FLOAT32 = 1e-5  # relative: some hundred roundings of 6e-8, through four steps of training
WORDS = [f"w{i}" for i in range(120)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{{ 'assistant ' if add_generation_prompt }}"
)
COMMON = dict(
    per_device_train_batch_size=2, max_steps=STEPS, learning_rate=0.5, optim="sgd", lr_scheduler_type="constant",
    use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, seed=0, bf16=False, gradient_checkpointing=False,
    disable_tqdm=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    shim.unpatch()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, in memory."""
    special = ["<unk>", "<pad>", "<s>", "</s>", "user", "assistant"]
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left",
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def model(width: int, seed: int, vocabulary: int) -> LlamaForCausalLM:
    """Two layers with large enough weights that student and teacher differ."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=1,
        )
    )


def sentences(n: int) -> list[str]:
    choose = torch.Generator().manual_seed(7)
    return [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (6,), generator=choose)) for _ in range(n)]


def distillation(folder: Path, beta: float, accumulate: int) -> tuple[Any, Any, Dataset]:
    args = DistillationConfig(
        str(folder), beta=beta, max_completion_length=8, temperature=0.8,
        gradient_accumulation_steps=accumulate, **COMMON,
    )  # fmt: skip
    return DistillationTrainer, args, Dataset.from_list([{"prompt": text} for text in sentences(16)])


def gkd(folder: Path, beta: float, accumulate: int) -> tuple[Any, Any, Dataset]:
    args = GKDConfig(
        str(folder), beta=beta, lmbda=0.5, max_new_tokens=8, max_length=64,
        gradient_accumulation_steps=accumulate, **COMMON,
    )  # fmt: skip
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(sentences(32)[:16], sentences(32)[16:], strict=True)
    ]
    return GKDTrainer, args, Dataset.from_list(rows)


def train(setup: tuple[Any, Any, Dataset]) -> tuple[list[float], torch.Tensor]:
    """Every loss the trainer saw, and all weights at the end."""
    kind, args, dataset = setup
    losses: list[float] = []

    class Recording(kind):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.item())
            return loss

    words = tokenizer()
    student, teacher = (model(width, width, len(words)) for width in (16, 32))
    trainer = Recording(model=student, teacher_model=teacher, args=args, train_dataset=dataset, processing_class=words)
    before = torch.cat([x.detach().double().flatten() for x in student.parameters()])
    trainer.train()
    after = torch.cat([x.detach().double().flatten() for x in trainer.model.parameters()])
    return losses, after - before


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("setup", [distillation, gkd])
def test_the_same_training(
    setup: Callable[..., Any], beta: float, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of every step and the way the weights went, within float32 rounding."""
    calls = 0
    original = shim.kd_loss

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    monkeypatch.setattr(shim, "kd_loss", counted)
    theirs, way = train(setup(tmp_path, beta, accumulate))
    assert calls == 0
    shim.patch()
    ours, our_way = train(setup(tmp_path, beta, accumulate))
    assert calls == len(theirs) == len(ours) == STEPS * accumulate
    assert theirs[0] > 1e-2
    assert way.norm() > 1e-2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=FLOAT32, atol=0)
    assert relative(our_way, way) < FLOAT32


def test_patch_after_a_reload() -> None:
    """TRL's module as importlib.reload leaves it, and what unpatch gives back then."""
    shim.patch("distillation")
    importlib.reload(distillation_trainer)
    original = distillation_trainer._chunked_divergence_loss
    assert original is not shim.chunked_divergence_loss
    shim.patch("distillation")
    assert distillation_trainer._chunked_divergence_loss is shim.chunked_divergence_loss
    shim.unpatch()
    assert distillation_trainer._chunked_divergence_loss is original


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("utilities", [sdft, sdpo])
def test_full_logit_self_distillation(utilities: Any, alpha: float) -> None:
    logits = 3 * torch.randn(2, 2, 7, 301)
    found = []
    for function in (
        utilities.compute_full_logit_self_distillation_loss,
        shim.compute_full_logit_self_distillation_loss,
    ):
        student = logits[0].clone().requires_grad_()
        loss = function(student, logits[1], distillation_alpha=alpha)
        loss.sum().backward()
        found.append((loss.detach(), student.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert relative(ours, theirs.double()) < FLOAT32


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_generalized_jsd_loss(beta: float, reduction: str, labelled: bool) -> None:
    logits = 3 * torch.randn(2, 2, 7, 301)
    labels = torch.randint(301, (2, 7)).masked_fill(torch.rand(2, 7) < 0.3, -100) if labelled else None
    found = []
    for function in (GKDTrainer.generalized_jsd_loss, shim.generalized_jsd_loss):
        student = logits[0].clone().requires_grad_()
        loss = function(student, logits[1], labels, beta, 1.3, reduction)
        loss.sum().backward()
        found.append((loss.detach(), student.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs.double()) < FLOAT32


def test_a_float32_bias_beside_bfloat16() -> None:
    """Both add it in float32: no rounding of the bias parts them, only that of dZ where it is stored."""
    states = [torch.randn(2, 7, width).bfloat16() for width in (16, 24)]
    weights = [torch.randn(301, width).bfloat16() for width in (16, 24)]
    biases = list(3 * torch.randn(2, 301))
    mask = torch.ones(2, 7, dtype=torch.int)
    found = []
    for function in (distillation_trainer._chunked_divergence_loss, shim.chunked_divergence_loss):
        bias = biases[0].clone().requires_grad_()
        loss, _, _ = function(*states, *weights, mask, 0.5, None, bias, biases[1])
        loss.backward()
        found.append((loss.detach(), bias.grad))
    assert relative(found[1][0], found[0][0].double()) < FLOAT32
    assert relative(found[1][1], found[0][1].double()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunked_divergence_loss(beta: float, items: int | None, dtype: torch.dtype) -> None:
    """All fourteen arguments; the loss, the entropy, the count and every gradient."""
    states = [torch.randn(2, 7, width).to(dtype) for width in (16, 24)]
    weights = [torch.randn(301, width).to(dtype) for width in (16, 24)]
    biases = list(torch.randn(2, 301).to(dtype))
    mask = (torch.rand(2, 7) < 0.7).int()
    found = []
    for function in (distillation_trainer._chunked_divergence_loss, shim.chunked_divergence_loss):
        leaves = [x[0].clone().requires_grad_() for x in (states, weights, biases)]
        loss, entropy, count = function(
            leaves[0],
            states[1],
            leaves[1],
            weights[1],
            mask,
            beta,
            items,
            leaves[2],
            biases[1],
            0.7,
            1.3,
            9.0,
            11.0,
            1.5,
        )
        loss.backward()
        found.append(([loss.detach(), entropy, count], [x.grad for x in leaves]))
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        assert relative(ours, theirs.double()) < FLOAT32
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert relative(ours, theirs.double()) < (FLOAT32 if dtype == torch.float32 else BFLOAT16)
