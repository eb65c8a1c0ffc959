"""Time and memory of the head path on this machine, beside the bare matrix products and the eager torch loss.

    python -m bench.heads --out bench/results

One training step of the loss head: hidden states in, loss and the gradients of hidden states and weight out. Runs are
interleaved (one of each per round), times are medians; extra memory is the peak resident size of a fresh process above
its size before the step, less the two gradients. Every implementation is first checked against float64 on the first
rows.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fusedkd
from fusedkd.eager import EAGER

DIVERGENCES = tuple(EAGER)
CHECKED_ROWS = 4


class Inputs(NamedTuple):
    """A student's and a teacher's hidden states and heads, and labels."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor


def make_inputs(rows: int, vocab: int, dim: int, teacher_dim: int, device: str) -> Inputs:
    """Random heads whose logits have a standard deviation of 5, as a trained model's do."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(rows, dim), torch.randn(rows, teacher_dim)
    weight, teacher_weight = (5 * torch.randn(vocab, d) / d**0.5 for d in (dim, teacher_dim))
    labels = torch.randint(vocab, (rows,))
    moved = (x.to(device) for x in (hidden, weight, teacher_hidden, teacher_weight, labels))
    inputs = Inputs(*moved)
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()
    return inputs


def eager(inputs: Inputs, name: str) -> torch.Tensor:
    """The loss as one writes it in torch, with all logits in memory."""
    s = inputs.hidden @ inputs.weight.t()
    with torch.no_grad():
        t = inputs.teacher_hidden @ inputs.teacher_weight.t()
    return EAGER[name](s, t, inputs.labels).mean()


def fused(inputs: Inputs, name: str) -> torch.Tensor:
    """The same by fusedkd."""
    return fusedkd.kd_loss(
        fusedkd.Head(inputs.hidden, inputs.weight),
        fusedkd.Head(inputs.teacher_hidden, inputs.teacher_weight),
        inputs.labels if name == "drkl" else None,
        divergence=name,
    )


IMPLEMENTATIONS: dict[str, Callable[[Inputs, str], torch.Tensor]] = {"eager": eager, "fusedkd": fused}


def step(inputs: Inputs, implementation: str, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients."""
    loss = IMPLEMENTATIONS[implementation](inputs, name)
    hidden, weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return loss.detach(), hidden, weight


