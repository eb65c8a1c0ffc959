"""Which tests notice a wrong formula: `make mutants`, or `python tests/mutate.py [part of a mutant's name ...]`.

A mutant is one number of one function made wrong in one of its versions: what Triton's interpreter runs, what torch
runs on a CPU, what torch.compile traces where that is other code, and what runs on Python's numbers. Nothing is edited
on disk. The quick tests are collected once; then each mutant gets a fork of pytest, in which those that look at its
subject run until one fails. A mutant whose function no test called is an error, and so is a target that is not there.
At the end every test that noticed a mutant must pass without any.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several mutants at a time, and a fork of OpenMP's threads hangs

import pytest
import torch
from _pytest.runner import runtestprotocol
from tqdm import tqdm

import fusedkd
from fusedkd.kernels.divergences import REGISTRY, definitions
from fusedkd.kernels.maths import centering, decomposition, elementary, mixture, moments
from fusedkd.kernels.maths.definition import Definition, Derived
from fusedkd.kernels.maths.mixture import SATURATING

TESTS = Path(__file__).parent

Change = Callable[[Any, str], Any]  # of a number, in a version


def one_per_cent(x: Any, version: str) -> Any:
    """Too large."""
    return x * 1.01


def zeroed(x: Any, version: str) -> Any:
    """Not there."""
    return x * 0.0


def negated(x: Any, version: str) -> Any:
    """The other direction."""
    return x * -1.0


def always(x: Any, version: str) -> Any:
    """1 whatever it was."""
    return x * 0.0 + 1.0


CHANGES: dict[str, Change] = {"1 % off": one_per_cent, "zeroed": zeroed, "negated": negated, "always 1": always}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """What is wrong, how to make it so in this process, and patterns of the tests to run, the quickest first."""

    name: str
    apply: Callable[[Counter], None]
    stages: tuple[str, ...]


class Counter:
    """How often what is wrong was called."""

    calls = 0


# --- making a function wrong in place, so that everything that holds it sees the mutant -------------------------------


def spoiled(original: Callable[..., Any], at: int | None, change: Change, version: str, counter: Counter) -> Any:
    """`original` with member `at` of what it returns changed (None: it returns one number)."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        counter.calls += 1
        made = original(*args, **kwargs)
        if at is None:
            return change(made, version)
        members = list(made)
        members[at] = change(members[at], version)
        return made._make(members) if hasattr(made, "_make") else tuple(members)

    return wrong


