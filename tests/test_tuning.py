"""The table of tiles, and its search on a clock that the test sets: what is taken, printed, left out and left alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import device
from test_commands import fusedkd_command
from torch import Tensor

import fusedkd
from fusedkd import backends
from fusedkd.backends import tuning
from fusedkd.backends.tuning import Search, Tuned
from fusedkd.kernels.aot import compiler
from fusedkd.kernels.device import rows as row_kernels
from fusedkd.kernels.device import tiles
from fusedkd.kernels.device import token_logprobs as logprob_kernels
from fusedkd.kernels.device import vocab_chunks as streaming_kernels
from fusedkd.kernels.device.tiles import ANY, TABLE, Line, Tile
from fusedkd.ops import logits as logits_operators
from fusedkd.ops import token_logprobs as token_operators
from fusedkd.schedules import token_chunks, vocab_chunks

if not row_kernels.triton:
    pytest.skip("Triton is not installed", allow_module_level=True)

PLACE = device("triton")
V = 300
SMALL, LARGE = Tile(128, 1), Tile(256, 2)
ODD = Tile(96, 1)  # no power of two: does not compile
CLASSES = ("light", "heavy", "two", "gathered")
LIGHT = (tiles.architecture(torch.device(PLACE, 0 if PLACE == "cuda" else None)), "light", 4)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Every test starts from the table of the file, and without the variable."""
    kept = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(kept)


def search(seconds: dict[Tile, float]) -> Search:
    """A search among the tiles named here, whose clock runs the work and tells these times."""
    return Search(lambda place: lambda work: timed(work, seconds), lambda line: list(seconds), rounds=1)


def timed(work: Callable[[], object], seconds: dict[Tile, float]) -> float:
    """The time set for the tile that `work` runs with."""
    work()
    (tile,) = (tile for tile in TABLE.values() if tile in seconds)
    return seconds[tile]


def through(monkeypatch: pytest.MonkeyPatch, found: Search) -> None:
    """All of fusedkd launches its kernels by way of this search."""
    monkeypatch.setattr(logits_operators, "row_functions", lambda backend: Tuned(row_kernels, found))
    monkeypatch.setattr(logits_operators, "logit_functions", lambda backend, problem, x: Tuned(row_kernels, found))
    monkeypatch.setattr(token_chunks, "row_functions", lambda backend: Tuned(row_kernels, found))
    monkeypatch.setattr(vocab_chunks, "functions_of", lambda backend: Tuned(streaming_kernels, found))
    monkeypatch.setattr(token_operators, "functions_of", lambda backend: Tuned(logprob_kernels, found))


def logits(rows: int = 3) -> tuple[Tensor, Tensor]:
    """A student that wants a gradient, and a teacher."""
    student, teacher = torch.randn(2, rows, V, device=PLACE)
    return student.requires_grad_(), teacher


def loss_and_gradient() -> list[Tensor]:
    """kd_loss on logits, the same every time."""
    torch.manual_seed(1)
    student, teacher = logits()
    loss = fusedkd.kd_loss(student, teacher, backend="triton")
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def pasted(printed: str) -> dict[Line, Tile]:
    """The last line that was printed, read as a line of the table."""
    return eval(f"{{{printed.splitlines()[-1]}}}", {"Tile": Tile})


