"""Several ranks on this machine: one process each, joined by gloo on the CPU, none of which outlives its time."""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
# Imported once, by a process without threads that ranks are forked from: torch alone takes seconds.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.profiler", "pytest", "fusedkd"]
COLLECTIVE = timedelta(seconds=30)  # longest wait of a collective; for groups that a function makes itself, too
GRACE = 2.0  # seconds that the other ranks have to report once one has failed: most wait for it in a collective


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What function(rank, *args) returns in each of `world` processes, which form the default process group.

    `function` is importable (a function of a module), and torch can save arguments and results. Each rank has one
    thread. After `timeout` seconds in all, and soon after a rank has failed, what is left is killed; an AssertionError
    has the traceback of every rank that raised, and where a rank was that hung.
    """
    deadline = time.monotonic() + timeout
    call = io.BytesIO()
    torch.save((function, args), call)  # by value: shared, each tensor holds a descriptor, of which 251 can be sent
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="fusedkd-ranks-", ignore_cleanup_errors=True) as folder:
        processes, pipes = [], []
        for rank in range(world):
            pipe, remote = context.Pipe(duplex=False)
            arguments = (remote, Path(folder), rank, world, deadline, call.getvalue())
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            remote.close()  # its end in this process: a rank that dies is an end of file here
            processes.append(process)
            pipes.append(pipe)
        try:
            results, errors = _gathered(pipes, deadline)
            for process in processes:
                process.join(0 if errors else max(0.0, deadline - time.monotonic()))
            for rank, process in enumerate(processes):
                if process.is_alive() and rank not in errors:
                    errors[rank] = "did not end in time" if rank in results else "no result in time"
                elif process.exitcode and rank not in errors:
                    errors[rank] = f"ended with exit code {process.exitcode}"
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        for rank in errors:
            hung = Path(folder) / f"{rank}.txt"
            errors[rank] += f"\n{hung.read_text()}" if hung.is_file() else ""
    if errors:
        raise AssertionError("\n".join(f"rank {rank} of {world}: {errors[rank]}" for rank in sorted(errors)))
    return [results[rank] for rank in range(world)]


def _gathered(pipes: list[Connection], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and errors by rank, of those that reported before the deadline."""
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    left = {pipe: rank for rank, pipe in enumerate(pipes)}
    while left and (ready := wait(list(left), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = left.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                errors[rank] = "ended without a result"
                continue
            if ok:
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
            else:
                errors[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + GRACE)
    return results, errors


def _rank(
    pipe: Connection,
    folder: Path,
    rank: int,
    world: int,
    deadline: float,
    call: bytes,
) -> None:
    """One process: its group, its function, its report."""
    with (folder / f"{rank}.txt").open("w") as file:
        faulthandler.dump_traceback_later(max(0.1, deadline - time.monotonic() - 1), file=file)
        torch.set_num_threads(1)
        try:
            meeting = f"file://{folder / 'rendezvous'}"
            dist.init_process_group("gloo", meeting, COLLECTIVE, world, rank)
            function, args = torch.load(io.BytesIO(call), weights_only=False)
            saved = io.BytesIO()
            torch.save(function(rank, *args), saved)  # no shared memory, which would end with this process
            dist.barrier()  # gloo's threads may abort a process whose peer has closed its connections
            dist.destroy_process_group()
            pipe.send((True, saved.getvalue()))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
            pipe.close()
    os._exit(0)  # the interpreter's end would run destructors beside threads of torch


def torchrun(world: int, script: str, *arguments: str, timeout: float = 120) -> str:
    """What a script of the repository prints as `world` ranks; their errors where it fails."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), script]
    # As many threads as torchrun gives, without its word about it.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *launch, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            try:
                process.wait(40)  # it gives them 30 seconds
            finally:
                process.kill()
            raise
    assert process.returncode == 0, errors[-3000:]
    return out
