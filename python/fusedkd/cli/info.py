"""What fusedkd finds on this machine: versions, devices, and the backend that each device gets."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from .. import __version__
from ..backends import TRITON_DEVICES, choose_backend, torch_compiled
from ..kernels.language import interpreted

RAN_ON: tuple[str, ...] = ()  # kinds of GPU, as drivers name them, on which the project has run its tests
NO_TRITON = "not installed (pip install triton; on Windows triton-windows; for XPU it comes with PyTorch)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of info."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def collect() -> dict[str, Any]:
    """Return versions (None: not installed), whether Triton interprets its kernels, and the devices."""
    versions = {
        "fusedkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }
    return {"versions": versions, "triton_interpret": interpreted(), "devices": list(_devices()), "ran_on": RAN_ON}


def describe(found: dict[str, Any]) -> str:
    """Return the findings as lines of text."""
    absent = {"triton": NO_TRITON, "cuda": "not in this PyTorch", "rocm": "not in this PyTorch"}
    lines = [f"{name:<8} {version or absent.get(name, 'not installed')}" for name, version in found["versions"].items()]
    lines.append(f"TRITON_INTERPRET is {'on' if found['triton_interpret'] else 'off'}")
    for device in found["devices"]:
        size = f"{device['threads']} threads" if "threads" in device else f"{device['memory_bytes'] / 2**30:.1f} GiB"
        lines += ["", f"{device['device']:<8} {device['name']}, {size}"]
        lines.append(f'{"":<8} backend="auto" is {device["backend"] or "refused"}: {device["reason"]}')
        if device["ran_by_the_project"] is False:
            lines.append(f"{'':<8} the project has never run its kernels on this kind of GPU: make gpu, and tell us")
    where = ", ".join(found["ran_on"]) or "no GPU yet: they are interpreted, compiled, and executed by an emulator"
    lines += ["", f"the project has run its kernels on {where}"]
    return "\n".join(lines)


def _version(module: str) -> str | None:
    try:
        return import_module(module).__version__
    except ImportError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    name = platform.processor() or platform.machine()
    cpu = _backend(torch.device("cpu"))
    yield {"device": "cpu", "name": name, "threads": torch.get_num_threads(), **cpu, "ran_by_the_project": None}
    for kind in TRITON_DEVICES:
        module = torch.get_device_module(kind)
        for index in range(module.device_count() if module.is_available() else 0):
            properties = module.get_device_properties(index)
            device = torch.device(kind, index)
            memory = properties.total_memory
            ran = any(name in properties.name for name in RAN_ON)
            about = {"device": str(device), "name": properties.name, "memory_bytes": memory}
            yield {**about, **_backend(device), "ran_by_the_project": ran}


def _loops() -> str:
    try:
        torch_compiled.check()
    except ValueError as error:
        return f"; {error}"
    return '; backend="compiled" makes loops of them'


def _backend(device: torch.device) -> dict[str, str | None]:
    try:
        backend = choose_backend("auto", device)
    except ValueError as error:
        return {"backend": None, "reason": str(error)}
    if backend != "triton":
        tests = '; backend="triton" runs too, in the interpreter' if interpreted() else ""
        return {"backend": "torch", "reason": f"CPU tensors take plain torch in cache-sized tiles{_loops()}{tests}"}
    slow = "; TRITON_INTERPRET runs them in Python, far slower: unset it" if interpreted() else ""
    return {"backend": backend, "reason": f"Triton kernels serve this device{slow}"}
