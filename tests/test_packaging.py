"""What a wheel and an sdist hold: the package as it is here, its linked folders as real files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, folder: Path) -> Path:
    """A wheel or an sdist of a source tree, by the backend that pyproject.toml names."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return folder / done.stdout.splitlines()[-1]


def sources(package: Path) -> dict[str, bytes]:
    """Every file of the package, links followed, by its place in it; neither caches nor what a build leaves."""
    return {
        str(Path(folder, name).relative_to(package)): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith((".py", ".json", ".c", ".h", ".typed")) and "results" not in Path(folder).parts
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of this checkout, and the wheel that is made of the sdist alone."""
    folder = tmp_path_factory.mktemp("packed")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("python", "kernels", "bench", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    sdist = built("sdist", copy, folder)
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return sdist, built("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_wheel_is_the_package(packed: tuple[Path, Path], tmp_path: Path) -> None:
    """Byte for byte, by way of the sdist: neither lacks a file, and neither has a link."""
    sdist, wheel = packed
    with tarfile.open(sdist) as file:
        assert not [member.name for member in file.getmembers() if member.issym() or member.islnk()]
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    assert sources(tmp_path / "fusedkd") == sources(ROOT / "python" / "fusedkd")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_an_installed_wheel_works(packed: tuple[Path, Path], tmp_path: Path) -> None:
    """Away from the checkout, without Triton."""
    with zipfile.ZipFile(packed[1]) as file:
        file.extractall(tmp_path)
    program = "import sys; sys.modules['triton'] = None; import fusedkd; print(fusedkd.__file__, fusedkd.divergences())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path)) and "jsd" in done.stdout
