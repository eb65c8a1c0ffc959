"""What several commands share: packages that may be missing, divergences by name, and where output goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from . import divergences


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
