"""What the compiled kernels cost, counted by the emulator and ptxas: `python tests/compiled_figures.py [NAME ...]`

Prints a JSON line for each case, or for those named (`--list` names them), with the figures of each kernel that it
launches. No time is measured. A program of its own, because Triton's interpreter and its compiler exclude each other.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compiled_cases
import emulator
import torch
from compiled_cases import ALIGNED, CAPABILITY
from counting import Cost, CountedGrid, counted

ARCHITECTURE = f"sm_{CAPABILITY}"
UNALIGNED = "unaligned"  # rows of an odd number of columns, one behind the other: only the first begins at a sector
PEAKED = "peaked"  # aligned rows with a token above 1/2 on both sides, in another tile than the label
# The same tiles, all of them full or nearly so. Of a single row Triton would make a constant.
SHAPES = {ALIGNED: (2, 16_384), UNALIGNED: (3, 16_381)}
DTYPES = compiled_cases.DTYPES | {"fp16": torch.float16}
FORMULAS = ("fkl", "rkl", "drkl", "ab", "jsd")
CLASSES = ("rkl", "ab", "jsd")  # one sweep with few or many sums, and two sweeps


class Case(NamedTuple):
    """One call."""

    way: str
    divergence: str
    dtype: str
    rows: str

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return "-".join(filter(None, self))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return SHAPES.get(self.rows, SHAPES[ALIGNED])


class Given(NamedTuple):
    """Operands of a call."""

    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    divergence: str


def logits(case: Case, stride: int) -> torch.Tensor:
    """Numbers of [-8, 8), each once, that no machine rounds differently: no token is likelier than 1/2."""
    rows, columns = case.shape
    at = torch.arange(rows * columns) * stride % 65_536
    return ((at - 32_768) / 4096).view(rows, columns).to(DTYPES[case.dtype])


def _given(case: Case) -> Given:
    rows, columns = case.shape
    labels = columns // 2 + torch.arange(rows)
    student, teacher = logits(case, 40_503), logits(case, 25_717)
    if case.rows == PEAKED:
        student[:, 9], teacher[:, 9] = 20, 18
    return Given(student, teacher, labels, case.divergence)


def _autograd(given: Given, **options: Any) -> None:
    import fusedkd

    student = given.student.requires_grad_()
    about = {"divergence": given.divergence, "backend": "triton", **options}
    fusedkd.kd_loss(student, given.teacher, given.labels, **about).backward()


def _fused(given: Given) -> None:
    import fusedkd

    fusedkd.kd_value_and_grad(given.student, given.teacher, given.labels, divergence=given.divergence, backend="triton")


def _streaming(given: Given) -> None:
    """Heads whose products are the logits, exactly."""
    import fusedkd

    hidden = torch.eye(len(given.labels), dtype=given.student.dtype)
    student, teacher = (x.T.contiguous().requires_grad_() for x in given[:2])
    heads = fusedkd.Head(hidden, student), fusedkd.Head(hidden, teacher.detach())
    about = {"divergence": given.divergence, "backend": "triton", "schedule": "streaming"}
    fusedkd.kd_loss(*heads, given.labels, **about).backward()


def _logprobs(given: Given) -> None:
    import fusedkd

    fusedkd.token_logprobs(given.student.requires_grad_(), given.labels, backend="triton").sum().backward()


def _top_k(given: Given) -> None:
    """A hundred tokens, the label among them, of which one after the other lies in another tile."""
    import fusedkd

    rows, columns = given.student.shape
    ids = (given.labels[:, None] + torch.arange(100) * 4099) % columns
    teacher = fusedkd.TopK(ids, torch.full((rows, 100), -5.0))
    student = given.student.requires_grad_()
    fusedkd.kd_loss(student, teacher, given.labels, divergence=given.divergence, backend="triton").backward()


WAYS: dict[str, tuple[Callable[[Given], None], tuple[str, ...]]] = {
    "autograd": (_autograd, (*FORMULAS, "akl", "amid", "taid")),
    "fused": (_fused, FORMULAS),
    "split rows": (_autograd, CLASSES),
    "streaming": (_streaming, CLASSES),
    "log-probabilities": (_logprobs, ("",)),
    "floor": (functools.partial(_autograd, support="floor"), ("rkl",)),
    "top-k": (_top_k, ("rkl",)),
}


def _cases() -> Iterator[Case]:
    for way, (_, divergences) in WAYS.items():
        kinds = (*SHAPES, PEAKED) if way == "fused" else SHAPES
        for divergence, dtype, rows in itertools.product(divergences, DTYPES, kinds):
            if dtype in compiled_cases.DTYPES or (way, divergence) == ("fused", "rkl"):  # else as bf16
                yield Case(way, divergence, dtype, rows)


CASES = {case.name: case for case in _cases()}


class Resources(NamedTuple):
    """What ptxas gave a kernel."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    ahead: int  # bytes that a thread loads before it waits for any of them


