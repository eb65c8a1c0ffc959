"""Rules of the repository that a machine can check: who imports whom, kernel signatures, and life without Triton."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "fusedkd"
LINKED = ("kernels", "bench")  # folders at the top, of which the package has links
KERNELS, BENCH = (sorted((PACKAGE / name).rglob("*.py")) for name in LINKED)
PYTHON = sorted(PACKAGE.rglob("*.py"))  # rglob does not follow the links
# From the bottom to the top: a file imports nothing of a layer above its own. What is not named serves several.
LAYERS = (
    "kernels.maths",
    "kernels.device",
    "kernels.divergences",
    "kernels.aot",
    "backends",
    "schedules",
    "ops",
    "loss",
    "recipes",
    "compat",
    "cli",
)
MOST_PARAMETERS = 21  # value and gradient: a tile is two of them, its columns and the threads that share them


def relative_name(path: Path) -> str:
    """A readable test id."""
    return str(path.relative_to(PACKAGE))


def absolute_name(path: Path, level: int, name: str) -> str:
    """`name` in full, as imported in a file with as many dots before it as `level`."""
    package = path.relative_to(PACKAGE.parent).parts[:-level] if level else ()
    return ".".join((*package, name)).rstrip(".")


def imports(path: Path) -> Iterator[str]:
    """Full names of what import statements and importlib calls bring in, at any depth: modules and their members."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute_name(path, node.level, node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                bare = name.value.lstrip(".")
                yield absolute_name(path, len(name.value) - len(bare), bare)


def roots(names: Iterable[str]) -> set[str]:
    """Top-level packages."""
    return {name.split(".")[0] for name in names}


def within(package: str, names: Iterable[str]) -> set[str]:
    """Those of the names that are the package or in it."""
    return {name for name in names if f"{name}.".startswith(f"{package}.")}


