"""The study of fidelity: verdicts, what is measured, and files that are continued or refused."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import needs_extra, numbers

from fusedkd import kd_loss
from fusedkd.__main__ import main
from fusedkd.cli import study_fidelity as study
from fusedkd.cli import study_fidelity_report as report_module
from fusedkd.cli.commands import Progress
from fusedkd.cli.demo import IGNORED, Budget

pytestmark = pytest.mark.xdist_group("study-fidelity")  # one small run serves all

ROOT = Path(__file__).parent.parent
QUIET = Progress(quiet=True)
SEEDS, NAMES = range(2), ("fkl", "rkl")


def small() -> study.Plan:
    """The quick plan with the least text and few steps: seconds."""
    demo, two = study.QUICK.demo, Budget(steps=2)
    teacher, student = replace(demo.teacher, budget=Budget(steps=5)), replace(demo.student, budget=two)
    return replace(study.QUICK, own_steps=2, demo=replace(demo, text_bytes=60_000, teacher=teacher, student=student))


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Those of the other tests come back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small run that nothing interrupted."""
    file = tmp_path_factory.mktemp("fidelity") / "all.json"
    study.measure(small(), SEEDS, NAMES, file, QUIET)
    return file


@pytest.mark.parametrize(
    ("differences", "sign", "difference", "error", "word"),
    [
        ([-0.9, -1.0, -1.1], -1, -1, 0.1 / math.sqrt(3), "reproduced"),
        ([-0.9, -1.0, -1.1], 1, -1, 0.1 / math.sqrt(3), "not reproduced"),
        ([0.9, 1.0, 1.1], 1, 1, 0.1 / math.sqrt(3), "reproduced"),
        ([1.0, 3.0], 1, 2, 1, "reproduced"),  # two standard errors are enough
        ([0.9, 2.9], 1, 1.9, 1, "undecided: difference smaller than 2 standard errors"),
        ([-1.0, 2.0, 0.5], 1, 0.5, math.sqrt(0.75), "undecided: difference smaller than 2 standard errors"),
        ([0.0, 0.0, 0.0], 1, 0, 0, "undecided: difference smaller than 2 standard errors"),
        ([5.0], 1, 5, math.nan, "undecided: one seed has no standard error"),
        ([], 1, math.nan, math.nan, "undecided: not run"),
    ],
)
def test_verdict(differences: list[float], sign: int, difference: float, error: float, word: str) -> None:
    """Mean, standard error and word by hand: σ of 0.9, 1, 1.1 is 0.1, of 1, 3 is √2, of −1, 2, 0.5 is 1.5."""
    found = report_module.verdict(differences, sign)
    assert found[:2] == pytest.approx((difference, error), nan_ok=True)
    assert found.word == word


def synthetic(entropy: dict[str, list[float]]) -> dict[str, Any]:
    """A report of runs of which the entropy is known."""
    runs = [
        {"seed": seed, "divergence": name, "numbers": {"entropy": value}}
        for name, values in entropy.items()
        for seed, value in enumerate(values)
    ]
    return {"runs": runs}


def test_seeds_are_compared_pair_by_pair() -> None:
    """Seeds that differ much between them do not hide a difference that each of them shows; a lone seed is left out."""
    report = synthetic({"rkl": [1.0, 5.0, 9.0], "fkl": [1.5, 5.4, 9.6, 0.0], "teacher": [4.0, 4.0, 4.0]})
    judged = report_module.judged(report, report_module.Comparison("entropy", "rkl", -1, "fkl"))
    assert judged == (pytest.approx(-0.5), pytest.approx(0.1 / math.sqrt(3)), "reproduced")
    judged = report_module.judged(report, report_module.Comparison("entropy", "rkl", -1, "teacher"))
    assert judged.difference == pytest.approx(1)
    assert judged.word.startswith("undecided")


