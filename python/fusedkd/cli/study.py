"""Small experiments of the literature, repeated with the library's own losses.

`cache` is in study_cache.py, `fidelity` in study_fidelity.py. `toy` has two, after Wu et al., Rethinking KL divergence
in knowledge distillation for LLMs (arXiv 2404.02657).

Free logits: one distribution is fitted, each token's logit a parameter, so that every divergence can reach the teacher.
Teacher and start are those of the authors' notebook: half a Gaussian of width 16 at 0, 1.25, ..., 98.75 (without its
1 % of noise), and logits uniform in [0, 1), here 32 such starts at once. The head is the smallest set of the teacher's
likeliest tokens with half of its mass, the tail is the rest, far is the less likely half of the vocabulary; the error
of a part is its Σ |p − q|, relative to that at the start. Which part comes first is asked once: when half of the whole
Σ |p − q| is gone, one part has less than half of its own left and the other more. Nothing else is chosen.

- Gradient descent (rate 2; a quarter of it gives the same curves): forward KL fits the head first from every start,
  reverse KL and DRKL the tail first from nearly every start, AKL and AB lie between. All five converge, and at the end
  the tail is behind under all of them: near the teacher both KLs and AKL have one second derivative, diag(p) − ppᵀ,
  under which the unlikeliest tokens are the slowest. The tail is first at the beginning only, as the authors say.
- Adam (rate 0.2), which the authors used, moves every logit at the same speed at first, and both KLs fit the tail first
  by this measure. There the statement holds between the losses at equal steps, as the authors' figure shows them: when
  forward KL has taken away half of the head's error, it is ahead on the head and reverse KL is ahead on the far tail.
- For a Zipf teacher (100 tokens, p_k ∝ 1/k) forward KL fits the head first; reverse KL favours the head less, but does
  not fit the tail first.

One peak for two: the target is 0.6 N(−4, 1) + 0.4 N(4, 1.5), the family the discretised Gaussians, with mean and
log-width as parameters, minimised by L-BFGS from nine means. Forward KL has one minimum, at the target's mean and
variance, and covers both peaks and the gap between them. The lowest minimum of reverse KL sits on the heavier peak, the
next on the other; a start right between them is caught in a third, shallow one over both, of twice the value. So mode
seeking is a matter of the start, too. All this needs the restricted family (Bishop, Pattern Recognition and Machine
Learning, figure 10.3): the free logits above show none of it, which is the point of Wu et al.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__, kd_loss, kd_value_and_grad
from . import study_cache, study_fidelity
from .commands import Progress, check_file, make_folder, positive, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from tqdm import tqdm

EXTRAS = ("matplotlib", "tqdm")
DIVERGENCES = ("fkl", "rkl", "akl", "ab", "drkl")
KLS = ("fkl", "rkl")
PARTS = ("head", "tail", "far")
KEPT = 40  # points of a curve in the JSON
PEAKS = ((0.6, -4.0, 1.0), (0.4, 4.0, 1.5))  # mass, mean, width
STARTS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Plan:
    """How long the experiments run, and from how many random starts."""

    starts: int = 32
    descent_steps: int = 500
    adam_steps: int = 120


class Experiment(NamedTuple):
    """Free logits that are fitted to a teacher, given as log p, by "descent" or "adam" under each divergence."""

    teacher: Tensor
    method: str
    steps: int
    divergences: tuple[str, ...]


FULL = Plan()
QUICK = Plan(starts=8, descent_steps=100, adam_steps=30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of study."""
    parser.add_argument(
        "study",
        choices=("toy", "cache", "fidelity"),
        help="toy: head and tail, and one peak for two; cache: the KL that a cache of a teacher's K likeliest tokens "
        "costs, for some K and every tail; fidelity: students of several divergences beside the DRKL paper's claims",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="where the picture or the tables go (default: here)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="write all numbers to FILE (cache, fidelity: by default beside the tables); fidelity continues it",
    )
    parser.add_argument("--quick", action="store_true", help="fewer starts and steps, to see that all runs")
    fidelity = parser.add_argument_group("fidelity only")
    count = partial(positive, int)
    fidelity.add_argument("--seeds", metavar="N", type=count, help=f"how many seeds (default: {study_fidelity.SEEDS})")
    steps = study_fidelity.FULL.demo.student.budget.steps
    fidelity.add_argument("--steps", metavar="N", type=count, help=f"steps to train each student (default: {steps})")
    fidelity.add_argument(
        "--divergences",
        metavar="NAME",
        nargs="+",
        choices=study_fidelity.DIVERGENCES,
        help=f"of {' '.join(study_fidelity.DIVERGENCES)} (default: all); drkl is three values of gamma",
    )


