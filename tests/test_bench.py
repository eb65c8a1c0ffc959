"""The benchmark: one quick run as a user starts it, its files, and the parts that decide what is said of whom."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_commands import fusedkd_command
from torch import Tensor

import fusedkd
from fusedkd.bench import cases, gpu, measure, readme, results, rivals, sections, shapes, subjects, targets, timing
from fusedkd.bench.cases import (
    Answer,
    Case,
    HeadInputs,
    ListedInputs,
    RowInputs,
    answer,
    errors,
    make_inputs,
    relative,
    truth,
)
from fusedkd.bench.tables import tables
from fusedkd.cli.eager import EAGER

ROOT = Path(__file__).parent.parent
STATUSES = {"measured", "imprecise", "wrong", "absent", "failed", "not measured"}
PNG = b"\x89PNG\r\n"
TINY = shapes.Shape("tiny", 12, 300, 8, 12)

pytestmark = pytest.mark.xdist_group("bench")  # one quick run serves all
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")


@dataclasses.dataclass
class QuickRun:
    """What one quick run printed and wrote."""

    folder: Path
    output: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """All sections at tiny sizes; none of the rivals but eager torch is installed, or they are hidden."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--quick", "--device", "cpu", "--rivals", "eager", *rivals.PACKAGES, "--out", folder]
    modules = [package.module for package in rivals.PACKAGES.values()]
    hide = f"import runpy, sys\nfor name in {modules}: sys.modules[name] = None\n"
    start = f"{hide}runpy.run_module('fusedkd', run_name='__main__')"
    command = [sys.executable, "-c", start, "bench", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return QuickRun(folder, done.stdout, json.loads((folder / "cpu-quick.json").read_text()))


def cells_of(result: dict[str, Any], section: str) -> Iterator[dict[str, Any]]:
    """Every cell of a section."""
    for case in result["sections"][section]["cases"]:
        yield from case["cells"]


def test_the_result_file(quick: QuickRun) -> None:
    """Every section with its machine, its date and every sample; plain JSON."""
    assert quick.result["schema"] == results.SCHEMA
    assert list(quick.result["sections"]) == list(sections.SECTIONS)
    for section in quick.result["sections"].values():
        found = section["machine"]
        assert section["quick"] is True
        assert found["device"] == "cpu"
        assert found["driver"] is None
        assert found["threads"] >= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
        assert re.fullmatch(r"[0-9a-f]{16}", found["source"])
        assert found["commit"]
        assert {"fusedkd", "torch", "python", "triton"} <= found["versions"].keys()
        assert set(found["rivals"]) == {package.name for package in rivals.PACKAGES.values()}


@pytest.mark.parametrize("section", ["rows", "heads", "accuracy"])
def test_both_kinds_of_rows(quick: QuickRun, section: str) -> None:
    """Measured alike; the tables and the report mark those that are peaked, and no others."""
    measured = quick.result["sections"][section]["cases"]
    plain, peaked = (
        [{**x["case"], "distribution": None, "kl": None} for x in measured if x["case"]["distribution"] == distribution]
        for distribution in cases.DISTRIBUTIONS
    )
    assert plain == peaked != []
    titles = [table.title for table in tables({"sections": {section: quick.result["sections"][section]}})]
    marked = [title for title in titles if title.endswith(", peaked rows")]
    assert [title.removesuffix(", peaked rows") for title in marked] == titles[: len(titles) // 2]
    assert len(marked) == len(titles) // 2
    assert all(title in (quick.folder / "cpu-quick.html").read_text() for title in titles)


def test_the_readme_has_one_kind_of_rows(quick: QuickRun) -> None:
    """One table for a shape, a line for each implementation; those that are absent stand below it."""
    (table,) = readme._heads(quick.result)
    assert table.columns == ("", "fkl")
    assert {row[0] for row in table.rows} >= {"eager torch", "fusedkd", "fusedkd streaming"}
    assert "peaked" not in table.about
    assert sum("not installed" in note for note in table.notes) == len(rivals.PACKAGES)


def test_results_without_the_kind_of_rows_are_random(quick: QuickRun) -> None:
    """As files have them that are older than the peaked rows: the same tables as of random rows."""
    section = quick.result["sections"]["rows"]
    new = [case for case in section["cases"] if case["case"]["distribution"] == "random"]
    old = [{**case, "case": {k: v for k, v in case["case"].items() if k != "distribution"}} for case in new]
    assert old != new
    shown = [list(tables({"sections": {"rows": {**section, "cases": found}}})) for found in (old, new)]
    assert shown[0] == shown[1] != []


@pytest.mark.parametrize("path", ["rows", "heads"])
def test_peaked_rows(path: str) -> None:
    """A token above 1/2 on both sides, which the typical random row does not have; logits spread as widely."""
    shape = shapes.CPU.resized(rows=24, vocab=8000)
    largest, spread = {}, {}
    for distribution in cases.DISTRIBUTIONS:
        inputs = make_inputs(Case(path, shape, "float32", "fkl", distribution=distribution), "cpu")
        logits = torch.stack(inputs.logits()).detach()  # (2, N, V)
        largest[distribution] = logits.softmax(-1).amax(-1)
        spread[distribution] = logits.std(-1)
        if distribution == "peaked":
            assert torch.equal(logits.argmax(-1), inputs.labels.expand(2, -1))
    assert largest["peaked"].min() > 0.5 > largest["random"].median()
    torch.testing.assert_close(spread["peaked"], spread["random"], rtol=0.05, atol=0)


@pytest.mark.parametrize("section", ["rows", "heads", "topk", "memory", "step"])
def test_cells(quick: QuickRun, section: str) -> None:
    """fusedkd and eager torch are timed as often as was asked, beside a floor, and agree with float64."""
    cases = quick.result["sections"][section]["cases"]
    assert cases
    for case in cases:
        assert case["reason"] is None
        assert len(case["floor"]["seconds"]) == quick.result["sections"][section]["rounds"]
        cells = {cell["implementation"]: cell for cell in case["cells"]}
        assert {cell["status"] for cell in cells.values()} <= STATUSES
        for name in ("fusedkd", "eager torch"):
            assert cells[name]["status"] == "measured", cells[name]["reason"]
            assert len(cells[name]["seconds"]) == len(case["floor"]["seconds"])
            assert min(cells[name]["seconds"]) > 0
            assert isinstance(cells[name]["extra_bytes"], int)
            assert max(cells[name]["errors"].values()) < 1e-4


def test_ceilings(quick: QuickRun) -> None:
    """A copy and the products of each phase, as work and samples."""
    found = {phase["what"].split(",")[0]: phase for phase in quick.result["sections"]["ceilings"]["ceilings"]}
    assert set(found) == {
        "copy",
        "student logits",
        "teacher logits",
        "hidden gradient",
        "weight gradient",
        "weight gradient added",
        "student logits by torch.mm",
        "teacher logits by torch.mm",
        "hidden gradient by torch.mm",
    }
    assert all(phase["seconds"] and phase["amount"] > 0 for phase in found.values())


@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
def test_accuracy(quick: QuickRun, distribution: str) -> None:
    """The closer the student, the smaller the KL; fusedkd keeps its digits where the plain loss has none left."""
    rows = [x for x in quick.result["sections"]["accuracy"]["cases"] if x["case"]["path"] == "rows"]
    rows = [x for x in rows if x["case"]["distribution"] == distribution]
    kls = [case["case"]["kl"] for case in rows]
    assert kls == sorted(kls, reverse=True)
    last = {cell["implementation"]: cell["errors"] for cell in rows[-1]["cells"]}
    assert kls[-1] < 1e-6
    assert max(last["fusedkd"].values()) < 2e-5 < 1e-2 < last["eager torch"]["loss"]


def test_absent_rivals_are_reported(quick: QuickRun) -> None:
    """By name and with what would help, in the file, in the tables and in the report."""
    absent = {cell["implementation"]: cell for cell in cells_of(quick.result, "heads") if cell["family"] != "fusedkd"}
    del absent["eager torch"]
    assert len(absent) == 7
    html = (quick.folder / "cpu-quick.html").read_text()
    for name, cell in absent.items():
        assert cell["status"] == "absent"
        assert cell["reason"].startswith("not installed: pip install ")
        assert cell["seconds"] == []
        assert f"{name}: not installed" in quick.output
        assert f"{name}: not installed" in html


def test_the_report_is_self_contained(quick: QuickRun) -> None:
    """No address but anchors and pictures that are in the page; every section and every figure is there."""
    html = (quick.folder / "cpu-quick.html").read_text()
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    assert "<script" not in html
    assert not re.search(r"@import|url\(", html)
    links = re.findall(r"(?:src|href)='([^']*)'", html)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    pictures = {base64.b64decode(link.split(",")[1]) for link in links if link.startswith("data:")}
    files = {file.read_bytes() for file in quick.folder.glob("*.png")}
    assert pictures == files
    assert len(files) == 3
    assert all(picture.startswith(PNG) for picture in files)
    assert all(f"id='{name}'" in html for name in sections.SECTIONS)


def test_the_tables_are_printed_and_written(quick: QuickRun) -> None:
    """The same Markdown on standard output and in the file."""
    assert (quick.folder / "cpu-quick.md").read_text().strip() == quick.output.strip()
    assert "± " in quick.output
    assert "eager torch" in quick.output


def test_nothing_is_said_of_a_gpu(quick: QuickRun) -> None:
    """What was measured on a CPU fills no cell that is about a GPU."""
    assert all(row[2:] == ["not measured", ""] for row in targets.table("", targets.GPU, None).rows)
    page = (quick.folder / "cpu-quick.html").read_text().split("On a GPU")[1]
    assert page.count("not measured") == len(targets.GPU)


def test_a_section_replaces_only_itself(quick: QuickRun) -> None:
    """Measuring one section again keeps the others as they were."""
    done = fusedkd_command("bench", "--quick", "--device", "cpu", "--only", "ceilings", "--out", quick.folder)
    assert done.returncode == 0, done.stderr
    after = json.loads((quick.folder / "cpu-quick.json").read_text())["sections"]
    assert after["ceilings"] != quick.result["sections"]["ceilings"]
    assert all(after[name] == quick.result["sections"][name] for name in sections.SECTIONS if name != "ceilings")


def test_the_readme_is_up_to_date() -> None:
    """Its measured part and the goals are what the committed result files say: bench --readme writes them."""
    text, folder = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "bench/results"
    found = readme.BEGIN + text.split(readme.BEGIN)[1].split(readme.END)[0] + readme.END
    assert found == readme.block(folder)
    assert (folder / readme.GOALS).read_text(encoding="utf-8") == readme.goals(folder)


def test_committed_results_are_of_full_runs() -> None:
    """With samples, and without anything of the machine but its model."""
    found = results.committed(ROOT / "bench/results")
    assert found
    for file in (ROOT / "bench/results").glob("*.json"):
        assert not re.search(r"/(home|root|tmp|work)/", file.read_text())
    assert any(cell["seconds"] for result in found for case in results.cases(result, "heads") for cell in case["cells"])


def test_readme_is_rewritten_in_place(tmp_path: Path) -> None:
    """What is outside the marks stays; quick results do not count."""
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    done = fusedkd_command("bench", "--out", tmp_path, "--readme", file)
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("not measured") == 1
    assert (tmp_path / readme.GOALS).read_text().count("not measured") == len(targets.GPU)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], ["--device", "'tpu'", "cpu", "cuda"]),
        (["--only", "everything"], ["--only", "'everything'", "heads"]),
        (["--rivals", "nobody"], ["--rivals", "'nobody'", "liger"]),
        (["--seconds", "-1"], ["--seconds", "'-1'", "above zero"]),
        (["--readme", "README.md"], ["--readme", "--out"]),
        (["--out", "FOLDER", "--readme", "FOLDER/absent.md"], ["--readme", "absent.md"]),
        (["--out", "FOLDER", "--readme", "FOLDER/plain.md"], ["--readme", "plain.md", "<!-- /measured -->"]),
        (["--out", "FOLDER/plain.md"], ["--out", "plain.md"]),
        (["--quick", "--device", "cpu", "--out", "FOLDER"], ["--out", "cpu-quick.json", "JSON"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_arguments(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    """Usage, the argument and what would work; nothing is measured."""
    (tmp_path / "plain.md").write_text("no marks\n")
    (tmp_path / "cpu-quick.json").write_text("{")
    done = fusedkd_command("bench", *(x.replace("FOLDER", str(tmp_path)) for x in arguments))
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    """cuda is known, but refused with torch's own reason."""
    done = fusedkd_command("bench", "--quick", "--device", "cuda")
    assert done.returncode == 2
    assert "argument --device: 'cuda' is not usable: " in done.stderr


def test_the_missing_extra_is_named() -> None:
    """And the command that installs it."""
    done = fusedkd_command("bench", "--quick", "--device", "cpu", hidden="tqdm")
    assert done.returncode == 2
    assert "pip install 'fusedkd[bench]'" in done.stderr


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("path", ["rows", "heads"])
def test_the_truth(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's float64 answer is the oracle's, though it takes five rows at a time."""
    monkeypatch.setattr(cases, "CHUNK", 5 * TINY.vocab)
    shape = dataclasses.replace(TINY, softcap=9.0 if path == "heads" else None)
    inputs = make_inputs(Case(path, shape, "float32", name), "cpu")
    kept = {key: x.detach().double() if isinstance(x, Tensor) else x for key, x in inputs._asdict().items()}
    doubles = inputs._replace(**{**kept, "labels": inputs.labels})
    for leaf in doubles.leaves.values():
        leaf.requires_grad_()
    student, teacher = doubles.logits()
    exact = oracle.distill(student.detach(), teacher.detach(), inputs.labels, oracle.meaning(name))
    slope = exact.gradient(torch.full((TINY.rows,), 1 / TINY.rows, dtype=torch.float64))
    wanted = torch.autograd.grad(student, list(doubles.leaves.values()), slope)
    found = truth(inputs, name)
    assert relative(found.loss, exact.loss.mean()) < 1e-12
    assert all(relative(a, b) < 1e-10 for a, b in zip(found.gradients.values(), wanted, strict=True))


@pytest.mark.parametrize("tail", ["bucket", "truncate"])
@pytest.mark.parametrize("path", ["rows", "heads"])
def test_the_truth_of_listed_tokens(path: str, tail: str) -> None:
    """It is what kd_loss says in float64; every implementation of such a case is found, and agrees."""
    case = Case(path, TINY, "float32", "fkl", listed=5, tail=tail)
    inputs = make_inputs(case, "cpu")
    assert isinstance(inputs, ListedInputs)
    student, _ = inputs.sides.logits()
    teacher = fusedkd.TopK(inputs.ids, inputs.logprobs, tail)
    loss = fusedkd.kd_loss(student.detach().double().requires_grad_(), teacher, backend="torch")
    found = truth(inputs, "fkl")
    assert relative(loss, found.loss) < (1e-12 if path == "rows" else 1e-6)  # of a float32 product
    programs = rivals.chosen(case, ("eager",))
    assert {x.name for x in programs} >= {"fusedkd", "eager torch"}
    assert {x.name for x in programs} & {"DistillKit's formula", "VeOmni's formula"} == {
        {"bucket": "DistillKit's formula", "truncate": "VeOmni's formula"}[tail]
    }
    for rival in programs:
        assert max(errors(answer(inputs, rival.loss("fkl")), found).values()) < 1e-5, rival.name


def test_a_teacher_s_likeliest_tokens(quick: QuickRun) -> None:
    """Both tails and the dense loss, of both paths, each under a title of its own; with one product less."""
    section = quick.result["sections"]["topk"]
    found = list(tables({"sections": {"topk": section}}))
    assert len({table.title for table in found}) == len(found) == 6
    for table, case in zip(found, section["cases"], strict=True):
        assert ("K=32" in table.title) == (case["case"]["listed"] == 32)
        assert ("three" in table.about) == (case["case"]["listed"] == 32 and case["case"]["path"] == "heads")


def test_errors_see_what_is_not_finite() -> None:
    """A NaN anywhere is an infinite error; zeros are an error of one."""
    exact = Answer(torch.tensor(2.0).double(), {"logits": torch.ones(3, 4).double()})
    spoiled = torch.ones(3, 4)
    spoiled[2, 3] = torch.nan
    found = errors(Answer(torch.tensor(2.0), {"logits": spoiled}), exact)
    assert found == {"loss": 0.0, "logits": float("inf")}
    assert errors(Answer(torch.tensor(2.0), {"logits": torch.zeros(3, 4)}), exact)["logits"] == 1.0


def fakes() -> dict[str, Callable[[str], Any]]:
    """Implementations with a fault each."""

    def scaled(factor: float) -> Callable[[str], Any]:
        def loss(divergence: str) -> Any:
            def value_and_gradient(x: RowInputs) -> tuple[Tensor, Tensor]:
                found = truth(x, divergence)
                return found.loss, factor * found.gradients["logits"]

            return value_and_gradient

        return loss

    def raising(error: Exception) -> Callable[[str], Any]:
        def loss(divergence: str) -> Any:
            raise error

        return loss

    return {
        "exact": scaled(1.0),
        "imprecise": scaled(1.01),
        "zeros": scaled(0.0),
        "broken": raising(RuntimeError("out of order\nand more")),
        "old": raising(ImportError("no such name")),
        "unfinished": raising(NotImplementedError("not yet")),
    }


def bench(seconds: float | None = None) -> sections.Bench:
    """What a section works with, told nobody."""
    settings = sections.Settings("cpu", quick=True)
    return sections.Bench(settings, timing.Clock("cpu"), measure.Deadline(seconds), lambda what, begins: None)


@pytest.fixture
def with_fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], subjects.Subject]:
    """A case of logits whose rivals are the fakes."""
    members = tuple(rivals.Rival(name, "eager", "rows", loss) for name, loss in fakes().items())
    monkeypatch.setattr(rivals, "RIVALS", members)
    monkeypatch.setattr(subjects.LossHead, "peak", lambda self, rival, loss: 1000)
    return lambda: subjects.LossHead(Case("rows", TINY, "float32", "rkl"), "cpu", ("eager",))


def test_who_is_timed(with_fakes: Callable[[], subjects.Subject]) -> None:
    """What is absent, fails or is wrong is reported and not timed; what is imprecise is timed and says so."""
    found = sections.measure_case(Case("rows", TINY, "float32", "rkl"), with_fakes, bench())
    cells = {cell["implementation"]: cell for cell in found["cells"]}
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "exact": "measured",
        "imprecise": "imprecise",
        "zeros": "wrong",
        "broken": "failed",
        "old": "absent",
        "unfinished": "absent",
    }
    assert [name for name, cell in cells.items() if cell["seconds"]] == ["exact", "imprecise"]
    assert cells["exact"]["extra_bytes"] == 1000
    assert "logits is off by 1.0e-02" in cells["imprecise"]["reason"]
    assert "logits is off by 1.0e+00: not timed" in cells["zeros"]["reason"]
    assert cells["broken"]["reason"] == "RuntimeError: out of order"
    result = {"sections": {"rows": {"machine": measure.machine("cpu"), "quick": True, "cases": [found]}}}
    (table,) = tables(result)
    shown = {row[1]: row[2] for row in table.rows}
    assert shown["imprecise"].endswith("s, imprecise")
    assert shown["zeros"] == "wrong"


def test_nothing_is_judged_in_accuracy(with_fakes: Callable[[], subjects.Subject]) -> None:
    """There the errors are the result."""
    found = sections.measure_case(Case("rows", TINY, "float32", "rkl"), with_fakes, bench(), timed=False)
    statuses = {cell["implementation"]: cell["status"] for cell in found["cells"]}
    assert statuses["zeros"] == "measured"
    assert found["case"]["kl"] > 0


def test_a_section_whose_time_is_up(with_fakes: Callable[[], subjects.Subject]) -> None:
    """Cases that were not begun say so."""
    found = sections.measure_case(Case("rows", TINY, "float32", "rkl"), with_fakes, bench(seconds=-1))
    assert found["cells"] == []
    assert "time was up" in found["reason"]


def test_rounds_are_interleaved() -> None:
    """One of each per round, the order turns, what fails is left out, and an end after three rounds is kept."""
    ran: list[str] = []

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            if name == "b" and ran.count("b") == 2:
                raise ValueError("enough of this")

        return run

    rounds = list(timing.interleaved({name: work(name) for name in "abc"}, timing.Clock("cpu"), 9, lambda: True))
    assert ran == ["a", "b", "c", "b", "c", "a", "a", "c", "c", "a"]
    assert rounds[1]["b"] == "ValueError: enough of this"
    assert len(rounds) == 1 + timing.LEAST_ROUNDS
    assert set(rounds[3]) == {"a", "c"}


def _held(size: int) -> int:
    torch.ones(size // 10) + torch.ones(size // 10)  # code is loaded and threads start here
    return measure.peak_bytes(lambda: {"gradient": torch.ones(size) + torch.ones(size)}, "cpu")


def test_peak_memory_of_a_fresh_process() -> None:
    """Two temporaries of 40 MB, and not the gradient that is handed back."""
    size = 10_000_000
    peak = measure.in_fresh_process(_held, size)
    assert 0.98 * 2 * size * 4 < peak < 1.02 * 2 * size * 4


def test_a_process_that_dies_is_reported() -> None:
    """With its exit code."""
    with pytest.raises(RuntimeError, match="exit code 3"):
        measure.in_fresh_process(sys.exit, 3)


def test_every_shape_is_a_pair_of_models() -> None:
    """Widths and vocabularies come from the models, and the softcap from the student."""
    assert shapes.GEMMA2.softcap == 30
    assert shapes.GEMMA3.vocab == 262_144
    assert (shapes.QWEN3.dim, shapes.QWEN3.teacher_dim, shapes.QWEN3.vocab) == (2048, 4096, 151_936)
    settings = sections.Settings("cuda")
    for section in ("rows", "heads", "topk", "memory", "accuracy"):
        assert sections.cases_of(section, settings)


class FakeGpu:
    """A machine for the driver: parts take no time, the benchmark measures what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.commands: list[list[str]] = []
        self.folder = folder
        self.crash: str | None = None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(gpu, "logged", self.logged)

    def logged(self, run: Any, name: str, command: list[str], seconds: float) -> tuple[int | None, float, list[str]]:
        """Note the command; write the sections that it asks for."""
        self.commands.append(command)
        if name != "benchmark":
            return (None if name == "large" and not self.crash else 0), 1.0, ["3 passed in 1.00s"]
        file = self.folder / "fake-gpu.json"
        found = results.load(file)
        for section in command[command.index("--only") + 1 :]:
            if section == self.crash:
                results.save(file, found)
                return 1, 1.0, ["CUDA error"]
            found["sections"][section] = {"machine": {"source": measure.source()}, "quick": False, "cases": []}
        results.save(file, found)
        return 0, 1.0, []

    def run(self) -> int:
        """One `make gpu`."""
        self.commands.clear()
        return gpu.main(["--out", str(self.folder), "--tests", str(ROOT / "tests")])


def test_gpu_run_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished is not repeated; what was cut off is; other sources begin anew."""
    machine = FakeGpu(monkeypatch, tmp_path)
    assert machine.run() == 0
    assert len(machine.commands) == 7
    assert [command[0] for command in machine.commands[3:6]] == ["/usr/bin/cmake", "/usr/bin/cmake", "/usr/bin/ctest"]
    assert "-DFUSEDKD_ARCHS=90" in machine.commands[3]
    assert "left       large: make gpu again" in capsys.readouterr().out
    assert machine.run() == 0
    assert [command[command.index("-k") + 1] for command in machine.commands] == ["large"]
    monkeypatch.setattr(gpu, "source", lambda: "other")
    machine.run()
    assert len(machine.commands) >= 7


def test_gpu_run_without_cmake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The C library is skipped with the reason, and not forgotten."""
    machine = FakeGpu(monkeypatch, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    machine.run()
    output = capsys.readouterr().out
    assert "C library  skipped: needs cmake on the path" in output
    assert "left       large, C library: make gpu again" in output


def test_gpu_run_survives_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The section that brings the benchmark down is left out, the others are measured."""
    machine = FakeGpu(monkeypatch, tmp_path)
    machine.crash = "memory"
    machine.run()
    output = capsys.readouterr().out
    assert "memory     not measured: CUDA error" in output
    assert machine.commands[-1][-2:] == ["accuracy", "step"]
    assert "left       memory: make gpu again" in output
    assert "not measured" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says that there is none."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_timed_heads_give_gradients() -> None:
    """The bare products write into buffers of the right sizes, and an answer names both gradients."""
    inputs = make_inputs(Case("heads", TINY, "float32", "fkl"), "cpu")
    assert isinstance(inputs, HeadInputs)
    subjects.bare_gemms(inputs)()
    found = answer(inputs, rivals.named("heads", "fusedkd").loss("fkl"))
    assert {name: tuple(x.shape) for name, x in found.gradients.items()} == {"hidden": (12, 8), "weight": (300, 8)}
