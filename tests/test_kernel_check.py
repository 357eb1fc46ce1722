"""`kernels/check`: every kernel and path against double precision, from C++, without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from autocompress_kernels.library import library_path, missing

SOURCE = Path(__file__).parents[1] / "kernels" / "check" / "check.cpp"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


def test_every_path_is_within_its_limits(tmp_path: Path) -> None:
    library, program = library_path(), tmp_path / "check"
    command = [str(COMPILER), "-std=c++17", "-O1", str(SOURCE), "-o", str(program)]
    command += [str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    run = subprocess.run([program, "300", "5"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert "portable: 300 cases" in run.stdout
