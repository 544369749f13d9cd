"""csrc/ without Python: headers that meet in one file, and the kernels on aarch64."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sysconfig

import pytest

from ..compiling import compiler
from ..processes import run_child
from ..repository import repository

CSRC = repository("csrc")
CHECK = pathlib.Path(__file__).with_name("kernels_check.cpp")
FLAGS = ["-std=c++17", f"-I{CSRC}", "-Wall", "-Wextra", "-Werror", "-pthread"]
ARM = "aarch64-linux-gnu-g++"


def compile_(*command) -> None:
    done = run_child(list(map(str, command)), stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backwards", [False, True])
def test_headers_meet_in_one_file(tmp_path, backwards):
    """A namespace a kernel: nothing is defined twice, and no header leans on one that happens to come before it."""
    command = compiler()
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs pybind11")
    import pybind11

    headers = sorted((path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.h")), reverse=backwards)
    assert {name.split("/")[0] for name in headers} == {"api", "bind", "host", "simd"}
    if backwards:
        headers.remove("bind/bindings.h")  # pybind11 takes the compiler most of its time
    (tmp_path / "all.cpp").write_text("".join(f'#include "{name}"\n' for name in headers))
    found = [
        flag for folder in (sysconfig.get_path("include"), pybind11.get_include()) for flag in ("-isystem", folder)
    ]
    isas = "-DSIMCTG_ISAS(DO,...)=DO(generic,__VA_ARGS__)"
    compile_(*command, *FLAGS, *found, isas, "-fsyntax-only", tmp_path / "all.cpp")


@pytest.mark.full
def test_kernels_on_aarch64(tmp_path):
    """All of them are compiled for NEON; where an emulator is installed, they are held against double precision."""
    if not shutil.which(ARM):
        pytest.skip(f"needs the cross compiler {ARM}")
    flags = [*FLAGS, "-O2", "-DNDEBUG", "-DSIMCTG_ISAS(DO,...)=DO(neon,__VA_ARGS__)"]
    objects = []
    for source in (CHECK, *sorted(CSRC.glob("host/*.cpp")), *sorted(CSRC.glob("simd/*.cpp"))):
        objects.append(tmp_path / f"{source.parent.name}-{source.stem}.o")
        isa = ["-DSIMCTG_ISA=neon"] if source.parent.name == "simd" else []
        compile_(ARM, *flags, *isa, "-c", source, "-o", objects[-1])
    compile_(ARM, "-static", "-pthread", "-Wl,--no-warnings", *objects, "-o", tmp_path / "check")
    if not shutil.which("qemu-aarch64"):
        pytest.skip("compiled, not run: needs the emulator qemu-aarch64")
    done = run_child(["qemu-aarch64", str(tmp_path / "check")], stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("neon\n")
