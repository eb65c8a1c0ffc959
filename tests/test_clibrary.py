"""The C library by ctypes, on a driver that runs each launch in Triton's interpreter: what it packs, what it chooses.

test_clibrary_compiled.py runs the launches as compiled.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each, random_labels
from clibrary import CASES, LAYOUTS, ROOT, SAME, STATUS_NUMBER, Library, Packed, call, memory, run, tool
from compare import relative

import fusedkd
from fusedkd.kernels.aot import embed

if not embed.triton:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("here tests/c/vectors.c runs the kernels themselves", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("clib")  # one process, one build
N = 5


def interpret(library: Library, packed: Packed) -> None:
    """Run a launch in Triton's interpreter."""
    line = packed.line
    assert packed.block == (32 * line["num_warps"], 1, 1)
    assert (packed.grid[1:], packed.shared) == ((1, 1), line["shared"])
    signature, constants = library.signature(line)
    given = iter(packed.arguments)
    arguments = [_argument(types, (i,), constants, given) for i, types in enumerate(signature.values())]
    arguments[list(signature).index("BLOCK")] = line["block"]
    library.variant(line).kernel[(packed.grid[0],)](*arguments)


def _argument(types: Any, path: tuple[int, ...], constants: dict[Any, Any], given: Iterator[tuple[str, Any]]) -> Any:
    """A kernel's argument: constants as compiled, the rest as packed, in order."""
    if isinstance(types, tuple):
        values = [_argument(kind, (*path, i), constants, given) for i, kind in enumerate(types)]
        return types._make(values) if hasattr(types, "_fields") else tuple(values)
    if types == "constexpr":
        return constants[path]
    kind, value = next(given)
    return memory(kind, value) if kind.startswith("*") else value


@pytest.fixture(scope="module")
def loaded(clib: Path) -> Library:
    return Library(clib, interpret)


@pytest.fixture
def library(loaded: Library) -> Library:
    """With the first device's context current, and nothing launched yet."""
    loaded.driver.stub_use(0)
    loaded.launches.clear()
    loaded.number("stub_fails").value = 0
    return loaded


def in_python(
    case: Any, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The same by fusedkd.kd_loss: loss, gradient, statistics."""
    parameters = dict(case[2])
    leaf = student.clone().requires_grad_()
    loss, stats = fusedkd.kd_loss(
        leaf,
        teacher,
        labels,
        divergence=fusedkd.divergence(parameters.pop("name"), **parameters),
        reduction="none",
        backend="triton",
        return_stats=True,
        **case[3],
    )
    loss.backward(torch.ones_like(loss) if weights is None else weights)
    return loss.detach(), leaf.grad, stats


def rows(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(N, columns) * 3, torch.randn(N, columns) * 3, random_labels((N,), columns)


@each("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1] or ''}")
def test_as_python(library: Library, case: Any, layout: str) -> None:
    """Every divergence that was built, in rows of every kind: loss and weighted gradient are those of kd_loss."""
    columns, lay, variant = LAYOUTS[layout]
    student, teacher, labels = rows(columns)
    weights = torch.rand(N) + 0.5
    ours, theirs = lay(student), lay(teacher)
    if layout == "reversed rows":  # through a negative stride, which torch has not
        args_rows = torch.arange(N - 1, -1, -1)
        expected = in_python(case, student[args_rows], teacher[args_rows], labels, weights)
        status, loss, grad = reversed_call(library, case, student, teacher, labels, weights)
    else:
        expected = in_python(case, student, teacher, labels, weights)
        status, loss, grad = call(library, case, ours, theirs, labels, weights=weights)
    assert status == "OK"
    assert [launch.line["variant"] for launch in library.launches] == [variant]
    assert relative(loss, expected[0].double()) < SAME
    assert relative(grad, expected[1].double()) < SAME
    assert bool((grad[labels < 0] == 0).all()) and bool((loss[labels < 0] == 0).all())


def reversed_call(
    library: Library,
    case: Any,
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The rows from the last to the first, by their strides; the gradient in the order of the call."""
    args = library.arguments(case)
    n, columns = student.shape
    loss, grad = torch.full((n,), torch.nan), torch.full((n, columns), torch.nan)
    args.rows, args.vocab_size = n, columns
    args.student, args.teacher = student[-1].data_ptr(), teacher[-1].data_ptr()
    args.student_row_stride = args.teacher_row_stride = -columns
    args.labels, args.weights = labels.data_ptr(), weights.data_ptr()
    args.loss, args.grad = loss.data_ptr(), grad.data_ptr()
    return library.status(args), loss, grad


@each("columns", [256, 131])
@each("gradient", [True, False])
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: f"{case[0]}{case[1] or ''}")
def test_statistics(library: Library, case: Any, columns: int, gradient: bool) -> None:
    """Those of KDStats, also without a gradient; weights of 1 come from the workspace."""
    student, teacher, labels = rows(columns)
    stats = torch.full((N, 11), torch.nan)
    status, loss, grad = call(library, case, student, teacher, labels, stats=stats, gradient=gradient)
    expected = in_python(case, student, teacher, labels, None)
    assert status == "OK"
    assert library.launches[0].line["kernel"] == ("value_and_gradient" if gradient else "value")
    assert relative(loss, expected[0].double()) < SAME
    theirs = torch.stack(list(expected[2]), -1)
    assert bool(((stats - theirs).norm(dim=0) <= 1e-5 * theirs.norm(dim=0).clamp(min=1)).all())  # nats
    if grad is not None:
        assert relative(grad, expected[1].double()) < SAME