def test_the_fastest_is_taken_and_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The line to paste is the line in use, with the device, the divergence and the shape that speak for it."""
    through(monkeypatch, search({SMALL: 3e-3, LARGE: 2e-3}))
    loss_and_gradient()
    printed = capsys.readouterr()
    assert pasted(printed.out) == {LIGHT: LARGE}
    assert tiles.chosen(LIGHT) == LARGE
    source = pasted(printed.out)[LIGHT].source
    assert source == tiles.chosen(LIGHT).source
    assert source.endswith(f", fkl, 3 x {V}")
    assert "rows.value" in printed.out
    assert "rows.gradient" in printed.out
    assert "2.0000 ms  Tile(256, 2)" in printed.out
    assert "3.0000 ms  Tile(128, 1)" in printed.out
    assert "rows.value" in printed.err, "no word while it searches"


@pytest.mark.parametrize("tile", [SMALL, Tile(4096, 16, 128)])
def test_the_printed_line(tile: Tile) -> None:
    """With and without registers; `source` comes along."""
    tile = Tile(tile.block, tile.num_warps, tile.registers, "GPU, fkl, 8 x 1000")
    found = pasted(tuning.as_code(("sm_90", "heavy", 2), tile))
    assert found == {("sm_90", "heavy", 2): tile}
    assert found["sm_90", "heavy", 2].source == tile.source


def head(rows: int = 3) -> dict[str, Any]:
    """Student and teacher heads of width 8, float32: gradients are written over the student's logits."""
    torch.manual_seed(2)
    return {
        "student": fusedkd.Head(
            torch.randn(rows, 8, device=PLACE, requires_grad=True), torch.randn(V, 8, device=PLACE, requires_grad=True)
        ),
        "teacher": fusedkd.Head(torch.randn(rows, 12, device=PLACE), torch.randn(V, 12, device=PLACE)),
        "labels": torch.arange(rows, device=PLACE),
    }


def of_heads(**options: Any) -> list[Tensor]:
    """Loss and gradients of a kd_loss on heads."""
    given = head()
    loss = fusedkd.kd_loss(**given, backend="triton", **options)
    student = given["student"]
    return [loss.detach(), *torch.autograd.grad(loss, [student.hidden, student.weight])]


def of_tokens() -> list[Tensor]:
    """Log-probabilities and entropies of a head, and gradients."""
    given = head()
    student = given["student"]
    found = fusedkd.token_logprobs(student, given["labels"], return_entropy=True, backend="triton")
    return [found[0].detach(), *torch.autograd.grad(sum(x.sum() for x in found), [student.hidden, student.weight])]


