"""The toy study, as a user runs it: what the literature says of forward and reverse KL, as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_commands import fusedkd_command, needs_extra, numbers

from fusedkd.cli import study_cache

pytestmark = pytest.mark.xdist_group("study")  # one full run serves all

FIVE = ["fkl", "rkl", "akl", "ab", "drkl"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All numbers of one full run."""
    folder = tmp_path_factory.mktemp("study")
    done = fusedkd_command("study", "toy", "--out", folder, "--json", folder / "toy.json")
    assert done.returncode == 0, done.stderr
    picture = folder / "study-toy.png"
    assert done.stdout.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    found = json.loads((folder / "toy.json").read_text())
    assert all(abs(number) < 1e6 for number in numbers(found)), "NaN or diverged"
    return found


def test_quick_runs_too(tmp_path: Path) -> None:
    """The same lines from fewer steps, and the picture in a folder that is made."""
    done = fusedkd_command("study", "toy", "--quick", "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("head first from") == 2 * len(FIVE) + 2
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["study-toy.png"]


def head_or_tail_first(report: dict[str, Any]) -> None:
    """Gradient descent on free logits: FKL fits the head first, RKL the tail."""
    fits = report["free"]["descent"]
    fkl, rkl = fits["fkl"], fits["rkl"]
    assert fkl["head_first_share"] == 1
    assert fkl["head_left"] < 0.45 < 0.5 < fkl["tail_left"]
    assert rkl["head_first_share"] < 0.15
    assert rkl["tail_left"] < 0.45 < 0.6 < rkl["head_left"]


def ahead_at_equal_steps(report: dict[str, Any]) -> None:
    """Adam, as published: at equal steps FKL is ahead on the head, RKL on the far tail."""
    fkl, rkl = (report["same_step"][name] for name in ("fkl", "rkl"))
    assert fkl["head"] < 0.8 * rkl["head"]
    assert rkl["far"] < 0.9 * fkl["far"]


def zipf_head_first(report: dict[str, Any]) -> None:
    """Zipf teacher: FKL fits the head first, and RKL favours the head less."""
    fkl, rkl = (report["free"]["zipf"][name] for name in ("fkl", "rkl"))
    assert fkl["head_first_share"] == 1
    assert fkl["tail_left"] - fkl["head_left"] > 0.1 > rkl["tail_left"] - rkl["head_left"]


def one_peak_or_both(report: dict[str, Any]) -> None:
    """FKL's fit has the target's mean and width and lies on both peaks; RKL's lowest minima each lie on one."""
    target, fkl, rkl = (report["family"][name] for name in ("target", "fkl", "rkl"))
    for fit in fkl:
        assert fit["mean"] == pytest.approx(target["mean"], abs=1e-3)
        assert fit["width"] == pytest.approx(target["width"], abs=1e-3)
        assert min(fit["left"], fit["right"]) > 0.4
    lowest = min(rkl, key=lambda fit: fit["loss"])
    assert (lowest["mean"], lowest["width"]) == pytest.approx((-4, 1), abs=0.05)
    assert lowest["left"] > 0.99
    on_one = [fit for fit in rkl if max(fit["left"], fit["right"]) > 0.99]
    assert len(on_one) == len(rkl) - 1
    assert {round(fit["mean"]) for fit in on_one} == {-4, 4}
    caught = next(fit for fit in rkl if fit not in on_one)
    assert caught["start"] == 0
    assert caught["loss"] > 2 * lowest["loss"]


CLAIMS = [head_or_tail_first, ahead_at_equal_steps, zipf_head_first, one_peak_or_both]


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim(claim: Any, report: dict[str, Any]) -> None:
    """Each claim of the module docstring that sets FKL against RKL."""
    claim(report)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_claim_tells_the_losses_apart(claim: Any, report: dict[str, Any]) -> None:
    """With FKL and RKL exchanged it fails."""
    with pytest.raises(AssertionError):
        claim(exchanged(report))


def exchanged(value: Any) -> Any:
    """The report of a library whose FKL and RKL are swapped."""
    if not isinstance(value, dict):
        return value
    swapped = {"fkl": "rkl", "rkl": "fkl"}
    return {swapped.get(key, key): exchanged(item) for key, item in value.items()}


def test_all_converge(report: dict[str, Any]) -> None:
    """Free logits reach the teacher under every divergence, from every start, and the tail arrives last."""
    for method, left in (("descent", 0.05), ("adam", 0.01)):
        fits = report["free"][method]
        assert list(fits) == FIVE
        assert all(fit["end"] < left for fit in fits.values())
    for fit in report["free"]["descent"].values():
        assert fit["curves"]["head"][-1] < fit["curves"]["tail"][-1]


def test_what_does_not_hold(report: dict[str, Any]) -> None:
    """Kept in view: with Adam both KLs fit the tail first by this measure, with a Zipf teacher RKL does not."""
    for name in ("fkl", "rkl"):
        assert report["free"]["adam"][name]["head_first_share"] < 0.1
    assert report["free"]["zipf"]["rkl"]["head_first_share"] > 0.5


def test_akl_and_ab_lie_between(report: dict[str, Any]) -> None:
    """And DRKL, whose gradient on the tail does not fade, fits the tail first as RKL does."""
    leads = {name: fit["tail_left"] - fit["head_left"] for name, fit in report["free"]["descent"].items()}
    for name in ("akl", "ab"):
        assert leads["rkl"] < leads[name] < leads["fkl"]
    assert report["free"]["descent"]["drkl"]["head_first_share"] < 0.15


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_the_missing_extra_is_named(package: str) -> None:
    """Usage and the command that installs it."""
    done = fusedkd_command("study", "toy", hidden=package)
    assert done.returncode == 2
    assert package in done.stderr
    assert "pip install 'fusedkd[plots]'" in done.stderr


@needs_extra
def test_a_cache_s_cost(tmp_path: Path) -> None:
    """A quick run: every K and tail beside all tokens, and what the bucket says of one student is a lower bound."""
    done = fusedkd_command("study", "cache", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "study-cache-quick.json").read_text())
    assert (tmp_path / "study-cache-quick.md").read_text() == study_cache.markdown(found)
    assert study_cache.markdown(found) in done.stdout
    holds(found)


