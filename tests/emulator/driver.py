"""A driver for Triton that runs what it compiles for an NVIDIA GPU on the CPU: launches take CPU tensors.

Triton's own JIT, specialisation and launch code run unchanged; in the place of ptxas and of CUDA's driver stand this
file and machine.py. Triton must be imported without its interpreter (TRITON_INTERPRET=0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .machine import ORDERS, UNWRITTEN, Finding, Grid, Program, Region

CAPABILITIES = (80, 90, 100)
PLACES = 132  # multiprocessors; as many blocks run at a time
CACHE = Path(__file__).parents[2] / "build" / "emulator"


@dataclasses.dataclass
class Settings:
    """How launches run."""

    order: str = "greedy"
    races: bool = True
    fuse: bool = False
    ulps: int = 0
    edit: Callable[[str], str] | None = None  # of the PTX of each launch
    narrow: Callable[[str, str, torch.Tensor], torch.Tensor] | None = None  # of kernel, argument: what may be touched
    seed: int = 0
    grid: type[Grid] = Grid  # what a launch is: a subclass may count


settings = Settings()
launched = Counter[str]()  # file:kernel
executed = Counter[str]()  # warp instructions
_found: dict[Any, Finding] = {}
_programs: dict[Any, Program] = {}


def findings() -> list[Finding]:
    """What the sanitizer saw since the last `clear`, the first of each kind and instruction."""
    return list(_found.values())


def clear() -> None:
    """Forget the findings."""
    _found.clear()


@contextlib.contextmanager
def edited(
    change: Callable[[str], str] | None = None, narrow: Callable[[str, str, torch.Tensor], torch.Tensor] | None = None
) -> Iterator[None]:
    """Within: every launch runs `change` of its PTX, and may touch `narrow` of each tensor."""
    settings.edit, settings.narrow = change, narrow
    try:
        yield
    finally:
        settings.edit = settings.narrow = None


def unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """Marks a tensor of floats as not written: NaN, and a kernel that reads it before a store is found out."""
    item = tensor.element_size()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_floating_point() and item in whole:
        tensor.detach().view(whole[item]).fill_(int.from_bytes(UNWRITTEN.to_bytes(2, "little") * (item // 2), "little"))
    return tensor


def regions(named: list[tuple[str, torch.Tensor]]) -> list[Region]:
    """The memory of tensors: one region per storage, in which only the tensors' own elements may be touched."""
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, x in named:
        if x.numel():
            by_storage.setdefault(x.untyped_storage().data_ptr(), []).append((name, x))
    out = []
    for views in by_storage.values():
        start = min(x.data_ptr() for _, x in views) & -8  # accesses of 8 bytes and more are at multiples of them
        stop = max(_stop(x) for _, x in views)
        dense = (x.data_ptr() == start and x.data_ptr() + x.nbytes == _stop(x) == stop for _, x in views)
        title = " and ".join(f"{name} {tuple(x.shape)}" for name, x in views)
        about = {"item": views[0][1].element_size(), "floating": views[0][1].is_floating_point()}
        out.append(Region.at(start, stop - start, title, whole=any(dense), **about))
        if out[-1].seen is not None:
            seen = torch.from_numpy(out[-1].seen)
            for view, byte in ((x, i) for _, x in views for i in range(x.element_size())):
                strides = [stride * view.element_size() for stride in view.stride()]
                seen.as_strided(view.shape, strides, view.data_ptr() - start + byte).fill_(True)
    return out


