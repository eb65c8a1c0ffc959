"""What a cache of a teacher's likeliest tokens costs in KL, for some K and every tail, on the demo's text and models.

One teacher; one student with all of its tokens, and for each K and tail one with the K likeliest, from the same weights
and on the same batches. Every student is measured by the dense KL on held-out text, whatever it was trained by. Beside
that stands what the loss says, on the held-out text, of the student that was trained with all tokens.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import TopK, kd_loss
from ..topk import topk
from .commands import Progress, versions
from .demo import (
    CPU,
    Budget,
    Windows,
    build,
    cached_loss,
    corpus_of,
    counted,
    distillation_loss,
    evaluate,
    head,
    next_token_loss,
    read_documents,
    train,
    write_cache,
)
from .demo import QUICK as QUICK_DEMO
from .demo import Plan as Demo
from .one_step import IGNORED

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

EXTRAS = ("transformers", "tokenizers", "tqdm")
TAILS = ("bucket", "renormalize", "truncate")
STEM = "study-cache"
NOTHING = "-"


@dataclass(frozen=True)
class Plan:
    """The demo's models and text, the divergence, and the K that are tried."""

    demo: Demo
    divergence: str = "fkl"
    ks: tuple[int, ...] = (1, 4, 16, 32, 128)


FULL = Plan(
    replace(
        CPU,
        teacher=replace(CPU.teacher, budget=Budget(steps=600)),
        student=replace(CPU.student, budget=Budget(steps=150)),
        batch=4,
        held_out=32,
    )
)
QUICK = Plan(
    replace(
        QUICK_DEMO,
        teacher=replace(QUICK_DEMO.teacher, budget=Budget(steps=30)),
        student=replace(QUICK_DEMO.student, budget=Budget(steps=8)),
        held_out=4,
    ),
    ks=(1, 8),
)


def measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Train the teacher and every student; return all numbers."""
    started, demo = time.perf_counter(), plan.demo
    documents = read_documents(None, demo)
    torch.manual_seed(demo.seed)
    text, held_out, vocab, _ = corpus_of(documents, demo, progress)
    teacher, untrained = build(demo.teacher, vocab, demo), build(demo.student, vocab, demo)
    bar = progress.stage("train teacher")
    train(teacher, partial(next_token_loss, teacher), demo.teacher, text, demo, bar)
    teacher.requires_grad_(False)

    def learnt(name: str, student: Qwen3ForCausalLM, loss: Any) -> dict[str, Any]:
        training = train(student, loss, demo.student, text, demo, progress.stage(f"distil: {name}"))
        bar = progress.stage(f"evaluate: {name}", len(held_out.ids))
        return {"training": training._asdict(), "held_out": evaluate(student, teacher, held_out, demo, bar)._asdict()}

    dense = deepcopy(untrained)
    all_tokens = learnt("all tokens", dense, partial(distillation_loss, plan.divergence, dense, teacher))
    steps, tried = all_tokens["training"]["steps"], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "cache.safetensors"
        bar = progress.stage(f"cache the teacher's top-{max(plan.ks)}", steps * demo.batch)
        taken = write_cache(file, teacher, text, steps, max(plan.ks), demo, bar)
        cache = TopK.load(file)
        for k in plan.ks:
            for tail in TAILS:
                student = deepcopy(untrained)
                loss = partial(cached_loss, plan.divergence, student, likeliest(cache, k, tail), taken)
                tried.append({"k": k, "tail": tail, **learnt(f"K = {k}, {tail}", student, loss)})
    said = values(plan, dense, teacher, held_out)
    bar = progress.stage("evaluate: untrained", len(held_out.ids))
    return {
        "versions": versions(),
        "plan": asdict(plan),
        "vocab": vocab,
        "tokens": {"train": counted(text), "held_out": counted(held_out)},
        "untrained": {"held_out": evaluate(untrained, teacher, held_out, demo, bar)._asdict()},
        "dense": {**all_tokens, "value": said["dense"]},
        "mass": said["mass"],
        "caches": [{**row, "value": said[row["tail"]][str(row["k"])]} for row in tried],
        "seconds": time.perf_counter() - started,
    }


def likeliest(cache: TopK, k: int, tail: str) -> TopK:
    """Return the first k of each row: they are in descending order."""
    return cache._replace(ids=cache.ids[..., :k], logprobs=cache.logprobs[..., :k], tail=tail)


@torch.no_grad()
def values(plan: Plan, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, text: Windows) -> dict[str, Any]:
    """Return the mean loss of each token by tail and K and for all tokens, and the teacher's mass of those listed."""
    count = (text.labels != IGNORED).sum()
    sums: dict[str, dict[str, Tensor]] = {}

    def add(name: str, k: object, value: Tensor) -> None:
        of_name = sums.setdefault(name, {})
        of_name[str(k)] = of_name.get(str(k), torch.zeros((), dtype=torch.float64)) + value.double() / count

    for ids, labels in zip(text.ids.split(plan.demo.batch), text.labels.split(plan.demo.batch), strict=True):
        own, guide = head(student, ids), head(teacher, ids)
        loss = partial(kd_loss, own, labels=labels, divergence=plan.divergence, reduction="sum")
        found = topk(guide, max(plan.ks))
        add("dense", "all", loss(guide))
        for k in plan.ks:
            add("mass", k, found.logprobs[..., :k].exp().sum(-1)[labels != IGNORED].sum())
            for tail in TAILS:
                add(tail, k, loss(likeliest(found, k, tail)))
    said = {name: {k: x.item() for k, x in of_name.items()} for name, of_name in sums.items()}
    return {**said, "dense": said["dense"]["all"]}


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the report, with what they were measured on."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    plan, dense = report["plan"], report["dense"]
    demo, training = plan["demo"], dense["training"]
    by = {(row["k"], row["tail"]): row for row in report["caches"]}
    sizes = "{layers} layers {hidden} wide"
    yield (
        f"`{plan['divergence']}`, one seed, {training['steps']} steps of {demo['batch']} · {demo['length']} tokens for "
        f"each student ({sizes.format(**demo['student'])}; teacher {sizes.format(**demo['teacher'])}, "
        f"{demo['teacher']['budget']['steps']} steps of its own), V = {report['vocab']:,}, "
        f"{report['tokens']['held_out']:,} held-out tokens of Python's library {report['versions']['python']}. "
        f"torch {report['versions']['torch']}."
    )
    yield ""
    yield "Dense KL(teacher ‖ student) on held-out text after that, in nats per token:"
    yield ""
    yield f"| K | the teacher's mass of them | bytes a token on disk | {' | '.join(TAILS)} |"
    yield "|---|---|---|" + "---|" * len(TAILS)
    for k in plan["ks"]:
        kls = (f"{by[k, tail]['held_out']['kl']:.3f}" for tail in TAILS)
        yield f"| {k} | {report['mass'][str(k)]:.1%} | {8 * k:,} | {' | '.join(kls)} |"
    yield f"| all {report['vocab']:,} | | {NOTHING} | {dense['held_out']['kl']:.3f} | | |"
    yield f"| before training | | {NOTHING} | {report['untrained']['held_out']['kl']:.3f} | | |"
    yield ""
    yield (
        "What the loss says of one student, that of the row with all tokens, whose dense value is "
        f"{dense['value']:.4f}, and the gap to that:"
    )
    yield ""
    yield f"| K | {' | '.join(TAILS)} |"
    yield "|---|" + "---|" * len(TAILS)
    for k in plan["ks"]:
        said = (by[k, tail]["value"] for tail in TAILS)
        yield f"| {k} | " + " | ".join(f"{x:.4f} ({x / dense['value'] - 1:+.1%})" for x in said) + " |"


def write(report: dict[str, Any], folder: Path, quick: bool, file: Path | None = None) -> Path:
    """Write the numbers as JSON, to `file` if there is one, and the tables; return the tables' path."""
    stem = STEM + "-quick" * quick
    (file or folder / f"{stem}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    path = folder / f"{stem}.md"
    path.write_text(markdown(report), encoding="utf-8")
    return path
