"""FUSEDKD_TUNE=1: the first launch of a row kernel on a GPU times the tiles it could run with and uses the best.

For every line of the table (kernels/device/tiles.py) and every kernel that runs with it the candidates are launched in
turn, behind a flushed cache, on the tensors of the call: those that a launch writes are kept and put back, so the
call's results are those of a call without a search. Tiles that do not compile or spill registers are left out. A line
for kernels/device/tiles.py and its timings are printed, and that tile is used until the process ends.

Cost, once per line and kernel: a compilation and eleven launches for each candidate, half a gigabyte to flush the
cache, and a copy of what the launch writes. Without the variable nothing is searched.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.device import rows, token_logprobs
from ..kernels.device.tiles import TABLE, Line, Tile, candidates, chosen
from ..kernels.language import interpreted
from ..timing import Clock, Timer, interleaved

VARIABLE = "FUSEDKD_TUNE"
ROUNDS = 10  # timed launches of each candidate, after one to compile it
TILED = ("value", "gradient", "value_and_gradient", "absorb", "add_sums")  # launches that take a tile of the table
WRITTEN = ("loss", "saved", "stats", "out", "carry", "sums", "found")  # what launches may write, by parameter


def wanted() -> bool:
    """Whether the environment asks for a search."""
    return os.environ.get(VARIABLE) == "1"


def check(device: torch.device) -> None:
    """Refuse to be asked for a search where there is none to do.

    Raises:
        ValueError: FUSEDKD_TUNE=1 and tensors on something else than a CUDA or ROCm device, or interpreted kernels.
    """
    if not wanted():
        return
    if device.type != "cuda":
        raise ValueError(
            f"{VARIABLE}=1 needs a GPU, to time tiles on: the tensors are on {device}. Move them to a CUDA or ROCm "
            f"device, or unset {VARIABLE}"
        )
    if interpreted():
        raise ValueError(f"{VARIABLE}=1 needs a GPU that runs compiled kernels: unset TRITON_INTERPRET or {VARIABLE}")


def tuned(kernels: ModuleType) -> Any:
    """A module of row kernels as it is, or with a search before first launches if the environment asks for it."""
    return Tuned(kernels, _SEARCH) if wanted() else kernels


class Tuned:
    """A module of row kernels whose launches may be searched."""

    def __init__(self, kernels: ModuleType, search: Search) -> None:
        self._kernels, self._search = kernels, search

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        return partial(self._search.launch, function) if name in TILED else function


class Spilled(Exception):
    """A compiled kernel keeps numbers in memory for want of registers."""


class Call(NamedTuple):
    """A launch with its tensors, and what of it matters to a search."""

    name: str  # of the kernel
    line: Line
    columns: int
    subject: str  # what is computed
    written: list[Tensor]
    launch: Callable[[], Any]

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
        """From a launcher of kernels/ and its arguments."""
        given = inspect.signature(function).bind(*args).arguments
        if "problem" in given:
            problem = given["problem"]
            line, columns = rows.line(problem, given["student"], given["teacher"]), problem.vocab_size
            subject = problem.definition.name
        else:
            line, columns, subject = token_logprobs.line(given["side"]), given["side"].x.shape[2], "token_logprobs"
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        written = [given[key] for key in WRITTEN if given.get(key) is not None]
        return cls(name, line, columns, subject, written, partial(function, *args))

    @property
    def place(self) -> str:
        """The device's name."""
        device = self.written[0].device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