def holds(found: dict[str, Any]) -> None:
    """What must be so of any run."""
    assert all(abs(number) < 1e9 for number in numbers(found)), "NaN or diverged"
    rows, ks = found["caches"], found["plan"]["ks"]
    assert [(row["k"], row["tail"]) for row in rows] == [(k, tail) for k in ks for tail in study_cache.TAILS]
    dense, before = (found[name]["held_out"]["kl"] for name in ("dense", "untrained"))
    assert found["dense"]["value"] == pytest.approx(dense, rel=1e-4)
    said = [row["value"] for row in rows if row["tail"] == "bucket"]
    assert said[0] > 0 and said == sorted(said) and said[-1] < found["dense"]["value"]
    assert all(row["training"]["steps"] == found["dense"]["training"]["steps"] for row in rows)
    best = min(row["held_out"]["kl"] for row in rows)
    assert dense < best < before


def test_the_committed_table_of_caches() -> None:
    """The page's table is that of the result file."""
    folder = Path(__file__).parent.parent / "bench/results"
    found = json.loads((folder / "study-cache.json").read_text())
    assert (folder / "study-cache.md").read_text() == study_cache.markdown(found)
    holds(found)
    assert "bench/results/study-cache.md" in (folder.parents[1] / "docs/cached-teachers.md").read_text()


def test_an_unknown_study_is_refused() -> None:
    """The known one is listed."""
    done = fusedkd_command("study", "nonsense")
    assert done.returncode == 2
    assert "toy" in done.stderr
