"""The command line, as a user runs it: in a process of its own."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedkd

MODULES = (
    "argparse",
    "ast",
    "codecs",
    "difflib",
    "inspect",
    "locale",
    "pickle",
    "random",
    "shutil",
    "tarfile",
    "typing",
)

needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "tokenizers", "tqdm")),
    reason="needs pip install 'fusedkd[demo]'",
)


def fusedkd_command(
    *arguments: object, hidden: str | None = None, interpret: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m fusedkd`, as if the package `hidden` were not installed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    hide = f"import runpy, sys; sys.modules['{hidden}'] = None; runpy.run_module('fusedkd', run_name='__main__')"
    start = ["-c", hide] if hidden else ["-m", "fusedkd"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A folder with text enough for a quick run."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for name in MODULES:
        source = importlib.import_module(name).__file__
        assert source is not None
        (folder / f"{name}.txt").write_bytes(Path(source).read_bytes())
    return folder


def test_alone_it_prints_help() -> None:
    """The commands are listed."""
    done = fusedkd_command()
    assert done.returncode == 0
    assert "info" in done.stdout
    assert "demo" in done.stdout


def test_version() -> None:
    """One line, the package's own."""
    assert fusedkd_command("--version").stdout == f"fusedkd {fusedkd.__version__}\n"


def test_info_is_readable() -> None:
    """Versions, interpreter, devices, and what each device gets."""
    done = fusedkd_command("info")
    assert done.returncode == 0, done.stderr
    for word in (fusedkd.__version__, "torch", "triton", "TRITON_INTERPRET is off", "cpu", 'backend="auto" is torch'):
        assert word in done.stdout


@pytest.mark.parametrize("interpret", [False, True])
def test_info_as_json(interpret: bool) -> None:
    """The same facts for programs; a CPU takes torch even where the interpreter could run."""
    found = json.loads(fusedkd_command("info", "--json", interpret=interpret).stdout)
    assert found["versions"]["fusedkd"] == fusedkd.__version__
    assert found["triton_interpret"] is (interpret and find_spec("triton") is not None)
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "torch")
    assert cpu["threads"] >= 1


def test_info_says_where_kernels_ran() -> None:
    """Nowhere, or on kinds of GPU that are named; of each GPU of this machine whether it is one of them."""
    found = json.loads(fusedkd_command("info", "--json").stdout)
    text = fusedkd_command("info").stdout
    assert f"the project has run its kernels on {', '.join(found['ran_on']) or 'no GPU yet'}" in text
    for device in found["devices"]:
        assert (device["ran_by_the_project"] is None) == (device["device"] == "cpu")