def test_there_is_something_to_check() -> None:
    """The rooms are where this file looks for them, and an import is seen when there is one."""
    assert {path.name for path in KERNELS} >= {"rows.py", "language.py", "fkl.py"}
    assert {path.name for path in BENCH} >= {"gpu.py", "measure.py"}
    assert {path.name for path in PYTHON} >= {"loss.py", "operator.py"}
    assert not {*KERNELS, *BENCH} & {*PYTHON}
    assert "torch" in roots(imports(PACKAGE / "kernels/device/rows.py"))
    assert "triton" in roots(imports(PACKAGE / "kernels/language.py"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import fusedkd.bench.gpu", "fusedkd.bench.gpu"),
        ("from .. import bench", "fusedkd.bench"),
        ("from ..bench.gpu import main", "fusedkd.bench.gpu.main"),
        ("from fusedkd import bench as b", "fusedkd.bench"),
        ("def f():\n    importlib.import_module('..bench', __package__)", "fusedkd.bench"),
        ("from .bench import x", "fusedkd.compat.bench.x"),
    ],
)
def test_imports_are_seen(line: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are written."""
    monkeypatch.setattr(Path, "read_text", lambda path: line)
    assert list(imports(PACKAGE / "compat/somewhere.py")) == [name]


@pytest.mark.parametrize("name", LINKED)
def test_the_package_links_to_folders_at_the_top(name: str) -> None:
    """One copy of each file; the type checker, which does not walk into links, is told of them."""
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / name
    assert f'"python/fusedkd/{name}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", KERNELS, ids=relative_name)
def test_kernels_stand_alone(path: Path) -> None:
    """kernels/ imports Triton, torch and the standard library, and nothing of fusedkd outside itself."""
    names = set(imports(path))
    assert roots(names - within("fusedkd.kernels", names)) <= {"torch", "triton"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", [*KERNELS, *PYTHON], ids=relative_name)
def test_the_product_does_not_know_its_measurements(path: Path) -> None:
    """Imports point one way, tests, bench -> python -> kernels: here from bench."""
    assert not within("fusedkd.bench", imports(path))


@pytest.mark.parametrize("path", [*KERNELS, *PYTHON, *BENCH], ids=relative_name)
def test_what_is_installed_does_not_know_its_tests(path: Path) -> None:
    """Nor numpy, which is torch's affair."""
    assert not roots(imports(path)) & {"tests", "conftest", "cases", "oracle", "compare", "pytest", "numpy"}


@pytest.mark.smoke
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_point_down(layer: str) -> None:
    """The path of a call is the list of layers from top to bottom."""
    inside = PACKAGE / layer.replace(".", "/")
    files = sorted(inside.rglob("*.py")) if inside.is_dir() else [inside.with_suffix(".py")]
    brought = {name for path in files for name in imports(path)}
    assert within("fusedkd", brought)
    for above in LAYERS[LAYERS.index(layer) + 1 :]:
        assert not within(f"fusedkd.{above}", brought)


def knows_torch_library(path: Path) -> bool:
    """Whether a file imports or names torch.library."""
    named = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return bool(within("torch.library", [*imports(path), *named]))


@pytest.mark.smoke
def test_operators_are_in_one_folder() -> None:
    """ops/ alone knows torch.library, and of it one file does."""
    files = [path for path in (*KERNELS, *PYTHON, *BENCH) if knows_torch_library(path)]
    assert files == [PACKAGE / "ops" / "operator.py"]


def launched(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file that are launched over a grid: `name[grid](...)`."""
    tree = ast.parse(path.read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]


GRID = [(path, kernel) for path in KERNELS for kernel in launched(path)]


@pytest.mark.parametrize(("path", "kernel"), GRID, ids=[f"{path.stem}.{kernel.name}" for path, kernel in GRID])
def test_kernel_signatures(path: Path, kernel: ast.FunctionDef) -> None:
    """Few parameters; those of compile time, and only they, are in capitals (but V, N, D: sizes are one letter)."""
    parameters = [*kernel.args.posonlyargs, *kernel.args.args, *kernel.args.kwonlyargs]
    assert len(parameters) <= MOST_PARAMETERS
    assert kernel.args.vararg is None
    for parameter in parameters:
        fixed = parameter.annotation is not None and ast.unparse(parameter.annotation) == "tl.constexpr"
        capitals = parameter.arg.isupper() and len(parameter.arg) > 1
        assert fixed == capitals, parameter.arg


def test_every_kernel_is_seen() -> None:
    """The three row kernels at least."""
    assert {kernel.name for _, kernel in GRID} >= {"_value", "_gradient", "_value_and_gradient"}


def python(code: str) -> str:
    """What a fresh interpreter prints, with Triton's own mode."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


WITHOUT_TRITON = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import torch
import fusedkd

torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 50)
student.requires_grad_()
for name in fusedkd.divergences():
    fusedkd.kd_loss(student, teacher, torch.tensor([1, 2, 3]), divergence=name).backward()
fusedkd.token_logprobs(student, torch.tensor([1, 2, 3])).sum().backward()
loss = fusedkd.kd_loss(student, teacher)
p, q = teacher.log_softmax(-1), student.log_softmax(-1)
print(torch.allclose(loss, (p.exp() * (p - q)).sum(-1).mean()), bool(student.grad.any()))
hidden = torch.randn(3, 8, requires_grad=True)
fusedkd.kd_loss(fusedkd.Head(hidden, torch.randn(50, 8)), teacher).backward()
print(bool(hidden.grad.any()), "triton" in sys.modules)
try:
    fusedkd.kd_loss(student, teacher, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton() -> None:
    """Import and the CPU path work where Triton cannot be imported; asking for it says what to do."""
    exact, works, refusal = python(WITHOUT_TRITON).splitlines()
    assert exact == "True True"
    assert works == "True False"
    assert 'backend="triton"' in refusal
    assert "install triton" in refusal
    assert 'backend="torch"' in refusal


def test_import_is_light() -> None:
    """`import fusedkd` brings in nothing heavy beside torch and Triton."""
    code = "import sys, torch\nbefore = set(sys.modules)\nimport fusedkd\nprint(*(set(sys.modules) - before))"
    brought = {name.split(".")[0] for name in python(code).split()}
    assert "fusedkd" in brought
    assert not brought & {"transformers", "tokenizers", "matplotlib", "tqdm", "numpy", "bench"}


KEYS = """
import triton.language as tl
from fusedkd.kernels.device import args, rows, split_rows, token_logprobs, vocab_chunks

args._LAYOUTS = tl.constexpr(LAYOUTS) if LAYOUTS else args._LAYOUTS
kernels = [
    rows._value, rows._gradient, vocab_chunks._absorb, vocab_chunks._add_sums, vocab_chunks._gradient,
    token_logprobs._value, token_logprobs._gradient, split_rows._statistics, split_rows._sums, split_rows._finalize,
    split_rows._gradient,
]
print(*(kernel.cache_key for kernel in kernels))
"""


def test_another_layout_is_another_kernel() -> None:
    """Triton's cache does not give the kernels of one order of a row's numbers in memory to another order."""
    now, again, other = (python(f"LAYOUTS = {text!r}\n{KEYS}").split() for text in (None, None, "another order"))
    assert now == again
    assert len(set(now)) == len(now)
    assert not set(now) & set(other)