@each("columns", [256, 131])
@each("name", ["rkl", "ab", "jsd", "taid"])
def test_without_labels(library: Library, name: str, columns: int) -> None:
    """Every row counts and nothing is held out."""
    student, teacher, _ = rows(columns)
    case = (name, {}, {"name": name}, {})
    status, loss, grad = call(library, case, student, teacher, None)
    expected = in_python(case, student, teacher, None, None)
    assert status == "OK"
    assert relative(loss, expected[0].double()) < SAME
    assert relative(grad, expected[1].double()) < SAME


def test_gradient_over_the_logits_and_beyond(library: Library) -> None:
    """In place, and with columns behind the compared ones, which get 0."""
    student, teacher, labels = rows(256)
    expected = in_python(CASES[0], student[:, :240], teacher[:, :240], labels.clamp(max=239), None)[1]
    args = library.defaults("rkl")
    loss, weights = torch.empty(N), torch.ones(N)
    labels = labels.clamp(max=239)
    args.rows, args.vocab_size, args.width = N, 240, 256
    args.student, args.teacher, args.grad = student.data_ptr(), teacher.data_ptr(), student.data_ptr()
    args.student_row_stride = args.teacher_row_stride = 256
    args.labels, args.loss, args.weights = labels.data_ptr(), loss.data_ptr(), weights.data_ptr()
    assert library.status(args) == "OK"
    assert library.launches[0].line["variant"] == "aligned"
    assert relative(student[:, :240], expected.double()) < SAME
    assert not student[:, 240:].any()


def test_chosen_by_the_device(library: Library) -> None:
    """sm_90 code on 9.0 alone, sm_80 code on every 8.x, none on 7.5 and 10.0; the stream is passed on."""
    student, teacher, labels = rows(64)
    for device, expected in ((0, 90), (1, 80), (2, None), (3, None)):
        library.driver.stub_use(device)
        library.launches.clear()
        status, *_ = call(library, CASES[0], student, teacher, labels, stream=device + 16)
        assert status == ("OK" if expected else "NO_KERNEL")
        launched = [(launch.line["arch"], launch.stream) for launch in library.launches]
        assert launched == ([(expected, device + 16)] if expected else [])


def test_what_was_not_built_is_refused(library: Library) -> None:
    """Other dtypes and divergences have no kernel here; nothing is launched, no other kernel takes their place."""
    student, teacher, labels = rows(64)
    assert call(library, ("fkl", {}, {}, {}), student, teacher, labels)[0] == "NO_KERNEL"
    assert call(library, CASES[0], student.bfloat16(), teacher.bfloat16(), labels)[0] == "NO_KERNEL"
    assert not library.launches


def test_no_context(library: Library) -> None:
    library.driver.stub_use(-1)
    assert call(library, CASES[0], *rows(64))[0] == "NO_CONTEXT"


def test_driver_error(library: Library) -> None:
    """Its number is kept, and the kernel is loaded by the next call."""
    ctypes.c_ulonglong.in_dll(library.driver, "stub_id").value += 1
    library.number("stub_fails").value = 209
    assert call(library, CASES[0], *rows(64))[0] == "DRIVER_ERROR"
    assert library.c.fusedkd_driver_error() == 209
    library.number("stub_fails").value = 0
    assert call(library, CASES[0], *rows(64))[0] == "OK"


