"""What the compiled kernels cost is no more than the committed figures, and the counters count what they say.

Counted anew are the cases below, which have every kernel; FUSEDKD_TESTS=all counts all. A figure that has to grow is
written again by `python -m fusedkd.bench.instructions --out bench/results`, and shows in the diff.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compiled_figures
import emulator
import pytest
import torch
from counting import Traffic, counted
from test_compiled_kernels import launchable
from test_emulator import run

from fusedkd.bench import compiled, instructions

RESULTS = Path(__file__).parents[1] / "bench" / "results"
COMMITTED = compiled.load(RESULTS)
CASES = {case["case"]: case for case in COMMITTED["cases"]}
FULL = os.environ.get("FUSEDKD_TESTS") == "all"
RECOUNTED = [
    "fused-rkl-bf16-aligned",
    "fused-rkl-bf16-unaligned",
    "split rows-jsd-bf16-aligned",
    "streaming-jsd-bf16-aligned",
    "log-probabilities-bf16-aligned",
    "floor-rkl-fp32-aligned",
    "top-k-rkl-bf16-aligned",
]
COMPILED = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SAME = {"launches", "blocks", "threads"}  # what is launched: others are no longer figures of the same
FLOORS = {"blocks_at_once", "bytes_ahead"}  # more is better


def worse(found: dict[str, dict[str, int]], committed: dict[str, dict[str, int]]) -> list[str]:
    """The figures of a case's kernels that are above those committed, or below where more is better."""
    if found.keys() != committed.keys():
        return [f"launched {', '.join(found)}, committed {', '.join(committed)}"]
    return [
        f"{kernel}: {figure} {now}, committed {then}"
        for kernel, figures in committed.items()
        for figure, then in figures.items()
        for now in [found[kernel][figure]]
        if (now != then if figure in SAME else now < then if figure in FLOORS else now > then)
    ]


# The counters


def counts(body: str, *given: Any, **options: Any) -> Any:
    """What a small kernel costs (test_emulator.py: program)."""
    with counted() as launches:
        run(body, *given, **options)
    return launches[0].cost()


B32, B16, B64 = "b32 %r1", "b16 %rs1", "b64 %rd1"
FOUR, FEW, NOBODY = "v4.b32 {%r1, %r1, %r1, %r1}", "@%p1 b32 %r1", "@%p2 b32 %r1"  # threads 0 to 4, and none


@pytest.mark.parametrize(
    ("what", "stride", "offset", "traffic"),
    [
        (B32, 4, 0, Traffic(1, 4, 4)),
        (B32, 4, 4, Traffic(1, 5, 4)),  # 128 bytes across five sectors
        (B32, 4, 32, Traffic(1, 4, 4)),
        (B32, 0, 0, Traffic(1, 1, 1)),
        (B16, 2, 0, Traffic(1, 2, 2)),
        (B16, 2, 10, Traffic(1, 3, 2)),
        (B16, 4, 0, Traffic(1, 4, 2)),  # every second half is not asked for
        (B16, 10, 0, Traffic(1, 10, 2)),
        (B16, 64, 0, Traffic(1, 32, 2)),
        (B64, 32, 0, Traffic(1, 32, 8)),
        (FOUR, 16, 0, Traffic(1, 16, 16)),
        (FOUR, 48, 16, Traffic(1, 32, 16)),
        (FEW, 4, 0, Traffic(1, 1, 1)),
        (FEW, 32, 0, Traffic(1, 5, 1)),
        (NOBODY, 4, 0, Traffic(0, 0, 0)),
    ],
)
@pytest.mark.parametrize("store", [False, True])
def test_sectors(what: str, stride: int, offset: int, traffic: Traffic, store: bool) -> None:
    """Of each warp: those that its bytes lie in, and those that would hold them."""
    guard, kind, register = re.findall(r"^(@%p\d )?(\S+) (.*)$", what)[0]
    access = f"st.global.{kind} [%rd9], {register};" if store else f"ld.global.{kind} {register}, [%rd9];"
    body = f"""setp.lt.u32 %p1, %r0, 5; setp.gt.u32 %p2, %r0, 99; mov.b32 %r1, 0; mov.b16 %rs1, 0; mov.b64 %rd1, 0;
    and.b32 %r5, %r0, 31; mad.wide.u32 %rd9, %r5, {stride}, %rd0; add.s64 %rd9, %rd9, {offset}; {guard}{access}"""
    cost = counts(body, torch.zeros(1024, dtype=torch.int16))
    assert (cost.stores if store else cost.loads) == traffic
    assert (cost.loads if store else cost.stores) == Traffic()
    if not guard:
        more = counts(body, torch.zeros(1024, dtype=torch.int16), threads=64, blocks=3)
        assert (more.stores if store else more.loads) == sum([traffic] * 2 * 3, Traffic())


