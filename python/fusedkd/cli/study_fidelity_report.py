"""What the runs of study_fidelity.py say of the claims of the DRKL paper: verdicts, tables, picture.

A claim is a list of comparisons of two numbers. Their difference is taken seed by seed; its mean decides if it is at
least two standard errors. Nothing here is written by hand but the claims.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAMMAS = (0.25, 0.5, 1.0)
NGRAMS = (1, 2, 3)
TEACHER = "teacher"
START = "start"  # the student before it is distilled
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided: difference smaller than 2 standard errors"
ALONE = "undecided: one seed has no standard error"
MISSING = "undecided: not run"
QUANTITIES = {
    "kl": "KL(p‖q)",
    "reverse_kl": "KL(q‖p)",
    "perplexity": "perplexity",
    "entropy": "entropy",
    "agreement": "same top-1",
    **{f"distinct_{n}": f"distinct-{n}" for n in NGRAMS},
    "on_target": "gradient on target",
    "push": "push by the rest",
    "by_rest": "share of the rest",
}


class Comparison(NamedTuple):
    """That `quantity` of the runs `of` is below (sign −1) or above (+1) that of the runs `against`; None means 0."""

    quantity: str
    of: str
    sign: int
    against: str | None


class Verdict(NamedTuple):
    """Mean difference over the seeds, its standard error (NaN if there is none), and what follows."""

    difference: float
    error: float
    word: str


class Claim(NamedTuple):
    """What the paper says, in a line, and what must then be so."""

    title: str
    comparisons: tuple[Comparison, ...]


def drkl(gamma: float) -> str:
    """Return the name of the runs of DRKL with this γ."""
    return f"drkl {gamma:g}"


DRKLS = tuple(drkl(gamma) for gamma in GAMMAS)
CLAIMS = (
    Claim(
        "RKL is overconfident: less entropy than the teacher and than FKL, a gradient dominated by the target, whose "
        "logit the non-target term pushes upward",
        (
            Comparison("entropy", "rkl", -1, TEACHER),
            Comparison("entropy", "rkl", -1, "fkl"),
            Comparison("on_target", "rkl", 1, "fkl"),
            Comparison("push", "rkl", 1, None),
        ),
    ),
    Claim(
        "DRKL improves fidelity: it is nearer to the teacher than RKL and FKL on held-out text",
        tuple(
            Comparison(quantity, name, -1, rival)
            for quantity in ("kl", "reverse_kl")
            for rival in ("rkl", "fkl")
            for name in DRKLS
        ),
    ),
    Claim(
        "DRKL improves diversity: more entropy and more distinct n-grams than RKL",
        tuple(
            Comparison(quantity, name, 1, "rkl")
            for quantity in ("entropy", *(f"distinct_{n}" for n in NGRAMS))
            for name in DRKLS
        ),
    ),
)


def verdict(differences: Sequence[float], sign: int) -> Verdict:
    """Judge the differences of the seeds; `sign` says which is claimed, above (+1) or below (−1) zero."""
    if not differences:
        return Verdict(math.nan, math.nan, MISSING)
    mean = statistics.fmean(differences)
    error = standard_error(differences)
    if math.isnan(error):
        return Verdict(mean, error, ALONE)
    if mean == 0 or abs(mean) < 2 * error:
        return Verdict(mean, error, UNDECIDED)
    return Verdict(mean, error, REPRODUCED if mean * sign > 0 else NOT_REPRODUCED)


def standard_error(values: Sequence[float]) -> float:
    """Return that of the mean, NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def judged(report: dict[str, Any], comparison: Comparison) -> Verdict:
    """Return the verdict on the seeds that have both runs."""
    quantity, of, sign, against = comparison
    own = by_seed(report, of, quantity)
    other = dict.fromkeys(own, 0.0) if against is None else by_seed(report, against, quantity)
    return verdict([own[seed] - other[seed] for seed in own if seed in other], sign)


def by_seed(report: dict[str, Any], name: str, quantity: str) -> dict[int, float]:
    """Return a quantity of the runs of that name."""
    runs = (run for run in report["runs"] if run["divergence"] == name)
    return {run["seed"]: run["numbers"][quantity] for run in runs if quantity in run["numbers"]}


def names(report: dict[str, Any]) -> list[str]:
    """Return the names of the runs, each once."""
    return list(dict.fromkeys(run["divergence"] for run in report["runs"]))


