"""`python -m fusedkd bench tune`: times the tiles that row kernels could run with, and prints lines for their table.

For each class of divergence and each size of a logit, every kernel that takes the table's tile is launched with each
candidate in turn, behind a flushed cache. Tiles that do not compile or spill registers are left out. The best tile of a
class costs its kernels least, each in units of its own fastest; its line goes into kernels/device/tiles.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..cli.commands import Progress, positive, require, usable_device
from ..divergence import divergence
from ..kernels.device import rows, token_logprobs, vocab_chunks
from ..kernels.device.rows import SAVED, Logits, Problem
from ..kernels.device.tiles import REGISTER_FILE, TABLE, Tile, TileKey, table_tile
from ..kernels.language import HAS_TRITON, interpreted
from .cases import STD
from .shapes import QWEN3
from .timing import Clock, Timer, interleaved

# A divergence for each class of tiles.py: one sweep with few or many sums, two sweeps, sweeps of its own.
CLASSES = {"light": "rkl", "heavy": "ab", "two": "jsd", "many": "amid"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS, ROUNDS = 2048, 10
BLOCKS = (1024, 2048, 4096, 8192, 16384)  # others' best for long rows: 8192 x 8, 4096 x 8, 16384 x 16
WARPS = (4, 8, 16, 32)
REGISTERS = (None, 128, 255)
LOAD = 16  # bytes that a thread loads at a time: a tile has at least as many for each
MOST_COLUMNS = 32  # per thread: with more, a tile's numbers do not fit into registers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of bench tune."""
    parser.add_argument("--device", type=usable_device, default="cuda", help="a CUDA or ROCm device (default: cuda)")
    parser.add_argument("--classes", metavar="CLASS", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--dtypes", metavar="DTYPE", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", metavar="N", type=partial(positive, int), default=ROWS, help=f"(default: {ROWS})")
    parser.add_argument(
        "--vocab", metavar="V", type=partial(positive, int), default=QWEN3.vocab, help=f"(default: {QWEN3.vocab})"
    )


def run(args: argparse.Namespace) -> int:
    """Time all tiles, print what was found and the lines."""
    require("search of tiles", "bench", ["tqdm"])
    _check(torch.device(args.device), args.vocab)
    clock = Clock(args.device)
    for dtype in args.dtypes:
        for name in args.classes:
            launches = list(launches_of(CLASSES[name], operands(args.rows, args.vocab, DTYPES[dtype], args.device)))
            tiles = candidates(launches[0].key)
            about = f"{torch.cuda.get_device_name(args.device)}, {CLASSES[name]}, {args.rows} x {args.vocab}"
            with Progress(quiet=False).stage(f"{name} {dtype}", len(launches) * len(tiles) * (1 + ROUNDS)) as bar:
                print("\n".join(search(launches, tiles, clock, about, tick=bar.update)), flush=True)
    return 0


def _check(device: torch.device, vocab: int) -> None:
    """ArgumentError where nothing can be timed."""
    if not HAS_TRITON:
        raise argparse.ArgumentError(None, "tiles are those of Triton's kernels: pip install triton")
    if device.type != "cuda":
        raise argparse.ArgumentError(None, f"--device: {device} is no GPU to time tiles on: name a CUDA or ROCm device")
    if interpreted():
        raise argparse.ArgumentError(None, "the interpreter's time says nothing of a GPU's: unset TRITON_INTERPRET")
    if vocab < max(BLOCKS):
        raise argparse.ArgumentError(
            None, f"--vocab: tiles of up to {max(BLOCKS)} columns would all be cut down to {vocab}: pass more"
        )