@pytest.mark.parametrize(
    ("access", "stride", "traffic"),
    [
        ("st.shared.b32 [%r2], %r0", 4, Traffic(1, 1, 1)),
        ("st.shared.b32 [%r2], %r0", 8, Traffic(1, 2, 1)),  # two words in each second bank
        ("st.shared.b32 [%r2], %r0", 12, Traffic(1, 1, 1)),  # 3 and 32 have no common factor
        ("st.shared.b32 [%r2], %r0", 128, Traffic(1, 32, 1)),  # all in one bank
        ("st.shared.b32 [%r2], %r0", 0, Traffic(1, 1, 1)),  # one word
        ("st.shared.b8 [%r2], %r0", 1, Traffic(1, 1, 1)),
        ("ld.shared.b16 %rs1, [%r2]", 2, Traffic(1, 1, 1)),  # two threads a word
        ("ld.shared.b16 %rs1, [%r2]", 64, Traffic(1, 16, 1)),
        ("st.shared.b64 [%r2], %rd1", 8, Traffic(1, 2, 2)),
        ("st.shared.b64 [%r2], %rd1", 16, Traffic(1, 4, 2)),
        ("st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0}", 16, Traffic(1, 4, 4)),
        ("st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0}", 32, Traffic(1, 8, 4)),
        ("@%p1 st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0}", 16, Traffic(1, 1, 1)),  # one phase, of threads 0 to 4
    ],
)
def test_waves(access: str, stride: int, traffic: Traffic) -> None:
    """Of each warp: as many as there are words in a bank, phase by phase."""
    body = f"""setp.lt.u32 %p1, %r0, 5; mov.b64 %rd1, 0; and.b32 %r5, %r0, 31; mov.b32 %r3, global_smem;
    mad.lo.s32 %r2, %r5, {stride}, %r3; {access};"""
    assert counts(body, shared=4096).shared == traffic
    if "@" not in access:
        assert counts(body, shared=4096, threads=64, races=False).shared == traffic + traffic


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_instructions_and_barriers(order: str) -> None:
    """By warps: three times round a loop, and an instruction that half of one warp runs in each arm."""
    about = {"order": order, "threads": 64}
    assert counts("", **about).instructions == 2 * 3  # two registers, and the return
    loop = "mov.b32 %r1, 0; $again: add.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, 3; bar.sync 0; @%p1 bra $again;"
    cost = counts(loop, blocks=5, **about)
    assert (cost.blocks, cost.instructions, cost.barriers) == (5, 5 * 2 * (3 + 1 + 3 * 4), 5 * 3)
    arms = "setp.lt.u32 %p1, %r0, 16; @%p1 bra $one; mov.b32 %r1, 1; bra $end; $one: mov.b32 %r1, 2; $end: bar.sync 0;"
    assert counts(arms, **about).instructions == 2 * 3 + (2 + 3 + 1) + (2 + 2 + 1)
    assert counts("setp.gt.u32 %p1, %r0, 99; @%p1 add.s32 %r1, %r0, 1;", **about).instructions == 2 * 5


