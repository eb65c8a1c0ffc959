"""The page of one divergence: its docstring, its parameters, and what its gradient does in a small example.

Nothing on a page is written by hand: the text is the docstring of kernels/divergences/NAME.py, the numbers are computed
by the library. In the example the teacher and the shape of the student's tail are fixed and the target's probability
q_y moves. With hats for the rows renormalised without the target y, the gradient on the tail has two parts,

    dL/dz_k = −q̂_k dL/dz_y + reshaping_k,  Σ reshaping_k = 0

the first moves mass between the target and the rest, the second changes q̂ at fixed q_y.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import divergence, divergences, kd_value_and_grad
from ..kernels.divergences import REGISTRY
from .commands import known_divergence, make_folder, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEACHER = (0.4, 0.3, 0.15, 0.1, 0.05)  # the target first
SHOWN = (0.01, 0.5, 0.99)
BESIDE = ("fkl", "rkl")
NOTHING = 1e-12  # what rounding leaves of a 0
STEP = 1e-6  # to either side of where a gradient may jump
JUMP = 1e-3
WIDTH = 120
COLUMNS = ("q_y", "dL/dz_y", "target term", "non-target term", "on the tail", "reshaping")
INDEX_COLUMNS = ("name", "what", "parameters", "dL/dz_y", "non-target term", "reshaping")
COMMAND = "python -m fusedkd explain"


class Effect(NamedTuple):
    """Gradients at some q_y, float64: on the target logit, its two terms (NaN without a split), and on the tail.

    tail: Σ |dL/dz_k| over k ≠ y. reshaping: the same sum over what changes q̂ at fixed q_y.
    """

    logit: Tensor
    target: Tensor
    nontarget: Tensor
    tail: Tensor
    reshaping: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of explain."""
    parser.add_argument("name", metavar="NAME", nargs="?", type=known_divergence, help="default: list the names")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="where the picture goes (default: here)"
    )
    parser.add_argument("--docs", metavar="DIR", type=Path, help="write the pages of all divergences and their index")


def run(args: argparse.Namespace) -> int:
    """Print and draw one divergence, write all pages, or list the names."""
    if args.docs:
        write_pages(make_folder("--docs", args.docs))
    elif args.name:
        require("picture", "plots", ("matplotlib",))
        folder = make_folder("--out", args.out)
        print(page(args.name))
        print(draw(args.name, folder))
    else:
        names = list(divergences())
        width = max(map(len, names))
        for name in names:
            print(f"{name.ljust(width)}  {_title(name)}")
    return 0


