"""One step of a loss, hidden states to gradients, fused beside plain: its time and memory, and both against V."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .. import Head, kd_loss
from .eager import EAGER

if TYPE_CHECKING:
    from tqdm import tqdm

IGNORED = -100
REPEATS = 5
ROUNDS = 3  # of the steps set against V, which take turns
SIDES = {"eager": ("eager torch", "#7a7a7a", "^--"), "fused": ("fusedkd", "#1b4f9c", "o-")}


class Operands(NamedTuple):
    """Hidden states (N, D) and output layers (V, D) of a student and a teacher."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


class Step(NamedTuple):
    """A loss and its gradients on one batch: the value, seconds, peak bytes beyond the inputs."""

    loss: float
    seconds: float
    peak_bytes: int


class Gradients(NamedTuple):
    """A step's loss, and its gradients to the student's hidden states (N, D) and output layer (V, D)."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Sizes:
    """What is set against V: tokens, and the widths of the student's and the teacher's hidden states."""

    rows: int
    dim: int
    teacher_dim: int
    vocabularies: tuple[int, ...]


Loss = Callable[[Operands], Tensor]


def fused_loss(divergence: str, labels: Tensor, x: Operands) -> Tensor:
    """Return the mean divergence from `kd_loss`."""
    sides = Head(x.hidden, x.weight), Head(x.teacher_hidden, x.teacher_weight)
    return kd_loss(*sides, labels, divergence=divergence)


def eager_loss(divergence: str, labels: Tensor, x: Operands) -> Tensor:
    """Return the same as one writes it, of all logits at once; they are float32 at least."""
    kept = labels != IGNORED
    logits = F.linear(x.hidden[kept], x.weight), F.linear(x.teacher_hidden[kept], x.teacher_weight)
    s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits)
    return EAGER[divergence](s, t, labels[kept]).mean()


def step(loss_of: Loss, operands: Operands) -> Gradients:
    """Return a loss and its gradients."""
    hidden, weight = (x.detach().requires_grad_() for x in (operands.hidden, operands.weight))
    loss = loss_of(operands._replace(hidden=hidden, weight=weight))
    return Gradients(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def measure(loss_of: Loss, operands: Operands) -> tuple[Step, Gradients]:
    """Return the median time of a step, its peak, and what it makes."""
    gradients = step(loss_of, operands)
    seconds = [seconds_of(loss_of, operands) for _ in range(REPEATS)]
    peak = peak_bytes(lambda: step(loss_of, operands), operands.hidden.device)
    return Step(gradients.loss.item(), statistics.median(seconds), peak), gradients


def seconds_of(loss_of: Loss, operands: Operands) -> float:
    """Return how long a step takes."""
    device = torch.get_device_module(operands.hidden.device)
    device.synchronize()
    started = time.perf_counter()
    step(loss_of, operands)
    device.synchronize()
    return time.perf_counter() - started


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes alive at once beyond those alive before."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        action()
        return module.max_memory_allocated() - before
    # Keeps the profiler from logging its start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = recorded.profiler.kineto_results.events()
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in memory), default=0)


def against_vocabulary(divergence: str, sizes: Sizes, device: str, seed: int, bar: tqdm[Any]) -> dict[str, Any]:
    """Measure steps of random operands, fused and plain, at several V; `bar` advances by `count` in all.

    The peak is what is held beyond inputs and gradients, the time the least of a few rounds in which both take turns.
    """
    losses: dict[str, Callable[[str, Tensor, Operands], Tensor]] = {"eager": eager_loss, "fused": fused_loss}
    at: dict[int, dict[str, Any]] = {}
    with bar:
        for vocabulary in sizes.vocabularies:
            operands, labels = _random(sizes, vocabulary, device, seed)
            steps = {name: partial(loss, divergence, labels) for name, loss in losses.items()}
            made = (operands.hidden.numel() + operands.weight.numel()) * operands.hidden.element_size()
            found: dict[str, Step] = {}
            for name, loss_of in steps.items():
                loss = step(loss_of, operands).loss.item()
                peak = peak_bytes(partial(step, loss_of, operands), operands.hidden.device)
                found[name] = Step(loss, float("inf"), peak - made)
                bar.update(2)
            for _ in range(ROUNDS):
                for name, loss_of in steps.items():
                    seconds = min(found[name].seconds, seconds_of(loss_of, operands))
                    found[name] = found[name]._replace(seconds=seconds)
                    bar.update()
            at[vocabulary] = {name: x._asdict() for name, x in found.items()}
    return {"divergence": divergence, "sizes": asdict(sizes), "vocabularies": at}


def count(sizes: Sizes) -> int:
    """Return how many steps `against_vocabulary` makes."""
    return len(sizes.vocabularies) * 2 * (2 + ROUNDS)


def _random(sizes: Sizes, vocabulary: int, device: str, seed: int) -> tuple[Operands, Tensor]:
    """Operands whose logits have a standard deviation of 5, as a trained model's, and labels."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(std).to(dtype)

    made: list[Tensor] = []
    for dim in (sizes.dim, sizes.teacher_dim):
        made += normal(sizes.rows, dim), normal(vocabulary, dim, std=5 / dim**0.5)
    labels = torch.randint(vocabulary, (sizes.rows,), generator=generator, device=device)
    return Operands(*made), labels


def rows_against(found: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a line for each V: times, peaks, and what the fused ones are of the plain ones."""
    for vocabulary, row in found["vocabularies"].items():
        shown = [f"{vocabulary:,}"]
        for key, unit, digits in (("seconds", 1e-3, 1), ("peak_bytes", 1e6, 1)):
            eager, fused = (row[name][key] for name in SIDES)
            shown += f"{eager / unit:,.{digits}f}", f"{fused / unit:,.{digits}f}", f"{fused / eager:.2f}"
        yield shown


def headline(found: dict[str, Any]) -> str:
    """Say in a sentence what the largest V that was measured came to."""
    vocabulary, row = list(found["vocabularies"].items())[-1]
    eager, fused = row["eager"], row["fused"]
    return (
        f"At V={vocabulary:,} a step of the loss needs {fused['peak_bytes'] / 1e6:,.0f} MB instead of "
        f"{eager['peak_bytes'] / 1e6:,.0f} MB, in {fused['seconds'] / eager['seconds']:.2f} of the time."
    )


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw memory and time against V as a PNG."""
    from matplotlib.figure import Figure

    sizes, at = found["sizes"], found["vocabularies"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels: Sequence[tuple[str, float, str]] = (
        ("peak_bytes", 1e6, "peak memory above inputs and gradients, MB"),
        ("seconds", 1e-3, "time of a step, ms"),
    )
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, (shown, color, style) in SIDES.items():
            axes.plot(list(at), [row[name][key] / unit for row in at.values()], style, color=color, label=shown)
        axes.set(xlabel="V", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(list(at), [f"{vocabulary:,}" for vocabulary in at])
        axes.minorticks_off()
        axes.grid(True, color="0.88", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(
        f"{found['divergence']}, {sizes['rows']} tokens, hidden states {sizes['dim']} wide from {sizes['teacher_dim']}"
    )
    figure.savefig(file, format="png", dpi=120)