def candidates(key: TileKey) -> list[Tile]:
    """The tiles worth timing, the table's own first."""
    amd = key.architecture.startswith("gfx")
    warp = 64 if amd else 32
    found = [
        Tile(block, warps, registers)
        for block in BLOCKS
        for warps in WARPS
        for registers in (REGISTERS[:1] if amd else REGISTERS)
        for columns in [block // (warp * warps)]
        if columns * key.logit_bytes >= LOAD
        and columns <= MOST_COLUMNS
        and warp * warps * (registers or 0) <= REGISTER_FILE
    ]
    return list(dict.fromkeys([table_tile(key), *found]))


class Operands(NamedTuple):
    """What launches read."""

    student: Tensor  # (1, N, V)
    teacher: Tensor  # (1, N, V)
    labels: Tensor  # (N,) int64
    upstream: Tensor  # (N,) float32


def operands(n: int, vocab: int, dtype: torch.dtype, device: str) -> Operands:
    """Random logits with the standard deviation of a trained model's."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, n, vocab, device=device, dtype=dtype).mul_(STD) for _ in range(2))
    return Operands(student, teacher, torch.arange(n, device=device) % vocab, torch.full((n,), 1 / n, device=device))


class Launch(NamedTuple):
    """A launch of one kernel, which takes the table's tile for `key`."""

    kernel: str
    key: TileKey
    written: tuple[Tensor, ...]  # some launches add to these
    run: Callable[[], Any]  # what Triton compiled; None in its interpreter


def launches_of(name: str, given: Operands) -> Iterator[Launch]:
    """One of every kernel that runs with the tile of a divergence's class."""
    form, (n, vocab) = divergence(name).form, given.student.shape[1:]
    problem = Problem(form.definition, form.decoupled, form.theta, (form.target, form.nontarget), vocab, mix=form.mix)
    student, teacher, labels, upstream = Logits(given.student), Logits(given.teacher), given.labels, given.upstream
    key = rows.tile_key(problem, student, teacher)
    loss, saved = upstream.new_empty(n), upstream.new_empty(n, SAVED)
    out = torch.empty_like(given.student[0])
    sides = problem, student, teacher, labels
    rows.value(*sides, loss, saved, None)  # the gradients need its row scalars
    value = partial(rows.value, *sides, loss, saved, None)
    yield Launch("rows.value", key, (loss, saved), value)
    yield Launch("rows.gradient", key, (out,), partial(rows.gradient, *sides, saved, upstream, out))
    both = partial(rows.value_and_gradient, *sides, upstream, out, loss, None)
    yield Launch("rows.value_and_gradient", key, (loss, out), both)
    if not form.definition.whole_rows:
        online = vocab_chunks.online_of(problem)
        carry = upstream.new_tensor(vocab_chunks.EMPTY).repeat(n, 1)
        carry = torch.cat((carry, carry.new_zeros(n, len(online.init.torch()))), 1)
        absorb = partial(vocab_chunks.absorb, *sides, carry, 0, with_stats=False)
        yield Launch("vocab_chunks.absorb", key, (carry,), absorb)
        if online.sums is None:
            sums = upstream.new_zeros(n, 3)
            yield Launch("vocab_chunks.add_sums", key, (sums,), partial(vocab_chunks.add_sums, *sides, saved, sums, 0))
        found = upstream.new_zeros(n, vocab_chunks.DOMINANT)
        gradient = partial(vocab_chunks.gradient, *sides, saved, upstream, found, out, 0)
        yield Launch("vocab_chunks.gradient", key, (found, out), gradient)
    if key == token_logprobs.tile_key(student):
        scalars, pair = upstream.new_empty(n, token_logprobs.SAVED), upstream.new_ones(n, 2)
        token_logprobs.value(student, labels, scalars, 1.0)
        value = partial(token_logprobs.value, student, labels, scalars, 1.0)
        yield Launch("token_logprobs.value", key, (scalars,), value)
        gradient = partial(token_logprobs.gradient, student, labels, scalars, pair, out, 1.0)
        yield Launch("token_logprobs.gradient", key, (out,), gradient)


class Spilled(Exception):
    """A compiled kernel keeps numbers in memory for want of registers."""


class Timed(NamedTuple):
    """Median seconds of the tiles that work, and why the others do not."""

    seconds: dict[Tile, float]
    failures: dict[Tile, str]


def search(
    launches: Sequence[Launch],
    tiles: Sequence[Tile],
    timer: Timer,
    about: str,
    rounds: int = ROUNDS,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Yield comments with the times of each launch, and the line of the table for their key."""
    key = launches[0].key
    yield f"# {about}, medians of {rounds}"
    found = []
    for launch in launches:
        seconds, failures = timed(launch, tiles, timer, rounds, tick)
        found.append(seconds)
        yield f"# {launch.kernel}"
        for tile, median in sorted(seconds.items(), key=lambda item: item[1]):
            yield f"# {median * 1e3:10.4f} ms  {_call(tile)}{' (so far)' * (tile == table_tile(key))}"
        for tile, why in failures.items():
            yield f"#   left out     {_call(tile)}: {why}"
    tile = best(found)
    yield f"# no tile works for all kernels of {key}" if tile is None else as_code(key, tile, about)


def timed(
    launch: Launch, tiles: Sequence[Tile], timer: Timer, rounds: int, tick: Callable[[], object] = lambda: None
) -> Timed:
    """Time a launch with every tile, once to compile and then in rounds. Leaves table and tensors as they were."""
    kept = [tensor.clone() for tensor in launch.written]

    def put_back() -> None:
        for tensor, copy in zip(launch.written, kept, strict=True):
            tensor.copy_(copy)

    def attempt() -> None:
        if spills := getattr(launch.run(), "n_spills", 0):
            raise Spilled(f"{spills} registers")

    def seconds_with(tile: Tile) -> float:
        put_back()  # outside the time: a launch may add to what it writes
        tick()
        with _in_table(launch.key, tile):
            return timer(attempt)

    work = {tile: partial(seconds_with, tile) for tile in tiles}
    try:
        found = list(interleaved(work, lambda call: cast(float, call()), rounds, lambda: False))
    finally:
        put_back()
    failures = {tile: why for each in found for tile, why in each.items() if isinstance(why, str)}
    samples = {tile: [float(each[tile]) for each in found[1:]] for tile in tiles if tile not in failures}
    return Timed({tile: statistics.median(seconds) for tile, seconds in samples.items()}, failures)


@contextmanager
def _in_table(key: TileKey, tile: Tile) -> Iterator[None]:
    """Launches of this key take this tile."""
    kept = dict(TABLE)
    TABLE[key] = tile
    try:
        yield
    finally:
        TABLE.clear()
        TABLE.update(kept)


def best(found: Sequence[dict[Tile, float]]) -> Tile | None:
    """The tile that works for all kernels and costs them least, each in units of its own fastest."""
    common = [tile for tile in found[0] if all(tile in seconds for seconds in found)] if found else []
    return min(common, key=lambda tile: sum(each[tile] / min(each.values()) for each in found), default=None)


def as_code(key: TileKey, tile: Tile, source: str) -> str:
    """A line of the table, as kernels/device/tiles.py has it."""
    return f'    TileKey("{key.architecture}", "{key.tile_class}", {key.logit_bytes}): {_call(tile, source)},'


def _call(tile: Tile, source: str | None = None) -> str:
    """A tile as the call that makes it."""
    registers = "" if tile.registers is None else f", {tile.registers}"
    named = "" if source is None else f', source="{source}"'
    return f"Tile({tile.block}, {tile.num_warps}{registers}{named})"
