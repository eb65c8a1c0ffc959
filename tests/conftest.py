"""Session set-up: Triton's interpreter where there is no GPU, one seed, and NaN in memory nobody wrote.

`--emulate 90` runs what Triton compiles for sm_90 instead (emulator/).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two processes that wait for each other's cores cost several times
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that tests start

settings.register_profile(
    "fusedkd", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fusedkd")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--emulate 90: kernels as compiled for sm_90, run on the CPU with a sanitizer."""
    text = "run kernels as Triton compiles them for this compute capability, emulated: 80, 90 or 100"
    parser.addoption("--emulate", type=int, metavar="CAPABILITY", help=text)
    text = "with --emulate: approximations (ex2, lg2 ...) are off by up to N units in the last place (default: 0)"
    parser.addoption("--ulps", type=int, default=0, metavar="N", help=text)
    text = "with --emulate: a product and the sum behind it are one operation, as ptxas may make them"
    parser.addoption("--fuse", action="store_true", help=text)
    text = "with --emulate: how a block's warps take turns: greedy (the default), lockstep (the fastest) or warps"
    parser.addoption("--order", metavar="ORDER", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Choose how kernels run, register the suite's markers, and save the interpreter repeated work."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that starts them
        # Inductor finds a graph by its operators' names: another version's graph knows other shapes of their results.
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fusedkd-inductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    # TRITON_INTERPRET is read when fusedkd, and with it Triton, is first imported.
    if (capability := config.getoption("--emulate")) is not None:
        os.environ["TRITON_INTERPRET"] = "0"
        how = {"ulps": config.getoption("--ulps"), "fuse": config.getoption("--fuse")}
        how["order"] = config.getoption("--order") or "greedy"
        config.pluginmanager.register(importlib.import_module("emulator.plugin").Plugin(capability, **how))
    elif any(map(config.getoption, ("--ulps", "--fuse", "--order"))):
        raise pytest.UsageError("--ulps, --fuse and --order need --emulate")
    elif not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    config.addinivalue_line("markers", "interpreter(reason): needs Triton's interpreter itself; --emulate skips it")
    config.addinivalue_line("markers", "smoke: a look at every path in a minute on two cores (pytest -m smoke -n 2)")
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty alone in this test")
    config.addinivalue_line("markers", "xdist_group: tests that one process runs (pytest-xdist)")
    save_repeated_work()


def save_repeated_work() -> None:
    """Let Triton's interpreter, where kernels run in it, do what it does at each operation once."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):
            interpreter = importlib.import_module("triton.runtime.interpreter")
            _patch_once_per_launch(interpreter)
            _remember_types(interpreter)


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


def _remember_types(interpreter: Any) -> None:
    """Let numbers, dtypes and shapes that Triton's own interpreter makes anew for each operation be made once."""
    tl, semantic = interpreter.tl, interpreter.interpreter_semantic
    make_dtype, same = interpreter._get_np_dtype, tl.constexpr(True)
    compare, make_constant, make_tensor = tl.tuple.__eq__, semantic.scalar_constant, tl.tensor.__init__
    dtypes: dict[str, Any] = {}
    types: dict[tuple[Any, ...], Any] = {}
    constants: dict[tuple[Any, ...], Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = make_dtype(of)
        return dtypes[name]

    def block_type(scalar: Any, shape: Any) -> Any:
        if scalar.is_ptr():
            return tl.block_type(scalar, shape)
        key = (scalar.name, *shape)
        if key not in types:
            types[key] = tl.block_type(scalar, shape)
        return types[key]

    def scalar_constant(value: Any, dtype: Any) -> Any:
        key = (type(value), value, dtype.name)
        if key not in constants:
            constants[key] = make_constant(value, dtype)
        return constants[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def equal(self: Any, other: Any) -> Any:
        if self is other:
            return same
        if isinstance(other, tl.tuple) and all(type(x) is int for x in other.values):
            return tl.constexpr(self.values == other.values)
        return compare(self, other)

    interpreter._get_np_dtype = np_dtype
    tl.tuple.__eq__ = equal
    tl.block_type.with_element_ty = lambda self, scalar: block_type(scalar, self.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, scalar, shape: block_type(scalar, shape)
    semantic.scalar_constant = scalar_constant
    tl.tensor.__init__ = tensor


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both implementations of every path."""
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The last arguments that each operator was called with, as its schema has them."""
    seen: dict[str, tuple[Any, ...]] = {}
    operator = importlib.import_module("fusedkd.ops.operator")
    original = operator.Operator.__call__

    def run(self: Any, *args: Any) -> Any:
        seen[self.name] = operator._flat(*args)
        return original(self, *args)

    monkeypatch.setattr(operator.Operator, "__call__", run)
    return seen


@pytest.fixture(scope="session")
def clib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C library, built by CMake for a few divergences, once for all files that run it."""
    return importlib.import_module("clibrary").build(tmp_path_factory.mktemp("clib"))


@pytest.fixture
def wide_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, whose time goes by operations: long rows in tiles of 8192 columns, which is still several."""
    with contextlib.suppress(ImportError):
        tiles = importlib.import_module("fusedkd.kernels.device.tiles")
        if not torch.cuda.is_available() and request.config.getoption("--emulate") is None:
            table = {line: dataclasses.replace(tile, block=8192) for line, tile in tiles.TABLE.items()}
            monkeypatch.setattr(tiles, "TABLE", table)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN, so that an output nobody wrote is seen."""
    emulated = request.config.getoption("--emulate") is not None
    if request.node.get_closest_marker("unpoisoned") is None:
        fill_unwritten(monkeypatch, importlib.import_module("emulator").unwritten if emulated else nan_everywhere)
    yield


def nan_everywhere(x: torch.Tensor) -> torch.Tensor:
    """What nobody wrote, as a number that shows."""
    return x.fill_(torch.nan)


def fill_unwritten(patch: pytest.MonkeyPatch, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have `fill` write what torch.empty and its relatives return."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            with torch.no_grad():
                return fill(made) if made.is_floating_point() else made

        return filled

    for name in ("empty", "empty_like", "empty_strided"):
        patch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