PATHS: dict[str, tuple[Callable[[], list[Tensor]], set[str]]] = {
    "logits": (loss_and_gradient, {"rows.value", "rows.gradient"}),
    "chunked": (lambda: of_heads(schedule="chunked"), {"rows.value_and_gradient"}),
    "streaming": (lambda: of_heads(schedule="streaming"), {"vocab_chunks.absorb", "vocab_chunks.gradient"}),
    "two sweeps": (
        lambda: of_heads(schedule="streaming", divergence="tvd"),
        {"vocab_chunks.absorb", "vocab_chunks.add_sums", "vocab_chunks.gradient"},
    ),
    "tokens": (of_tokens, {"token_logprobs.value", "token_logprobs.gradient"}),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_call_is_as_without_a_search(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is searched once, and loss and gradients are, bit for bit, those of the tile that was taken.

    Some launches add to what they write, and some write over the logits that they read.
    """
    work, kernels = PATHS[path]
    for kind in CLASSES:
        TABLE[LIGHT[0], kind, 4] = LARGE
    plain = work()
    found = search({SMALL: 3.0, LARGE: 2.0})
    for kind in CLASSES:
        TABLE[LIGHT[0], kind, 4] = Tile(512, 4)  # until the search has found another
    through(monkeypatch, found)
    tuned = work()
    assert {name for kernel in found.seconds.values() for name in kernel} == kernels
    assert all(torch.equal(a, b) for a, b in zip(plain, tuned, strict=True))


def test_once_for_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of each candidate: one to compile and the rounds; nothing more at the second call."""
    ran: list[int] = []

    def clock(work: Callable[[], object]) -> float:
        ran.append(1)
        work()
        return 1.0

    through(monkeypatch, Search(lambda place: clock, lambda line: [SMALL, LARGE], rounds=2))
    loss_and_gradient()
    first = len(ran)
    loss_and_gradient()
    assert first == len(ran) == 2 * 2 * 3  # kernels, candidates, launches


def test_what_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However fast it would be; the reason is told."""
    through(monkeypatch, search({ODD: 1e-3, SMALL: 3e-3, LARGE: 2e-3}))
    loss_and_gradient()
    printed = capsys.readouterr().out
    assert pasted(printed) == {LIGHT: LARGE}
    assert "left out     Tile(96, 1): " in printed
    assert "power of 2" in printed


def test_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's tile stays, the call works, and the reason is told."""
    before, plain = dict(TABLE), loss_and_gradient()
    found = search({ODD: 1e-3})
    through(monkeypatch, found)
    assert all(torch.equal(a, b) for a, b in zip(plain, loss_and_gradient(), strict=True))
    assert before == TABLE
    assert not found.seconds
    assert "left out     Tile(96, 1): " in capsys.readouterr().out


def launcher(spills: dict[Tile, int]) -> Callable[..., Any]:
    """A launcher whose kernels are said to spill so many registers."""

    def value(side: row_kernels.Side, saved: Tensor) -> Any:
        return SimpleNamespace(n_spills=spills[tiles.chosen(logprob_kernels.line(side))])

    return value


def given() -> tuple[row_kernels.Side, Tensor]:
    """What `launcher` takes."""
    return row_kernels.Side(torch.zeros(1, 3, V, device=PLACE)), torch.zeros(3, device=PLACE)


def test_what_spills_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """As Triton counts it on what it compiled."""
    found = search({SMALL: 1e-3, LARGE: 2e-3})
    found.launch(launcher({SMALL: 8, LARGE: 0}), *given())
    printed = capsys.readouterr().out
    assert pasted(printed) == {LIGHT: LARGE}
    assert "left out     Tile(128, 1): Spilled: 8 registers" in printed


def test_one_tile_for_all_kernels_of_a_line() -> None:
    """The first kernel loses a little, where the second gains more; each counts in units of its own fastest."""
    seconds = {SMALL: 1.0, LARGE: 1.5}
    found = search(seconds)

    def gradient(side: row_kernels.Side, out: Tensor) -> None:
        return None

    found.launch(launcher({SMALL: 0, LARGE: 0}), *given())
    assert tiles.chosen(LIGHT) == SMALL
    seconds.update({SMALL: 0.04, LARGE: 0.01})
    found.launch(gradient, *given())
    assert tiles.chosen(LIGHT) == LARGE


def test_rows_shorter_than_a_tile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They would all run with one tile: said once, nothing timed, and longer rows are still searched."""
    before = dict(TABLE)
    seconds = {SMALL: 1.0, LARGE: 2.0, Tile(512, 4): 3.0}
    found = search(seconds)
    through(monkeypatch, found)
    loss_and_gradient()
    loss_and_gradient()
    assert before == TABLE
    lines = capsys.readouterr().out.splitlines()
    assert [f"on {V} columns" in line for line in lines] == [True, True]  # value and gradient
    del seconds[Tile(512, 4)]
    loss_and_gradient()
    assert tiles.chosen(LIGHT) == SMALL


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched and nothing searched."""
    found = search({SMALL: 1.0})
    through(monkeypatch, found)
    student, teacher = logits(0)
    fusedkd.kd_loss(student, teacher, reduction="sum", backend="triton").backward()
    assert not found.seconds


def test_an_interrupted_search() -> None:
    """Table and tensors are as they were."""

    def clock(work: Callable[[], object]) -> float:
        work()
        raise KeyboardInterrupt

    def value(side: row_kernels.Side, saved: Tensor) -> None:
        saved.fill_(7.0)

    before, (side, saved) = dict(TABLE), given()
    with pytest.raises(KeyboardInterrupt):
        Search(lambda place: clock, lambda line: [SMALL, LARGE]).launch(value, side, saved)
    assert before == TABLE
    assert not saved.any()


@pytest.mark.parametrize("value", [None, "", "0", "1"])
def test_only_the_variable_starts_a_search(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only as 1. (The check of the device is put aside here.)"""
    if value is None:
        monkeypatch.delenv(tuning.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(tuning.VARIABLE, value)
    found = search({SMALL: 3.0, LARGE: 2.0})
    monkeypatch.setattr(tuning, "_SEARCH", found)
    monkeypatch.setattr(backends, "check", lambda place: None)
    before = dict(TABLE)
    loss_and_gradient()
    of_tokens()
    of_heads(schedule="streaming")
    kernels = {name for kernel in found.seconds.values() for name in kernel}
    if value == "1":
        assert {name.partition(".")[0] for name in kernels} == {"rows", "token_logprobs", "vocab_chunks"}
    else:
        assert not kernels
        assert before == TABLE


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_no_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to tune tensors of a CPU, whatever would run them."""
    monkeypatch.setenv(tuning.VARIABLE, "1")
    student, teacher = torch.randn(2, 3, 50)
    with pytest.raises(ValueError, match=r"FUSEDKD_TUNE=1 needs a GPU.* on cpu.*unset FUSEDKD_TUNE"):
        fusedkd.kd_loss(student, teacher, backend=backend)
    with pytest.raises(ValueError, match="FUSEDKD_TUNE=1 needs a GPU"):
        fusedkd.token_logprobs(student, torch.zeros(3, dtype=torch.int64), backend=backend)


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is no use where TRITON_INTERPRET keeps kernels from it."""
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(tuning, "interpreted", lambda: True)
    with pytest.raises(ValueError, match=r"FUSEDKD_TUNE=1 needs a GPU.*unset TRITON_INTERPRET"):
        tuning.check(torch.device("cuda", 0))
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    tuning.check(torch.device("cuda", 0))


def test_the_benchmark_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage and exit status 2, before anything is measured."""
    monkeypatch.setitem(os.environ, tuning.VARIABLE, "1")
    done = fusedkd_command("bench", "--quick", "--device", "cpu", "--only", "rows")
    assert done.returncode == 2
    assert "FUSEDKD_TUNE=1 needs a GPU" in done.stderr


def test_the_table_is_whole() -> None:
    """Each class at 2 and 4 bytes for any architecture; lines for one are of an architecture that is compiled for."""
    assert {(kind, width) for name, kind, width in TABLE if name == ANY} == {(k, w) for k in CLASSES for w in (2, 4)}
    assert {name for name, _, _ in TABLE} <= {ANY, *compiler.ARCHITECTURES}
    assert all(tile.source for tile in TABLE.values())


def test_an_architecture_may_differ() -> None:
    """Its line wins at launches and in what is compiled ahead, and only there."""
    usual, own = TABLE[ANY, "light", 2], Tile(1024, 4, 128)
    TABLE["sm_90", "light", 2] = own
    assert tiles.fitting(("sm_90", "light", 2), 100_000) == own
    assert tiles.fitting(("sm_100", "light", 2), 100_000) == usual
    compiled = {
        name: {variant.name: variant.tile for kernel, variant in compiler.variants(2, name) if kernel == "value"}
        for name in ("sm_100", "sm_90")
    }
    assert compiled["sm_90"]["fkl"] == compiled["sm_90"]["token_logprobs"] == own
    assert compiled["sm_100"]["fkl"] == compiled["sm_100"]["token_logprobs"] == usual


@pytest.mark.parametrize(
    ("hip", "properties", "name"),
    [
        (None, {"major": 9, "minor": 0}, "sm_90"),
        (None, {"major": 10, "minor": 0}, "sm_100"),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-"}, "gfx942"),
    ],
)
def test_architecture(hip: str | None, properties: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the driver once per device."""
    asked = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda place: asked.append(place) or SimpleNamespace(**properties)
    )
    tiles.architecture.cache_clear()
    found = [tiles.architecture(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    tiles.architecture.cache_clear()
    assert found == [name] * 4
    assert len(asked) == 2
    assert name in compiler.ARCHITECTURES
    assert tiles.architecture(torch.device("cpu")) == tiles.architecture(torch.device("xpu", 0)) == ANY


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("name", compiler.ARCHITECTURES)
def test_candidates(name: str, width: int) -> None:
    """The table's own first, no two alike; a thread loads 16 bytes; AMD's compiler has no register limit."""
    line = (name, "heavy", width)
    found = tiles.candidates(line)
    lanes = compiler.ARCHITECTURES[name][2]
    assert found[0] == tiles.chosen(line)
    assert len(set(found)) == len(found) > 5
    for tile in found[1:]:
        assert tile.block / (lanes * tile.num_warps) * width >= 16, tile
        assert tile.registers is None or not name.startswith("gfx"), tile