@pytest.mark.parametrize(("n", "value"), [(1, 3 / 7), (2, 3 / 5), (3, 1)])
def test_distinct(n: int, value: float) -> None:
    """1212 and 123 have seven tokens, three of them different; 12 21 12, 12 23; 121 212, 123: none spans two texts."""
    assert study.distinct([[1, 2, 1, 2], [1, 2, 3]], n) == pytest.approx(value)


def test_the_split_of_a_gradient() -> None:
    """Under RKL the rest pushes the target logit up by q_y (1 − q_y) KL(q̂‖p̂); ignored tokens count for nothing."""
    generator = torch.Generator().manual_seed(0)
    own, guide = (2 * torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([3, IGNORED, 0, 10, 7])
    own.requires_grad_()
    loss, stats = kd_loss(own, guide, labels, divergence="rkl", return_stats=True)
    (gradient,) = torch.autograd.grad(loss, own)
    found = study.split(gradient, labels, stats)

    on_target, push, moves = [], [], []
    q, p = own.detach().softmax(-1), guide.softmax(-1)
    for i, y in enumerate(labels.tolist()):
        if y == IGNORED:
            continue
        slopes = q[i] * ((q[i] / p[i]).log() - (q[i] * (q[i] / p[i]).log()).sum())
        on_target.append((slopes[y] ** 2, (slopes**2).sum()))
        rest = torch.arange(11) != y
        hats = q[i][rest] / q[i][rest].sum(), p[i][rest] / p[i][rest].sum()
        up = q[i, y] * (1 - q[i, y]) * (hats[0] * (hats[0] / hats[1]).log()).sum()
        push.append(up)
        moves.append(abs(slopes[y] + up))
    shares = [torch.stack(x).sum() for x in zip(*on_target, strict=True)]
    assert found.on_target == pytest.approx((shares[0] / shares[1]).item(), rel=1e-5)
    assert found.push == pytest.approx(torch.stack(push).mean().item(), rel=1e-5)
    both = sum(push) + sum(moves)
    assert found.by_rest == pytest.approx(float(sum(push) / both), rel=1e-5)


def test_curves_are_thinned_to_means() -> None:
    """At most POINTS, whose mean is that of all steps."""
    points = study.thinned(range(1, 5 * study.POINTS + 1))
    assert len(points) == study.POINTS
    assert points[:2] == [3, 8]
    assert study.thinned([1, 2]) == [1, 2]


@needs_extra
def test_a_run_is_whole(finished: Path) -> None:
    """Teacher and students of every seed, all numbers finite, curves for the students, different losses differ."""
    report = json.loads(finished.read_text())
    runs = {(run["seed"], run["divergence"]): run for run in report["runs"]}
    assert list(runs) == [(seed, name) for seed in SEEDS for name in ("teacher", "start", *NAMES)]
    assert all(math.isfinite(number) for number in numbers(report))
    for (_, name), run in runs.items():
        distilled = name in NAMES
        quantities = set(report_module.QUANTITIES)
        assert set(run["numbers"]) == (quantities if distilled else quantities - set(study.Split._fields))
        assert 0 < run["numbers"]["distinct_1"] <= 1
        if distilled:
            assert {key: len(points) for key, points in run["curves"].items()} == dict.fromkeys(
                ("step", *study.Split._fields), 2
            )
    kls = {run["numbers"]["kl"] for run in runs.values()}
    assert len(kls) == len(runs) - 1  # the teacher's is 0 for both seeds
    assert runs[0, "rkl"]["numbers"]["push"] > 0 == pytest.approx(runs[0, "fkl"]["numbers"]["push"], abs=1e-7)


@needs_extra
def test_what_was_killed_is_continued(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs stay as they are, the others have the numbers that they would have had."""
    file, written, save = tmp_path / "killed.json", [], study.save

    def die_after_the_third(report: dict[str, Any], file: Path) -> None:
        save(report, file)
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study, "save", die_after_the_third)
        study.measure(small(), SEEDS, NAMES, file, QUIET)
    first = json.loads(file.read_text())["runs"]
    assert [run["divergence"] for run in first] == ["teacher", "start", "fkl"]

    report = study.measure(small(), SEEDS, NAMES, file, QUIET)
    assert report == json.loads(file.read_text())
    assert report["runs"][:3] == first
    whole = json.loads(finished.read_text())
    for run in (*report["runs"], *whole["runs"]):
        run.pop("seconds", None)
    assert report == whole


@needs_extra
def test_files_that_do_not_fit_are_refused(finished: Path, tmp_path: Path) -> None:
    """Other settings by name, another teacher, and what is no report; the file stays as it was."""
    file = tmp_path / "changed.json"
    report = json.loads(finished.read_text())

    def refusal(plan: study.Plan, content: str) -> str:
        file.write_text(content)
        with pytest.raises(argparse.ArgumentError) as caught:
            study.measure(plan, range(3), NAMES, file, QUIET)
        assert file.read_text() == content
        return str(caught.value)

    longer = replace(small(), drawn=13)
    assert "plan.drawn 12, not 13" in refusal(longer, finished.read_text())
    assert "plan.drawn 12, not 13" in refusal(longer, json.dumps({**report, "runs": []}))
    assert "not a report of study fidelity" in refusal(small(), "[1, 2]")
    assert "not a report of study fidelity" in refusal(small(), "{")
    report["teacher"]["entropy"] += 1e-3
    assert "another teacher" in refusal(small(), json.dumps(report))


@needs_extra
def test_tables_and_picture_of_a_finished_file(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is trained again; without matplotlib the picture alone is missing, and that is said."""
    monkeypatch.setattr(study, "QUICK", small())
    monkeypatch.setattr(study, "prepare", None)
    command = ["study", "fidelity", "--quick", "--seeds", "2", "--divergences", *NAMES, "--json", str(finished)]
    assert main([*command, "--out", str(tmp_path / "with")]) == 0
    assert (tmp_path / "with/study-fidelity-quick.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = (tmp_path / "with/study-fidelity-quick.md").read_text()
    assert text == report_module.markdown(json.loads(finished.read_text()))
    assert text in capsys.readouterr().out

    monkeypatch.setattr(study, "find_spec", lambda name: None)
    assert main([*command, "--out", str(tmp_path / "without")]) == 0
    assert "pip install 'fusedkd[plots]'" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "without").iterdir()] == ["study-fidelity-quick.md"]


@needs_extra
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fidelity", "--seeds", "0"], "--seeds: '0' is not above zero"),
        (["fidelity", "--steps", "x"], "--steps: 'x' is not above zero"),
        (["fidelity", "--divergences", "nonsense"], "--divergences: invalid choice: 'nonsense'"),
        (["cache", "--seeds", "2"], "--seeds is for study fidelity, not study cache"),
        (["toy", "--divergences", "fkl"], "--divergences is for study fidelity, not study toy"),
        (["fidelity", "--json", "no-such-folder/file.json"], "--json: no folder no-such-folder"),
    ],
)
def test_options_are_checked(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before work starts, by name."""
    with pytest.raises(SystemExit) as caught:
        main(["study", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_committed_result() -> None:
    """The page has the tables of the result file: all seeds and divergences of a default run."""
    folder = ROOT / "bench/results"
    report = json.loads((folder / "study-fidelity.json").read_text())
    assert (folder / "study-fidelity.md").read_text() == report_module.markdown(report)
    assert (folder / "study-fidelity.png").read_bytes().startswith(b"\x89PNG\r\n")
    names = ("teacher", "start", *study.subjects(study.DIVERGENCES))
    expected = {(seed, name) for seed in range(study.SEEDS) for name in names}
    now = dict(study.leaves(study.settings(study.FULL)["plan"]))
    assert dict(study.leaves(report["settings"]["plan"])).items() <= now.items(), "the defaults are others now"
    assert {(run["seed"], run["divergence"]) for run in report["runs"]} == expected
    assert all(len(points) <= 100 for run in report["runs"] for points in run.get("curves", {}).values())
    assert all(math.isfinite(number) for number in numbers(report))
    assert "bench/results/study-fidelity.md" in (ROOT / "docs/fidelity.md").read_text()
