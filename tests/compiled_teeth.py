"""What the emulator notices: kernels with one fault each, run one by one. `python tests/compiled_teeth.py [WORDS]`

For every kernel of the cases of compiled_cases.py (those whose names have one of the words):

    barriers    each bar.sync is deleted in turn
    buffers     each tensor is one element shorter than the kernel believes
    masks       each guarded access of global memory loses its guard

A fault is noticed if a number is wrong or there is a finding that the unchanged kernel does not give. What is not, is
listed with where it stands and what is known about it:

    no thread was masked    the guard holds for all threads at this size: nothing is lost without it
    harmless                threads that the guard keeps away do what others do too: the same value to the same address,
                            or a load whose number nobody uses, of memory that may be read
    shared                  the element belongs to another tensor of the same launch too
    not touched             no access of this launch reaches the tensor's last element
    not needed              of a barrier: the next one, or other data in between, orders the same accesses at this size

Each takes a second or two; --most N tries N of each kernel's barriers and masks, evenly spread. Not part of CI.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import compiled_cases
import emulator
import torch

GUARDED = re.compile(r"^\s*@!?%p\d+ ((ld|st)\.global\S*.*)$")


def observe(case: str) -> set[str]:
    """What is wrong with a run."""
    way, divergence, dtype, layout = compiled_cases.CASES[case]
    emulator.clear()
    emulator.settings.seed = 0
    wrong = set()
    try:
        compiled_cases.run(way, divergence, compiled_cases.DTYPES[dtype], layout)
    except (AssertionError, emulator.Fault) as error:
        wrong.add(type(error).__name__)
    return wrong | {" ".join(f[:3]) for f in emulator.findings() if f.kind != "replicas differ by rounding"}


def source(lines: list[str], at: int) -> str:
    """The kernel's line that a line of PTX belongs to."""
    said = (lines[i].split("//")[-1].strip() for i in range(at, 0, -1) if lines[i].strip().startswith(".loc"))
    return next(said, "?")[:90]


def without(text: str, at: int, replacement: str) -> Callable[[str], str]:
    """An edit of one kernel."""
    lines = text.splitlines()
    lines[at] = replacement
    return lambda given: "\n".join(lines) if given == text else given


def barriers(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers, and what stands there instead."""
    return ((i, "") for i, line in enumerate(text.splitlines()) if line.strip().startswith("bar.sync"))


def masks(text: str) -> Iterator[tuple[int, str]]:
    """The same, of guarded accesses."""
    found = ((i, GUARDED.match(line)) for i, line in enumerate(text.splitlines()))
    return ((i, match.group(1)) for i, match in found if match)


def flipped(text: str, at: int) -> Callable[[str], str]:
    """The guard turned round and its access made a trap: whether any thread is masked here."""
    line = text.splitlines()[at].strip()
    guard = line.split()[0]
    turned = "@" + guard[2:] if guard.startswith("@!") else "@!" + guard[1:]
    return without(text, at, f"{line}\n{turned} ld.shared.b32 %r0, [0];")


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
        title = emulator.Program(text).kernel.title
        for kind, places in (("barriers", list(barriers(text))), ("masks", list(masks(text)))):
            chosen = places[:: -(-len(places) // most)] if places else []
            silent = []
            for at, replacement in chosen:
                with emulator.edited(without(text, at, replacement)):
                    if observe(case) - usual:
                        continue
                reason = "not needed"
                if kind == "masks":
                    with emulator.edited(flipped(text, at)):
                        reason = "harmless" if "Fault" in observe(case) - usual else "no thread was masked"
                silent.append(f"    {reason}: {text.splitlines()[at].strip()[:60]} of {source(text.splitlines(), at)}")
            print(
                f"{case} {title} {kind}: {len(chosen) - len(silent)} of {len(chosen)} noticed",
                *silent,
                sep="\n",
                flush=True,
            )
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
