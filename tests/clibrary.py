"""The C library by ctypes: its structures, its build by CMake, and a driver without a GPU that hands on each launch.

tests/c/libcuda.c stands for the driver: device memory is the host's, and a launch is written down. What a launch gets
is read back by the signature that the kernel was compiled with, so a mistake in the packing is a wrong number.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedkd.kernels.aot import compiler, embed

ROOT = Path(__file__).parent.parent
ARCHS, NAMES = ("80", "90"), ("rkl", "drkl", "ab", "jsd", "taid")  # of the library that most tests share
SAME = 2e-6  # relative L2 to the Python path: the same kernels, maybe in other tiles


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


class Packed(NamedTuple):
    """What the C code gave the driver for one launch."""

    line: dict[str, Any]  # of the manifest
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None
    arguments: list[tuple[str, Any]]  # Triton's type and the number; of a pointer the address


STATUS = {
    int(number): name
    for name, number in re.findall(r"FUSEDKD_(OK|BAD_\w+|N\w+|DRIVER_ERROR) = (\d+)", embed.HEADER.read_text())
}
STATUS_NUMBER = {name: number for number, name in STATUS.items()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # numbered as in the header
POINTED = {"*i64": torch.int64, "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16}
CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


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


def build(
    folder: Path, archs: Sequence[str] = ARCHS, dtypes: Sequence[str] = ("float32",), names: Sequence[str] = NAMES
) -> Path:
    """The library, built by CMake as a user builds it."""
    lists = (("ARCHS", archs), ("DTYPES", dtypes), ("DIVERGENCES", names))
    options = [f"-DFUSEDKD_{key}={';'.join(values)}" for key, values in lists]
    run(tool("cmake"), "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
    run(tool("cmake"), "--build", folder, "-j", "2")
    return folder


def leaves(types: Any) -> Iterator[str]:
    """The types of what a launch passes, in order: a signature without its constants."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from leaves(kind)
        elif kind != "constexpr":
            yield kind


def memory(kind: str, address: int) -> torch.Tensor | None:
    """What a pointer's address is to Triton: a tensor of one element that begins there, or None."""
    if not address:
        return None
    dtype = POINTED[kind]
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Library:
    """The library and the driver below it: `execute` runs a launch, `launches` are those that ran.

    `tensors` are those of the latest `call`, by the names of its arguments.
    """

    def __init__(self, folder: Path, execute: Callable[[Library, Packed], None]) -> None:
        self.driver_file = folder / "libcuda_stub.so"
        run("gcc", "-shared", "-fPIC", "-o", self.driver_file, ROOT / "tests/c/libcuda.c")
        os.environ["FUSEDKD_LIBCUDA"] = str(self.driver_file)
        self.c = ctypes.CDLL(str(folder / "libfusedkd.so"))
        self.driver = ctypes.CDLL(str(self.driver_file))
        for name in ("fusedkd_status_string", "fusedkd_divergence_name", "fusedkd_parameter_name"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.manifest = json.loads((folder / "generated/manifest.json").read_text())
        self.by_address = {ctypes.addressof(self.cubin(line)): line for line in self.manifest["kernels"]}
        self.execute, self.error = execute, None
        self.launches: list[Packed] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(Launch))(self._launched)
        ctypes.c_void_p.in_dll(self.driver, "stub_launched").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def number(self, name: str) -> ctypes.c_int:
        """A variable of the driver."""
        return ctypes.c_int.in_dll(self.driver, name)

    def cubin(self, line: dict[str, Any]) -> Any:
        """A kernel's code, as the library holds it."""
        return (ctypes.c_ubyte * line["bytes"]).in_dll(self.c, line["symbol"])

    def variant(self, line: dict[str, Any]) -> compiler.Variant:
        """What a kernel of the manifest was compiled from, but for its tile."""
        (found,) = (
            variant
            for key, variant in compiler.variants(compiler.DTYPES[line["dtype"]][1], f"sm_{line['arch']}")
            if (key, variant.name) == (line["kernel"], line["divergence"]) and not variant.argmax
        )
        return found

    def signature(self, line: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
        """Types and constants of a kernel's parameters."""
        return compiler.specialization(self.variant(line), line["dtype"], embed.CALLS[line["variant"]])[:2]

    def _launched(self, launch: Any) -> None:
        """Read back and run; an exception would be lost between Python and C, so `status` raises it."""
        try:
            packed = self.read(launch.contents)
            self.launches.append(packed)
            self.execute(self, packed)
        except Exception as error:
            self.error = error

    def read(self, given: Launch) -> Packed:
        """What is packed in a launch; behind the signature's arguments Triton's own pointers."""
        line = self.by_address[given.cubin]
        assert given.entry.decode() == line["entry"]
        kinds = [*leaves(self.signature(line)[0].values()), *["i64"] * line["scratch"]]
        arguments = [
            (kind, CTYPES["i64" if kind.startswith("*") else kind].from_address(address).value)
            for kind, address in zip(kinds, given.arguments, strict=False)
        ]
        return Packed(line, tuple(given.grid), tuple(given.block), given.shared, given.stream, arguments)

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
            self.tensors["workspace"] = room[: size.value]
            args.workspace, args.workspace_bytes = room.data_ptr(), size.value
            result = self.c.fusedkd_rows(ctypes.byref(args), ctypes.c_void_p(stream))
            error, self.error = self.error, None
            if error is not None:
                raise error
            assert bool((room[size.value :] == 0xAB).all()), "written beyond the workspace"
        return STATUS[result]


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
    # columns, how they lie, the kernels that serve them
    "contiguous": (256, torch.clone, "aligned"),
    "padded rows": (256, lambda x: torch.cat((x, x[:, :16]), -1)[:, :-16], "aligned"),
    "odd width": (131, torch.clone, "generic"),
    "shifted": (256, lambda x: torch.cat((x[:, :1], x), -1)[:, 1:], "generic"),
    "every second column": (256, lambda x: torch.stack((x, x + 1), -1)[..., 0], "generic"),
    "transposed": (256, lambda x: x.mT.contiguous().mT, "generic"),
    "reversed rows": (256, lambda x: x, "aligned"),
}


def call(
    library: Library, case: Any, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, **rest: Any
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """Run a case in C: status, loss, and the gradient in memory laid out like the student's."""
    args = library.arguments(case)
    n, columns = student.shape
    args.rows, args.vocab_size, args.dtype = n, columns, list(DTYPES.values()).index(student.dtype)
    args.student_row_stride, args.student_column_stride = student.stride()
    args.teacher_row_stride, args.teacher_column_stride = teacher.stride()
    loss = torch.full((n,), torch.nan)
    grad = None
    if rest.get("gradient", True):
        grad = torch.empty_strided(student.shape, student.stride(), dtype=student.dtype).fill_(torch.nan)
        args.grad_row_stride, args.grad_column_stride = grad.stride()
    given = {"student": student, "teacher": teacher, "labels": labels, "loss": loss, "grad": grad}
    given |= {"weights": rest.get("weights"), "stats": rest.get("stats")}
    for name, x in given.items():
        setattr(args, name, pointer(x))
    library.tensors = {name: x for name, x in given.items() if x is not None}
    return library.status(args, rest.get("stream", 0)), loss, grad
