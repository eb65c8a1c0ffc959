"""Session set-up: Triton's interpreter where there is no GPU, one seed, and NaN in memory nobody wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fusedkd, and with it Triton, is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

settings.register_profile(
    "fusedkd", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fusedkd")


def pytest_configure(config: pytest.Config) -> None:
    """Register the suite's markers, and save the interpreter repeated work."""
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty alone in this test")
    config.addinivalue_line("markers", "xdist_group: tests that one process runs (pytest-xdist)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):
            _patch_once_per_launch(importlib.import_module("triton.runtime.interpreter"))


def _patch_once_per_launch(interpreter: Any) -> None:
    """Let the first of a launch's functions that sees a part of triton.language patch it, and no other after it.

    Triton's own interpreter looks through all of it at each call of a function in a kernel: half of its time.
    """
    language = (interpreter.tl, interpreter.tl.core)
    seen_by: dict[Any, frozenset[int]] = {}
    patched: set[frozenset[int]] = set()
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in seen_by:
            names = self.fn.__globals__.values()
            seen_by[self.fn] = frozenset(id(part) for part in language if any(value is part for value in names))
        seen = seen_by[self.fn]
        if seen not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(seen)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both implementations of every path."""
    return request.param


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, whose time goes by operations: long rows in tiles of 8192 columns, which is still several."""
    with contextlib.suppress(ImportError):
        tiles = importlib.import_module("fusedkd.kernels.tiles")
        if not torch.cuda.is_available():
            table = {line: dataclasses.replace(tile, block=8192) for line, tile in tiles.TABLE.items()}
            monkeypatch.setattr(tiles, "TABLE", table)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN, so that an output nobody wrote is seen."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            with torch.no_grad():
                return made.fill_(torch.nan) if made.is_floating_point() else made

        return filled

    if request.node.get_closest_marker("unpoisoned") is None:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    yield