def run(args: argparse.Namespace) -> int:
    """Run the experiments, print what they show, draw them and write their numbers."""
    toy_study = args.study == "toy"
    require("study", "plots" if toy_study else "demo", EXTRAS if toy_study else study_cache.EXTRAS)
    if args.study != "fidelity":
        refuse_options_of_fidelity(args)
    check_file("--json", args.json)
    folder = make_folder("--out", args.out)
    if args.study == "fidelity":
        study_fidelity.run(args, folder, Progress(quiet=False))
        return 0
    if args.study == "cache":
        report = study_cache.measure(study_cache.QUICK if args.quick else study_cache.FULL, Progress(quiet=False))
        print(study_cache.markdown(report))
        print(study_cache.write(report, folder, args.quick, args.json))
        return 0
    report = toy(QUICK if args.quick else FULL)
    print(describe(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(draw(report, folder))
    return 0


def refuse_options_of_fidelity(args: argparse.Namespace) -> None:
    """Refuse what the other studies would ignore.

    Raises:
        argparse.ArgumentError: naming the option.
    """
    for name in ("seeds", "steps", "divergences"):
        if getattr(args, name) is not None:
            raise argparse.ArgumentError(None, f"--{name} is for study fidelity, not study {args.study}")


def toy(plan: Plan) -> dict[str, Any]:
    """Run all experiments, with a bar on a terminal; return their numbers."""
    from tqdm import tqdm

    experiments = {
        "descent": Experiment(half_gaussian(), "descent", plan.descent_steps, DIVERGENCES),
        "adam": Experiment(half_gaussian(), "adam", plan.adam_steps, DIVERGENCES),
        "zipf": Experiment(zipf(), "descent", plan.descent_steps, KLS),
    }
    steps = sum(one.steps * len(one.divergences) for one in experiments.values()) + len(KLS)
    started = time.perf_counter()
    with tqdm(total=steps, desc="toy", disable=None) as bar:
        free = {
            key: {name: _summary(fit(one, name, plan.starts, bar)) for name in one.divergences}
            for key, one in experiments.items()
        }
        family = {name: fit_family(name, bar) for name in KLS}
    return {
        "versions": {"fusedkd": __version__, "torch": torch.__version__},
        "free": free,
        "same_step": _same_step(free["adam"]),
        "family": {"target": _moments(target()), **family},
        "seconds": time.perf_counter() - started,
    }


def half_gaussian() -> Tensor:
    """Return log p of the published teacher."""
    return (-(torch.arange(80, dtype=torch.float64) * 1.25 / 16).square() / 2).log_softmax(-1)


def zipf() -> Tensor:
    """Return log p of a teacher with p_k ∝ 1/k."""
    return (-torch.arange(1, 101, dtype=torch.float64).log()).log_softmax(-1)


def parts(teacher: Tensor) -> dict[str, Tensor]:
    """Return the columns of the head, the tail and the far tail as masks."""
    p, order = teacher.exp(), teacher.argsort(descending=True)
    before = p[order].cumsum(-1) - p[order]
    head, far = (torch.zeros(len(p), dtype=torch.bool) for _ in range(2))
    head[order[before < 0.5]] = True
    far[order[len(p) // 2 :]] = True
    return {"head": head, "tail": ~head, "far": far}


def fit(experiment: Experiment, divergence: str, starts: int, bar: tqdm[Any]) -> dict[str, Tensor]:
    """Fit free logits from random starts; return Σ |p − q| [steps + 1, starts], of the whole and of each part."""
    teacher, method, steps, _ = experiment
    logits = torch.rand(starts, len(teacher), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=0.2) if method == "adam" else torch.optim.SGD([logits], lr=2.0)
    labels = teacher.argmax().expand(starts)
    gaps = [(teacher.exp() - logits.softmax(-1)).abs()]
    for _ in range(steps):
        _, logits.grad = kd_value_and_grad(
            logits, teacher.expand_as(logits), labels, divergence=divergence, reduction="none", backend="torch"
        )
        optimizer.step()
        gaps.append((teacher.exp() - logits.softmax(-1)).abs())
        bar.update()
    gap = torch.stack(gaps)
    return {"whole": gap.sum(-1), **{key: gap[..., mask].sum(-1) for key, mask in parts(teacher).items()}}


def _summary(errors: dict[str, Tensor]) -> dict[str, Any]:
    """What was left of each part when half of the whole was gone, means over the starts; the end; mean curves."""
    relative = {key: error / error[0] for key, error in errors.items()}
    gone = relative["whole"] <= 0.5
    half = torch.where(gone.any(0), gone.double().argmax(0), len(gone) - 1)
    head, tail = (relative[key].gather(0, half.unsqueeze(0)).squeeze(0) for key in ("head", "tail"))
    kept = [*dict.fromkeys(torch.logspace(0, 1, KEPT, len(gone), dtype=torch.float64).long().sub(1).tolist())]
    return {
        "half_gone_at_step": half.double().mean().item(),
        "head_left": head.mean().item(),
        "tail_left": tail.mean().item(),
        "head_first_share": (head < tail).double().mean().item(),
        "end": relative["whole"][-1].max().item(),
        "curves": {"step": kept, **{key: relative[key].mean(-1)[kept].tolist() for key in PARTS}},
    }


def _same_step(fits: dict[str, Any]) -> dict[str, Any]:
    """Forward and reverse KL at the step where forward KL has taken away half of the head's error."""
    curves = {name: fits[name]["curves"] for name in KLS}
    at = next(i for i, left in enumerate(curves["fkl"]["head"]) if left <= 0.5)
    return {
        "step": curves["fkl"]["step"][at],
        **{name: {key: curve[key][at] for key in ("head", "far")} for name, curve in curves.items()},
    }


def places() -> Tensor:
    """Return where the columns of the two-peaked target stand."""
    return torch.arange(-20, 20.25, 0.25, dtype=torch.float64)


def target() -> Tensor:
    """Return log p of the two-peaked target."""
    peaks = [mass / width * (-((places() - mean) / width).square() / 2).exp() for mass, mean, width in PEAKS]
    return torch.stack(peaks).sum(0).log().log_softmax(-1)


def fit_family(divergence: str, bar: tqdm[Any]) -> list[dict[str, float]]:
    """Fit mean and width of a discretised Gaussian to the target from each start; return the fits."""
    mean = torch.tensor(STARTS, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    log_width = torch.full_like(mean, math.log(2)).requires_grad_()
    teacher = target().expand(len(STARTS), -1)
    optimizer = torch.optim.LBFGS(
        [mean, log_width], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def losses() -> Tensor:
        student = _gaussian(mean, log_width)
        return kd_loss(student, teacher, divergence=divergence, reduction="none", backend="torch")

    def closure() -> float:
        optimizer.zero_grad()
        loss = losses().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    bar.update()
    fitted = _gaussian(mean, log_width).detach().log_softmax(-1)
    found = zip(STARTS, losses().tolist(), fitted, strict=True)
    return [{"start": start, "loss": loss, **_moments(row)} for start, loss, row in found]


def _gaussian(mean: Tensor, log_width: Tensor) -> Tensor:
    return -((places() - mean) * (-log_width).exp()).square() / 2


def _moments(log_probabilities: Tensor) -> dict[str, float]:
    """Mean and width of a distribution over the places, and its mass to the left and right of 0, between the peaks."""
    x, q = places(), log_probabilities.exp()
    mean = (q * x).sum()
    width = (q * (x - mean).square()).sum().sqrt()
    return {
        "mean": mean.item(),
        "width": width.item(),
        "left": q[x < 0].sum().item(),
        "right": q[x > 0].sum().item(),
    }


def describe(report: dict[str, Any]) -> str:
    """Return what the experiments show as lines of text."""
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    titles = {
        "descent": "Free logits, half-Gaussian teacher, gradient descent",
        "adam": "The same with Adam",
        "zipf": "Zipf teacher, gradient descent",
    }
    for key, title in titles.items():
        yield f"{title}: left of the head and of the tail when half of Σ |p − q| is gone"
        for name, row in report["free"][key].items():
            yield (
                f"  {name:<5} head {row['head_left']:.3f}  tail {row['tail_left']:.3f}  head first from "
                f"{row['head_first_share']:4.0%} of the starts  left at the end {row['end']:.1%}"
            )
    same = report["same_step"]
    yield f"Adam, step {same['step']}: left of the head and of the far tail"
    yield from (f"  {name:<5} head {same[name]['head']:.3f}  far  {same[name]['far']:.3f}" for name in KLS)
    family = report["family"]
    yield f"One peak for two: the target has {_shown(family['target'])}"
    for name in KLS:
        for row in family[name]:
            yield f"  {name:<5} from {row['start']:+.0f}: {_shown(row)}, loss {row['loss']:.3f}"


def _shown(row: dict[str, float]) -> str:
    return f"mean {row['mean']:+.3f}, width {row['width']:.3f}, left {row['left']:.3f}, right {row['right']:.3f}"


def draw(report: dict[str, Any], folder: Path) -> Path:
    """Draw the experiments; return the PNG's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplot_mosaic([list(DIVERGENCES), ["zipf fkl", "zipf rkl", "adam", "family", "family"]])
    for name in DIVERGENCES:
        _draw_order(axes[name], f"{name}, gradient descent", report["free"]["descent"][name])
    for name in KLS:
        _draw_order(axes[f"zipf {name}"], f"{name}, Zipf teacher", report["free"]["zipf"][name])
    _draw_same_step(axes["adam"], report["free"]["adam"])
    _draw_family(axes["family"], report["family"])
    axes["fkl"].set_ylabel("part of the error that is left")
    path = folder / "study-toy.png"
    figure.savefig(path, dpi=120)
    return path


def _draw_order(axes: Axes, title: str, row: dict[str, Any]) -> None:
    """Head and tail over the steps, and where half of the whole error is gone."""
    curves = row["curves"]
    axes.plot(curves["step"][1:], curves["head"][1:], label="head")
    axes.plot(curves["step"][1:], curves["tail"][1:], "--", label="tail")
    axes.axvline(row["half_gone_at_step"], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xscale="log", xlabel="step", title=f"{title}\nhead first: {row['head_first_share']:.0%} of the starts")
    axes.legend()


def _draw_same_step(axes: Axes, fits: dict[str, Any]) -> None:
    for name, color in zip(KLS, ("C0", "C1"), strict=True):
        curves = fits[name]["curves"]
        axes.plot(curves["step"][1:], curves["head"][1:], color=color, label=f"{name} head")
        axes.plot(curves["step"][1:], curves["far"][1:], ":", color=color, label=f"{name} far tail")
    axes.set(xscale="log", xlabel="step", title="Adam: fkl ahead on the head,\nrkl on the far tail")
    axes.legend()


def _draw_family(axes: Axes, family: dict[str, Any]) -> None:
    x = places()
    axes.fill_between(x.tolist(), target().exp().tolist(), color="0.85", label="target")
    for name, color in zip(KLS, ("C0", "C1"), strict=True):
        for i, row in enumerate(family[name]):
            fitted = (-((x - row["mean"]) / row["width"]).square() / 2).softmax(-1)
            axes.plot(x.tolist(), fitted.tolist(), color=color, label=name if i == 0 else None)
    axes.set(xlim=(-12, 12), title="one peak for two, nine starts")
    axes.legend()
