"""The documentation's code runs, and it names what there is."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import tokenize
import unicodedata
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_definition import SERIES, SPREADS, error, evaluate, pair

import fusedkd
from fusedkd.kernels.divergences import ALL
from fusedkd.kernels.maths.definition import Definition

DEFINITIONS = [member for member in ALL if isinstance(member, Definition)]
DOCS = Path(__file__).parent.parent / "docs"
PAGES = (*DOCS.glob("*.md"), DOCS.parent / "CONTRIBUTING.md")
EXAMPLES = {page: re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S) for page in PAGES}


def test_there_is_something_to_run() -> None:
    """The pages with code are found, and their blocks."""
    assert {page.name for page, blocks in EXAMPLES.items() if blocks} >= {
        "index.md",
        "cached-teachers.md",
        "choosing.md",
        "memory.md",
        "numerics.md",
    }


@pytest.mark.smoke
@pytest.mark.parametrize("page", [page for page, blocks in EXAMPLES.items() if blocks], ids=lambda page: page.stem)
def test_examples(page: Path) -> None:
    """The blocks of a page run in order; what they assert holds."""
    names: dict[str, object] = {}
    for block in EXAMPLES[page]:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.smoke
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_emulator_in_a_script() -> None:
    """The page's example as it says: a process of its own, since this one may have Triton's interpreter."""
    page = (DOCS / "emulator.md").read_text()
    (script,) = re.findall(r"^``` \{ \.python \}\n(.*?)^```$", page, re.M | re.S)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_adding_a_divergence(tmp_path: Path) -> None:
    """The page's example as a file of kernels/divergences, given the δ of the page's text: value and gradient."""
    page = (DOCS / "adding-a-divergence.md").read_text()
    (block,) = re.findall(r"^``` \{ \.python \}\n(.*?)^```$", page, re.M | re.S)
    code = re.sub(r'^--8<-- "(.*)"$', lambda named: (DOCS.parent / named[1]).read_text(), block, flags=re.M)
    (file := tmp_path / "example.py").write_text(code)
    spec = importlib.util.spec_from_file_location("fusedkd.kernels.divergences.example", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (example,) = (value for value in vars(module).values() if isinstance(value, Definition))

    # So close that p − q on the torch backend comes from δ; farther apart it is a plain difference.
    noise = torch.tensor([0.0, 1e-3], dtype=torch.float64).view(2, 1, 1) * torch.randn(2, 6, 40, dtype=torch.float64)
    logits = (torch.randn(6, 40, dtype=torch.float64) + noise).requires_grad_()
    logp, logq = logits.log_softmax(-1)
    defaults = [parameter.default for parameter in example.parameters]
    value = example.reference(logp, logq, *defaults)
    gradient = torch.autograd.grad(value.sum(), logits)[0][1]

    (first, second), (logp, logq) = re.findall(r"δ = log ([pq]) − log ([pq])", page)[0], (logp.detach(), logq.detach())
    logs = {"p": logp, "q": logq}
    theta = tuple(torch.tensor(x, dtype=torch.float64) for x in (*defaults, *[0.0] * example.extras))
    f, phi = example.term.torch(logq.exp(), logp.exp(), logq, logp, logs[first] - logs[second], theta)
    torch.testing.assert_close(f.sum(-1), value.detach(), rtol=1e-10, atol=0)
    ours = phi - logq.exp() * phi.sum(-1, keepdim=True)
    assert (ours - gradient).norm() < 1e-10 * gradient.norm()


def test_the_readme_s_parameters() -> None:
    """The README's table of divergences has every name, its parameters and their defaults."""
    readme = (DOCS.parent / "README.md").read_text()
    section = readme[readme.index("\n## Divergences\n") : readme.index("\n## Recipes\n")]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (?:`([^`|]*)`)?[^|]*\|", section, re.M)
    known = fusedkd.divergences()
    assert [name for name, _ in rows] == list(known)
    for name, given in rows:
        weights = {"target": 1.0, "nontarget": 1.0}
        own = {key: value for key, value in known[name].items() if key not in weights or name == "decoupled"}
        assert eval(f"dict({given})") == own, name


MATHEMATICS = (DOCS / "mathematics.md").read_text()
SUMMANDS = {
    name: formulas
    for block in re.findall(r"^```text\nname [^\n]*\n(.*?)^```$", MATHEMATICS, re.M | re.S)
    for name, *formulas in (re.split(r" {2,}", line) for line in block.splitlines())
}
TYPED = {"−": "-", "·": "*", "½": "0.5", "²": "**2", "^": "**", "√p": "sqrt(p)", "√q": "sqrt(q)"}


def test_the_summands_are_those_of_the_definitions() -> None:
    """Every separable divergence with a kernel of its own has a line."""
    assert SUMMANDS.keys() == {definition.name for definition in DEFINITIONS}


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
@pytest.mark.parametrize("spread", SPREADS)
def test_summands(definition: Definition, spread: float) -> None:
    """f and phi as docs/mathematics.md#summands-and-slopes has them, evaluated, are those of `term`."""
    logp, logq = (logits.log_softmax(-1) for logits in pair(spread))
    theta = tuple(float(parameter.default) for parameter in definition.parameters)
    symbols = {"alpha": "α", "beta": "β", "lam": "λ", "w": "w", "detach_mixture": "detached"}
    names = {symbols[p.name]: value for p, value in zip(definition.parameters, theta, strict=True)}
    names |= {"p": logp.exp(), "q": logq.exp(), "δ": logp - logq}
    names |= {"expm1": torch.expm1, "sqrt": torch.sqrt, "sgn": torch.sign, "abs": torch.abs}
    names |= {"rem2": lambda x: torch.expm1(x) - x, "φ": lambda a, x: torch.expm1(a * x) / a}
    names["c"] = sum(theta)

    def value(formula: str) -> torch.Tensor:
        for sign, typed in TYPED.items():
            formula = formula.replace(sign, typed)
        return eval(re.sub(r"\|(.*?)\|", r"abs(\1)", formula), names)

    f, phi, *mixture = SUMMANDS[definition.name]
    if mixture:
        names["M"] = value(mixture[0])
        names["a"], names["b"] = (names["M"] / names["q"]).log(), (names["M"] / names["p"]).log()
    for ours, formula in zip(evaluate(definition, theta, logp, logq), (f, phi), strict=True):
        assert error(ours, value(formula)) < SERIES, formula


def cited(path: Path) -> set[str]:
    """The Markdown files, with their headings, that comments and docstrings name; NAME.md stands for any."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = [token.string for token in tokens if token.type == tokenize.COMMENT]
    prose += [ast.get_docstring(x) or "" for x in ast.walk(ast.parse(text)) if isinstance(x, documented)]
    return set(re.findall(r"(?:[\w-]+/)*(?:README|[\w-]*[a-z][\w-]*)\.md(?:#[\w-]+)?", " ".join(prose)))


def headings(path: Path) -> set[str]:
    """The anchors that the site makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    plain = (unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in found)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def test_what_the_code_cites_is_here() -> None:
    """No comment sends its reader to a document, or to a heading of one, that the repository does not have."""
    root = DOCS.parent
    sources = [path for room in ("bench", "kernels", "python", "tests") for path in (root / room).rglob("*.py")]
    citations = {(path.name, name) for path in sources for name in cited(path)}
    assert ("test_tolerances.py", "docs/mathematics.md#drkl") in citations
    for path, name in sorted(citations):
        page, _, heading = name.partition("#")
        assert (root / page).is_file(), f"{path} cites {page}"
        assert not heading or heading in headings(root / page), f"{path} cites {name}"


def test_the_reference_is_complete() -> None:
    """Every public name, and nothing else of the top level."""
    named = re.findall(r"^::: fusedkd\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted({*fusedkd.__all__, "compat"} - {"__version__"})


MODULES = sorted(path.stem for path in (Path(fusedkd.__file__).parent / "compat").glob("[!_]*.py"))


def test_every_drop_in_has_a_page() -> None:
    """And the index links to each, once, and to nothing else of that folder."""
    assert [path.stem for path in sorted((DOCS / "drop-ins").glob("*.md"))] == MODULES
    assert sorted(re.findall(r"\]\(drop-ins/(\w+)\.md\)", (DOCS / "drop-ins.md").read_text())) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_the_page_of_a_drop_in(module: str) -> None:
    """Its code is Python, every name of fusedkd in it exists, and it says what was checked and what raises."""
    page = (DOCS / "drop-ins" / f"{module}.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    named = set(re.findall(r"fusedkd\.compat\.(\w+)\.(\w+)", page))
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedkd"):
            named |= {((node.module or "").removeprefix("fusedkd.compat."), alias.name) for alias in node.names}
    shared = {name for name in named if name[0] == "fusedkd.compat"}  # from fusedkd.compat import MODULE
    for of, name in named - shared:
        assert callable(getattr(import_module(f"fusedkd.compat.{of}"), name)), f"{of}.{name}"
    assert {name for _, name in shared} <= set(MODULES)
    assert module in {of for of, _ in named}
    for label in ("Checked", "The same", "Differs", "Raises"):
        assert f"**{label}:**" in page


def test_the_versions_of_drop_ins() -> None:
    """The index and the pages name the releases that `make test-compat` installs."""
    root = DOCS.parent
    pinned = re.search(r"^ALONE = ((?:.*\\\n)*.*)$", (root / "Makefile").read_text(), re.M)
    assert pinned is not None
    extra = re.search(r"^compat = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S)
    assert extra is not None
    releases = {*re.findall(r"[\w-]+==([\d.]+)", pinned[1]), *re.findall(r'"(?:trl|liger-kernel)==([\d.]+)"', extra[1])}
    index = (DOCS / "drop-ins.md").read_text()
    pages = {path.stem: path.read_text() for path in (DOCS / "drop-ins").glob("*.md")}
    said: set[str] = set()
    for module, checked in re.findall(r"\]\(drop-ins/(\w+)\.md\) \|[^|]*\| ([^|]*)\|", index):
        if "run" in checked:
            versions = re.findall(r"\d+\.\d+\.\d+", checked)
            said |= set(versions)
            assert all(version in pages[module] for version in versions), module
        else:
            assert all(commit in pages[module] for commit in re.findall(r"[0-9a-f]{7}", checked)), module
            assert "not on PyPI and not run" in pages[module], module
    assert said == releases
