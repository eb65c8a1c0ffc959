"""Fidelity and diversity of students under several divergences, on the demo's text and models.

One teacher. For each seed one student that has learnt the text itself for a while: from random weights the slowest
divergence would leave the most entropy, whatever it seeks. Every divergence trains a copy of it on the same batches for
as many steps. Each is then measured on held-out text and by samples from the same prompts with the same random numbers.
While it learns, the gradient of its logits is split (`Split`). Each finished run is written at once; a second call
continues. What the numbers say of the claims of Luong, Tran and Chen (arXiv 2604.00223) is in study_fidelity_report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Divergence, KDStats, divergence, kd_loss
from .commands import Progress, versions
from .demo import (
    CPU,
    Budget,
    Recipe,
    Windows,
    build,
    corpus_of,
    counted,
    evaluate,
    head,
    next_token_loss,
    read_documents,
    train,
)
from .demo import QUICK as QUICK_DEMO
from .demo import Plan as Demo
from .one_step import IGNORED
from .study_fidelity_report import GAMMAS, NGRAMS, START, TEACHER, draw, drkl, markdown

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

EXTRAS = ("transformers", "tokenizers", "tqdm")
DIVERGENCES = ("fkl", "rkl", "drkl", "ab", "akl", "skl", "jsd")
SEEDS = 3
STEM = "study-fidelity"
POINTS = 50  # of a curve in the JSON, each the mean of as many steps


@dataclass(frozen=True)
class Plan:
    """All that decides the numbers of a run, besides its seed and divergence.

    demo: text, models and steps; one thread, so that sums are added in one order.
    own_steps: of next-token training, before a student is distilled.
    prompts, prompt, drawn: how many held-out windows are continued, from how many tokens, by how many.
    """

    demo: Demo
    own_steps: int
    prompts: int
    prompt: int
    drawn: int


FULL = Plan(
    replace(
        CPU,
        tokenizer_vocab=2048,
        teacher=Recipe(128, 4, 4e-3, Budget(steps=1000)),
        student=Recipe(64, 2, 6e-3, Budget(steps=150)),
        length=64,
        batch=4,
        threads=1,
    ),
    own_steps=300,
    prompts=64,
    prompt=16,
    drawn=48,
)
QUICK = Plan(
    replace(
        QUICK_DEMO,
        teacher=replace(QUICK_DEMO.teacher, budget=Budget(steps=30)),
        student=replace(QUICK_DEMO.student, budget=Budget(steps=8)),
        batch=2,
        held_out=4,
    ),
    own_steps=10,
    prompts=4,
    prompt=8,
    drawn=12,
)


class Split(NamedTuple):
    """How the gradient of one batch's logits is shared out; the last two are of `KDStats`, at the target logits.

    on_target: share of the squared norm that is on the target logits.
    push: mean −dL_N/dz_y: how much the non-target term raises the target logit in a step of descent.
    by_rest: Σ |dL_N/dz_y| / Σ (|dL_T/dz_y| + |dL_N/dz_y|): the non-target term's share of what moves the target logit.
    """

    on_target: float
    push: float
    by_rest: float


def run(args: argparse.Namespace, folder: Path, progress: Progress) -> None:
    """Measure what is missing, then write tables and picture of all runs in the file."""
    plan = plan_of(args.quick, args.steps)
    stem = STEM + "-quick" * args.quick
    file = args.json or folder / f"{stem}.json"
    report = measure(plan, range(args.seeds or SEEDS), args.divergences or DIVERGENCES, file, progress)
    text = markdown(report)
    print(text)
    tables = folder / f"{stem}.md"
    tables.write_text(text, encoding="utf-8")
    print(tables)
    if find_spec("matplotlib"):
        print(draw(report, folder / f"{stem}.png"))
    else:
        print("no picture: pip install 'fusedkd[plots]'")


def plan_of(quick: bool, steps: int | None) -> Plan:
    """Return the plan of a call; `steps` are those of each student."""
    plan = QUICK if quick else FULL
    if steps is None:
        return plan
    student = replace(plan.demo.student, budget=Budget(steps=steps))
    return replace(plan, demo=replace(plan.demo, student=student))


def subjects(names: Iterable[str]) -> dict[str, Divergence]:
    """Return the divergences of those names under the names of their runs; `drkl` is three of them."""
    found: dict[str, Divergence] = {}
    for name in names:
        if name == "drkl":
            found.update({drkl(gamma): divergence("drkl", gamma=gamma) for gamma in GAMMAS})
        else:
            found[name] = divergence(name)
    return found


def measure(plan: Plan, seeds: Sequence[int], names: Sequence[str], file: Path, progress: Progress) -> dict[str, Any]:
    """Make every run that the file lacks, writing the file after each; return the file's report.

    Raises:
        argparse.ArgumentError: the file holds runs of other settings, or of a teacher that is not the one trained here.
    """
    report = opened(file, settings(plan))
    asked = subjects(names)
    done = {(one["seed"], one["divergence"]) for one in report["runs"]}
    missing = [(seed, name) for seed in seeds for name in (TEACHER, START, *asked) if (seed, name) not in done]
    if not missing:
        return report
    world = prepare(plan, progress)
    taught = world.quality(TEACHER, world.teacher, progress)
    if report.setdefault("teacher", taught) != taught:
        raise argparse.ArgumentError(
            None,
            f"--json: {file} holds runs of another teacher than the one trained here (another machine, or changed text "
            "files?): name another file or delete it",
        )
    report["tokens"] = {"train": counted(world.text), "held_out": counted(world.held_out)}
    starts: dict[int, Qwen3ForCausalLM] = {}
    for number, (seed, name) in enumerate(missing, 1):
        title = f"seed {seed}, {name} ({number} of {len(missing)})"
        if name != TEACHER and seed not in starts:
            starts = {seed: world.start(seed, progress)}
        if name == TEACHER:
            row = {"numbers": {**taught, **world.samples(world.teacher, seed)}}
        elif name == START:
            row = {"numbers": {**world.quality(title, starts[seed], progress), **world.samples(starts[seed], seed)}}
        else:
            row = world.learnt(deepcopy(starts[seed]), asked[name], seed, title, progress)
        report["runs"].append({"seed": seed, "divergence": name, **row})
        save(report, file)
    return report


def settings(plan: Plan) -> dict[str, Any]:
    """Return what runs of one file have in common, as JSON has it."""
    decided = asdict(plan)
    del decided["demo"]["against"]  # steps that nothing is trained by
    return json.loads(json.dumps({"plan": decided, "versions": versions()}))


def opened(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the report in the file, or an empty one if there is no file.

    Raises:
        argparse.ArgumentError: it is not such a report, or one of other settings; these are named.
    """
    if not file.exists():
        return {"settings": wanted, "runs": []}
    try:
        report = json.loads(file.read_text())
        found = report["settings"]
        report["runs"] = list(report["runs"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"--json: {file} is not a report of study fidelity: name another file or delete it"
        raise argparse.ArgumentError(None, message) from error
    here, there = dict(leaves(wanted)), dict(leaves(found))
    differing = [
        f"{name} {there.get(name, 'absent')}, not {here.get(name, 'absent')}"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    ]
    if differing:
        message = f"--json: {file} holds runs with {'; '.join(differing)}: name another file or delete it"
        raise argparse.ArgumentError(None, message)
    return report


def leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Return the numbers and words of nested settings under dotted names."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, item in value.items() for leaf in leaves(item, f"{name}.{key}".lstrip("."))]


def save(report: dict[str, Any], file: Path) -> None:
    """Write the report, whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(part, file)


@dataclass(frozen=True)
class World:
    """The teacher, the text, and what is measured of a student."""

    plan: Plan
    vocab: int
    teacher: Qwen3ForCausalLM
    text: Windows
    held_out: Windows

    def start(self, seed: int, progress: Progress) -> Qwen3ForCausalLM:
        """Return the seed's student before it is distilled: trained on the text alone."""
        demo = replace(self.plan.demo, seed=seed)
        torch.manual_seed(seed)
        student = build(demo.student, self.vocab, demo)
        recipe = replace(demo.student, budget=Budget(steps=self.plan.own_steps))
        bar = progress.stage(f"train student: seed {seed}")
        train(student, partial(next_token_loss, student), recipe, self.text, demo, bar)
        return student

    def learnt(
        self, student: Qwen3ForCausalLM, loss: Divergence, seed: int, title: str, progress: Progress
    ) -> dict[str, Any]:
        """Train the student under the divergence; return its numbers and curves."""
        started, demo = time.perf_counter(), replace(self.plan.demo, seed=seed)
        seen: list[Split] = []
        watched = partial(watched_loss, loss, student, self.teacher, seen)
        train(student, watched, demo.student, self.text, demo, progress.stage(f"distil: {title}"))
        by_name = {name: list(values) for name, values in zip(Split._fields, zip(*seen, strict=True), strict=True)}
        return {
            "numbers": {
                **self.quality(title, student, progress),
                **self.samples(student, seed),
                **{name: statistics.fmean(values) for name, values in by_name.items()},
            },
            "curves": {"step": thinned(range(1, len(seen) + 1)), **{n: thinned(v) for n, v in by_name.items()}},
            "seconds": time.perf_counter() - started,
        }

    def quality(self, title: str, model: Qwen3ForCausalLM, progress: Progress) -> dict[str, float]:
        """Return the held-out means of a model."""
        bar = progress.stage(f"evaluate: {title}", len(self.held_out.ids))
        return evaluate(model, self.teacher, self.held_out, self.plan.demo, bar)._asdict()

    def samples(self, model: Qwen3ForCausalLM, seed: int) -> dict[str, float]:
        """Return the distinct-n of continuations of the prompts."""
        whole = (self.held_out.labels[:, : self.plan.prompt] != IGNORED).all(-1)
        prompts = self.held_out.ids[whole][: self.plan.prompts, : self.plan.prompt]
        drawn = continuations(model, prompts, self.plan.drawn, seed).tolist()
        return {f"distinct_{n}": distinct(drawn, n) for n in NGRAMS}


def prepare(plan: Plan, progress: Progress) -> World:
    """Read the text, train tokenizer and teacher."""
    demo = plan.demo
    text, held_out, vocab, _ = corpus_of(read_documents(None, demo), demo, progress)
    torch.manual_seed(demo.seed)
    teacher = build(demo.teacher, vocab, demo)
    train(teacher, partial(next_token_loss, teacher), demo.teacher, text, demo, progress.stage("train teacher"))
    teacher.requires_grad_(False)
    return World(plan, vocab, teacher, text, held_out)


def watched_loss(
    loss: Divergence, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, seen: list[Split], batch: Windows
) -> Tensor:
    """Return the divergence of a batch; its backward pass adds the split of the gradient to `seen`."""
    with torch.no_grad():
        guide = logits(teacher, batch.ids)
    own = logits(student, batch.ids)
    value, stats = kd_loss(own, guide, batch.labels, divergence=loss, return_stats=True)
    own.register_hook(lambda gradient: seen.append(split(gradient, batch.labels, stats)))
    return value


def logits(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Return the model's logits on these tokens."""
    return F.linear(*head(model, ids)[:2])


def split(gradient: Tensor, labels: Tensor, stats: KDStats) -> Split:
    """Return how a gradient (..., V) of logits is shared out."""
    kept = labels != IGNORED
    rows = gradient[kept]
    on_target = rows.gather(-1, labels[kept].unsqueeze(-1)).square().sum() / rows.square().sum()
    own, rest = stats.target_grad[kept], stats.nontarget_grad[kept]
    by_rest = rest.abs().sum() / (own.abs().sum() + rest.abs().sum())
    return Split(on_target.item(), -rest.mean().item(), by_rest.item())


def thinned(values: Sequence[float]) -> list[float]:
    """Return the means of up to POINTS equal parts, to four digits."""
    parts = torch.tensor(values, dtype=torch.float64).tensor_split(min(POINTS, len(values)))
    return [float(f"{part.mean().item():.4g}") for part in parts]


@torch.no_grad()
def continuations(model: Qwen3ForCausalLM, prompts: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` tokens [prompts, count] drawn from the model itself (temperature 1) after each prompt."""
    sampler: Any = model  # its types do not admit that it can generate
    torch.manual_seed(seed)
    drawn = sampler.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=count,
        use_cache=True,
        pad_token_id=0,
    )
    return drawn[:, prompts.shape[1] :]


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """Return how many different n-grams the texts have together, by how many n-grams (Li et al., arXiv 1510.03055)."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)