def test_nobody_counts_outside() -> None:
    """The emulator is as it was before, also after an error."""
    with pytest.raises(RuntimeError, match="stop"), counted():
        assert emulator.settings.grid is not emulator.Grid
        raise RuntimeError("stop")
    assert emulator.settings.grid is emulator.Grid


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 1024, 0, 2),
        (168, 128, 0, 3),
        (88, 128, 0, 5),  # five warps of 2,816 registers for each scheduler, not 5.8
        (255, 256, 0, 1),
        (128, 256, 0, 2),
        (16, 32, 0, 32),
        (32, 256, 64 << 10, 3),
        (32, 128, 227 << 10, 1),
    ],
)
def test_blocks_at_once(registers: int, threads: int, shared: int, blocks: int) -> None:
    """As NVIDIA's occupancy calculator says for compute capability 9.0."""
    assert compiled_figures.blocks_at_once(registers, threads, shared) == blocks


# The ceilings


def test_a_worse_figure_is_seen() -> None:
    """Each of them, of each kernel, by one; a better one is none."""
    for case in CASES.values():
        kernels = case["kernels"]
        assert worse(kernels, kernels) == []
        for kernel, figures in kernels.items():
            for figure, value in figures.items():
                up, down = ({**kernels, kernel: {**figures, figure: value + step}} for step in (1, -1))
                bad, good = (down, up) if figure in FLOORS else (up, down)
                assert worse(bad, kernels) == [f"{kernel}: {figure} {bad[kernel][figure]}, committed {value}"]
                assert bool(worse(good, kernels)) == (figure in SAME)
    assert worse({}, CASES[RECOUNTED[0]]["kernels"]) != []


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("bar.sync 0;", {"instructions", "barriers"}),
        ("mov.b32 %r2, 0;", {"instructions"}),
        ("ld.global.b32 %r2, [%rd9+64];", {"instructions", "loads"}),
        ("st.shared.b32 [global_smem], %r1;", {"instructions", "shared"}),
    ],
)
def test_a_worse_kernel_counts_more(more: str, what: set[str]) -> None:
    """An instruction more is an instruction more."""
    body = "mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 %r1, [%rd9]; {} st.global.b32 [%rd9], %r1;"
    given, about = torch.zeros(256, dtype=torch.int32), {"threads": 64, "shared": 16}
    before, after = (counts(body.format(x), given, **about) for x in ("", more))
    names = ("blocks", "instructions", "barriers", "loads", "stores", "shared")
    assert {name for name in names if getattr(before, name) != getattr(after, name)} == what
    assert after.instructions - before.instructions == 2


WHOLE_VECTORS = [
    f"autograd-{name}-{dtype}" for name in ("fkl", "rkl", "ab", "jsd", "amid") for dtype in ("bf16", "fp32")
] + ["fused-rkl-bf16"]
# In flight, in KB, where less than 24: 16 columns for a thread would spill, and 330 instructions a pair hide latency.
FEWER = {"autograd-amid-bf16:_value": 16}


@pytest.mark.parametrize("name", WHOLE_VECTORS)
def test_unaligned_rows_are_as_cheap(name: str) -> None:
    """At most 1.15 instructions for one of aligned rows, and bytes enough in flight.

    A first vector in the middle of a sector costs each request one more: 17 for 16.
    """
    aligned, unaligned = (CASES[f"{name}-{rows}"] for rows in compiled_figures.SHAPES)
    for kernel, one in aligned["kernels"].items():
        other = unaligned["kernels"][kernel]
        per_pair = [
            x["instructions"] / (case["n"] * case["columns"]) for x, case in ((one, aligned), (other, unaligned))
        ]
        assert per_pair[1] <= 1.15 * per_pair[0], kernel
        sectors = [x["load_sectors"] / case["n"] for x, case in ((one, aligned), (other, unaligned))]
        assert sectors[1] <= 17 / 16 * sectors[0], kernel
        for x in (one, other):
            in_flight = x["bytes_ahead"] * x["threads"] * x["blocks_at_once"] >> 10
            assert in_flight >= FEWER.get(f"{name}:{kernel.split(':')[1]}", 24), kernel
            assert x["spilled"] == 0


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(compiled_figures.PEAKED)])
def test_peaked_rows_are_as_cheap(name: str) -> None:
    """A token above 1/2 takes the mask of its own tile alone: at most 1.1 instructions for one of other rows."""
    plain = CASES[name.replace(compiled_figures.PEAKED, compiled_figures.ALIGNED)]
    for kernel, one in plain["kernels"].items():
        assert CASES[name]["kernels"][kernel]["instructions"] <= 1.1 * one["instructions"], kernel