def test_loaded_once_in_each_context(library: Library) -> None:
    """By many threads at once too; a new context, even at the address of an old one, loads anew."""
    student, teacher, labels = rows(64)
    identity = ctypes.c_ulonglong.in_dll(library.driver, "stub_id")
    loads, launches = library.number("stub_loads"), library.number("stub_launches")
    silent = ctypes.c_void_p.in_dll(library.driver, "stub_launched")
    kept, silent.value = silent.value, None  # launches are counted, not run
    found: list[str] = []

    def work() -> None:
        library.driver.stub_use(0)
        found.extend(call(library, CASES[0], student, teacher, labels)[0] for _ in range(20))

    try:
        for _ in range(2):
            identity.value += 1
            before = loads.value, launches.value
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (loads.value - before[0], launches.value - before[1]) == (1, 160)
    finally:
        silent.value = kept
    assert set(found) == {"OK"}


def test_no_rows(library: Library) -> None:
    """Nothing to do, and no workspace; what is wrong is still said."""
    args = library.defaults("rkl")
    args.vocab_size = 64
    assert library.status(args) == "OK"
    assert not library.launches
    args.temperature = -1
    assert library.status(args) == "BAD_TEMPERATURE"


def test_parameters_are_python_s(library: Library) -> None:
    """Names, defaults, and the ends of every domain: what one refuses the other refuses."""
    known = fusedkd.divergences()
    assert set(library.manifest["not in C"]) == set(known) - set(embed.in_c())
    for number, name in enumerate(embed.in_c()):
        assert library.c.fusedkd_divergence_name(number) == name.encode()
        args = library.defaults(name)
        for i in range(library.c.fusedkd_parameter_count(number)):
            key = library.c.fusedkd_parameter_name(number, i).decode()
            assert args.parameters[i] == float(known[name][key])
            for value in (-17.0, -16.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, 16.0, 17.0, torch.inf, torch.nan):
                args = library.defaults(name)
                args.parameters[i] = value
                given = bool(value) if isinstance(known[name][key], bool) and value in (0, 1) else value
                try:
                    fusedkd.divergence(name, **{key: given})
                    expected = 0
                except (ValueError, TypeError):
                    expected = STATUS_NUMBER["BAD_PARAMETER"]
                args.rows, args.vocab_size, args.labels = 0, 16, 8
                size = ctypes.c_size_t()
                found = library.c.fusedkd_rows_workspace(ctypes.byref(args), ctypes.byref(size))
                assert found == expected, f"{name}, {key}={value}"


def test_tests_of_the_build(clib: Path) -> None:
    """`ctest -L cpu`, as the README says it; where there is no GPU the other label says that it is skipped."""
    ctest = tool("ctest")
    assert "100% tests passed" in run(ctest, "--test-dir", clib, "-L", "cpu")
    shown = run(ctest, "--test-dir", clib, "-L", "gpu", "--verbose")
    assert "skipped: " in shown
    example = subprocess.run([clib / "fusedkd_example"], capture_output=True, text=True)
    assert (example.returncode, "NVIDIA driver" in example.stderr) == (1, True)


CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(consumer C)
find_package(fusedkd 0.1 REQUIRED)
foreach(library IN ITEMS fusedkd fusedkd_static)
  add_executable(with_${library} main.c)
  target_link_libraries(with_${library} PRIVATE fusedkd::${library})
endforeach()
"""


def test_installed(clib: Path, tmp_path: Path) -> None:
    """A project that finds the installed library by find_package, shared and static."""
    run(tool("cmake"), "--install", clib, "--prefix", tmp_path / "prefix")
    shutil.copy(ROOT / "tests/c/header.c", tmp_path / "main.c")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    build = tmp_path / "build"
    run(tool("cmake"), "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    run(tool("cmake"), "--build", build)
    for name in ("fusedkd", "fusedkd_static"):
        run(build / f"with_{name}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DPython3_EXECUTABLE={bare}/bin/python", "pip install torch triton"),
        ("-DFUSEDKD_ARCHS=90;75", "FUSEDKD_ARCHS must be a list of 80, 90 and 100, got 75"),
        ("-DFUSEDKD_DTYPES=float64", "FUSEDKD_DTYPES must be a list of float32, bfloat16 and float16, got float64"),
        ("-DFUSEDKD_DIVERGENCES=rkl;kl", "FUSEDKD_DIVERGENCES"),
    ],
)
def test_configuration_errors(tmp_path: Path, option: str, message: str) -> None:
    """What cannot be built stops at once, and the message says what would work."""
    bare = tmp_path / "bare"
    run(sys.executable, "-m", "venv", "--without-pip", bare)
    given = [f"-DPython3_EXECUTABLE={sys.executable}", option.format(bare=bare)]
    done = subprocess.run(
        [tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), *given], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
