"""The figures of a result file, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .results import cases, mark, median, over_floor, spread, timed
from .tables import grouped, kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

# Colour, marker and line of every implementation, the same in all figures.
STYLES = {
    "fusedkd": ("#1b4f9c", "o", "-"),
    "fusedkd streaming": ("#4f8fdb", "s", "-"),
    "fusedkd bf16 logits": ("#0b7a75", "D", "-"),
    "fusedkd, autograd": ("#4f8fdb", "s", "-"),
    "eager torch": ("#7a7a7a", "^", "--"),
    "torch.compile": ("#b08900", "v", "--"),
    "Liger FusedLinearJSD": ("#c8553d", "<", "--"),
    "Liger FusedLinearJSDLoss": ("#e08b6d", ">", "--"),
    "Liger JSD": ("#c8553d", "<", "--"),
    "Liger KLDIVLoss": ("#e08b6d", ">", "--"),
    "TRL ChunkedDivergence": ("#6a4c93", "P", "--"),
    "Unsloth fused_linear_jsd": ("#a23b72", "p", "--"),
    "ORDA DistillationLoss": ("#2a9d8f", "h", "--"),
    "torch linear_cross_entropy": ("#c9a227", "d", "--"),
    "FLA FusedKLDiv, fp32 sums": ("#3a7d44", "X", "--"),
    "FLA FusedKLDiv": ("#86bb8d", "X", "--"),
}
OTHER = ("#444444", ".", ":")
LEAST_BYTES = 100_000  # what a logarithmic axis shows of nothing
RULE = {"color": "0.88", "linewidth": 0.8}


class Plot(NamedTuple):
    """A figure's name, its title and explanation for the report, and its PNG."""

    name: str
    title: str
    words: str
    png: bytes


def plots(result: Result) -> Iterator[Plot]:
    """Draw every figure that a result file has data for."""
    if cases(result, "memory"):
        yield Plot(
            "growth",
            "Time and peak memory against N and V",
            "One training step of the loss head with forward KL. Memory is what is held above the inputs and the two "
            "gradients. Implementations that hold all logits grow with N·V; a chunked one grows with the vocabulary "
            "alone, and streaming with neither.",
            _png(_growth(result)),
        )
    if cases(result, "heads") or cases(result, "rows"):
        yield Plot(
            "roofline",
            "Share of the roofline",
            "The time of what cannot be avoided as a share of the time taken: for hidden states the four bare matrix "
            "products, for logits one sweep that reads both sides and writes a gradient. Both are timed in the same "
            "rounds as the implementations; whiskers show the spread of the times.",
            _png(_roofline(result)),
        )
    if cases(result, "accuracy"):
        yield Plot(
            "accuracy",
            "Error against KL",
            "Relative L2 error against float64 as the student approaches the teacher, to the left. A difference of two "
            "log-probabilities loses digits in proportion to 1/KL; formed from centred logits it does not. With hidden "
            "states in, the float32 product itself costs about 5e-6/√KL.",
            _png(_accuracy(result)),
        )


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(name: str) -> dict[str, Any]:
    color, marker, line = STYLES.get(name, OTHER)
    ours = name.startswith("fusedkd")
    return {
        "color": color,
        "marker": marker,
        "linestyle": line,
        "linewidth": 2.2 if ours else 1.5,
        "markersize": 5,
        "zorder": 3 if ours else 2,
    }


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", **RULE)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels, below them."""
    found = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    order = list(STYLES)
    names = sorted(found, key=lambda name: order.index(name) if name in STYLES else len(order))
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _growth(result: Result) -> Figure:
    figure = _figure(11, 7.5)
    grid = figure.subplots(2, 2)
    found = cases(result, "memory")
    base = max((case["case"]["shape"] for case in found), key=lambda shape: sum(_same(shape, x, "rows") for x in found))
    for column, axis in enumerate(("rows", "vocab")):
        fixed = "vocab" if axis == "rows" else "rows"
        pivot = _pivot(found, fixed)
        members = [case for case in found if case["case"]["shape"][fixed] == pivot]
        for row, (label, value) in enumerate(
            (("time, ms", lambda x: 1e3 * median(x["seconds"])), ("peak memory, MB", _megabytes))
        ):
            axes = grid[row, column]
            _curves(axes, members, axis, value)
            symbol, other = ("N", "V") if axis == "rows" else ("V", "N")
            axes.set(xlabel=symbol, ylabel=label, title=f"{label.split(',')[0]} against {symbol}, {other}={pivot:,}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,g}")
            ticks = sorted({case["case"]["shape"][axis] for case in members})
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=8)
            axes.minorticks_off()
            _plain(axes)
    _legend(figure, list(grid.flat))
    figure.suptitle(f"Forward KL, hidden states in, {base['dim']} wide from {base['teacher_dim']}", fontsize=11)
    return figure


def _same(shape: dict[str, Any], case: dict[str, Any], key: str) -> bool:
    return case["case"]["shape"][key] == shape[key]


