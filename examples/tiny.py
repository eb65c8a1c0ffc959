"""What the examples share: Python's standard library as text, and Qwen2 models small enough for a CPU.

Nothing is downloaded. With a model and data of your own, nothing of this file is needed.
"""

import argparse
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

IGNORED = -100
VOCAB, LENGTH, BATCH = 4096, 64, 16  # BATCH rows of LENGTH tokens
WORD = r"\w+|\s+|[^\w\s]"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steps(about: str | None, default: int = 60) -> int:
    """The command line's number of steps. Every run has the same random numbers."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=default, help=f"of every training (default: {default})")
    torch.manual_seed(0)
    return parser.parse_args().steps


@cache
def words(files: int = 150) -> list[str]:
    """The library's words, spaces and signs, in order."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    return [word for path in paths for word in re.findall(WORD, path.read_text(errors="ignore"))]


@cache
def vocabulary() -> dict[str, int]:
    """Ids of the commonest words; 0 is every other one."""
    return {word: i for i, (word, _) in enumerate(Counter(words()).most_common(VOCAB - 1), 1)}


def numbered(some: Iterable[str]) -> Tensor:
    """Ids of words."""
    known = vocabulary()
    return torch.tensor([known.get(word, 0) for word in some])


def tokenizer() -> PreTrainedTokenizerFast:
    """The same ids for programs that want a tokenizer; its chats are the messages one after the other."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokens = Tokenizer(models.WordLevel({"<other>": 0, **vocabulary()}, unk_token="<other>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    other = dict(unk_token="<other>", pad_token="<other>", eos_token="<other>", bos_token="<other>")
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", **other)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def text() -> tuple[Tensor, Tensor]:
    """(rows, LENGTH + 1) ids to learn from, and as many columns of held-out ones."""
    rows = numbered(words()).unfold(0, LENGTH + 1, LENGTH)
    return rows[: -len(rows) // 10], rows[-len(rows) // 10 :]


def batches(
    rows: Tensor, steps: int, device: torch.device = DEVICE, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches, or a rank's part of each: ids, and labels, in which unknown words do not count."""
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (BATCH,), generator=generator)][part].to(device)
        labels = chosen[:, 1:]
        yield chosen[:, :-1], torch.where(labels == 0, IGNORED, labels)


def model(width: int, layers: int, tied: bool = True) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, whose output layer is its embedding unless it is not `tied`."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def train(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], steps: int, what: str = "teacher") -> None:
    """Next words, by cross-entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for ids, labels in shown(data, what, steps):
        logits = model(ids).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(rows: Tensor, steps: int, tied: bool = True) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    """A student that knows nothing, and a larger teacher, trained on the rows and frozen."""
    student, teacher = model(64, 2, tied).to(DEVICE), model(128, 3, tied).to(DEVICE)
    train(teacher, batches(rows, steps), steps)
    return student, teacher.requires_grad_(False)


def shown(items: Iterable[Any], what: str, steps: int) -> Iterable[Any]:
    """The items, with a progress bar on the first rank where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    other = os.environ.get("RANK", "0") != "0"
    return tqdm(items, what, steps, disable=True if other else None)  # None: only where it can be seen


@torch.no_grad()
def held_out_loss(loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> float:
    """The mean of loss(ids, labels) over a few batches."""
    return torch.stack([loss(*batch) for batch in batches(rows, 8)]).mean().item()


def report(what: str, steps: int, before: float, after: float) -> None:
    """Say what training did; it is an error if that is nothing."""
    print(f"{steps} steps: held-out {what} {before:.4f} -> {after:.4f} nats a token")
    if not after < before:
        raise SystemExit("the held-out loss did not fall")