def _stop(x: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def _flat(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(signature, tuple):
        for one, part in zip(signature, value, strict=True):
            yield from _flat(one, part)
    elif signature != "constexpr":
        yield signature, value


def _parameter(signature: str, value: Any) -> Any:
    """A launch argument as its bits."""
    if signature[0] == "*":
        return np.uint64(0 if value is None else value.data_ptr())
    if signature == "fp32":
        return np.float32(value)
    if signature in ("i32", "u32", "i64", "u64"):
        return np.array(int(value) & (1 << int(signature[1:])) - 1, f"u{int(signature[1:]) // 8}")[()]
    raise NotImplementedError(f"a launch argument of type {signature}")


def launch(program: Program, size: int, given: list[tuple[str, Any]], **options: Any) -> Grid:
    """Runs `size` blocks of a kernel on arguments (Triton's type, value); Fault where a launch cannot go on."""
    names = [name for _, name in program.kernel.params]
    given = given + [("i64", 0)] * (len(names) - len(given))  # two pointers to scratch memory
    params = {name: _parameter(*one) for name, one in zip(names, given, strict=True)}
    tensors = [(name, value) for name, (_, value) in zip(names, given, strict=True) if isinstance(value, torch.Tensor)]
    if settings.narrow is not None:
        tensors = [(name, settings.narrow(program.kernel.title, name, tensor)) for name, tensor in tensors]
    settings.seed += 1
    usual = {"order": settings.order, "races": settings.races, "resident": PLACES, "seed": settings.seed}
    grid = settings.grid(program, size, params, regions(tensors), _found, **(usual | options))
    launched[program.kernel.title] += 1
    grid.run()
    executed[program.kernel.title] += sum(n * len(program.kernel.blocks[at].code) for at, n in grid.counts.items())
    return grid


def _launcher(src: Any, metadata: Any) -> Callable[..., None]:
    """What Triton calls for a launch."""
    signature = tuple(src.signature.values())

    def launcher(x: int, y: int, z: int, stream: Any, function: str, *rest: Any) -> None:
        if y != 1 or z != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("a grid of more than one dimension, or scratch memory")
        text = function if settings.edit is None else settings.edit(function)
        key = (text, settings.ulps, settings.fuse)
        if key not in _programs:
            _programs[key] = Program(text, metadata.shared, ulps=settings.ulps, fuse=settings.fuse)
        # rest: packed metadata, launch metadata, two hooks, then the kernel's arguments
        launch(_programs[key], x, list(_flat(signature, rest[4:])))

    return launcher


def _without_ptxas(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook on its stages, and without arguments the hook's name in cache keys."""
    if stages is None:
        return "ptx-emulator", "ptx-emulator"
    stages["cubin"] = lambda src, metadata: src.encode()
    return None


def _driver(target: Any) -> Any:
    """A GPU whose memory is the process's, as far as Triton asks its driver and that CUDA's."""
    properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": PLACES, "warpSize": 32}

    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, kernel.decode(), 0, 0, 1024  # module, function, registers, spills, most threads

    return types.SimpleNamespace(
        launcher_cls=_launcher,
        utils=types.SimpleNamespace(get_device_properties=lambda device: properties, load_binary=load_binary),
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        set_current_device=lambda device: None,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


def check(capability: Any, order: Any = "greedy", ulps: Any = 0, **flags: Any) -> None:
    """ValueError for what `install` does not know, with what it does."""
    if capability not in CAPABILITIES:
        raise ValueError(f"capability must be one of {', '.join(map(str, CAPABILITIES))}, got {capability!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    if not isinstance(ulps, int) or isinstance(ulps, bool) or ulps < 0:
        raise ValueError(f"ulps must be 0 or a positive integer, got {ulps!r}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def install(
    capability: int = 90, *, order: str = "greedy", races: bool = True, fuse: bool = False, ulps: int = 0
) -> None:
    """From now on `backend="triton"` on CPU tensors compiles for sm_`capability` and runs the PTX.

    order: in which a block's warps run: "greedy", "lockstep" or "warps" (machine.py). races: whether to look for them.
    fuse: a product and the sum behind it become one fma, as ptxas may make it. ulps: how far approximations are off.
    ValueError for what is none of these; RuntimeError where Triton was imported with its interpreter.
    """
    check(capability, order, ulps, races=races, fuse=fuse)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    if knobs.runtime.interpret:
        raise RuntimeError("Triton was imported with its interpreter: set TRITON_INTERPRET=0 before that")
    settings.order, settings.races, settings.fuse, settings.ulps = order, races, fuse, ulps
    knobs.compilation.disable_line_info = False  # findings and kernels are named by their source
    knobs.runtime.add_stages_inspection_hook = _without_ptxas
    triton.runtime.driver.set_active(_driver(GPUTarget("cuda", capability, 32)))

    from fusedkd import backends

    backends.interpreted = lambda: True  # CPU tensors may ask for Triton
