"""The pages of the divergences: text, picture, the effects they state, and that docs/divergences is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_commands import fusedkd_command

from fusedkd import divergences
from fusedkd.cli.explain import TEACHER, effect, page

DOCS = Path(__file__).parent.parent / "docs" / "divergences"
PNG = b"\x89PNG\r\n"
P_Y = TEACHER[0]
P_REST = torch.tensor(TEACHER[1:], dtype=torch.float64) / sum(TEACHER[1:])
Q_REST = P_REST.flip(0)


def test_without_a_name_it_lists_them() -> None:
    """One line each; no picture, so no package is missed."""
    done = fusedkd_command("explain", hidden="matplotlib")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(divergences())


def test_page_and_picture(tmp_path: Path) -> None:
    """The page on standard output, the picture in a folder that is made, its name in the last line."""
    folder = tmp_path / "pictures"
    done = fusedkd_command("explain", "drkl", "--out", folder)
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert text == page("drkl")
    assert "dL/dz_y = B = q_y (1 − q_y)(a_q − a_p)" in text
    assert '    fusedkd.divergence("drkl", gamma=0.5)' in text
    assert Path(last) == folder / "explain-drkl.png"
    assert Path(last).read_bytes().startswith(PNG)


def test_documentation_is_up_to_date(tmp_path: Path) -> None:
    """If not: python -m fusedkd explain --docs docs/divergences."""
    done = fusedkd_command("explain", "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert set(made) == {"README.md", *(f"{name}.md" for name in divergences())}
    assert set(made) == {file.name for file in DOCS.iterdir()}
    stale = [name for name, text in made.items() if text != (DOCS / name).read_text(encoding="utf-8")]
    assert not stale, f"run python -m fusedkd explain --docs docs/divergences: {stale}"


@pytest.mark.smoke
@pytest.mark.parametrize("name", divergences())
def test_every_page_is_complete(name: str) -> None:
    """What each docstring owes, as a heading of its own, and a sentence on the gradient."""
    text = page(name)
    for part in ("**Edge cases:** ", "**Source:** ", "radient:** ", "q_y = p_y = 0.4, dL/dz_y ", "sure of the target."):
        assert text.count(part) == 1, part


def test_the_non_target_push() -> None:
    """arXiv 2604.00223: the non-target tokens push RKL's target logit up even at q_y = p_y, DRKL's not at all."""
    push = effect("rkl", [P_Y]).nontarget.item()
    assert push == pytest.approx(-P_Y * (1 - P_Y) * (Q_REST * (Q_REST / P_REST).log()).sum().item(), rel=1e-6)
    assert push < -0.1
    drkl = effect("drkl", [0.01, P_Y, 0.99])
    assert drkl.nontarget.tolist() == [0, 0, 0]
    assert drkl.logit[1].item() == pytest.approx(0, abs=1e-12)
    assert effect("fkl", [P_Y]).nontarget.item() == pytest.approx(0, abs=1e-12)


def test_the_supervision_of_the_tail() -> None:
    """RKL's fades as 1 − q_y, FKL's and DRKL's stay: against the closed forms."""
    q_y = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    gap = (Q_REST / P_REST).log()
    spread = (Q_REST * (gap - (Q_REST * gap).sum())).abs().sum()
    expected = {
        "fkl": ((1 - P_Y) * (Q_REST - P_REST).abs().sum()).expand(3),
        "rkl": (1 - q_y) * spread,
        "drkl": (0.5 * spread).expand(3),
    }
    for name, sizes in expected.items():
        torch.testing.assert_close(effect(name, q_y.tolist()).reshaping, sizes, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", divergences())
def test_the_terms_add_up(name: str) -> None:
    """The two terms of dL/dz_y are its whole."""
    found = effect(name, [0.01, 0.5, 0.99])
    if found.target.isnan().all():
        pytest.skip("no such terms")
    torch.testing.assert_close(found.target + found.nontarget, found.logit, rtol=1e-5, atol=1e-7)


def test_an_unknown_divergence_is_refused() -> None:
    """The known names are listed."""
    done = fusedkd_command("explain", "nonsense")
    assert done.returncode == 2
    assert "unknown divergence 'nonsense'; known: " in done.stderr


def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    """Usage and the command that installs it."""
    done = fusedkd_command("explain", "fkl", "--out", tmp_path, hidden="matplotlib")
    assert done.returncode == 2
    assert "matplotlib" in done.stderr
    assert "pip install 'fusedkd[plots]'" in done.stderr