def _pivot(found: list[dict[str, Any]], key: str) -> int:
    """The size that most cases share."""
    sizes = [case["case"]["shape"][key] for case in found]
    return max(sizes, key=sizes.count)


def _megabytes(cell: dict[str, Any]) -> float | None:
    return None if cell["extra_bytes"] is None else max(cell["extra_bytes"], LEAST_BYTES) / 1e6


def _curves(
    axes: Axes, members: list[dict[str, Any]], axis: str, value: Callable[[dict[str, Any]], float | None]
) -> None:
    """One curve per implementation over an axis of the shapes."""
    points: dict[str, list[tuple[int, float]]] = {}
    for case in members:
        for cell in timed(case):
            if (y := value(cell)) is not None:
                points.setdefault(cell["implementation"], []).append((case["case"]["shape"][axis], y))
    for name, found in points.items():
        xs, ys = zip(*sorted(found), strict=True)
        axes.plot(xs, ys, label=name, **_style(name))


def _roofline(result: Result) -> Figure:
    panels = [(section, members) for section in ("heads", "rows") if (members := _floored(result, section))]
    bars = max(sum(len(list(timed(case))) for case in members) for _, members in panels)
    figure = _figure(5.6 * len(panels) + 1.5, 1.8 + 0.19 * bars)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    titles = {"heads": "hidden states in", "rows": "logits in"}
    for axes, (section, members) in zip(grid, panels, strict=True):
        _bars(axes, members)
        axes.set(title=titles[section], xlabel="% of the roofline")
    _legend(figure, list(grid))
    return figure


def _floored(result: Result, section: str) -> list[dict[str, Any]]:
    return [case for case in cases(result, section) if case["floor"] and case["floor"]["seconds"] and any(timed(case))]


def _bars(axes: Axes, members: list[dict[str, Any]]) -> None:
    """A group of bars per case, best first, with the spread of the times as whiskers."""
    place, ticks = 0.0, []
    seen: set[str] = set()
    for case in members:
        cells = sorted(timed(case), key=lambda cell: median(cell["seconds"]))
        ticks.append((place + (len(cells) - 1) / 2, _label(case)))
        for cell in cells:
            name = cell["implementation"]
            share = 100 / (over_floor(case, cell) or 1.0)
            whisker = share * spread(cell["seconds"]) / median(cell["seconds"])
            color = STYLES.get(name, OTHER)[0]
            label = None if name in seen else name
            axes.barh(place, share, xerr=whisker, color=color, ecolor="0.35", height=0.85, label=label)
            axes.text(share + whisker + 1, place, f"{share:.0f}", va="center", fontsize=8)
            seen.add(name)
            place += 1
        place += 1
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_xlim(0, 112)
    axes.axvline(100, color="0.4", linewidth=1)
    axes.set_ylim(place - 1, -1)
    _plain(axes)
    axes.grid(False, axis="y")


def _label(case: dict[str, Any]) -> str:
    """What a group of bars is about: models for heads, sizes for rows."""
    shape = case["case"]["shape"]
    heads = case["case"]["path"] == "heads"
    sizes = f"{shape['rows']:,} × {shape['vocab']:,}"
    what = shape["name"].replace(" from ", "\nfrom ") if heads else f"{sizes}, {case['case']['dtype']}"
    return f"{case['case']['divergence']}{mark(case)}, {what}"


def _accuracy(result: Result) -> Figure:
    found = cases(result, "accuracy")
    columns = list(dict.fromkeys(kind(case)[:3] for case in found))
    height = len({kind(case)[3] for case in found})
    figure = _figure(3.1 * len(columns) + 0.6, 6.6 * height)
    grid = figure.subplots(2 * height, len(columns), squeeze=False, sharex="col", sharey="row")
    seen = dict.fromkeys(columns, 0)  # kinds of rows of each column
    for (path, dtype, divergence, _), members in grouped(found, kind):
        column = columns.index((path, dtype, divergence))
        loss, gradient = grid[2 * seen[columns[column]] :, column][:2]
        seen[columns[column]] += 1
        _errors(loss, members, "loss")
        _errors(gradient, members, "logits" if path == "rows" else "hidden")
        if column == 0:
            loss.set_ylabel("relative error of the loss")
            gradient.set_ylabel("relative error of the gradient")
        given = "logits in" if path == "rows" else "hidden states in"
        loss.set_title(f"{divergence}, {given}\n{dtype}{mark(members[0])}", fontsize=10)
        gradient.set_xlabel("KL(teacher || student)")
    _legend(figure, list(grid.flat))
    return figure


def _errors(axes: Axes, members: list[dict[str, Any]], name: str) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for case in members:
        for cell in case["cells"]:
            error = cell["errors"].get(name)
            if error:
                points.setdefault(cell["implementation"], []).append((case["case"]["kl"], error))
    for label, found in points.items():
        xs, ys = zip(*sorted(found), strict=True)
        axes.plot(xs, ys, label=label, **_style(label))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color="0.4", linewidth=0.8)
    _plain(axes)