def write_pages(folder: Path) -> None:
    """Write NAME.md for every divergence, and README.md, their index."""
    for name in divergences():
        (folder / f"{name}.md").write_text(page(name) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(index() + "\n", encoding="utf-8")


def page(name: str) -> str:
    """Return the page of a divergence as Markdown."""
    effects = f"## On the target logit and the tail\n\n{_effect_text(name)}"
    parameters = f"## Parameters\n\n{_parameters(name)}"
    made = f"Defined in kernels/divergences/{name}.py. The picture of its gradient: `{COMMAND} {name}`."
    return "\n\n".join((f"# {name}", _docstring(name), effects, parameters, made))


def index() -> str:
    """Return the table of all divergences as Markdown."""
    rows = []
    for name, known in divergences().items():
        parameters = ", ".join(f"{key}={_default(value)}" for key, value in known.items())
        pull = [_at_match(name, field) for field in ("logit", "nontarget")]
        reshaping = " → ".join(_number(size) for size in effect(name, SHOWN).reshaping)
        rows.append([f"[{name}]({name}.md)", _title(name), parameters, *pull, reshaping])
    words = (
        f"p is the teacher, q the student, y the target. The last three columns are of one example, computed: "
        f"{_example()}. They are dL/dz_y and its non-target term where the student already gives the target its due, "
        f"q_y = p_y = {TEACHER[0]} (below 0: descent raises the target logit), and the size of the gradient that "
        f"reshapes the tail at fixed q_y, for q_y = {', '.join(map(str, SHOWN))}."
    )
    made = f"These pages are made from the docstrings of kernels/divergences: `{COMMAND} --docs docs/divergences`."
    return "\n\n".join(("# Divergences", _fill(made), _fill(words), _table(INDEX_COLUMNS, rows)))


def effect(name: str, target_probabilities: Iterable[float]) -> Effect:
    """Return the gradients of a divergence, at its defaults, where the student gives the target these probabilities."""
    q_y = torch.tensor(list(target_probabilities), dtype=torch.float64).unsqueeze(-1)
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    shape = teacher[1:].flip(0) / teacher[1:].sum()
    student = torch.cat([q_y, (1 - q_y) * shape], -1).log()
    _, gradient, stats = kd_value_and_grad(
        student,
        teacher.log().expand_as(student),
        torch.zeros(len(q_y), dtype=torch.int64),
        divergence=name,
        reduction="none",
        return_stats=True,
        backend="torch",
    )
    logit, tail = gradient[:, 0], gradient[:, 1:]
    reshaping = tail + shape * logit.unsqueeze(-1)
    weights = divergence(name).form
    terms = (weights.target * stats.target_grad.double(), weights.nontarget * stats.nontarget_grad.double())
    return Effect(logit, *terms, tail.abs().sum(-1), reshaping.abs().sum(-1))


def draw(name: str, folder: Path) -> Path:
    """Draw the gradient of a divergence beside forward and reverse KL over q_y; return the PNG's path."""
    from matplotlib.figure import Figure

    odds = torch.linspace(-7, 7, 400, dtype=torch.float64)
    q_y = odds.sigmoid()
    names = list(dict.fromkeys((*BESIDE, name)))
    found = {key: effect(key, q_y.tolist()) for key in names}
    panels: dict[str, tuple[str, str]] = {
        "logit": ("gradient on the target logit, dL/dz_y", "below 0: descent raises it"),
        "nontarget": ("its non-target term, dL_N/dz_y", _matches(names)),
        "tail": ("gradient on the tail, Σ |dL/dz_k|, k ≠ y", ""),
        "reshaping": ("of it: what reshapes the tail at fixed q_y", ""),
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([["logit", "nontarget"], ["tail", "reshaping"]])
    for field, (title, note) in panels.items():
        _panel(axes[field], q_y.tolist(), {key: getattr(found[key], field).tolist() for key in names})
        axes[field].set_title(f"{title}\n{note}".strip(), fontsize=10)
    axes["logit"].legend()
    figure.suptitle("\n".join(map(_fill, (_title(name), f"({_example()})"))), fontsize=11)
    path = folder / f"explain-{name}.png"
    figure.savefig(path, dpi=120)
    return path


def _panel(axes: Axes, q_y: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draw one curve per divergence; the last one is the one explained."""
    styles = ("--", "-.", "-") if len(curves) > len(BESIDE) else ("--", "-.")
    for (key, curve), style in zip(curves.items(), styles, strict=True):
        axes.plot(q_y, curve, style, label=key, linewidth=2)
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.axvline(TEACHER[0], color="0.7", linewidth=0.8, zorder=0)
    axes.annotate(" p_y", (TEACHER[0], 0.94), xycoords=("data", "axes fraction"), color="0.4")
    axes.set_xscale("logit")
    axes.set_xlabel("q_y")


def _matches(names: Iterable[str]) -> str:
    return "at q_y = p_y: " + ", ".join(f"{name} {_at_match(name, 'nontarget')}" for name in names)


def _at_match(name: str, field: str) -> str:
    """A gradient at q_y = p_y: a number, or the two between which it jumps there."""
    p_y = TEACHER[0]
    below, at, above = getattr(effect(name, (p_y * (1 - STEP), p_y, p_y * (1 + STEP))), field).tolist()
    if math.isnan(at):
        return "no split"
    if abs(above - below) > JUMP:
        return f"jumps from {_number(below)} to {_number(above)}"
    return _number(at)


def _effect_text(name: str) -> str:
    """What the gradient does in the example: a sentence on the target logit, one on the tail, and the numbers."""
    found = effect(name, SHOWN)
    rows = [[_number(q), *(_number(column[i]) for column in found)] for i, q in enumerate(SHOWN)]
    keys = (
        "Terms: those of the split L = L_T + L_N (NaN: there is none). On the tail: Σ |dL/dz_k| over k ≠ y. "
        "Reshaping: the same sum without the push −q̂_k dL/dz_y that only moves mass between the target and the rest."
    )
    sentences = (f"One example, computed: {_example()}.", _logit_sentence(name), _tail_sentence(name, found.reshaping))
    return "\n\n".join([*map(_fill, sentences), _table(COLUMNS, rows), _fill(keys)])


def _example() -> str:
    target, *rest = TEACHER
    return (
        f"the teacher gives the target {target} and the other tokens {', '.join(map(str, rest))}; the student orders "
        f"the others the wrong way round, {', '.join(map(str, reversed(rest)))} times (1 − q_y)/{1 - target:g}"
    )


def _logit_sentence(name: str) -> str:
    total, target, nontarget = (_at_match(name, field) for field in ("logit", "target", "nontarget"))
    if total.startswith("jumps"):
        text = f"dL/dz_y {total}"
    elif total == "0":
        text = "dL/dz_y is 0: descent leaves the target logit where it is, however wrong the tail is"
    else:
        text = f"dL/dz_y is {total}: descent {'raises' if total.startswith('−') else 'lowers'} the target logit"
    terms = "" if nontarget == "no split" else f" Its target term: {target}; its non-target term: {nontarget}."
    beside = _beside({key: _at_match(key, "logit") for key in BESIDE if key != name})
    return f"Where the student already gives the target its due, q_y = p_y = {TEACHER[0]}, {text}.{terms}{beside}"


def _tail_sentence(name: str, reshaping: Tensor) -> str:
    _, middle, last = reshaping.tolist()
    verb = "fades" if last < 0.2 * middle else "weakens" if last < 0.9 * middle else "does not fade"
    beside = _beside({key: _numbers(effect(key, SHOWN).reshaping) for key in BESIDE if key != name})
    return (
        f"What reshapes the tail at fixed q_y measures {_numbers(reshaping)} at q_y = {', '.join(map(str, SHOWN))}: it "
        f"{verb} as the student grows sure of the target.{beside}"
    )


def _beside(others: dict[str, str]) -> str:
    return f" Beside it: {'; '.join(f'{name} {text}' for name, text in others.items())}."


def _parameters(name: str) -> str:
    taken = REGISTRY[name].arguments
    if not taken:
        return "None."
    rows = [(f"`{p.name}`", f"`{_code(p.default)}`", p.domain, p.meaning) for p in taken]
    call = ", ".join([f'"{name}"', *(f"{p.name}={_code(p.default)}" for p in taken)])
    base = "A base's own parameters may be given beside it. " if any(p.name == "base" for p in taken) else ""
    text = _fill(f"{base}A number may be a tensor with one value per token.")
    return "\n\n".join(
        [_table(("parameter", "default", "allowed", "meaning"), rows), text, f"    fusedkd.divergence({call})"]
    )


def _module(name: str) -> Any:
    return import_module(f"..kernels.divergences.{name}", __package__)


def _lines(name: str) -> list[str]:
    return (inspect.getdoc(_module(name)) or "").splitlines()


def _title(name: str) -> str:
    return _lines(name)[0].rstrip(".")


def _docstring(name: str) -> str:
    """The docstring as Markdown: its labels (`Gradient:`) in bold, an empty line around its indented formulas."""
    blocks: list[str] = []
    formula = None  # whether the line before is one; None after an empty line
    for line in _lines(name):
        opening = re.fullmatch(r"([A-Z][a-z]+(?: [a-z]+){0,2}):( .*)?", line)
        kind = line.startswith("    ")
        if line and formula is not None and (opening or kind != formula):
            blocks.append("")
        blocks.append(f"**{opening[1]}:**{opening[2] or ''}" if opening else line if kind else line.strip())
        formula = kind if line else None
    return "\n".join(blocks)


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(values: Tensor) -> str:
    return ", ".join(map(_number, values.tolist()))


def _number(value: float | Tensor) -> str:
    """Four digits, a real minus sign, and 0 for what rounding leaves of it."""
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return "0" if abs(value) < NOTHING else f"{value:.4g}".replace("-", "−")


def _default(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
