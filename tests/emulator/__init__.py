"""Runs what Triton compiles for NVIDIA GPUs on a CPU, and reports what a GPU's sanitizer would.

    install(90)      from now on backend="triton" on CPU tensors compiles for sm_90 and executes the PTX
    findings()       races, unwritten memory, misaligned and stray accesses, divergent barriers, what does not end
    clear()          forget them

parse.py reads PTX, translate.py makes numpy of it, machine.py is the GPU, driver.py stands between Triton and that.
"""

from .driver import CAPABILITIES, clear, edited, executed, findings, install, launch, launched, settings, unwritten
from .machine import BENIGN, ORDERS, Fault, Finding, Grid, Program, Region

__all__ = [
    "BENIGN",
    "CAPABILITIES",
    "ORDERS",
    "Fault",
    "Finding",
    "Grid",
    "Program",
    "Region",
    "clear",
    "edited",
    "executed",
    "findings",
    "install",
    "launch",
    "launched",
    "settings",
    "unwritten",
]