def test_info_says_whether_rows_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backend="compiled" does, or why it cannot."""
    assert 'backend="compiled" makes loops of them' in fusedkd_command("info").stdout
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert 'backend="compiled" needs a C++ compiler' in fusedkd_command("info").stdout


def test_info_without_triton_says_how_to_get_it() -> None:
    """No Triton is a finding, not a failure."""
    done = fusedkd_command("info", hidden="triton")
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


@needs_extra
def test_demo_distils(prose: Path, tmp_path: Path) -> None:
    """Every divergence brings the student closer to the teacher, with the gradient of the plain loss."""
    file = tmp_path / "report.json"
    done = fusedkd_command("demo", "--quick", "--device", "cpu", "--text", prose, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "train teacher" in done.stderr
    report = json.loads(file.read_text())
    assert all(math.isfinite(number) for number in numbers(report))
    assert list(report["divergences"]) == ["fkl", "rkl", "ab", "drkl"]

    before = report["student"]["held_out"]["kl"]
    assert report["teacher"]["held_out"]["kl"] < 1e-6 < before
    for name, student in report["divergences"].items():
        assert name in done.stdout
        assert student["held_out"]["kl"] < (0.5 if name == "fkl" else 1) * before
        fused, eager = student["one_step"]["fused"], student["one_step"]["eager"]
        assert max(fused["gradient_error"].values()) < 1e-3
        assert fused["loss"] == pytest.approx(eager["loss"], rel=1e-3)
        assert fused["peak_bytes"] > 0

    sizes, at = report["against"]["sizes"], report["against"]["vocabularies"]
    assert [int(v) for v in at] == sizes["vocabularies"]
    for row in at.values():
        assert row["fused"]["loss"] == pytest.approx(row["eager"]["loss"], rel=1e-3)
    last = at[str(sizes["vocabularies"][-1])]
    assert last["eager"]["peak_bytes"] > 4 * 4 * sizes["rows"] * sizes["vocabularies"][-1]  # four matrices of logits
    megabytes = [f"{last[side]['peak_bytes'] / 1e6:,.0f} MB" for side in ("fused", "eager")]
    *_, headline = done.stdout.splitlines()
    start = f"At V={sizes['vocabularies'][-1]:,} a step of the loss needs {' instead of '.join(megabytes)}, in "
    assert headline.startswith(start)
    if find_spec("matplotlib"):
        assert str(file.with_suffix(".png")) in done.stdout
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    cache, dense = report["cache"], report["divergences"]["fkl"]
    assert "distil fkl from the cache" in done.stderr
    assert "fkl top-32" in done.stdout
    assert (cache["divergence"], cache["k"]) == ("fkl", 32)
    assert 8 * 32 <= cache["bytes_per_token"] < 8 * 32 + 1  # int32 and float32, and the header's few bytes
    assert cache["tokens"] == report["plan"]["batch"] * cache["training"]["steps"] * report["plan"]["length"]
    assert cache["training"]["steps"] == dense["training"]["steps"]
    assert cache["training"]["loss"] < dense["training"]["loss"]
    for kl in ("kl", "reverse_kl"):
        assert 0 < dense["held_out"][kl] < cache["held_out"][kl] < 0.5 * report["student"]["held_out"][kl]


@needs_extra
def test_the_demo_measures_memory_beyond_inputs_and_gradients() -> None:
    """A loss that holds so many logits more than another is seen to; time and peak are of steps of the same loss."""
    one_step = importlib.import_module("fusedkd.cli.one_step")
    progress = importlib.import_module("fusedkd.cli.commands").Progress(quiet=True)
    sizes = one_step.Sizes(200, 64, 8, (20_000, 40_000))
    with progress.stage("steps", one_step.count(sizes)) as bar:
        found = one_step.against_vocabulary("rkl", sizes, "cpu", 0, bar)
    few, many = found["vocabularies"].values()
    logits = 4 * sizes.rows * 20_000  # bytes of a side, and by how much those of the larger V are more
    assert few["eager"]["peak_bytes"] > 4 * logits
    assert many["eager"]["peak_bytes"] - few["eager"]["peak_bytes"] > 4 * logits
    # Logits of both sides at half of the tokens.
    assert many["fused"]["peak_bytes"] - few["fused"]["peak_bytes"] < 1.5 * logits
    for row in (few, many):
        assert row["fused"]["loss"] == pytest.approx(row["eager"]["loss"], rel=1e-5)
        assert 0 < row["fused"]["seconds"] < math.inf
    made = one_step.peak_bytes(lambda: torch.empty(1 << 20), torch.device("cpu"))
    assert made == 4 << 20


def test_the_demo_says_when_it_cannot_draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without matplotlib all numbers are printed, and how to get the picture."""
    demo = pytest.importorskip("fusedkd.cli.demo")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'fusedkd[demo]'" in demo._picture({}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@needs_extra
def test_a_student_learns_from_the_cache_alone(tmp_path: Path) -> None:
    """The rows of the windows that training takes, in whatever order: the loss of a batch is that of its own top-k."""
    demo = importlib.import_module("fusedkd.cli.demo")
    plan = demo.Plan(length=8, batch=3, threads=1)
    teacher, student = (demo.build(demo.Recipe(32, 1, 1e-3, demo.Budget()), 40, plan) for _ in range(2))
    ids = torch.randint(40, (11, plan.length), generator=torch.Generator().manual_seed(0))
    text = demo.Windows(ids, ids.roll(-1, 1), torch.arange(len(ids)))
    bar = demo.Progress(quiet=True).stage("cache")
    taken = demo.write_cache(tmp_path / "cache", teacher, text, 2, 5, plan, bar)
    cache = fusedkd.TopK.load(tmp_path / "cache")
    assert len(taken) == len(cache.ids) == 2 * plan.batch
    for batch in itertools.islice(demo._batches(text, plan), 2):
        found = demo.cached_loss("rkl", student, cache, taken, batch)
        wanted = fusedkd.kd_loss(
            demo.head(student, batch.ids),
            fusedkd.topk(demo.head(teacher, batch.ids), 5),
            batch.labels,
            divergence="rkl",
        )
        torch.testing.assert_close(found, wanted)
        assert found > 0


def test_demo_refuses_an_unknown_divergence() -> None:
    """The known names are listed, before anything is trained."""
    done = fusedkd_command("demo", "--quick", "--divergence", "nonsense")
    assert done.returncode == 2
    assert "unknown divergence 'nonsense'; known: " in done.stderr
    assert all(name in done.stderr for name in ("fkl", "rkl", "ab", "drkl"))


@needs_extra
@pytest.mark.parametrize("folder", ["", "absent"])
def test_demo_refuses_a_folder_without_text(folder: str, tmp_path: Path) -> None:
    """Empty or absent, the folder is named."""
    done = fusedkd_command("demo", "--quick", "--text", tmp_path / folder)
    assert done.returncode == 2
    assert "error: --text: " in done.stderr
    assert str(tmp_path) in done.stderr


def test_demo_names_the_missing_extra() -> None:
    """Usage and the command that installs it."""
    done = fusedkd_command("demo", "--quick", hidden="transformers")
    assert done.returncode == 2
    assert "transformers" in done.stderr
    assert "pip install 'fusedkd[demo]'" in done.stderr
