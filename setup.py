"""Builds the C++ extension `simctg_fast._C` and maps the top-level folder `kernels/` to `simctg_fast.kernels`.

Everything declarative is in pyproject.toml. Environment variables read here:

* ``SIMCTG_FAST_BUILD_CPP=0`` leaves the extension out; the PyTorch path serves instead.
* ``SIMCTG_FAST_REQUIRE_EXT=1`` makes a failed build an error. By default it is reported and the installation goes on.
  pip shows nothing of the report, so it is also written to ``_build_error.txt``, which takes the extension's place in
  the package: `simctg-fast env` prints it.
* ``MAX_JOBS`` compile jobs at a time (default: the processors this process may use).
* ``CXX``, ``CXXFLAGS``, ``LDFLAGS`` as everywhere.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
RECORD = "_build_error.txt"  # beside where the library would be; `simctg_fast/ops/_backends.py` reads it
LEFT_OUT = "left out by SIMCTG_FAST_BUILD_CPP=0"
RECORD_LINES, RECORD_WIDTH = 200, 2000  # what is kept of a compiler's message
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))
SIMD = "csrc/simd/"  # compiled once for each instruction set, every other file once

# The flags of each set, by machine, the best one first. No -march=native: a wheel has to run on other machines, so the
# set is chosen at run time.
ISAS_X86_64 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}
ISAS = {"x86_64": ISAS_X86_64, "amd64": ISAS_X86_64, "aarch64": {"neon": []}, "arm64": {"neon": []}}
# Sets that add instructions to another one, for the sources that ask for them: name, base, the macros asked for and the
# flags that define them. The best one first.
EXTENDED_X86_64 = [
    ("avx512_bf16", "avx512", {"__AVX512BF16__": "-mavx512bf16", "__AVX512VNNI__": "-mavx512vnni"}),
    ("avx512_vnni", "avx512", {"__AVX512VNNI__": "-mavx512vnni"}),
    ("avx2_vnni", "avx2", {"__AVXVNNI__": "-mavxvnni"}),
]
# Where a short loop lies among the lines of the cache is a fifth of its time, and else changes with any other source.
SIMD_FLAGS = ["-falign-functions=64", "-falign-loops=32"]
# GCC 12 takes the deliberately undefined vectors inside its own intrinsics for a mistake of ours.
ISA_WARNINGS = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CXX_FLAGS = ["-Icsrc", "-O3", "-std=c++17", "-fPIC", "-pthread", "-DNDEBUG", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-pthread"]


class BuildError(Exception):
    """The extension could not be built; the text says why in a line, ``output`` is what the tools said."""

    def __init__(self, reason: str, output: list[str] | None = None):
        super().__init__(reason)
        self.output = output or []


def instruction_sets() -> dict[str, list[str]]:
    """Those that this machine's build holds, the best one first, with their flags."""
    wide = sys.maxsize > 2**32
    return ISAS.get(platform.machine().lower() if wide else "", {"generic": []})


def extended_sets() -> list[tuple[str, str, dict[str, str]]]:
    return EXTENDED_X86_64 if instruction_sets() is ISAS_X86_64 else []


def objects() -> Iterator[tuple[str, str, list[str]]]:
    """For every object its source, its name without the ending, and its own flags."""
    for source in SOURCES:
        name = source.removesuffix(".cpp")
        if not source.startswith(SIMD):
            yield source, name, []
            continue
        text = (ROOT / source).read_text(encoding="utf-8")
        sets = dict(instruction_sets())
        for isa, base, flags in extended_sets():
            if any(macro in text for macro in flags):
                sets[isa] = [*sets[base], *flags.values()]
        for isa, flags in sets.items():
            warnings = ISA_WARNINGS if flags else []
            yield source, f"{name}.{isa}", [*flags, *SIMD_FLAGS, *warnings, f"-DSIMCTG_ISA={isa}"]


def compiler() -> str:
    return os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"


def check_compiler() -> None:
    """Raise BuildError where there is none, before ninja says so once for every source."""
    words = [word for word in shlex.split(compiler()) if "=" not in word]
    if not words or shutil.which(words[0]) is None:
        name = words[0] if words else compiler()
        raise BuildError(f"no C++ compiler: {name!r} was not found (the variable CXX names another)")