def test_the_committed_files() -> None:
    """All cases are there, with every kernel of ours, and the page is that of the result."""
    assert list(CASES) == list(compiled_figures.CASES)
    assert (RESULTS / compiled.PAGE).read_text() == compiled.page(COMMITTED)
    assert {kernel for case in CASES.values() for kernel in case["kernels"]} == launchable()
    assert {kernel for name in RECOUNTED for kernel in CASES[name]["kernels"]} == launchable()


@pytest.fixture(scope="module")
def recounted() -> dict[str, Any]:
    """The figures of the code as it is."""
    triton = pytest.importorskip("triton")
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the figures are those of Triton {COMMITTED['triton']}, this is {triton.__version__}")
    return {case["case"]: case for case in compiled.counted(*([] if FULL else RECOUNTED))}


@COMPILED
@pytest.mark.interpreter("it starts a process with the emulator itself")
@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("name", CASES if FULL else RECOUNTED)
def test_no_figure_is_worse(name: str, recounted: dict[str, Any]) -> None:
    """Counted anew."""
    assert not worse(recounted[name]["kernels"], CASES[name]["kernels"])


# The command


@COMPILED
def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """An installed package has no emulator: the command says so before it compiles anything."""
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "fusedkd" / "bench" / "compiled.py"))
    with pytest.raises(SystemExit) as refused:
        instructions.main(["--out", str(tmp_path / "results")])
    assert refused.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "compiled_figures.py: kernels are counted by the emulator of fusedkd's tests" in message
    assert "in a clone of the repository" in message
    assert not (tmp_path / "results").exists()


def test_an_unknown_case() -> None:
    """Is refused with those that there are."""
    done = subprocess.run([sys.executable, compiled.script(), "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown: x; known: autograd-fkl-bf16-aligned" in done.stderr


def test_a_failing_program() -> None:
    """What it printed is not the end of it."""
    lines = compiled.printed("-c", "print('one'); raise SystemExit(3)")
    assert next(lines) == "one"
    with pytest.raises(subprocess.CalledProcessError, match="3"):
        next(lines)


@COMPILED
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Writes all files and says how far it is."""
    some, written = [CASES[name] for name in RECOUNTED[:2]], []
    monkeypatch.setattr(instructions, "counted", lambda architecture, elements: iter([]))
    monkeypatch.setattr(instructions.model, "write", written.append)
    monkeypatch.setattr(compiled, "counted", lambda: iter(some))
    monkeypatch.setattr(compiled, "names", lambda: RECOUNTED[:2])
    assert instructions.main(["--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / instructions.FILE).read_text())["kernels"] == []
    assert json.loads((tmp_path / compiled.FILE).read_text())["cases"] == some
    assert "| rkl | bf16 | unaligned | `_value_and_gradient` |" in (tmp_path / compiled.PAGE).read_text()
    assert "case 2 of 2: fused-rkl-bf16-unaligned" in capsys.readouterr().err
    (tmp_path / compiled.FILE).unlink()
    assert instructions.main(["--out", str(tmp_path), "--loops"]) == 0
    assert written == [tmp_path, tmp_path]
    assert not (tmp_path / compiled.FILE).exists()