def markdown(report: dict[str, Any]) -> str:
    """Return what was measured on, the verdicts and all means."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    plan, versions = report["settings"]["plan"], report["settings"]["versions"]
    demo = plan["demo"]
    sizes = "{layers} layers {hidden} wide"
    seeds = len({run["seed"] for run in report["runs"]})
    yield (
        f"{seeds} seed{'s' * (seeds != 1)}, {demo['student']['budget']['steps']} steps of {demo['batch']} · "
        f"{demo['length']} tokens for each student ({sizes.format(**demo['student'])}, after {plan['own_steps']} steps "
        f"on the text itself; teacher {sizes.format(**demo['teacher'])}, {demo['teacher']['budget']['steps']} steps), "
        f"V = {demo['tokenizer_vocab']:,}, {report['tokens']['held_out']:,} held-out tokens of Python's library "
        f"{versions['python']}, {plan['prompts']} prompts continued by {plan['drawn']} tokens. "
        f"torch {versions['torch']}."
    )
    for claim in CLAIMS:
        verdicts = [judged(report, one) for one in claim.comparisons]
        yield ""
        yield f"**{claim.title}.** {_summary(verdicts)}"
        yield ""
        yield "| claimed | difference | verdict |"
        yield "|---|---|---|"
        for one, found in zip(claim.comparisons, verdicts, strict=True):
            yield f"| {_shown(one)} | {_signed(found)} | {found.word} |"
    yield ""
    yield "Means over the seeds ± standard error:"
    yield ""
    yield f"| | {' | '.join(QUANTITIES.values())} |"
    yield "|---|" + "---|" * len(QUANTITIES)
    for name in names(report):
        yield f"| {name} | " + " | ".join(_mean(report, name, quantity) for quantity in QUANTITIES) + " |"


def _summary(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(found.word.split(":")[0] for found in verdicts)
    parts = [f"{counts[word]} {word}" for word in (REPRODUCED, NOT_REPRODUCED, "undecided") if counts[word]]
    return f"Of {len(verdicts)} comparisons: {', '.join(parts)}."


def _shown(one: Comparison) -> str:
    other = "0" if one.against is None else one.against
    return f"{QUANTITIES[one.quantity]}: {one.of} {'<' if one.sign < 0 else '>'} {other}"


def _signed(found: Verdict) -> str:
    if math.isnan(found.difference):
        return ""
    return f"{found.difference:+.4f}" + ("" if math.isnan(found.error) else f" ± {found.error:.4f}")


def _mean(report: dict[str, Any], name: str, quantity: str) -> str:
    values = [*by_seed(report, name, quantity).values()]
    if not values:
        return ""
    digits = 1 if quantity == "perplexity" else 3
    error = standard_error(values)
    shown = f"{round(statistics.fmean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no minus before zero
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def draw(report: dict[str, Any], path: Path) -> Path:
    """Draw fidelity, diversity and the split of the gradient; return the PNG's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplot_mosaic([["fidelity", "entropy", "distinct"], ["on_target", "push", "by_rest"]])
    students = [name for name in names(report) if name not in (TEACHER, START)]
    for i, name in enumerate(students):
        _draw_student(axes, report, name, f"C{i}")
    _draw_teacher(axes, report)
    axes["fidelity"].set(xscale="log", yscale="log", xlabel="KL(p‖q)", ylabel="KL(q‖p)", title="held-out KL, both ways")
    axes["entropy"].set_title("entropy on held-out text, nats")
    axes["entropy"].tick_params("x", rotation=45)
    axes["distinct"].set(xticks=NGRAMS, xlabel="n", title="distinct n-grams in samples")
    titles = {
        "on_target": "share of the squared gradient on target logits",
        "push": "upward push on the target logit by the rest",
        "by_rest": "the rest's share of what moves the target logit",
    }
    for key, title in titles.items():
        axes[key].set(xlabel="step", title=title)
    figure.legend(*axes["fidelity"].get_legend_handles_labels(), loc="outside lower center", ncols=9)
    figure.savefig(path, dpi=100)
    return path


def _draw_student(axes: dict[str, Axes], report: dict[str, Any], name: str, color: str) -> None:
    """The student's means with standard errors, and its mean curves."""

    def mean(quantity: str) -> tuple[float, float]:
        values = [*by_seed(report, name, quantity).values()]
        error = standard_error(values)
        return statistics.fmean(values), 0.0 if math.isnan(error) else error

    (x, dx), (y, dy), (h, dh) = mean("kl"), mean("reverse_kl"), mean("entropy")
    axes["fidelity"].errorbar(x, y, dy, dx, "o", color=color, label=name)
    axes["entropy"].errorbar([name], [h], [dh], fmt="o", color=color)
    axes["distinct"].plot(NGRAMS, [mean(f"distinct_{n}")[0] for n in NGRAMS], "o-", color=color)
    curves = [run["curves"] for run in report["runs"] if run["divergence"] == name]
    for key in ("on_target", "push", "by_rest"):
        line = [statistics.fmean(points) for points in zip(*(one[key] for one in curves), strict=True)]
        axes[key].plot(curves[0]["step"], line, color=color)


def _draw_teacher(axes: dict[str, Axes], report: dict[str, Any]) -> None:
    entropy = statistics.fmean(by_seed(report, TEACHER, "entropy").values())
    axes["entropy"].axhline(entropy, color="0.5", linestyle="--", label=TEACHER)
    axes["entropy"].legend()
    ngrams = [statistics.fmean(by_seed(report, TEACHER, f"distinct_{n}").values()) for n in NGRAMS]
    axes["distinct"].plot(NGRAMS, ngrams, "--", color="0.5", label=TEACHER)
    axes["distinct"].legend()
