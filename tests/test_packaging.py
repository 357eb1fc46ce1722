"""What `pip install` puts on a machine, with a compiler and without, and what the library needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"autocompress": ROOT, "autocompress_kernels": ROOT / "kernels"}
CSRC = ROOT / "kernels" / "autocompress_kernels" / "csrc"
LIBRARY = next(CSRC.parent.glob("libautocompress_kernels.*"), None)
COMPILERS = ("c++", "g++", "clang++")

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake here")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="there is no C++ compiler here"
)
needs_library = pytest.mark.skipif(
    LIBRARY is None or sys.platform != "linux" or shutil.which("readelf") is None,
    reason="there is no library of the kernels here, or no readelf to look into it",
)


def build(hook: str, project: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a hook of the build backend in `project`, as pip does; the wheel is left in `out`."""
    out.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k != "AUTOCOMPRESS_NO_KERNELS"}
    return subprocess.run(
        [sys.executable, "-c", f"import scikit_build_core.build as b; b.{hook}({str(out)!r})"],
        cwd=project,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def wheel(out: Path) -> zipfile.ZipFile:
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """The project with C++ sources that compile in no time."""
    project = tmp_path / "project"
    csrc = project / CSRC.relative_to(ROOT)
    csrc.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "kernels/CMakeLists.txt"):
        shutil.copy(ROOT / name, project / name)
    shutil.copytree(ROOT / "search_spaces", project / "search_spaces")
    for source in CSRC.glob("isa_*.cpp"):
        isa = source.stem.removeprefix("isa_")
        (csrc / source.name).write_text(f'extern "C" int ack_{isa}(void) {{ return 1; }}\n')
    (csrc / "dispatch.cpp").write_text('extern "C" int ack_abi(void) { return 1; }\n')
    for package, root in SOURCE_ROOTS.items():
        (project / root.relative_to(ROOT) / package).mkdir(exist_ok=True)
        (project / root.relative_to(ROOT) / package / "__init__.py").write_text(
            '__version__ = "1.2.3"\n'
        )
    return project


def test_wheel_has_every_module_and_data_file(tmp_path: Path) -> None:
    done = build("build_wheel", ROOT, tmp_path, AUTOCOMPRESS_NO_KERNELS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {f"autocompress/search_spaces/{p.name}" for p in ROOT.glob("search_spaces/*.toml")}
    for package, root in SOURCE_ROOTS.items():
        for suffix in ("*.py", "*.css", "py.typed"):
            expected |= {str(p.relative_to(root)) for p in (root / package).rglob(suffix)}
    names = {name for name in wheel(tmp_path).namelist() if ".dist-info/" not in name}
    assert names == expected, "the wheel must hold the packages and nothing else"


@needs_cmake
@needs_compiler
def test_wheel_with_library_fits_every_python_of_the_platform(
    miniature: Path, tmp_path: Path
) -> None:
    done = build("build_wheel", miniature, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    built = wheel(tmp_path / "out")
    assert re.search(r"/autocompress-1\.2\.3-py3-none-(?!any)\w+\.whl$", str(built.filename))
    assert sum(n.startswith("autocompress_kernels/libauto") for n in built.namelist()) == 1


@needs_cmake
def test_without_a_compiler_the_install_succeeds_and_says_so(
    miniature: Path, tmp_path: Path
) -> None:
    # A library that an editable install has left there must not slip in.
    (miniature / "kernels" / "autocompress_kernels" / "libautocompress_kernels.so").touch()
    done = build("build_wheel", miniature, tmp_path / "out", CC="false", CXX="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WITHOUT its native kernels" in done.stdout
    built = wheel(tmp_path / "out")
    assert str(built.filename).endswith("-py3-none-any.whl")
    assert not [name for name in built.namelist() if "libautocompress" in name]


@needs_cmake
def test_kernels_that_were_asked_for_are_not_left_out(miniature: Path, tmp_path: Path) -> None:
    done = build(
        "build_wheel",
        miniature,
        tmp_path / "out",
        CC="false",
        CXX="false",
        AUTOCOMPRESS_NO_KERNELS="0",
    )
    assert done.returncode != 0
    assert not list((tmp_path / "out").glob("*.whl"))


@needs_cmake
@needs_compiler
def test_library_that_needs_the_cpp_runtime_does_not_link(miniature: Path, tmp_path: Path) -> None:
    csrc = miniature / CSRC.relative_to(ROOT)
    (csrc / "late.cpp").write_text("int *late(void) { return new int; }\n")
    done = build("build_wheel", miniature, tmp_path / "out", AUTOCOMPRESS_NO_KERNELS="0")
    assert done.returncode != 0
    assert "operator new" in done.stdout + done.stderr


@needs_cmake
@needs_compiler
def test_editable_install_is_its_folders(miniature: Path, tmp_path: Path) -> None:
    done = build("build_editable", miniature, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    built = wheel(tmp_path / "out")
    (pth,) = (name for name in built.namelist() if name.endswith(".pth"))
    assert built.read(pth).decode().split()[-2:] == [str(miniature), str(miniature / "kernels")]
    (finder,) = (name for name in built.namelist() if name.endswith(".py"))
    assert "\ninstall({}, {}, {}, []," in built.read(finder).decode(), "it must map no module"
    assert list((miniature / "kernels" / "autocompress_kernels").glob("libautocompress_kernels.*"))


def test_every_instruction_set_is_built() -> None:
    listing = (ROOT / "kernels" / "CMakeLists.txt").read_text(encoding="utf-8")
    built = {"portable", *re.findall(r"^ *add_isa\((\w+)", listing, re.MULTILINE)}
    sources = {path.stem.removeprefix("isa_") for path in CSRC.glob("isa_*.cpp")}
    assert built == sources, "kernels/CMakeLists.txt must name every isa_*.cpp"
    assert "-march=native" not in listing


def test_everything_that_builds_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].replace("_", "-").lower() for line in pins.splitlines()}
    needed = {
        re.split(r"[^\w-]", requirement)[0].lower()
        for requirement in (
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *(r for extra in project["project"]["optional-dependencies"].values() for r in extra),
        )
    }
    assert needed | {"cmake", "ninja"} <= pinned


@needs_library
def test_library_needs_only_the_c_library() -> None:
    listing = subprocess.run(
        ["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing))
    assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"}


@needs_library
def test_library_exports_its_abi_and_no_other_names() -> None:
    listing = subprocess.run(
        ["readelf", "-W", "--dyn-syms", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    exported = set(re.findall(r" (?:GLOBAL|WEAK) +DEFAULT +\d+ (\w+)", listing))
    header = (CSRC / "autocompress_kernels.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^[a-z][\w ]*[ *](ack_\w+)\(", header, re.MULTILINE))
    assert "ack_linear" in declared <= exported
    assert {name for name in exported if not name.startswith("ack_")} == set()