def replace_code(fn: types.FunctionType, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give a function the behaviour of make(the function as it was), for all who hold it."""
    original = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    original.__kwdefaults__ = fn.__kwdefaults__
    name = f"_mutant_{id(fn)}"
    fn.__globals__[name] = make(original)
    free = fn.__code__.co_freevars  # the new code must close over as much as the old
    text = "def outer():\n"
    text += "".join(f"    {variable} = None\n" for variable in free)
    text += (
        f"    def inner(*args, **kwargs):\n        ({', '.join([*free, ''])}) if False else None\n"
        if free
        else ("    def inner(*args, **kwargs):\n")
    )
    text += f"        return {name}(*args, **kwargs)\n    return inner\n"
    scope: dict[str, Any] = {}
    exec(text, scope)
    inner = scope["outer"]()
    fn.__defaults__, fn.__kwdefaults__ = None, None
    fn.__code__ = inner.__code__.replace(co_name=fn.__name__)


def cell(fn: types.FunctionType, name: str) -> types.FunctionType:
    """What a function closes over under a name."""
    return fn.__closure__[fn.__code__.co_freevars.index(name)].cell_contents  # type: ignore[index]


def versions_of(formula: Any) -> dict[str, Any]:
    """What there is of a formula, by version; a missing one is not a Python function (torch.expm1)."""
    if not hasattr(formula, "torch"):
        return {"triton": formula}
    found = {"triton": formula, "traced": formula.traced}
    run = formula.torch
    if getattr(run, "__closure__", None) and "eager" in run.__code__.co_freevars:
        found["torch"] = cell(run, "eager")
    else:
        found = {"triton": formula, "torch": run}
    if formula.slope is not run and formula.slope.__code__ is getattr(run, "__code__", None):
        found["slope"] = formula.slope
    return {name: fn for name, fn in found.items() if name == "triton" or isinstance(fn, types.FunctionType)}


def wrong_function(fn: Any, version: str, at: int | None, change: Change, counter: Counter) -> None:
    """Make one version of a formula, a kernel's function or a plain function wrong."""
    if version == "triton":
        if not hasattr(fn, "rewrite"):
            raise LookupError(f"{fn} is no function of Triton's interpreter")
        rewrite = fn.rewrite
        fn.rewrite = lambda: spoiled(rewrite(), at, change, version, counter)
    elif isinstance(fn, types.FunctionType):
        replace_code(fn, lambda original: spoiled(original, at, change, version, counter))
    else:
        raise LookupError(f"{fn} is no Python function")


# --- what can be wrong ------------------------------------------------------------------------------------------------

FILES = (
    "test_definition.py",
    "test_logits.py",
    "test_hard_rows.py",
    "test_streaming.py",
    "test_options.py",
    "test_arguments.py",
    "test_identities.py",
    "test_split_rows.py",
    "test_compiled.py",
)


def unit_tests(*definitions: str) -> str:
    """Tests of definitions by themselves."""
    return rf"test_definition\.py::.*[\[-]({'|'.join(definitions)})[\]-]"


def calls(version: str, names: Iterable[str], *tests: str) -> str:
    """Tests of one backend that run divergences by name."""
    backend = "triton" if version == "triton" else "torch"
    return rf"::({'|'.join(tests)})\[{backend}-(.*-)?({'|'.join(names)})[\]-]"


def tests_of(definition: str, names: list[str], version: str) -> tuple[str, ...]:
    """The unit tests of a definition, then calls of the divergences that use it."""
    return (
        *(() if version == "triton" else (unit_tests(definition),)),
        calls(version, names, "test_every_divergence"),
        calls(
            version,
            names,
            "test_near",
            "test_near_the_others",
            "test_near_and_far",
            "test_saturated",
            "test_peaked_apart",
        ),
        rf"::test_every_way\[{'triton' if version == 'triton' else 'torch'}-.*-({'|'.join(names)})[\]-]",
        rf"test_compiled\.py::.*[\[-]({'|'.join(names)})[\]-]",
    )


def users_of(definition: Definition) -> list[str]:
    """The registered divergences that run a definition."""
    return [
        name
        for name, member in REGISTRY.items()
        if fusedkd.divergence(name).form.definition is definition
        or definition in (member.definitions if isinstance(member, Derived) else ())
    ]


def in_function(
    name: str,
    formula: Any,
    outputs: dict[int | None, str],
    changes: tuple[str, ...],
    stages: Callable[[str], tuple[str, ...]],
    unused: tuple[str, ...] = (),
) -> Iterator[Mutant]:
    """Every version, number and change of a function, but for versions that the package never runs."""
    for version, fn in versions_of(formula).items():
        if version in unused:
            continue
        for at, what in outputs.items():
            for change in changes:

                def apply(
                    counter: Counter, fn: Any = fn, version: str = version, at: Any = at, c: str = change
                ) -> None:
                    wrong_function(fn, version, at, CHANGES[c], counter)

                yield Mutant(f"{name} [{version}]: {what} {change}", apply, tuple(stages(version)))


def in_definition(definition: Definition) -> Iterator[Mutant]:
    """Term, one-sweep form, row_parameters, reference."""
    users = users_of(definition)

    def stages(version: str) -> tuple[str, ...]:
        return tests_of(definition.name, users, version)

    name = definition.name
    no = ("slope",)  # which leaves f out
    yield from in_function(f"{name}.term", definition.term, {0: "f"}, ("1 % off", "zeroed"), stages, no)
    yield from in_function(f"{name}.term", definition.term, {1: "phi"}, ("1 % off", "zeroed", "negated"), stages)
    form = definition.online
    if form.sums is not None:
        yield from in_function(f"{name}.sums", form.sums, {0: "total"}, ("1 % off", "zeroed"), stages)
        yield from in_function(f"{name}.sums", form.sums, {1: "mass"}, ("1 % off", "zeroed", "negated"), stages)
        state = {i: f"state[{i}]" for i in range(len(form.init.torch()))}
        yield from in_function(f"{name}.advance", form.advance, state, ("1 % off",), stages)
        yield from in_function(f"{name}.ratio", form.ratio, {None: "r"}, ("1 % off", "zeroed"), stages)
    if definition.row_parameters is not None:
        yield from in_row_parameters(name, definition, stages)
    if definition.outer is not None:
        outputs: dict[int | None, str] = {0: "D", 1: "slope"}
        yield from in_function(f"{name}.outer", definition.outer, outputs, ("1 % off", "zeroed"), stages)

    def reference(counter: Counter) -> None:
        wrong_function(definition.reference, "torch", None, one_per_cent, counter)

    yield Mutant(f"{name}.reference: value 1 % off", reference, (unit_tests(name),))


def in_row_parameters(name: str, definition: Definition, stages: Callable[[str], tuple[str, ...]]) -> Iterator[Mutant]:
    """What rows find for themselves."""
    row_parameters = definition.row_parameters
    assert row_parameters is not None
    changes = ("zeroed", "always 1") if row_parameters is SATURATING else ("1 % off", "zeroed")
    for version, fn in (("triton", row_parameters.kernel), ("torch", row_parameters.torch)):
        for i, change in itertools.product(range(row_parameters.extras), changes):

            def nested(made: Any, version: str, i: int = i, change: str = change) -> Any:
                members = list(made)
                members[i] = CHANGES[change](members[i], version)
                return tuple(members)

            def apply(counter: Counter, fn: Any = fn, version: str = version, change: Change = nested) -> None:
                wrong_function(fn, version, 0 if version == "triton" else None, change, counter)

            yield Mutant(f"{name}.row_parameters [{version}]: extra {i} {change}", apply, stages(version))
    if name.startswith("amid"):
        for i, change in itertools.product(range(2), ("1 % off", "zeroed")):

            def sums(made: Any, version: str, i: int = i, change: str = change) -> Any:
                members = list(made)
                members[i] = CHANGES[change](members[i], version)
                return tuple(members)

            def in_kernel(counter: Counter, change: Change = sums) -> None:
                wrong_function(row_parameters.kernel, "triton", 1, change, counter)

            yield Mutant(f"{name}.row_parameters [triton]: {('F', 'Φ')[i]} {change}", in_kernel, stages("triton"))


def in_registered(name: str) -> Iterator[Mutant]:
    """Defaults, domain, and what a derived divergence passes on."""
    member = REGISTRY[name]
    stages = (
        calls("torch", [name], "test_every_divergence"),
        rf"test_(arguments|options|identities)\.py::.*{name}",
        r"test_arguments\.py::",
    )
    field = "parameters" if isinstance(member, Definition) else "arguments"
    for parameter in getattr(member, field):
        value, bounds = parameter.default, (parameter.low, parameter.high)
        changes = {}
        if not isinstance(value, str):
            moved = 1 - value if isinstance(value, bool) else value * 0.99
            changes["default changed"] = dataclasses.replace(parameter, default=moved)
        if not all(map(math.isinf, bounds)):
            changes["range removed"] = dataclasses.replace(parameter, low=-math.inf, high=math.inf)
        for what, changed in changes.items():

            def other(counter: Counter, parameter: Any = parameter, changed: Any = changed) -> None:
                counter.calls += 1
                taken = tuple(changed if p is parameter else p for p in getattr(member, field))
                object.__setattr__(member, field, taken)

            yield Mutant(f"{name}.{parameter.name}: {what}", other, stages if "default" in what else stages[1:])
    if not isinstance(member, Definition):
        form = fusedkd.divergence(name).form
        fields = [f"theta[{i}]" for i in range(len(form.theta))] + ["target", "nontarget", "decoupled"]
        fields += ["mix"] if form.mix is not None else []
        for what in fields:

            def passed(counter: Counter, what: str = what) -> None:
                def change(made: Any, version: str) -> Any:
                    if what.startswith("theta"):
                        i = int(what[6:-1])
                        moved = made.theta[i] * 0.99 if made.theta[i] else 0.01
                        return made._replace(theta=(*made.theta[:i], moved, *made.theta[i + 1 :]))
                    old = getattr(made, what)
                    return made._replace(**{what: (not old) if what == "decoupled" else old * 0.99})

                wrong_function(member.form, "torch", None, change, counter)

            yield Mutant(f"{name}.form: {what} changed", passed, stages)


def in_shared_maths() -> Iterator[Mutant]:
    """What all divergences use."""

    def stages(version: str) -> tuple[str, ...]:
        backend = "triton" if version == "triton" else "torch"
        return (
            *(() if version == "triton" else (r"test_definition\.py::",)),
            calls(version, ("fkl", "rkl", "drkl", "jsd", "akl", "taid"), "test_every_divergence"),
            calls(version, ("rkl", "jsd"), "test_near", "test_saturated", "test_running_maxima", "test_offsets"),
            rf"test_streaming\.py::.*{backend}",
            rf"test_(logits\.py::test_many_rows|(options|split_rows)\.py::.*{backend})",
            r"test_compiled\.py::test_(rows|heads)",
        )

    one: dict[int | None, str] = {None: "value"}
    for fn in ("expm1_product", "rem2_product", "expm1_ratio", "log1p", "softplus", "exp", "expm1", "tanh"):
        yield from in_function(f"maths.{fn}", getattr(elementary, fn), one, ("1 % off",), stages)
    several = {
        "mixture.log_mixture": (mixture.log_mixture, ("log(m/q)", "log(m/p)", "far")),
        "decomposition.binary": (decomposition.binary, ("log q_y", "log p_y", "δ_y", "log Q", "log P", "δ_Q")),
        "decomposition.offsets": (decomposition.offsets, ("l_s", "l_t", "r")),
        "decomposition.combine": (decomposition.combine, ("loss", "L_T", "L_N", "L_T'", "L_N'", "a", "b", "T")),
        "decomposition.combine_outer": (
            decomposition.combine_outer,
            ("loss", "L_T", "L_N", "L_T'", "L_N'", "a", "b", "T"),
        ),
        "decomposition.side_stats": (decomposition.side_stats, ("entropy", "logprob", "lse")),
        "centering.centred": (centering.centred, ("z", "u", "d")),
        "centering.target_terms": (centering.target_terms, ("z_y", "u_y", "d_y", "own u_y")),
        "moments._shift": (moments._shift, ("Z", "A", "B")),
        "moments.remainder_sums": (moments.remainder_sums, ("total", "slope")),
        "moments.entropies_advance": (moments.entropies_advance, ("student", "teacher", "Σ e^u")),
        "moments.cross_entropy_advance": (moments.cross_entropy_advance, ("maximum", "sum")),
    }
    for name, (formula, outputs) in several.items():
        yield from in_function(name, formula, dict(enumerate(outputs)), ("1 % off",), stages)


# Mutants that are right, each with the reason: nothing can notice them. "*" stands for any text.
EQUIVALENT: dict[str, str] = {
    "tvd.row_parameters *: extra 0 always 1": "|p-q| keeps its slope where p meets q: the far form is as exact",
}


def mutants() -> list[Mutant]:
    """All of them."""
    found = [mutant for definition in definitions().values() for mutant in in_definition(definition)]
    found += [mutant for name in REGISTRY for mutant in in_registered(name)]
    return [*found, *in_shared_maths()]


# --- running ----------------------------------------------------------------------------------------------------------


def fails(item: Any) -> bool:
    """Whether a test fails, in this process."""
    return any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


def first_failure(mutant: Mutant, items: list[Any]) -> dict[str, Any]:
    """The first test that notices a mutant, how many did not, and how often its target was called."""
    counter, ran = Counter(), []
    mutant.apply(counter)
    for pattern in mutant.stages:
        for item in items:
            if item not in ran and re.search(pattern, item.nodeid):
                if fails(item):
                    return {"test": item.nodeid, "passed": len(ran), "calls": counter.calls}
                ran.append(item)
    return {"test": None, "passed": len(ran), "calls": counter.calls}


def forked(work: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """Start `work` in a fork; its process id, and where its result is to be read."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        found = work()
    except BaseException as error:  # a fork must not go on as the driver
        found = {"error": f"{type(error).__name__}: {error}"}
    with os.fdopen(write, "w") as pipe:
        json.dump(found, pipe)
    os._exit(0)


def alone(item: Any) -> dict[str, Any]:
    """A test without any mutant."""
    return {"fails": fails(item)}


def in_forks(
    jobs: dict[str, Callable[[], dict[str, Any]]], at_once: int, unit: str, file: Path | None = None
) -> dict[str, dict[str, Any]]:
    """The results of all jobs, some at a time."""
    results: dict[str, dict[str, Any]] = {}
    running: dict[int, tuple[str, int]] = {}
    waiting = list(jobs.items())
    with tqdm(total=len(jobs), unit=unit, smoothing=0, miniters=1, mininterval=2) as bar:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, work = waiting.pop(0)
                pid, read = forked(work)
                running[pid] = (name, read)
            pid, _ = os.wait()
            name, read = running.pop(pid)
            with os.fdopen(read) as pipe:
                results[name] = json.loads(pipe.read() or '{"error": "the process ended"}')
            if file:
                with file.open("a") as out:
                    out.write(json.dumps({"name": name, **results[name]}) + "\n")
            if not results[name].get("test", True):
                bar.write(f"not noticed: {name} {results[name]}", file=sys.stderr)
            bar.update()
    return {name: results[name] for name in jobs}


class Loop:
    """pytest's plugin: in the place of running the tests."""

    def __init__(self, chosen: list[Mutant], at_once: int, file: Path | None) -> None:
        self.chosen, self.at_once, self.file, self.bad = chosen, at_once, file, -1

    def pytest_runtestloop(self, session: Any) -> bool:
        """Mutants, then what noticed them without any."""
        items = session.items
        found = in_forks(
            {m.name: functools.partial(first_failure, m, items) for m in self.chosen},
            self.at_once,
            " mutants",
            self.file,
        )
        witnesses = {result["test"] for result in found.values() if result.get("test")}
        jobs = {item.nodeid: functools.partial(alone, item) for item in items if item.nodeid in witnesses}
        unchanged = in_forks(jobs, self.at_once, " tests without a mutant")
        red = {name for name, result in unchanged.items() if result.get("fails") is not False}
        self.bad = report(found, red)
        return True


def main() -> int:
    """Run the mutants that were asked for; the exit status says whether any survived unexplained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these texts")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--save", type=Path, help="a file for the results as they come, one JSON object a line")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    args = parser.parse_args()
    chosen = [m for m in mutants() if not args.names or any(text in m.name for text in args.names)]
    assert len({m.name for m in chosen}) == len(chosen)
    if args.list:
        print("\n".join(m.name for m in chosen))
        return 0
    torch.set_num_threads(1)
    loop = Loop(chosen, args.jobs, args.save)
    files = [str(TESTS / file) for file in FILES]
    pytest.main(["-qq", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[loop])
    return 0 if loop.bad == 0 else 1


def explained(name: str) -> str | None:
    """Why a mutant cannot be noticed."""
    for pattern, reason in EQUIVALENT.items():
        if fnmatch.fnmatchcase(name, pattern):
            return reason
    return None


def report(results: dict[str, dict[str, Any]], red: set[str]) -> int:
    """The table; how many mutants are to be looked at."""
    bad = 0
    for name, found in results.items():
        reason, test = explained(name), found.get("test")
        wrong = True
        if found.get("error"):
            verdict = f"ERROR: {found['error']}"
        elif not found["calls"]:
            verdict = f"NOT CALLED by {found['passed']} tests"
        elif test in red:
            verdict = f"NOTHING SHOWN: {test} fails without it too"
        elif test and reason:
            verdict = f"EXPLAINED, but noticed by {test}"
        elif test:
            verdict, wrong = f"{test} (after {found['passed']})", False
        elif reason:
            verdict, wrong = f"no test can: {reason}", False
        else:
            verdict = f"SURVIVED {found['passed']} tests"
        bad += wrong
        print(f"{name:60}  {verdict}")
    noticed = sum(bool(found.get("test")) for found in results.values())
    print(f"{noticed} of {len(results)} mutants noticed, {bad} to look at")
    return bad


if __name__ == "__main__":
    sys.exit(main())