def bare_gemms(inputs: Inputs) -> Callable[[], None]:
    """The four products that no exact implementation can do without, into buffers that are there."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs[:4])
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return run


def check(inputs: Inputs, implementation: str, name: str) -> dict[str, float]:
    """Relative L2 errors of loss and hidden gradient against eager float64 on a few rows."""
    few = Inputs(
        inputs.hidden[:CHECKED_ROWS].detach().requires_grad_(),
        inputs.weight,
        inputs.teacher_hidden[:CHECKED_ROWS],
        inputs.teacher_weight,
        inputs.labels[:CHECKED_ROWS],
    )
    double = Inputs(*(x.detach().double() if x.is_floating_point() else x for x in few))
    double.hidden.requires_grad_()
    double.weight.requires_grad_()
    loss, hidden, _ = step(few, implementation, name)
    true_loss, true_hidden, _ = step(double, "eager", name)
    return {
        "loss_error": float((loss.double() - true_loss).abs() / true_loss.abs()),
        "gradient_error": float((hidden.double() - true_hidden).norm() / true_hidden.norm()),
    }


def timed(fn: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_bytes(arguments: argparse.Namespace, implementation: str, name: str) -> int:
    """Peak memory of one step above the inputs and the two gradients, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.heads", "--memory-of", implementation, name]
    for option in ("rows", "vocab", "dim", "teacher_dim", "device"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(inputs: Inputs, implementation: str, name: str) -> int:
    """The step's peak in this process: sampled resident size on a CPU, the allocator's own count on a GPU."""
    if inputs.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, hidden, weight = step(inputs, implementation, name)
        return torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    before = peak = _resident()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, hidden, weight = step(inputs, implementation, name)
    peak = max(peak, _resident())
    done.set()
    sampler.join()
    return peak - before - hidden.nbytes - weight.nbytes


def _resident() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if "model name" in line), platform.processor())
    return {
        "commit": commit + ("+changes" if dirty.strip() else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedkd": fusedkd.__version__,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the result file holds them."""
    from tqdm import tqdm

    inputs = make_inputs(arguments.rows, arguments.vocab, arguments.dim, arguments.teacher_dim, arguments.device)
    cases = [(implementation, name) for name in arguments.divergence for implementation in IMPLEMENTATIONS]
    gemms = bare_gemms(inputs)
    samples: dict[str, list[float]] = {"gemms": []}
    rows = {}
    with tqdm(total=2 * len(cases) + (arguments.rounds + 1) * (len(cases) + 1), desc="bench.heads") as bar:
        for implementation, name in cases:
            key = f"{implementation} {name}"
            rows[key] = {"implementation": implementation, "divergence": name, **check(inputs, implementation, name)}
            bar.update()
            rows[key]["extra_bytes"] = extra_bytes(arguments, implementation, name)
            samples[key] = []
            bar.update()
        for round_number in range(arguments.rounds + 1):
            for key, times in samples.items():
                fn = gemms if key == "gemms" else lambda key=key: step(inputs, *key.split())
                seconds = timed(fn, arguments.device)
                if round_number:  # the first round warms up
                    times.append(seconds)
                bar.update()
    floor = statistics.median(samples["gemms"])
    for key, row in rows.items():
        row["seconds"] = samples[key]
        row["median_seconds"] = statistics.median(samples[key])
        row["over_gemms"] = row["median_seconds"] / floor
        if row["implementation"] == "fusedkd":
            plain = rows[f"eager {row['divergence']}"]
            row["memory_over_eager"] = row["extra_bytes"] / plain["extra_bytes"]
    return {
        "machine": machine(arguments.device),
        "shape": {name: getattr(arguments, name) for name in ("rows", "vocab", "dim", "teacher_dim")},
        "dtype": "float32",
        "gemms": {"seconds": samples["gemms"], "median_seconds": floor},
        "results": list(rows.values()),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    shape, machine_ = result["shape"], result["machine"]
    lines = [
        f"N={shape['rows']}, V={shape['vocab']:,}, D={shape['dim']} (student) / {shape['teacher_dim']} (teacher), "
        f"{result['dtype']}, {machine_['device']}, torch {machine_['torch']}, {machine_['date'][:10]}, "
        f"commit {machine_['commit'][:10]}. Four bare matrix products: {result['gemms']['median_seconds']:.2f} s.",
        "",
        "| divergence | implementation | time, s | / bare products | extra memory, MB | loss error | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["results"]:
        lines.append(
            f"| {row['divergence']} | {row['implementation']} | {row['median_seconds']:.2f} | {row['over_gemms']:.2f} "
            f"| {row['extra_bytes'] / 1e6:.0f} | {row['loss_error']:.0e} | {row['gradient_error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m bench.heads", description=(__doc__ or "").split("\n")[0])
    options.add_argument("--rows", type=int, default=512)
    options.add_argument("--vocab", type=int, default=151_936)
    options.add_argument("--dim", type=int, default=256)
    options.add_argument("--teacher-dim", type=int, default=512)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--divergence", nargs="+", default=list(DIVERGENCES), choices=DIVERGENCES)
    options.add_argument("--out", type=pathlib.Path, help="folder for heads-DEVICE.json and .md")
    options.add_argument("--memory-of", nargs=2, metavar=("IMPLEMENTATION", "DIVERGENCE"), help=argparse.SUPPRESS)
    return options


def main() -> None:
    """Measure, print the table, write the files."""
    arguments = parser().parse_args()
    if arguments.memory_of:
        implementation, name = arguments.memory_of
        small = make_inputs(8, 1024, 16, 16, arguments.device)
        step(small, implementation, name)  # libraries load and threads start here, not in the measurement
        inputs = make_inputs(arguments.rows, arguments.vocab, arguments.dim, arguments.teacher_dim, arguments.device)
        print(measure_memory(inputs, implementation, name))
        return
    result = run(arguments)
    print(table(result))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = arguments.out / f"heads-{arguments.device}"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
