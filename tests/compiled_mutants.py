"""What the emulator notices: kernels with one fault each, run one by one. `python tests/compiled_mutants.py [WORDS]`

For every kernel of the cases of compiled_cases.py (those whose names have one of the words):

    barriers    each bar.sync is deleted in turn
    swaps       the stores that stand before and behind a barrier change places, around each in turn
    buffers     each tensor is one element shorter than the kernel believes
    masks       each guarded access of global memory loses its guard

A fault is noticed if a number is wrong or there is a finding that the unchanged kernel does not give. Each that is not
is listed with where it stands and a reason, which for masks is found by running the kernel once more:

    no thread masked    made a trap, the other side of the guard stops nobody: nothing is lost at this size
    unused              garbage in the place of what the masked threads load changes nothing, and the memory is theirs
    replicas            the masked threads alone, instead of the others, store the same numbers at the same addresses
    not needed          of a barrier or a swap: other barriers order the same accesses of the warps at this size
    shared              of a buffer: the element belongs to another tensor of the same launch too
    not touched         of a buffer: no access of this launch reaches the tensor's last element
    unexplained         none of these

Each takes a second or two; --most N tries N of each kind for each kernel, evenly spread. Not part of CI.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import compiled_cases
import emulator
import torch

GUARDED = re.compile(r"^\s*@(!?)(%p\d+) ((ld|st)\.global\S*\s+(.*))$")
REGISTER = re.compile(r"%[a-z]+\d+")
# What a register of a load is filled with, by its size in PTX: a NaN, or an integer that is no index.
GARBAGE = {"b16": "0x7fed", "b32": "0x7feddead", "b64": "0x7feddead7feddead"}


class Fault(NamedTuple):
    """Lines of a kernel's PTX, and what stands there instead."""

    at: int  # the line that is reported
    lines: dict[int, str]

    def edit(self, text: str) -> Callable[[str], str]:
        """What makes this fault of one kernel and leaves all others."""
        lines = text.splitlines()
        for at, replacement in self.lines.items():
            lines[at] = replacement
        return lambda given: "\n".join(lines) if given == text else given


def observe(case: str) -> set[str]:
    """What is wrong with a run."""
    way, divergence, dtype, layout = compiled_cases.CASES[case]
    emulator.clear()
    emulator.settings.seed = 0
    wrong = set()
    try:
        compiled_cases.run(way, divergence, compiled_cases.DTYPES[dtype], layout)
    except (AssertionError, IndexError, emulator.Fault) as error:  # schedules index by a token that a kernel wrote
        wrong.add(type(error).__name__)
    return wrong | {" ".join(f[:3]) for f in emulator.findings() if f.kind != "replicas differ by rounding"}


def source(lines: list[str], at: int) -> str:
    """The kernel's line that a line of PTX belongs to."""
    said = (lines[i].split("//")[-1].strip() for i in range(at, 0, -1) if lines[i].strip().startswith(".loc"))
    return next(said, "?")[:90]


def barriers(lines: list[str]) -> Iterator[Fault]:
    """Each is deleted."""
    return (Fault(i, {i: ""}) for i, line in enumerate(lines) if line.strip().startswith("bar.sync"))


def swaps(lines: list[str]) -> Iterator[Fault]:
    """The last store before a barrier and the first behind it, up to the next barriers."""
    for fault in barriers(lines):
        pair = [_next_store(lines, fault.at, step) for step in (-1, 1)]
        if None not in pair:
            one, other = pair
            yield Fault(fault.at, {one: lines[other], other: lines[one]})


def _next_store(lines: list[str], at: int, step: int) -> Any:
    while 0 <= (at := at + step) < len(lines):
        line = lines[at].strip()
        if " st." in f" {line}":
            return at
        if "bar.sync" in line:
            return None
    return None


def masks(lines: list[str]) -> Iterator[Fault]:
    """Each guarded access is done by all threads."""
    found = ((i, GUARDED.match(line)) for i, line in enumerate(lines))
    return (Fault(i, {i: match.group(3)}) for i, match in found if match)


KINDS = {"barriers": barriers, "swaps": swaps, "masks": masks}


def why_not(kind: str, case: str, text: str, fault: Fault, usual: set[str]) -> str:
    """Why a fault was not noticed."""
    if kind != "masks":
        return "not needed"
    lines = text.splitlines()
    negated, predicate, access, what, operands = GUARDED.match(lines[fault.at]).groups()
    others = f"@{'' if negated else '!'}{predicate}"  # the threads that the guard keeps away

    def unchanged(replacement: str) -> bool:
        with emulator.edited(Fault(fault.at, {fault.at: replacement}).edit(text)):
            return not observe(case) - usual

    if unchanged(f"{lines[fault.at]}\n{others} ld.shared.b32 %r0, [0];"):
        return "no thread masked"
    if what == "st":
        return "replicas" if unchanged(f"{others} {access}") else "unexplained"
    size = re.search(r"\.(b16|b32|b64)\b", access).group(1)
    registers = REGISTER.findall(operands.split("[")[0])
    spoilt = (f"{others} mov.{size} {register}, {GARBAGE[size]};" for register in registers)
    return "unused" if unchanged("\n".join([lines[fault.at], *spoilt])) else "unexplained"


def shorter(x: torch.Tensor) -> torch.Tensor:
    """Without its last element (of its last row)."""
    return x.reshape(-1)[:-1] if x.is_contiguous() else x[..., :-1]


def main() -> None:
    """Print a line for each kind of fault of each kernel, and one for each that was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--most", type=int, default=1_000_000)
    arguments = parser.parse_args()
    emulator.install(compiled_cases.CAPABILITY)
    import cases

    cases.cuts = lambda backend: False
    for case in compiled_cases.CASES:
        if not arguments.words or any(word in case for word in arguments.words):
            every(case, arguments.most)


def every(case: str, most: int) -> None:
    """All faults of one case."""
    texts: dict[str, str] = {}
    given: dict[tuple[str, str], Any] = {}
    with emulator.edited(lambda t: texts.setdefault(t, t), lambda k, name, x: given.setdefault((k, name), x)):
        usual = observe(case)
    for text in texts:
        lines, title = text.splitlines(), emulator.Program(text).kernel.title
        for kind, faults in KINDS.items():
            places = list(faults(lines))
            chosen = places[:: -(-len(places) // most)] if places else []
            silent = []
            for fault in chosen:
                with emulator.edited(fault.edit(text)):
                    if observe(case) - usual:
                        continue
                reason = why_not(kind, case, text, fault, usual)
                silent.append(f"    {reason}: {lines[fault.at].strip()[:60]} of {source(lines, fault.at)}")
            count = f"{len(chosen) - len(silent)} of {len(chosen)} noticed"
            print(f"{case} {title} {kind}: {count}", *silent, sep="\n", flush=True)
            emulator.driver._programs.clear()
    addresses = [x.untyped_storage().data_ptr() for x in given.values()]
    for key, x in given.items():
        with emulator.edited(narrow=lambda k, name, y, key=key: shorter(y) if (k, name) == key else y):
            if not observe(case) - usual:
                reason = "shared" if addresses.count(x.untyped_storage().data_ptr()) > 1 else "not touched"
                print(f"    {case} {key[0]} buffer {key[1]} {tuple(x.shape)}: {reason}", flush=True)
    print(f"{case} buffers: {len(given)} tried", flush=True)


if __name__ == "__main__":
    main()
