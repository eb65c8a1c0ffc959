"""What several commands share: missing packages, the types of arguments, where output goes, and progress."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import __version__, divergences

if TYPE_CHECKING:
    from tqdm import tqdm

N = TypeVar("N", int, float)


class Progress:
    """Stages on standard error: bars on a terminal, plain lines elsewhere, nothing if quiet."""

    def __init__(self, quiet: bool) -> None:
        """Decide once how stages are shown."""
        self.bars = not quiet and sys.stderr.isatty()
        self.lines = not quiet and not self.bars

    def stage(self, name: str, total: int | None = None) -> tqdm[Any]:
        """Announce a stage and return its bar, over `total` items or else over the share of a budget."""
        from tqdm import tqdm

        if self.lines:
            print(f"{name} ...", file=sys.stderr, flush=True)
        shape = None if total else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=total or 1.0, desc=name, disable=not self.bars, bar_format=shape)


def versions() -> dict[str, str]:
    """Return what the numbers of a study depend on beside its plan."""
    return {"fusedkd": __version__, "torch": torch.__version__, "python": platform.python_version()}


def require(command: str, extra: str, packages: Sequence[str]) -> None:
    """Refuse to run `command` where one of `packages`, which the optional dependency `extra` installs, is missing.

    Raises:
        argparse.ArgumentError: with the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise argparse.ArgumentError(None, f"the {command} needs {', '.join(missing)}: pip install 'fusedkd[{extra}]'")


def known_divergence(name: str) -> str:
    """Return `name` if a divergence is registered under it: the `type` of an argument."""
    names = list(divergences())
    if name not in names:
        raise argparse.ArgumentTypeError(f"unknown divergence {name!r}; known: {', '.join(names)}")
    return name


def positive(kind: Callable[[str], N], text: str) -> N:
    """Return the number that `text` names, above zero: with `kind` bound, the `type` of an argument."""
    try:
        number = kind(text)
    except ValueError:
        number = kind("0")
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return number


def usable_device(name: str) -> str:
    """Return `name` if tensors can be made on that device: the `type` of an argument."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not usable: {str(error).splitlines()[0]}") from error
    return name


def make_folder(option: str, folder: Path) -> Path:
    """Return the folder that `option` names, made if need be.

    Raises:
        argparse.ArgumentError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentError(None, f"{option}: {folder} cannot be a folder: {error.strerror}") from error
    return folder


def check_file(option: str, file: Path | None) -> None:
    """Refuse a file, if there is to be one, whose folder does not exist.

    Raises:
        argparse.ArgumentError: naming the folder.
    """
    if file and not file.parent.is_dir():
        raise argparse.ArgumentError(None, f"{option}: no folder {file.parent}")
