"""Deadlines, bytes, and the machine that something was measured on."""

from __future__ import annotations

import datetime
import hashlib
import multiprocessing
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..cli import info
from . import rivals
from .timing import reason

HERE = Path(__file__).parent


class Deadline:
    """A point in time that may never come."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.end is not None and time.monotonic() > self.end


def peak_bytes(work: Callable[[], Mapping[str, Tensor]], device: str) -> int:
    """Most bytes held at once during `work` beyond those held before it and the gradients that it returns.

    On a GPU the allocator's own count. On a CPU the kernel's high-water mark of what this process, which should
    be a fresh one, has resident (Linux).
    """
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        # 5 sets the high-water mark back to what is resident now: proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        gradients = work()
        peak = _status("VmHWM")
    return peak - before - sum(x.nbytes for x in gradients.values())


def _status(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS is what is resident, VmHWM its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in a process of its own, which has imported the package and done nothing else.

    Raises:
        RuntimeError: it failed there, or the process died (of memory, say).
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        result, failure = receive.recv()
    except EOFError:
        process.join()
        result, failure = None, f"the process ended with exit code {process.exitcode}"
    process.join()
    if failure:
        raise RuntimeError(failure)
    return result


def _report(send: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        send.send((work(*arguments), None))
    except Exception as error:
        send.send((None, reason(error)))


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    found = info.collect()
    return {
        "commit": _commit(),
        "source": source(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "name": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": None if device == "cpu" else torch.cuda.get_device_properties(0).total_memory,
        "driver": None if device == "cpu" else _driver(),
        "triton_interpret": found["triton_interpret"],
        "versions": found["versions"],
        "rivals": rivals.versions(),
    }


def source() -> str:
    """A digest of the package's own files: what was measured, where no commit says so."""
    rooms = {"": Path(info.__file__).parent, "kernels": Path(kernels.__file__).parent, "bench": HERE}
    files = {
        (Path(name) / path.relative_to(room)).as_posix(): path
        for name, room in rooms.items()
        for path in room.rglob("*.py")
    }
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + files[name].read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    """The commit that the package's folder is at, if it is in a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not (head := git("rev-parse", "HEAD")):
        return "unknown"
    return head + ("+changes" if git("status", "--porcelain", "-uno") else "")


def _cpu_name() -> str:
    info_file = Path("/proc/cpuinfo")
    lines = info_file.read_text().splitlines() if info_file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "unknown"
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
