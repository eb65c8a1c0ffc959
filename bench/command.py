"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cli.commands import Progress, make_folder, positive, require, usable_device
from . import model, readme, report, sharding, tune
from .measure import Deadline, machine
from .results import empty, load, save, stem
from .rivals import FAMILIES
from .sections import SECTIONS, Bench, Settings, measure_section, units_of
from .tables import page
from .timing import Clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of bench."""
    parser.add_argument("--device", type=_device, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--only", metavar="SECTION", nargs="+", choices=list(SECTIONS), help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--rivals",
        metavar="NAME",
        nargs="*",
        choices=FAMILIES,
        help=f"set fusedkd beside these (default: all of {', '.join(FAMILIES)}; no name: alone)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds, to see that all runs")
    parser.add_argument("--seconds", metavar="S", type=partial(positive, float), help="most time for all sections")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write the results, tables, plots and report to DIR")
    parser.add_argument(
        "--readme",
        metavar="FILE",
        type=Path,
        help="measure nothing: write the results in --out as tables to FILE, and goals.md beside them",
    )
    summary = "time the tiles of the row kernels on a GPU and print lines for their table"
    commands = parser.add_subparsers(metavar="[tune | model | sharding]")
    search = commands.add_parser("tune", help=summary, description=summary.capitalize())
    tune.add_arguments(search)
    search.set_defaults(run=tune.run, fail=search.error)
    summary = "print what a model of the time says of GPUs that are not here, from counted instructions and bytes"
    modelled = commands.add_parser("model", help=summary, description=summary.capitalize())
    model.add_arguments(modelled)
    modelled.set_defaults(run=model.run, fail=modelled.error)
    summary = "print what the ranks of a sharded vocabulary tell each other, and how long that would take"
    shared = commands.add_parser("sharding", help=summary, description=summary.capitalize())
    sharding.add_arguments(shared)
    shared.set_defaults(run=sharding.run, fail=shared.error)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    if args.readme:
        if not args.out:
            raise argparse.ArgumentError(None, "--readme needs --out: the folder of the results")
        readme.write(args.readme, args.out)
        return 0
    sections = [name for name in SECTIONS if name in (args.only or SECTIONS)]
    require("benchmark", "bench", ["tqdm", *["matplotlib"] * bool(args.out), *["transformers"] * ("step" in sections)])
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = make_folder("--out", args.out) if args.out else None
    families = FAMILIES if args.rivals is None else tuple(args.rivals)
    settings = Settings(device, args.quick, families)
    found = machine(device)
    file = folder / f"{stem(device, found['name'], args.quick)}.json" if folder else None
    result = load(file) if file else empty()
    end = None if args.seconds is None else time.monotonic() + args.seconds
    for section in sections:
        seconds = None if end is None else _share(sections, section) * (end - time.monotonic())
        result["sections"][section] = _measured(section, settings, found, Deadline(seconds))
        if file:
            save(file, result)
    print(page(result))
    if file:
        report.write(file, result)
    return 0


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda")
    return usable_device(name)


def _share(sections: list[str], section: str) -> float:
    """A section's part of the time that is left for it and those after it."""
    return SECTIONS[section] / sum(SECTIONS[name] for name in sections[sections.index(section) :])


def _measured(section: str, settings: Settings, found: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
    """A section with the machine, the settings and the date of its measurement."""
    done = 0
    with Progress(quiet=False).stage(section, units_of(section, settings)) as bar:

        def tick(what: str, begins: bool = True) -> None:
            nonlocal done
            bar.update(done - bar.n)
            bar.set_postfix_str(what)
            done += begins

        bench = Bench(settings, Clock(settings.device), deadline, tick)
        measured = measure_section(section, bench)
        bar.update(done - bar.n)
    return {"machine": found, "quick": settings.quick, "rounds": settings.rounds, **measured}
