"""The table of tiles, and `bench tune` on a clock that the test sets: what is found, printed, left out, put back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import device, each
from test_commands import fusedkd_command
from torch import Tensor

from fusedkd.bench import tune
from fusedkd.bench.tune import Launch, Operands
from fusedkd.kernels.aot import compiler
from fusedkd.kernels.device import tiles
from fusedkd.kernels.device.tiles import ANY, TABLE, Tile, TileKey

if not compiler.triton:
    pytest.skip("Triton is not installed", allow_module_level=True)

PLACE = device("triton")
V = 300
SMALL, LARGE = Tile(128, 1), Tile(256, 2)
ODD = Tile(96, 1)  # no power of two: does not compile
KEY = TileKey("sm_90", "light", 4)
KERNELS = {
    "light": ["rows.value", "rows.gradient", "rows.value_and_gradient", "vocab_chunks.absorb", "vocab_chunks.gradient"],
    "many": ["rows.value", "rows.gradient", "rows.value_and_gradient"],
}
KERNELS["heavy"] = KERNELS["light"]
KERNELS["two"] = [*KERNELS["light"][:4], "vocab_chunks.add_sums", "vocab_chunks.gradient"]
KERNELS["light"] = [*KERNELS["light"], "token_logprobs.value", "token_logprobs.gradient"]


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Every test starts from the table of the file."""
    kept = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(kept)


def clock(seconds: dict[Tile, float]) -> Callable[[Callable[[], object]], float]:
    """Runs the work and tells the time set for the tile that it runs with."""

    def timed(work: Callable[[], object]) -> float:
        work()
        (tile,) = (tile for tile in TABLE.values() if tile in seconds)
        return seconds[tile]

    return timed


def operands(n: int = 3) -> Operands:
    """Of few and short rows."""
    return tune.operands(n, V, torch.float32, PLACE)


def search(launches: list[Launch], seconds: dict[Tile, float]) -> list[str]:
    """What is printed of a search among these tiles."""
    return list(tune.search(launches, list(seconds), clock(seconds), "GPU, rkl, 3 x 300", rounds=1))


def launch(spills: dict[Tile, int], *written: Tensor) -> Launch:
    """A launch that adds 1 to what it writes, of a kernel that is said to spill so many registers."""

    def run() -> Any:
        for tensor in written:
            tensor.add_(1.0)
        return SimpleNamespace(n_spills=spills[tiles.table_tile(KEY)])

    return Launch("rows.value", KEY, written, run)


def pasted(line: str) -> dict[TileKey, Tile]:
    """A line of the table, read."""
    return eval(f"{{{line}}}", {"Tile": Tile, "TileKey": TileKey})


def copies(launch: Launch) -> list[bytes]:
    """What a launch writes, as bytes: much of it is NaN before the first launch."""
    return [tensor.cpu().numpy().tobytes() for tensor in launch.written]


@each("name", tune.CLASSES)
def test_every_kernel_of_a_class(name: str) -> None:
    """All are launched, with the tile asked for, and afterwards table and tensors are as they were, bit for bit."""
    found = list(tune.launches_of(tune.CLASSES[name], operands()))
    assert [launch.kernel for launch in found] == KERNELS[name]
    assert {launch.key.tile_class for launch in found} == {name}
    for launch in found:
        before, kept = copies(launch), dict(TABLE)
        assert set(tune.timed(launch, [LARGE], clock({LARGE: 1.0}), 1).seconds) == {LARGE}
        assert kept == TABLE
        assert copies(launch) == before
        for tensor in launch.written:
            tensor.add_(1.0)
        before = copies(launch)
        launch.run()
        assert all(now != then for now, then in zip(copies(launch), before, strict=True)), "`written` has more"


def test_the_fastest_is_printed() -> None:
    """As the line to paste, with the device, the divergence and the shape that speak for it."""
    TABLE[KEY] = SMALL
    lines = search([launch({SMALL: 0, LARGE: 0})], {SMALL: 3e-3, LARGE: 2e-3})
    assert pasted(lines[-1]) == {KEY: LARGE}
    assert pasted(lines[-1])[KEY].source == "GPU, rkl, 3 x 300"
    assert lines[1:-1] == ["# rows.value", "#     2.0000 ms  Tile(256, 2)", "#     3.0000 ms  Tile(128, 1) (so far)"]
    assert TABLE[KEY] == SMALL


@each("tile", [SMALL, Tile(4096, 16, 128)])
def test_the_printed_line(tile: Tile) -> None:
    """With and without registers; `source` comes along."""
    found = pasted(tune.as_code(KEY, tile, "GPU, fkl, 8 x 1000"))
    assert found == {KEY: tile}
    assert found[KEY].source == "GPU, fkl, 8 x 1000"


def test_once_to_compile_and_then_in_rounds() -> None:
    """Each launch begins from the same tensors."""
    ran: list[float] = []
    written = torch.zeros(3)

    def timer(work: Callable[[], object]) -> float:
        work()
        ran.append(float(written[0]))
        return 1.0

    ticks: list[int] = []
    tune.timed(launch({SMALL: 0, LARGE: 0}, written), [SMALL, LARGE], timer, 2, tick=partial(ticks.append, 1))
    assert ran == [1.0] * 2 * 3  # candidates, launches
    assert len(ticks) == len(ran)
    assert not written.any()


