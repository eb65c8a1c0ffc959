"""Measurement: time, memory and accuracy beside rivals. `python -m fusedkd bench`, `... bench tune`."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
