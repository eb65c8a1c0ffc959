"""The demo: distil small language models on real text, and set the fused loss beside the plain one.

A tokenizer and a teacher are trained on the text, then one student per divergence, all from the same weights.
A student learns from `kd_loss(Head, Head)` alone, so its training never holds the [tokens, vocabulary] logits.
One more learns from a file of the teacher's likeliest tokens, while the teacher is not in memory.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Head, TopK, __version__, kd_loss
from ..topk import topk
from . import one_step
from .commands import Progress, check_file, known_divergence, positive, require, usable_device
from .eager import EAGER
from .one_step import IGNORED, REPEATS, Operands, Sizes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tqdm import tqdm
    from transformers import Qwen3ForCausalLM

EXTRAS = ("transformers", "tokenizers", "tqdm")
LEAST_TEXT = 20_000
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
ROWS = 1024
QUALITY_COLUMNS = (
    "",
    "steps",
    "seconds",
    "perplexity",
    "KL(teacher || it)",
    "KL(it || teacher)",
    "entropy",
    "same top-1",
)
STEP_COLUMNS = ("", "loss", "dH error", "dW error", "ms", "peak MB")
AGAINST_COLUMNS = ("V", "eager ms", "fusedkd ms", "of it", "eager MB", "fusedkd MB", "of it")
PICTURE = "fusedkd-demo.png"
LAPTOP = Sizes(512, 64, 128, (4096, 32_768, 131_072))

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """When training ends: after so many seconds or so many steps, whichever comes first."""

    seconds: float | None = None
    steps: int | None = None

    def shares(self) -> Iterator[float]:
        """Yield before each step which share of the budget is used, until none is left."""
        seconds, steps = self.seconds or math.inf, self.steps or math.inf
        started = time.perf_counter()
        step = 0
        while (share := max(step / steps, (time.perf_counter() - started) / seconds)) < 1:
            yield share
            step += 1


@dataclass(frozen=True)
class Recipe:
    """A model whose attention heads are 32 wide, and how it is trained."""

    hidden: int
    layers: int
    rate: float
    budget: Budget


@dataclass(frozen=True)
class Plan:
    """All that decides a run; without `head_vocab` the heads are as long as the tokenizer's vocabulary.

    likeliest: tokens of a position in the cache that the first divergence is distilled from once more.
    against: sizes of the steps that are set against V, of operands that nothing is trained for.
    """

    divergences: tuple[str, ...] = ("fkl", "rkl", "ab", "drkl")
    device: str = "cpu"
    seed: int = 0
    text_bytes: int = 3_000_000
    tokenizer_vocab: int = 4096
    head_vocab: int | None = None
    teacher: Recipe = Recipe(128, 4, 4e-3, Budget(seconds=60))
    student: Recipe = Recipe(64, 2, 6e-3, Budget(seconds=20, steps=300))
    length: int = 128
    batch: int = 8
    held_out: int = 64
    likeliest: int = 32
    threads: int = torch.get_num_threads()
    against: Sizes = LAPTOP


CPU = Plan()
GPU = Plan(
    text_bytes=8_000_000,
    tokenizer_vocab=8192,
    head_vocab=151_936,
    teacher=Recipe(512, 8, 1e-3, Budget(seconds=60)),
    student=Recipe(256, 4, 1e-3, Budget(seconds=20, steps=300)),
    length=256,
    batch=16,
    held_out=128,
    threads=1,
    against=Sizes(2048, 256, 512, (8192, 32_768, 131_072)),
)
QUICK = Plan(
    text_bytes=300_000,
    tokenizer_vocab=512,
    teacher=Recipe(64, 2, 5e-3, Budget(steps=120)),
    student=Recipe(32, 1, 5e-3, Budget(steps=80)),
    length=64,
    held_out=16,
    threads=1,
    against=Sizes(64, 32, 64, (512, 8192)),
)


class Windows(NamedTuple):
    """Token windows [rows, length] and their labels, already shifted; last positions and padding are ignored."""

    ids: Tensor
    labels: Tensor
    at: Tensor  # (rows,) which windows of the text they are

    def spread(self, count: int) -> Windows:
        """Return at most `count` windows, taken evenly."""
        stride = -(-len(self.ids) // count)
        return Windows(*(x[::stride] for x in self))


class Corpus(NamedTuple):
    """Text as tokens.

    text, held_out: windows to learn from and to evaluate on. vocab: the tokenizer's. unseen: documents held out.
    """

    text: Windows
    held_out: Windows
    vocab: int
    unseen: int


class Training(NamedTuple):
    """What one training took, and its last loss."""

    steps: int
    seconds: float
    loss: float


class Quality(NamedTuple):
    """Held-out means per token: perplexity, both KLs and the entropy in nats, share of equal top-1 tokens."""

    perplexity: float
    kl: float  # KL(teacher || model)
    reverse_kl: float
    entropy: float
    agreement: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument(
        "--divergence",
        dest="divergences",
        metavar="NAME",
        action="append",
        type=known_divergence,
        help=f"distil with this divergence; may be repeated (default: {' '.join(CPU.divergences)})",
    )
    seconds, steps = partial(positive, float), partial(positive, int)
    parser.add_argument("--text", metavar="DIR", type=Path, help="learn the text files below DIR, not Python's library")
    parser.add_argument("--teacher-seconds", metavar="S", type=seconds, help="time to train the teacher (default: 60)")
    parser.add_argument("--student-seconds", metavar="S", type=seconds, help="most time for each student (default: 20)")
    parser.add_argument("--student-steps", metavar="N", type=steps, help="steps to train each student (default: 300)")
    parser.add_argument("--device", type=usable_device, help="default: cuda or xpu if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny models for a few seconds, to see that all runs")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers to FILE")
    picture = f"draw memory and time against V (default: beside the numbers, as PNG, else {PICTURE})"
    parser.add_argument("--picture", metavar="FILE", type=Path, help=picture)


def run(args: argparse.Namespace) -> int:
    """Run the demo, print its tables and write its numbers."""
    started = time.perf_counter()
    require("demo", "demo", EXTRAS)
    check_file("--json", args.json)
    check_file("--picture", args.picture)
    plan = _plan(args)
    report = distil(read_documents(args.text, plan), plan, Progress(args.quiet))
    report["seconds"] = time.perf_counter() - started
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(_picture(report["against"], args.picture or (args.json or Path(PICTURE)).with_suffix(".png")))
    print(f"\n{one_step.headline(report['against'])}")
    return 0


def _picture(against: dict[str, Any], file: Path) -> str:
    """Draw it, if that can be, and say what became of it."""
    if find_spec("matplotlib") is None:
        return "no picture: matplotlib is missing (pip install 'fusedkd[demo]')"
    one_step.draw(against, file)
    return f"memory and time against V are drawn in {file}"


def _plan(args: argparse.Namespace) -> Plan:
    kinds = (kind for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available())
    device = args.device or next(kinds, "cpu")
    plan = QUICK if args.quick else CPU if torch.device(device).type == "cpu" else GPU
    plan = replace(
        plan, device=device, seed=args.seed, divergences=tuple(dict.fromkeys(args.divergences or plan.divergences))
    )
    if args.teacher_seconds:
        plan = replace(plan, teacher=replace(plan.teacher, budget=Budget(args.teacher_seconds)))
    if args.student_seconds or args.student_steps:
        budget = Budget(args.student_seconds, args.student_steps)
        plan = replace(plan, student=replace(plan.student, budget=budget))
    return plan


def read_documents(folder: Path | None, plan: Plan) -> list[str]:
    """Return as much text as is wanted from below `folder`, or from Python's own library; the seed fixes the order.

    Raises:
        argparse.ArgumentError: there is no such folder, or too little text to learn from.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise argparse.ArgumentError(None, f"--text: no folder {root}")
    paths = sorted(path for path in root.rglob("*" if folder else "*.py") if _is_wanted(path, root, folder is None))
    random.Random(plan.seed).shuffle(paths)
    documents: list[str] = []
    room = plan.text_bytes
    for path in paths:
        with path.open("rb") as file:
            data = file.read(min(room, plan.text_bytes // 10))
        if data and b"\0" not in data:
            documents.append(data.decode(errors="ignore"))
            room -= len(data)
        if not room:
            break
    if len(documents) < 2 or plan.text_bytes - room < LEAST_TEXT:
        found = f"{len(documents)} text files with {plan.text_bytes - room:,} bytes below {root}"
        raise argparse.ArgumentError(None, f"--text: {found}; the demo needs at least 2 files and {LEAST_TEXT:,} bytes")
    return documents


def _is_wanted(path: Path, root: Path, library: bool) -> bool:
    parts = path.relative_to(root).parts
    hidden = any(part.startswith(".") for part in parts)
    return path.is_file() and not hidden and not (library and LEFT_OUT.intersection(parts))


def train_tokenizer(documents: Sequence[str], vocab: int, progress: Progress) -> Tokenizer:
    """Return a byte-level BPE tokenizer learnt from the documents; token 0 opens a document and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|document|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress.stage("tokenizer", len(documents)) as bar:
        tokenizer.train_from_iterator(_ticking(documents, bar), trainer)
    return tokenizer


def _ticking(items: Sequence[T], bar: tqdm[Any]) -> Iterator[T]:
    for item in items:
        yield item
        bar.update()


def windows(documents: Sequence[str], tokenizer: Tokenizer, plan: Plan) -> Windows:
    """Return the documents as token windows; no window spans two documents."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        tokens = [0, *encoding.ids]
        for start in range(0, len(tokens) - 1, plan.length):
            window = tokens[start : start + plan.length]
            padding = plan.length - len(window)
            ids.append(window + [0] * padding)
            labels.append(window[1:] + [IGNORED] * (padding + 1))
    at = torch.arange(len(ids), device=plan.device)
    return Windows(torch.tensor(ids, device=plan.device), torch.tensor(labels, device=plan.device), at)


def corpus_of(documents: Sequence[str], plan: Plan, progress: Progress) -> Corpus:
    """Return the documents as tokens of a tokenizer that has seen none of those held out."""
    unseen = max(1, len(documents) // 10)
    tokenizer = train_tokenizer(documents[unseen:], plan.tokenizer_vocab, progress)
    text = windows(documents[unseen:], tokenizer, plan)
    held_out = windows(documents[:unseen], tokenizer, plan).spread(plan.held_out)
    return Corpus(text, held_out, tokenizer.get_vocab_size(), unseen)


def build(recipe: Recipe, vocab: int, plan: Plan) -> Qwen3ForCausalLM:
    """Return a language model with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = recipe.hidden // 32
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=plan.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(plan.device):
        return Qwen3ForCausalLM(config)


def head(model: Qwen3ForCausalLM, ids: Tensor) -> Head:
    """Return the model's head on these tokens: hidden states and weight instead of logits."""
    hidden = model.model(input_ids=ids).last_hidden_state
    return Head(hidden, model.lm_head.weight)


def next_token_loss(model: Qwen3ForCausalLM, batch: Windows) -> Tensor:
    """Return the cross entropy of the labels."""
    hidden, weight = head(model, batch.ids)[:2]
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def distillation_loss(divergence: str, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: Windows) -> Tensor:
    """Return the divergence of the student from the teacher; no logits are held."""
    with torch.no_grad():
        teacher_head = head(teacher, batch.ids)
    return kd_loss(head(student, batch.ids), teacher_head, batch.labels, divergence=divergence)


@torch.no_grad()
def write_cache(
    file: Path, teacher: Qwen3ForCausalLM, text: Windows, steps: int, k: int, plan: Plan, bar: tqdm[Any]
) -> Tensor:
    """Write the teacher's k likeliest tokens for the windows that a training of so many steps takes; return which."""
    taken = torch.cat([batch.at for batch in islice(_batches(text, plan), steps)]).unique()
    found: list[TopK] = []
    with bar:
        for at in taken.split(plan.batch):
            with _autocast(plan):
                side = head(teacher, text.ids[at])
                found.append(topk(side, k))
            bar.update(len(at))
    ids, logprobs = (torch.cat([x.cpu() for x in parts]) for parts in zip(*(part[:2] for part in found), strict=True))
    TopK(ids, logprobs, vocab_size=found[0].vocab_size).save(file)
    return taken


def cached_loss(divergence: str, student: Qwen3ForCausalLM, cache: TopK, taken: Tensor, batch: Windows) -> Tensor:
    """Return the divergence of the student from the teacher's likeliest tokens in a cache of some windows, `taken`."""
    rows = torch.searchsorted(taken, batch.at).to(cache.ids.device)
    ids, logprobs = (x[rows].to(batch.ids.device) for x in (cache.ids, cache.logprobs))
    teacher = cache._replace(ids=ids, logprobs=logprobs)
    return kd_loss(head(student, batch.ids), teacher, batch.labels, divergence=divergence)


def distil_cached(
    divergence: str,
    student: Qwen3ForCausalLM,
    file: Path,
    taken: Tensor,
    steps: int,
    text: Windows,
    plan: Plan,
    bar: tqdm[Any],
) -> Training:
    """Train a student on a file of `write_cache`, for the steps that it was made for."""
    cache = TopK.load(file)
    loss = partial(cached_loss, divergence, student, cache, taken)
    return train(student, loss, replace(plan.student, budget=Budget(steps=steps)), text, plan, bar)


def train(
    model: Qwen3ForCausalLM,
    loss_of: Callable[[Windows], Tensor],
    recipe: Recipe,
    text: Windows,
    plan: Plan,
    bar: tqdm[Any],
) -> Training:
    """Minimise a loss over random windows until the budget is used; the rate warms up, then decays linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, betas=(0.9, 0.95))
    started = time.perf_counter()
    steps, loss = 0, torch.tensor(math.nan)
    with bar:
        for share, batch in zip(recipe.budget.shares(), _batches(text, plan), strict=False):
            if steps % 20 == 0:
                choose_threads(plan.threads)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * min(1.0, 0.05 + share / 0.05) * (1 - share)
            with _autocast(plan):
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            bar.update(share - bar.n)
            if not bar.disable and steps % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.update(1 - bar.n)
    last = loss.item()
    return Training(steps, time.perf_counter() - started, last)


def choose_threads(most: int) -> None:
    """Use so many CPU threads, or one if they gain little now: on a busy machine threads mostly wait for each other."""
    x = torch.zeros(256, 4096)
    x.softmax(-1)

    def elapsed(threads: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for _ in range(50):
            x.softmax(-1)
        return time.perf_counter() - started

    torch.set_num_threads(most if most > 1 and elapsed(most) < 0.75 * elapsed(1) else 1)


def _autocast(plan: Plan) -> torch.autocast:
    kind = torch.device(plan.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def _batches(text: Windows, plan: Plan) -> Iterator[Windows]:
    generator = torch.Generator().manual_seed(plan.seed)
    while True:
        for rows in torch.randperm(len(text.ids), generator=generator).split(plan.batch):
            yield Windows(*(x[rows] for x in text))


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, text: Windows, plan: Plan, bar: tqdm[Any]) -> Quality:
    """Return the quality of a model on held-out text; the statistics come out of the fused loss."""
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    with bar:
        for ids, labels in zip(text.ids.split(plan.batch), text.labels.split(plan.batch), strict=True):
            with _autocast(plan):
                own, guide = head(model, ids), head(teacher, ids)
                kl, stats = kd_loss(own, guide, labels, reduction="none", return_stats=True)
                reverse = kd_loss(own, guide, labels, divergence="rkl", reduction="none")
                equal = (_top1(own) == _top1(guide)) & (labels != IGNORED)
            parts = (stats.student_logprob, kl, reverse, stats.student_entropy, equal)
            sums += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
            count += int((labels != IGNORED).sum())
            bar.update(len(ids))
    logprob, *means = (sums / count).tolist()
    return Quality(math.exp(-logprob), *means)


def _top1(side: Head) -> Tensor:
    rows = side.hidden.flatten(0, 1).split(ROWS)
    return torch.cat([F.linear(part, side.weight).argmax(-1) for part in rows]).view(side.hidden.shape[:-1])


def compare_step(
    divergence: str, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: Windows, plan: Plan
) -> dict[str, Any]:
    """Measure the fused loss on one batch beside the plain loss, if there is one, both against a higher precision."""
    with torch.no_grad(), _autocast(plan):
        own, guide = head(student, batch.ids), head(teacher, batch.ids)
    dtype = torch.float32 if torch.device(plan.device).type == "cpu" else torch.bfloat16
    operands = Operands(*(x.detach().to(dtype) for x in (own.hidden, own.weight, guide.hidden, guide.weight)))

    fused, plain = (partial(loss, divergence, batch.labels) for loss in (one_step.fused_loss, one_step.eager_loss))
    if divergence not in EAGER:
        return {"fused": one_step.measure(fused, operands)[0]._asdict()}
    higher = Operands(*(x.to(torch.float64 if dtype is torch.float32 else torch.float32) for x in operands))
    truth = one_step.step(plain, higher)
    result: dict[str, Any] = {}
    for name, loss_of in (("fused", fused), ("eager", plain)):
        step, gradients = one_step.measure(loss_of, operands)
        errors = [float((g - best).norm() / best.norm()) for g, best in zip(gradients[1:], truth[1:], strict=True)]
        result[name] = {**step._asdict(), "gradient_error": dict(zip(("hidden", "weight"), errors, strict=True))}
    return result


def distil(documents: Sequence[str], plan: Plan, progress: Progress) -> dict[str, Any]:
    """Train the tokenizer, the teacher and one student per divergence; return all numbers."""
    torch.manual_seed(plan.seed)
    text, held_out, tokens, unseen = corpus_of(documents, plan, progress)
    batch = text.spread(ROWS // plan.length)
    vocab = plan.head_vocab or tokens
    likeliest = min(plan.likeliest, vocab)
    teacher, untrained = build(plan.teacher, vocab, plan), build(plan.student, vocab, plan)

    def quality(name: str, model: Qwen3ForCausalLM) -> dict[str, float]:
        bar = progress.stage(f"evaluate {name}", len(held_out.ids))
        return evaluate(model, teacher, held_out, plan, bar)._asdict()

    def distilled(name: str) -> dict[str, Any]:
        student = deepcopy(untrained)
        loss = partial(distillation_loss, name, student, teacher)
        training = train(student, loss, plan.student, text, plan, progress.stage(f"distil {name}"))
        return {
            "training": training._asdict(),
            "held_out": quality(name, student),
            "one_step": compare_step(name, student, teacher, batch, plan),
        }

    bar = progress.stage("train teacher")
    taught = train(teacher, partial(next_token_loss, teacher), plan.teacher, text, plan, bar)
    teacher.requires_grad_(False)
    report = {
        "versions": {"fusedkd": __version__, "torch": torch.__version__},
        "plan": asdict(plan),
        "vocab": vocab,
        "documents": {"train": len(documents) - unseen, "held_out": unseen},
        "tokens": {"train": counted(text), "held_out": counted(held_out)},
        "parameters": {"teacher": _size(teacher), "student": _size(untrained)},
        "teacher": {"training": taught._asdict(), "held_out": quality("teacher", teacher)},
        "student": {"held_out": quality("untrained student", untrained)},
        "divergences": {name: distilled(name) for name in plan.divergences},
        "one_step": {"tokens": counted(batch), "how": _how(plan)},
    }
    first = plan.divergences[0]
    steps, shown = report["divergences"][first]["training"]["steps"], f"top-{likeliest}"
    student = deepcopy(untrained)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, put_away = Path(folder) / "cache.safetensors", Path(folder) / "teacher.pt"
        bar = progress.stage(f"cache the teacher's {shown}", min(steps * plan.batch, len(text.ids)))
        started = time.perf_counter()
        taken = write_cache(file, teacher, text, steps, likeliest, plan, bar)
        seconds = time.perf_counter() - started
        # What the student learns from is the file alone: the teacher comes back to be measured by.
        torch.save(teacher, put_away)
        del teacher
        bar = progress.stage(f"distil {first} from the cache")
        training = distil_cached(first, student, file, taken, steps, text, plan, bar)
        teacher = torch.load(put_away, weights_only=False)
        size = file.stat().st_size
    tokens = taken.numel() * plan.length
    report["cache"] = {
        "divergence": first,
        "k": likeliest,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "seconds": seconds,
        "training": training._asdict(),
        "held_out": quality(f"{first} {shown}", student),
    }
    choose_threads(plan.threads)
    bar = progress.stage("steps against V", one_step.count(plan.against))
    compared = next((name for name in plan.divergences if name in EAGER), "fkl")
    report["against"] = one_step.against_vocabulary(compared, plan.against, plan.device, plan.seed, bar)
    return report


def _how(plan: Plan) -> str:
    cpu = torch.device(plan.device).type == "cpu"
    memory = "torch.profiler's allocator events" if cpu else "the device's max_memory_allocated"
    return (
        f"errors: relative L2, against the eager loss in {'float64' if cpu else 'float32'}; ms: median of {REPEATS};\n"
        f"peak: most bytes alive beyond the inputs, loss and gradients included, from {memory}"
    )


def counted(text: Windows) -> int:
    """Return how many tokens have a label."""
    return int((text.labels != IGNORED).sum())


def _size(model: Qwen3ForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_report(report: dict[str, Any]) -> None:
    """Print what was learnt, the held-out table and the one-step table."""
    plan, tokens, parameters = report["plan"], report["tokens"], report["parameters"]
    print(f"text     {tokens['train']:,} tokens to learn, {tokens['held_out']:,} held out")
    print(f"heads    {report['vocab']:,} columns")
    for name in ("teacher", "student"):
        print(f"{name}  {plan[name]['layers']} layers, {plan[name]['hidden']} wide, {parameters[name]:,} parameters")
    print("\nHeld-out text, nats per token:")
    _print_table(QUALITY_COLUMNS, _quality_rows(report))
    _print_cache(report["cache"], report["divergences"])
    print(f"\nOne step on {report['one_step']['tokens']} tokens, loss and gradients of the distilled student:")
    _print_table(STEP_COLUMNS, _step_rows(report["divergences"]))
    print(report["one_step"]["how"])
    _print_against(report["against"])
    print(f"\n{report['seconds']:.0f} s in all on {plan['device']}")


def _print_against(against: dict[str, Any]) -> None:
    sizes = against["sizes"]
    widths = f"hidden states {sizes['dim']} wide from {sizes['teacher_dim']}"
    print(f"\nOne step of {against['divergence']} against V, {sizes['rows']} tokens, {widths}:")
    _print_table(AGAINST_COLUMNS, one_step.rows_against(against))
    print(f"ms: least of {one_step.ROUNDS}, in turns; MB: most held at once beyond inputs and gradients")


def _print_cache(cache: dict[str, Any], divergences: dict[str, Any]) -> None:
    name, k = cache["divergence"], cache["k"]
    dense, last = divergences[name]["training"]["loss"], cache["training"]["loss"]
    print(f"\n{name} top-{k}: learnt from a file of the teacher's {k} likeliest tokens, without the teacher in memory")
    print(
        f"file       {cache['bytes']:,} bytes, {cache['bytes_per_token']:.1f} a token, "
        f"made in {cache['seconds']:.1f} s of {cache['tokens']:,} tokens"
    )
    print(f"last loss  {last:.4f} over {k} tokens and a bucket of all others; of {name} over all tokens {dense:.4f}")


def _quality_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    cache = report["cache"]
    models = {"teacher": report["teacher"], "student before": report["student"], **report["divergences"]}
    models[f"{cache['divergence']} top-{cache['k']}"] = cache
    for name, row in models.items():
        training, quality = row.get("training", {"steps": 0, "seconds": 0.0}), Quality(**row["held_out"])
        spent = [f"{training['steps']}", f"{training['seconds']:.1f}"]
        nats = [f"{quality.kl:.4f}", f"{quality.reverse_kl:.4f}", f"{quality.entropy:.3f}"]
        yield [name, *spent, f"{quality.perplexity:.1f}", *nats, f"{quality.agreement:.1%}"]


def _step_rows(divergences: dict[str, Any]) -> Iterator[list[str]]:
    for name, row in divergences.items():
        for kind, step in row["one_step"].items():
            errors = step.get("gradient_error", {})
            shown = [f"{errors[part]:.1e}" if errors else "-" for part in ("hidden", "weight")]
            cost = [f"{step['seconds'] * 1e3:.1f}", f"{step['peak_bytes'] / 1e6:.1f}"]
            yield [f"{name} {kind}", f"{step['loss']:.6f}", *shown, *cost]


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for name, *numbers in table:
        print("  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]))