@functools.cache
def resources(ptx: str) -> Resources:
    """ptxas with the options that Triton gives it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    from fusedkd.kernels.aot import compiler, sass
    from fusedkd.kernels.device.tiles import FUSION

    backend: Any = make_backend(GPUTarget("cuda", CAPABILITY, 32))
    cubin = backend.make_cubin(ptx, {}, backend.parse_options(dict(FUSION)), CAPABILITY)
    found = compiler.resources(cubin)
    return Resources(found["registers"], found["stack"], sass.loaded_ahead(compiler.disassembly(cubin)))


def blocks_at_once(registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on a multiprocessor of compute capability 9.0, as NVIDIA's occupancy calculator has it.

    A warp's registers are given out 256 at a time, by four schedulers that own 16,384 each; a block's shared memory is
    given out 128 bytes at a time, 1 KB more than it asks for, of 228 KB. There is room for 64 warps and 32 blocks.
    """
    warps = threads // 32
    per_scheduler = 16_384 // (-(-registers * 32 // 256) * 256)
    memory = (228 << 10) // (-(-shared // 128) * 128 + 1024)
    return min(4 * per_scheduler // warps, 64 // warps, 32, memory)


def figures(launches: list[CountedGrid]) -> dict[str, int]:
    """Those of a kernel: counts of all its launches, and of its resources the worst of its variants."""
    programs = {id(launch.program): launch.program for launch in launches}.values()
    found = [resources("\n".join(program.kernel.lines)) for program in programs]
    threads, shared = (max(of) for of in zip(*((p.kernel.threads, p.shared) for p in programs), strict=True))
    registers = max(x.registers for x in found)
    cost = sum((launch.cost() for launch in launches), Cost())
    return {
        "launches": len(launches),
        "blocks": cost.blocks,
        "instructions": cost.instructions,
        "barriers": cost.barriers,
        "load_requests": cost.loads.requests,
        "load_sectors": cost.loads.taken,
        "load_sectors_least": cost.loads.least,
        "store_requests": cost.stores.requests,
        "store_sectors": cost.stores.taken,
        "store_sectors_least": cost.stores.least,
        "shared_requests": cost.shared.requests,
        "shared_waves": cost.shared.taken,
        "shared_waves_least": cost.shared.least,
        "threads": threads,
        "registers": registers,
        "spilled": max(x.spilled for x in found),
        "shared_memory": shared,
        "blocks_at_once": blocks_at_once(registers, threads, shared),
        "bytes_ahead": min(x.ahead for x in found),
    }


def count(case: Case) -> dict[str, dict[str, int]]:
    """The figures of each kernel that a case launches, by file:kernel."""
    compiled_cases.share_rows(case.way == "split rows")
    with counted() as launches:
        WAYS[case.way][0](_given(case))
    titles = dict.fromkeys(launch.program.kernel.title for launch in launches)
    return {title: figures([x for x in launches if x.program.kernel.title == title]) for title in titles}


def main(names: list[str]) -> None:
    """A line for each case that is named, or for all."""
    if names == ["--list"]:
        print(*CASES, sep="\n")
        return
    if unknown := set(names) - set(CASES):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    os.environ["TRITON_INTERPRET"] = "0"
    emulator.install(CAPABILITY, order="lockstep", races=False)
    for case in [CASES[name] for name in names] or CASES.values():
        rows, columns = case.shape
        report = {"case": case.name, "architecture": ARCHITECTURE, **case._asdict(), "n": rows, "columns": columns}
        print(json.dumps({**report, "kernels": count(case)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
