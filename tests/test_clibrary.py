"""The C library by ctypes, on a driver that runs each launch in Triton's interpreter: what it packs, what it chooses.

The library is built as a user builds it, for a few divergences; tests/c/libcuda.c stands for the driver. What a launch
gets is read back by the signature that the kernel was compiled with: a mistake in the packing is a wrong number.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each, random_labels
from close import relative

import fusedkd

aot = pytest.importorskip("fusedkd.kernels.aot")
embed = pytest.importorskip("fusedkd.kernels.embed")
if not embed.triton:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("here tests/c/vectors.c runs the kernels themselves", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("clib")  # one process, one build
ROOT = Path(__file__).parent.parent
ARCHS, DTYPE, NAMES = ("80", "90"), "float32", ("rkl", "drkl", "ab", "jsd", "taid")
SAME = 2e-6  # relative L2 to the Python path: the same kernels, maybe in other tiles
N = 5


class Args(ctypes.Structure):
    """fusedkd_rows_args."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("divergence", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("parameters", ctypes.c_double * 4),
        ("target", ctypes.c_double),
        ("nontarget", ctypes.c_double),
        ("decoupled", ctypes.c_int),
        ("temperature_squared", ctypes.c_int),
        ("temperature", ctypes.c_double),
        ("rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        *((f"{side}_{axis}_stride", ctypes.c_int64) for side in ("student", "teacher") for axis in ("row", "column")),
        ("labels", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_row_stride", ctypes.c_int64),
        ("grad_column_stride", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    ]


class Launch(ctypes.Structure):
    """A launch as tests/c/libcuda.c writes it down."""

    _fields_ = [
        ("cubin", ctypes.c_void_p),
        ("entry", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p * 40),
    ]


def tool(name: str) -> str:
    """A program beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert found, f"needs {name}"
    return found


def run(*command: str | Path) -> str:
    """Run to its end; a failure shows what was printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built by CMake."""
    folder = tmp_path_factory.mktemp("clib")
    lists = (("ARCHS", ARCHS), ("DTYPES", (DTYPE,)), ("DIVERGENCES", NAMES))
    options = [f"-DFUSEDKD_{key}={';'.join(values)}" for key, values in lists]
    run(tool("cmake"), "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
    run(tool("cmake"), "--build", folder, "-j", "2")
    return folder


class Library:
    """The library and the driver below it; `launches` are the symbols of the kernels that ran."""

    def __init__(self, folder: Path) -> None:
        self.driver_file = folder / "libcuda_stub.so"
        run("gcc", "-shared", "-fPIC", "-o", self.driver_file, ROOT / "tests/c/libcuda.c")
        os.environ["FUSEDKD_LIBCUDA"] = str(self.driver_file)
        self.c = ctypes.CDLL(str(folder / "libfusedkd.so"))
        self.driver = ctypes.CDLL(str(self.driver_file))
        for name in ("fusedkd_status_string", "fusedkd_divergence_name", "fusedkd_parameter_name"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.manifest = json.loads((folder / "generated/manifest.json").read_text())
        self.by_address = {
            ctypes.addressof(ctypes.c_ubyte.in_dll(self.c, line["symbol"])): line for line in self.manifest["kernels"]
        }
        self.variants = {
            (variant.name, key): variant
            for key, variant in aot.variants(4, "sm_90")
            if key in embed.KERNELS and not variant.argmax
        }
        self.launches: list[dict[str, Any]] = []
        self.streams: list[int | None] = []
        self.callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(Launch))(self._launched)
        ctypes.c_void_p.in_dll(self.driver, "stub_launched").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def number(self, name: str) -> ctypes.c_int:
        """A variable of the driver."""
        return ctypes.c_int.in_dll(self.driver, name)

    def _launched(self, launch: Any) -> None:
        """Run a launch in the interpreter."""
        given = launch.contents
        line = self.by_address[given.cubin]
        self.launches.append(line)
        self.streams.append(given.stream)
        assert given.entry.decode() == line["entry"]
        assert list(given.block) == [32 * line["num_warps"], 1, 1]
        assert (given.grid[1], given.grid[2], given.shared) == (1, 1, line["shared"])
        variant = self.variants[line["divergence"], line["kernel"]]
        signature, constants, _ = aot.specialization(variant, line["dtype"], embed.CALLS[line["variant"]])
        addresses = iter(given.arguments)
        arguments = [
            _argument(types, (i,), constants, addresses) for i, types in enumerate(signature.values())
        ]  # fmt: skip
        arguments[list(signature).index("BLOCK")] = line["block"]
        variant.kernel[(given.grid[0],)](*arguments)

    def defaults(self, name: str) -> Args:
        """Arguments of a divergence at its defaults."""
        args = Args()
        assert self.c.fusedkd_rows_defaults(ctypes.byref(args), embed.in_c().index(name)) == 0
        return args

    def arguments(self, case: Any) -> Args:
        """Arguments of one of CASES."""
        name, fields, _, options = case
        args = self.defaults(name)
        for key, value in {**fields, **options}.items():
            if key == "parameters":
                args.parameters[: len(value)] = value
            else:
                setattr(args, key, value)
        return args

    def status(self, args: Args, stream: int = 0) -> str:
        """Call with a workspace of exactly the size that is asked for; the status' name."""
        size = ctypes.c_size_t(12345)
        result = self.c.fusedkd_rows_workspace(ctypes.byref(args), ctypes.byref(size))
        if result == 0:
            room = torch.full((size.value + 64,), 0xAB, dtype=torch.uint8)
            args.workspace, args.workspace_bytes = room.data_ptr(), size.value
            result = self.c.fusedkd_rows(ctypes.byref(args), ctypes.c_void_p(stream))
            assert bool((room[size.value :] == 0xAB).all()), "written beyond the workspace"
        return STATUS[result]


STATUS = {
    int(number): name
    for name, number in re.findall(r"FUSEDKD_(OK|BAD_\w+|N\w+|DRIVER_ERROR) = (\d+)", embed.HEADER.read_text())
}
CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def _argument(types: Any, path: tuple[int, ...], constants: dict[Any, Any], addresses: Iterator[int]) -> Any:
    """A kernel's argument: constants as compiled, the rest read where the launch says, in order."""
    if isinstance(types, tuple):
        return tuple(_argument(kind, (*path, i), constants, addresses) for i, kind in enumerate(types))
    if types == "constexpr":
        return constants[path]
    address = next(addresses)
    if not types.startswith("*"):
        return CTYPES[types].from_address(address).value
    there = ctypes.c_uint64.from_address(address).value
    dtype = {"*i64": torch.int64, "*fp32": torch.float32}[types]
    return torch.frombuffer((ctypes.c_char * 8).from_address(there), dtype=dtype) if there else None


@pytest.fixture(scope="module")
def loaded(built: Path) -> Library:
    return Library(built)


@pytest.fixture
def library(loaded: Library) -> Library:
    """With the first device's context current, and nothing launched yet."""
    loaded.driver.stub_use(0)
    loaded.launches.clear()
    loaded.streams.clear()
    loaded.number("stub_fails").value = 0
    return loaded


CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # name in C, its fields, the same in Python, further fields of both
    ("rkl", {}, {"name": "rkl"}, {}),
    ("rkl", {"target": 0.5, "nontarget": 3.0}, {"name": "rkl", "target": 0.5, "nontarget": 3.0}, {}),
    ("rkl", {"decoupled": 1, "nontarget": 0.5}, {"name": "decoupled", "base": "rkl", "nontarget": 0.5}, {}),
    ("drkl", {"parameters": [0.7]}, {"name": "drkl", "gamma": 0.7}, {}),
    ("ab", {"parameters": [0.3, 0.9]}, {"name": "ab", "alpha": 0.3, "beta": 0.9}, {}),
    ("ab", {"parameters": [0.0, 0.9]}, {"name": "ab", "alpha": 0.0, "beta": 0.9}, {}),
    ("jsd", {"parameters": [0.2]}, {"name": "jsd", "beta": 0.2}, {"temperature": 2.0, "temperature_squared": True}),
    ("taid", {"parameters": [0.6]}, {"name": "taid", "t": 0.6}, {"temperature": 0.5}),
]
LAYOUTS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "contiguous": (256, torch.clone, "aligned"),
    "padded rows": (256, lambda x: torch.cat((x, x[:, :16]), -1)[:, :-16], "aligned"),
    "odd width": (131, torch.clone, "generic"),
    "shifted": (256, lambda x: torch.cat((x[:, :1], x), -1)[:, 1:], "generic"),
    "every second column": (256, lambda x: torch.stack((x, x + 1), -1)[..., 0], "generic"),
    "transposed": (256, lambda x: x.mT.contiguous().mT, "generic"),
    "reversed rows": (256, lambda x: x, "aligned"),
}


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def call(
    library: Library, case: Any, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, **rest: Any
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """Run a case in C: status, loss, and the gradient in memory laid out like the student's."""
    args = library.arguments(case)
    n, columns = student.shape
    args.rows, args.vocab_size = n, columns
    args.student, args.teacher, args.labels = student.data_ptr(), teacher.data_ptr(), pointer(labels)
    args.student_row_stride, args.student_column_stride = student.stride()
    args.teacher_row_stride, args.teacher_column_stride = teacher.stride()
    loss = torch.full((n,), torch.nan)
    grad = None
    if rest.get("gradient", True):
        grad = torch.empty_strided(student.shape, student.stride()).fill_(torch.nan)
        args.grad = grad.data_ptr()
        args.grad_row_stride, args.grad_column_stride = grad.stride()
    args.loss, args.weights, args.stats = loss.data_ptr(), pointer(rest.get("weights")), pointer(rest.get("stats"))
    return library.status(args, rest.get("stream", 0)), loss, grad


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
    assert [line["variant"] for line in library.launches] == [variant]
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
    assert library.launches[0]["kernel"] == ("value_and_gradient" if gradient else "value")
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
    assert library.launches[0]["variant"] == "aligned"
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
        assert [line["arch"] for line in library.launches] == ([expected] if expected else [])
        assert library.streams[-1:] == ([device + 16] if expected else library.streams[-1:])


def test_what_was_not_built_is_refused(library: Library) -> None:
    """Other dtypes and divergences have no kernel here; nothing is launched, no other kernel takes their place."""
    student, teacher, labels = rows(64)
    assert call(library, ("fkl", {}, {}, {}), student, teacher, labels)[0] == "NO_KERNEL"
    assert call(library, ("rkl", {"dtype": 1}, {}, {}), student, teacher, labels)[0] == "NO_KERNEL"
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


STATUS_NUMBER = {name: number for number, name in STATUS.items()}


def test_tests_of_the_build(built: Path) -> None:
    """`ctest -L cpu`, as the README says it; where there is no GPU the other label says that it is skipped."""
    ctest = tool("ctest")
    assert "100% tests passed" in run(ctest, "--test-dir", built, "-L", "cpu")
    shown = run(ctest, "--test-dir", built, "-L", "gpu", "--verbose")
    assert "skipped: " in shown
    example = subprocess.run([built / "fusedkd_example"], capture_output=True, text=True)
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


def test_installed(built: Path, tmp_path: Path) -> None:
    """A project that finds the installed library by find_package, shared and static."""
    run(tool("cmake"), "--install", built, "--prefix", tmp_path / "prefix")
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
