"""The command line: `python -m fusedkd COMMAND`.

A command is a line in COMMANDS and a module of its name in cli/, `bench` a package of its own, with
`add_arguments(parser)` and `run(args) -> exit status`.
What `run` finds wrong with its arguments it raises as `argparse.ArgumentError`: usage, message, exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__

COMMANDS = {
    "info": "show versions, devices and the backend that each device gets",
    "demo": "distil a small language model on real text and compare divergences",
    "explain": "show the page of one divergence and draw its gradient",
    "study": "repeat small experiments of the literature",
    "bench": "measure time, memory and accuracy beside other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m fusedkd", description="Fused knowledge-distillation losses for large vocabularies."
    )
    parser.add_argument("--version", action="version", version=f"fusedkd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if given[:1] == [name]:
            module = import_module(".bench" if name == "bench" else f".cli.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run, fail=command.error)
    args = parser.parse_args(given)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except argparse.ArgumentError as error:
        return args.fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