def ninja_command() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        if ninja.BIN_DIR:
            return os.path.join(ninja.BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found; `pip install ninja` provides it")
    return found


def include_flags() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 was not found; `pip install pybind11` provides it") from error
    folders = dict.fromkeys([sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()])
    return [flag for folder in folders for flag in ("-isystem", folder)]


def ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_flags(flags: list[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


def ninja_file(folder: str, library: str) -> str:
    """Text of the build.ninja, to be run in the repository root: one edge an object, with its depfile, and one link."""
    each = " ".join(f"DO({isa},__VA_ARGS__)" for isa in instruction_sets())
    extended = " ".join(f"DO({isa},{base},__VA_ARGS__)" for isa, base, *_ in extended_sets())
    cxx_flags = [*CXX_FLAGS, f"-DSIMCTG_ISAS(DO,...)={each}", f"-DSIMCTG_EXTENDED_ISAS(DO,...)={extended}"]
    cxx_flags += [*include_flags(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {ninja_path(folder)}",
        f"cxx = {compiler().replace('$', '$$')}",
        f"cxx_flags = {ninja_flags(cxx_flags)}",
        f"link_flags = {ninja_flags([*LINK_FLAGS, *shlex.split(os.environ.get('LDFLAGS', ''))])}",
        "rule compile",
        "  command = $cxx $cxx_flags $own_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx $in $link_flags -o $out",
        "  description = link $out",
    ]
    built = []
    for source, name, flags in objects():
        built.append(ninja_path(f"{folder}/{name}.o"))
        lines += [f"build {built[-1]}: compile {ninja_path(source)}", f"  own_flags = {ninja_flags(flags)}"]
    lines += [f"build {ninja_path(library)}: link {' '.join(built)}", f"default {ninja_path(library)}"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder; the second waits and finds the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        with contextlib.suppress(ImportError):  # no fcntl outside POSIX
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class BuildExtension(build_ext):
    """`build_ext` that hands the compiling to ninja, so that an edit to one source costs one compile job.

    The objects live in ``build/`` under the repository whatever setuptools calls its temporary folder: an editable
    install, a wheel and ``build_ext --inplace`` share them.
    """

    def run(self) -> None:
        if os.environ.get("SIMCTG_FAST_BUILD_CPP") == "0":
            self._put_record(LEFT_OUT)
            print("simctg_fast: SIMCTG_FAST_BUILD_CPP=0, built without the C++ extension")
            return
        library = Path(self.get_ext_filename("_C")).name
        folder = f"build/ninja-{self.plat_name}-{sys.implementation.cache_tag}"
        with locked(ROOT / folder):
            try:
                self._ninja(folder, f"{folder}/{library}")
            except BuildError as error:
                shutil.rmtree(ROOT / folder, ignore_errors=True)
                python = f"Python {platform.python_version()}, {sysconfig.get_config_var('EXT_SUFFIX')}"
                self._put_record(str(error), f"({python}, compiler {compiler()!r})", *error.output)
                if os.environ.get("SIMCTG_FAST_REQUIRE_EXT") == "1":
                    raise SystemExit(f"simctg_fast: the C++ extension was not built: {error}") from None
                print(
                    f"simctg_fast: the C++ extension was not built: {error}\n"
                    "simctg_fast: going on without it; the slower PyTorch path serves instead "
                    "(SIMCTG_FAST_REQUIRE_EXT=1 makes this an error)",
                    file=sys.stderr,
                )
                return
            for target in self._targets():
                install_library(ROOT / folder / library, target)
                target.with_name(RECORD).unlink(missing_ok=True)

    def _ninja(self, folder: str, library: str) -> None:
        check_compiler()
        build_file = ROOT / folder / "build.ninja"
        build_file.write_text(ninja_file(folder, library))
        jobs = self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else os.environ.get("MAX_JOBS")
        if jobs is None:
            jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        command = [ninja_command(), "-f", str(build_file.relative_to(ROOT)), "-j", str(jobs)]
        command += ["--quiet"] if self.verbose < 1 else []
        said = []
        try:
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ninja:
                for line in ninja.stdout or ():
                    said.append(line.decode(errors="replace").rstrip())
                    print(said[-1], flush=True)
        except OSError as error:
            raise BuildError(f"{command[0]} did not start: {error}") from error
        if ninja.returncode != 0:
            raise BuildError(reason(said, ninja.returncode), failures(said))

    def _targets(self) -> list[Path]:
        """Where the library goes: beside the sources for an in-place build, into the build folder for a wheel."""
        inplace, regular = self._get_inplace_equivalent(self.get_finalized_command("build_py"), self.extensions[0])
        targets = [ROOT / inplace] if self.inplace else []
        if self.editable_mode or not self.inplace:
            targets.append(Path(regular))
        return targets

    def _put_record(self, *lines: str) -> None:
        """In the place of the library: one of an earlier build must not be installed, or stay importable."""
        for target in self._targets():
            target.unlink(missing_ok=True)
            write_record(target.with_name(RECORD), *lines)

    def get_outputs(self) -> list[str]:
        paths = super().get_outputs()
        return [path for path in (*paths, *map(record_of, paths)) if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        mapping |= {record_of(built): record_of(source) for built, source in mapping.items()}
        return {built: source for built, source in mapping.items() if os.path.exists(built)}


def record_of(library: str) -> str:
    return os.path.join(os.path.dirname(library), RECORD)


def write_record(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line[:RECORD_WIDTH] for line in lines[:RECORD_LINES]]
    path.write_text("\n".join(text) + "\n", encoding="utf-8", errors="replace")


def reason(said: list[str], code: int) -> str:
    """The line of ninja's output that says what went wrong, the compiler's first error if there is one."""
    spoken = [line for line in said if not line.startswith((compiler(), "FAILED: ", "ninja: build stopped", "["))]
    errors = [line for line in spoken if re.search(r"\berror\b|not found|undefined|cannot|killed", line, re.IGNORECASE)]
    found = errors or [line for line in spoken if line]
    return found[0].strip() if found else f"{compiler()!r} failed without a message (ninja: exit status {code})"


def failures(said: list[str]) -> list[str]:
    """``said`` without the steps that went well."""
    return [line for line in said if not re.match(r"\[\d+/\d+\] ", line)]


def install_library(built: Path, target: Path) -> None:
    """Copies through a rename: a process that has the old library mapped keeps it."""
    if target.exists() and target.read_bytes() == built.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(built, scratch)
    os.replace(scratch, target)


if int(setuptools.__version__.split(".")[0]) < 77:  # it does not understand pyproject.toml, and says so at length
    text = f"setuptools {setuptools.__version__} is too old to build simctg_fast: pip install 'setuptools>=77'"
    write_record(ROOT / "simctg_fast" / RECORD, text)
    raise SystemExit(text)

setup(
    packages=[*find_packages(include=["simctg_fast", "simctg_fast.*"]), "simctg_fast.kernels"],
    package_dir={"simctg_fast.kernels": "kernels"},
    ext_modules=[Extension("simctg_fast._C", sources=SOURCES)],
    cmdclass={"build_ext": BuildExtension},
)