def test_what_does_not_compile_is_left_out() -> None:
    """However fast it would be; the reason is told, and where nothing compiles there is no line."""
    value = next(tune.launches_of("rkl", operands()))
    lines = search([value], {ODD: 1e-3, SMALL: 3e-3, LARGE: 2e-3})
    assert pasted(lines[-1]) == {value.key: LARGE}
    (left_out,) = (line for line in lines if "left out     Tile(96, 1): " in line)
    assert "power of 2" in left_out
    assert search([value], {ODD: 1e-3})[-1].startswith("# no tile works for all kernels of TileKey(")


def test_what_spills_is_left_out() -> None:
    """As Triton counts it on what it compiled."""
    lines = search([launch({SMALL: 8, LARGE: 0})], {SMALL: 1e-3, LARGE: 2e-3})
    assert pasted(lines[-1]) == {KEY: LARGE}
    assert "#   left out     Tile(128, 1): Spilled: 8 registers" in lines


def test_one_tile_for_all_kernels_of_a_class() -> None:
    """A kernel may lose a little where another gains more; each counts in units of its own fastest."""
    assert tune.best([{SMALL: 1.0, LARGE: 1.5}]) == SMALL
    assert tune.best([{SMALL: 1.0, LARGE: 1.5}, {SMALL: 0.04, LARGE: 0.01}]) == LARGE
    assert tune.best([{SMALL: 1.0, LARGE: 1.5}, {LARGE: 0.01}]) == LARGE  # the only one that works for both
    assert tune.best([]) is None
    assert tune.best([{SMALL: 1.0}, {LARGE: 1.0}]) is None


def test_a_kernel_without_a_tile_has_no_line() -> None:
    """A line that stops one of the class's kernels from compiling would be worse than none."""
    works, spills = launch({SMALL: 0, LARGE: 0}), launch({SMALL: 8, LARGE: 8})
    assert search([works, spills], {SMALL: 1.0, LARGE: 2.0})[-1].startswith("# no tile works for all kernels")


def test_an_interrupted_search() -> None:
    """Table and tensors are as they were."""

    def timer(work: Callable[[], object]) -> float:
        work()
        raise KeyboardInterrupt

    before, written = dict(TABLE), torch.zeros(3)
    with pytest.raises(KeyboardInterrupt):
        tune.timed(launch({SMALL: 0, LARGE: 0}, written), [SMALL, LARGE], timer, 1)
    assert before == TABLE
    assert not written.any()


def test_without_a_gpu() -> None:
    """Usage, what would work, and exit status 2, before anything is timed."""
    for options, why in (
        (["--device", "cpu"], "cpu is no GPU to time tiles on: name a CUDA or ROCm device"),
        (["--rows", "0"], "'0' is not above zero"),
        (["--classes", "middling"], "invalid choice: 'middling'"),
    ):
        done = fusedkd_command("bench", "tune", *options)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: python -m fusedkd bench tune")
        assert why in done.stderr


def test_what_cannot_be_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is no use where Triton is not installed or interprets; short rows would all run with one tile."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(tune, "interpreted", lambda: True)
    with pytest.raises(argparse.ArgumentError, match="unset TRITON_INTERPRET"):
        tune._check(gpu, 100_000)
    monkeypatch.setattr(tune, "interpreted", lambda: False)
    tune._check(gpu, 100_000)
    with pytest.raises(argparse.ArgumentError, match="--vocab: tiles of up to 16384 columns"):
        tune._check(gpu, 16383)
    monkeypatch.setattr(tune, "HAS_TRITON", False)
    with pytest.raises(argparse.ArgumentError, match="pip install triton"):
        tune._check(gpu, 100_000)


def test_the_table_is_whole() -> None:
    """Each class at 2 and 4 bytes for any architecture; lines for one are of an architecture that is compiled for."""
    assert {key[1:] for key in TABLE if key.architecture == ANY} == {(kind, n) for kind in tune.CLASSES for n in (2, 4)}
    assert {key.architecture for key in TABLE} <= {ANY, *compiler.ARCHITECTURES}
    assert all(tile.source for tile in TABLE.values())


def test_an_architecture_may_differ() -> None:
    """Its line wins at launches and in what is compiled ahead, and only there."""
    usual, own = TABLE[TileKey(ANY, "light", 2)], Tile(1024, 4, 128)
    TABLE[TileKey("sm_90", "light", 2)] = own
    assert tiles.tile_for(TileKey("sm_90", "light", 2), 100_000) == own
    assert tiles.tile_for(TileKey("sm_100", "light", 2), 100_000) == usual
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
    key, warp = TileKey(name, "heavy", width), compiler.ARCHITECTURES[name][2]
    found = tune.candidates(key)
    assert found[0] == tiles.table_tile(key)
    assert len(set(found)) == len(found) > 5
    for tile in found[1:]:
        assert tile.block / (warp * tile.num_warps) * width >= 16, tile
        assert tile.registers is None or not name.startswith("gfx"), tile
