"""The documentation's site: its check finds what is wrong, and its hook writes formulas and nothing else.

`make docs` checks the site that it builds; here are small ones, each with one fault.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from check_site import faults

DOCS = Path(__file__).parent.parent / "docs"
SOUND = {
    "index.html": '<link rel="stylesheet" href="a.css"><a href="sub/page.html#there">x</a> <a href="https://x.org">x</a>',
    "sub/page.html": '<h1 id="there">x</h1> <a href="../index.html">x</a> <a href="#there">x</a> <img src="data:,">',
    "a.css": "b { background: url(data:image/png;base64,x) } c { background: url('sub/d.png') }",
    "sub/d.png": "",
}
WRONG = {
    "a page": ("index.html", '<a href="gone.html">x</a>', "links to gone.html"),
    "an anchor": ("index.html", '<a href="sub/page.html#gone">x</a>', "no such anchor"),
    "an anchor here": ("sub/page.html", '<a href="#gone">x</a>', "no such anchor"),
    "a script": ("index.html", '<script src="https://cdn.x.org/a.js"></script>', "from elsewhere"),
    "a script of either scheme": ("index.html", '<script src="//cdn.x.org/a.js"></script>', "from elsewhere"),
    "a missing script": ("index.html", '<script src="gone.js"></script>', "not there"),
    "a style sheet": ("index.html", '<link rel="stylesheet" href="https://x.org/a.css">', "from elsewhere"),
    "a picture": ("index.html", '<img src="https://x.org/a.png">', "from elsewhere"),
    "a font": ("a.css", "@font-face { src: url(https://x.org/a.woff2) }", "from elsewhere"),
    "an import": ("a.css", "@import 'https://x.org/a.css';", "from elsewhere"),
    "a style": ("index.html", "<style>@import 'https://x.org/a.css';</style>", "from elsewhere"),
    "a diagram": ("index.html", '<pre class="mermaid">x</pre>', "from elsewhere"),
}


def write(site: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


@pytest.fixture(scope="module")
def hooks() -> SimpleNamespace:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return SimpleNamespace(**vars(module))


def test_a_sound_site(tmp_path: Path) -> None:
    assert faults(write(tmp_path, SOUND)) == []


def test_an_empty_site(tmp_path: Path) -> None:
    assert faults(tmp_path)


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_found(name: str, tmp_path: Path) -> None:
    file, added, said = WRONG[name]
    (found,) = faults(write(tmp_path, SOUND | {file: SOUND[file] + added}))
    assert found.startswith(file) and said in found


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("q_y = p_y", "q<sub>y</sub> = p<sub>y</sub>"),
        ("dL/dz_k, ∂L/∂z_k and q̂_k", "dL/dz<sub>k</sub>, ∂L/∂z<sub>k</sub> and q̂<sub>k</sub>"),
        ("h_{n−1}, Σ_tail", "h<sub>n−1</sub>, Σ<sub>tail</sub>"),
        ("p^α q^β p^(α+β)", "p<sup>α</sup> q<sup>β</sup> p<sup>α+β</sup>"),
        ("e^{−cx} e^−60 x^½", "e<sup>−cx</sup> e<sup>−60</sup> x<sup>½</sup>"),
        ("sm_90 kd_loss unsloth_zoo q_names", "sm_90 kd_loss unsloth_zoo q_names"),
        ("<code>q_y</code> q_y <pre><b>e^x</b></pre>", "<code>q_y</code> q<sub>y</sub> <pre><b>e^x</b></pre>"),
        ('<a id="q_y" href="q_k">p_y</a>', '<a id="q_y" href="q_k">p<sub>y</sub></a>'),
    ],
)
def test_formulas(written: str, shown: str, hooks: SimpleNamespace) -> None:
    assert hooks.formulas(written) == shown


def test_a_folder_in_the_navigation(tmp_path: Path, hooks: SimpleNamespace) -> None:
    """Its pages are there without a line for each; an index may be in the folder or beside it."""
    write(tmp_path, dict.fromkeys(["a/README.md", "a/z.md", "a/b.md", "c.md", "c/d.md"], ""))
    config = SimpleNamespace(
        docs_dir=str(tmp_path), nav=[{"Top": "x.md"}, {"More": [{"A": "a/"}, {"C": "c/"}, {"E": "e.md"}]}]
    )
    hooks.on_config(config)
    more = [{"A": ["a/README.md", "a/b.md", "a/z.md"]}, {"C": ["c.md", "c/d.md"]}, {"E": "e.md"}]
    assert config.nav == [{"Top": "x.md"}, {"More": more}]