class Search:
    """What was timed in this process: seconds by line of the table, kernel and tile."""

    def __init__(
        self,
        clock: Callable[[str], Timer] = Clock,
        propose: Callable[[Line], list[Tile]] = candidates,
        rounds: int = ROUNDS,
    ) -> None:
        self.clock, self.propose, self.rounds = clock, propose, rounds
        self.seconds: dict[Line, dict[str, dict[Tile, float]]] = {}
        self._searched: set[tuple[Line, str]] = set()
        self._too_short: set[tuple[Line, str]] = set()  # and said so
        self._one_at_a_time = threading.Lock()  # the backward pass has a thread of its own

    def launch(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a launcher of kernels/, after a search if it is the first with its line of the table."""
        call = Call.of(function, args)
        with self._one_at_a_time:
            if len(call.written[0]) and (call.line, call.name) not in self._searched and not _capturing():
                self._find(call)
            return function(*args)

    def best(self, line: Line) -> Tile:
        """The tile that costs the kernels of a line least, each in units of its own fastest."""
        found = list(self.seconds.get(line, {}).values())
        common = [tile for tile in found[0] if all(tile in seconds for seconds in found)] if found else []
        if not common:
            return chosen(line)
        return min(common, key=lambda tile: sum(seconds[tile] / min(seconds.values()) for seconds in found))

    def _find(self, call: Call) -> None:
        """Time the candidates, print what was found, and put the best into the table."""
        name, line = call.name, call.line
        tiles, usual = self.propose(line), chosen(line)
        widest = max(tile.block for tile in tiles)
        if call.columns < widest:  # the table's tiles would be cut down, all to the same
            if (line, name) not in self._too_short:
                _say(f"# {VARIABLE}=1: {name} is not tuned on {call.columns} columns; the widest tile has {widest}")
            self._too_short.add((line, name))
            return
        self._searched.add((line, name))
        times, failures = self._timed(call, tiles)
        about = f"{call.place}, {call.subject}, {len(call.written[0])} x {call.columns}"
        _say(f"# {VARIABLE}=1: {name} on {about}, medians of {self.rounds}")
        for tile, seconds in sorted(times.items(), key=lambda item: item[1]):
            _say(f"# {seconds * 1e3:10.4f} ms  {_call(tile)}{' (so far)' * (tile == usual)}")
        for tile, why in failures.items():
            _say(f"#   left out     {_call(tile)}: {why}")
        if times:
            self.seconds.setdefault(line, {})[name] = times
            TABLE[line] = replace(self.best(line), source=about)
            _say(as_code(line, TABLE[line]))

    def _timed(self, call: Call, tiles: list[Tile]) -> tuple[dict[Tile, float], dict[Tile, str]]:
        """Median seconds of every tile that works, and why others do not. Leaves table and tensors as they were."""
        line = call.line
        before, kept = TABLE.get(line), [tensor.clone() for tensor in call.written]
        clock = self.clock(str(call.written[0].device))
        bar = _bar(f"{VARIABLE}=1: {call.name} {line}", len(tiles) * (1 + self.rounds))

        def attempt(tile: Tile) -> None:
            TABLE[line] = tile
            spills = getattr(call.launch(), "n_spills", 0)  # of what Triton compiled; its interpreter returns nothing
            if spills:
                raise Spilled(f"{spills} registers")

        def put_back() -> None:
            for tensor, copy in zip(call.written, kept, strict=True):
                tensor.copy_(copy)

        def timed(work: Callable[[], object]) -> float:
            put_back()  # outside the clock: a launch may add to what it writes, or write over what it reads
            if bar is not None:
                bar.update()
            return clock(work)

        rounds: list[dict[Tile, float | str]] = []
        try:
            work = {tile: partial(attempt, tile) for tile in tiles}
            rounds += interleaved(work, timed, self.rounds, lambda: False)
        finally:
            put_back()
            TABLE.pop(line, None)
            if before is not None:
                TABLE[line] = before
            if bar is not None:
                bar.close()
        failures = {tile: why for found in rounds for tile, why in found.items() if isinstance(why, str)}
        samples = {tile: [float(found[tile]) for found in rounds[1:]] for tile in tiles if tile not in failures}
        return {tile: statistics.median(seconds) for tile, seconds in samples.items()}, failures


def as_code(line: Line, tile: Tile) -> str:
    """A line of the table, as kernels/device/tiles.py has it."""
    architecture, kind, width = line
    return f'    ("{architecture}", "{kind}", {width}): {_call(tile, tile.source)},'


def _call(tile: Tile, source: str | None = None) -> str:
    """A tile as the call that makes it."""
    registers = "" if tile.registers is None else f", {tile.registers}"
    named = "" if source is None else f', source="{source}"'
    return f"Tile({tile.block}, {tile.num_warps}{registers}{named})"


def _capturing() -> bool:
    """Whether launches are being recorded into a CUDA graph, where nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _bar(name: str, total: int) -> Any:
    """A progress bar on a terminal, where tqdm is installed; else a line of text."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            return tqdm(total=total, desc=name)
    print(f"{name} ...", file=sys.stderr, flush=True)
    return None


def _say(text: str) -> None:
    print(text, flush=True)


_SEARCH = Search()
