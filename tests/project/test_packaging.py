"""Installing: the four ways to import the kernels, what a wheel holds, and how the extension is built.

Everything happens in copies of the repository, so the working tree keeps its own build.
"""

from __future__ import annotations

import contextlib
import email
import importlib.util
import itertools
import os
import pathlib
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile

import pytest

import simctg_fast
from simctg_fast.ops import _backends

from ..processes import LIMIT, run_child, started
from ..repository import ROOT, repository

repository("setup.py")  # nothing here without it
PARTS = (
    *(
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
    ),
    *("kernels", "csrc", "simctg_fast"),
)
X86_64 = sysconfig.get_platform().endswith("x86_64")

pytestmark = pytest.mark.xdist_group("packaging")  # one worker builds the wheel


def missing_tool() -> str | None:
    """What an environment for running the library need not have, and one that builds it must."""
    for name in ("setuptools", "pybind11"):
        if importlib.util.find_spec(name) is None:
            return name
    if importlib.util.find_spec("ninja") is None and not shutil.which("ninja"):
        return "ninja"
    words = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return None if shutil.which(words[0]) else f"the compiler {words[0]}"


@pytest.fixture(scope="session")
def build_tools():
    if (missing := missing_tool()) is not None:
        pytest.skip(f"builds the library, which needs {missing}")


def run(*command, cwd="/", expect=0, path=(), **environment) -> str:
    """What a command printed, standard error included. `path` becomes PYTHONPATH."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SIMCTG_FAST_") and k != "MAX_JOBS"}
    inherited["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), inherited["PATH"]])  # where ninja is
    result = run_child(
        list(command),
        cwd=cwd,
        env={**inherited, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.STDOUT,
    )
    assert (result.returncode == 0) == (expect == 0), result.stdout
    return result.stdout


def python(code: str, **options) -> str:
    return run(options.pop("python", sys.executable), "-c", textwrap.dedent(code), **options).strip()


def copy_tree(target: pathlib.Path) -> pathlib.Path:
    """A clean checkout, but with the objects of the last build, which ninja recognises by their times."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target / name)
    for objects in (ROOT / "build").glob("ninja-*"):
        shutil.copytree(objects, target / "build" / objects.name)
    return target


@pytest.fixture(scope="session")
def tree(tmp_path_factory, build_tools):
    return copy_tree(tmp_path_factory.mktemp("checkout") / "a tree")  # the space is on purpose


@pytest.fixture(scope="session")
def wheel(tree):
    """Built where importing torch fails: nothing of it may be needed at build time."""
    code = """
        import sys
        sys.modules["torch"] = None
        from setuptools import build_meta
        build_meta.build_wheel("dist")
    """
    python(code, cwd=tree, SIMCTG_FAST_REQUIRE_EXT="1")
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A site-packages folder with the wheel in it."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def checkout(tree, wheel):
    """The tree after `build_ext --inplace`."""
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, SIMCTG_FAST_REQUIRE_EXT="1")
    return tree


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """A folder with a stand-in for the Hugging Face package `kernels`, at a version that transformers accepts."""
    folder = tmp_path_factory.mktemp("hugging_face")
    version = python("from transformers.utils import import_utils; print(import_utils.KERNELS_MIN_VERSION)")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        textwrap.dedent(f"""
        __version__ = {version!r}
        WHO = "hugging face"

        class Anything:
            def __init__(self, *args, **kwargs): pass
            def __call__(self, given=None, *args, **kwargs): return given
            def __getattr__(self, name): return Anything()

        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything
        """)
    )
    (folder / "kernels" / "layer.py").write_text("from . import WHO\n")
    metadata = folder / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


# Imports the library's kernels, the extension, and the transformers module that imports `kernels`.
USE = """
    import importlib.util, pathlib, sys
    import simctg_fast
    import simctg_fast.kernels
    from simctg_fast import viterbi_backtrace
    from simctg_fast.ops import _backends
    import transformers.integrations.hub_kernels
    from transformers.utils.import_utils import is_kernels_available
    assert _backends.extension() is not None, _backends.extension_error()
    print(pathlib.Path(simctg_fast.__file__).parent)
    print(pathlib.Path(simctg_fast.kernels.__file__).parent)
    print("taken" if importlib.util.find_spec("kernels") else "free", is_kernels_available())
"""


class TestKernelsFolder:
    """`kernels/` is `simctg_fast.kernels` however the library is imported, and never Hugging Face's `kernels`."""

    def test_wheel(self, site):
        package, kernels, name = python(USE, path=[site]).splitlines()
        assert package == str(site / "simctg_fast")
        assert kernels == str(site / "simctg_fast" / "kernels")
        assert name == "free False"

    @pytest.mark.parametrize("mode", ["lenient", pytest.param("strict", marks=pytest.mark.full)])
    def test_editable(self, mode, tmp_path, build_tools):
        if importlib.util.find_spec("pip") is None:
            pytest.skip("needs pip")
        tree = copy_tree(tmp_path / "tree")
        venv.create(tmp_path / "venv", with_pip=False)
        interpreter = tmp_path / "venv" / "bin" / "python"
        (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
        # The packages of the running environment, but not what its own .pth files add (this library, if editable).
        (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps"]
        install += ["--no-build-isolation", "--config-settings", f"editable_mode={mode}", "--editable", tree]
        run(*install, SIMCTG_FAST_REQUIRE_EXT="1")
        package, kernels, name = python(USE, python=interpreter).splitlines()
        if mode == "lenient":
            assert package == str(tree / "simctg_fast")
            assert kernels == str(tree / "kernels")
        assert name == "free False"
        python("import simctg_fast.kernels", python=interpreter, cwd=tree)  # its own root is on sys.path as well
        assert (tmp_path / "venv" / "bin" / "simctg-fast").is_file()

    def test_plain_checkout(self, checkout):
        """The root of the repository on sys.path, nothing installed, no package of Hugging Face's."""
        package, kernels, name = python(USE, path=[checkout]).splitlines()
        assert package == str(checkout / "simctg_fast")
        assert kernels == str(checkout / "kernels")
        assert name == "taken False"

    def test_plain_checkout_under_the_name_kernels(self, checkout):
        code = """
            import importlib, sys
            import kernels
            assert not [name for name in vars(kernels) if not name.startswith("__")], vars(kernels)
            for name in ("candidate_select", "contrastive_loss"):
                try:
                    importlib.import_module("kernels." + name)
                except ModuleNotFoundError:
                    continue
                raise SystemExit("a kernel was imported a second time, as kernels." + name)
            import simctg_fast.kernels
            assert simctg_fast.kernels is not kernels
        """
        (checkout / "kernels" / "candidate_select.py").touch()
        python(code, path=[checkout])

    @pytest.mark.parametrize("first", ["checkout", pytest.param("hugging face", marks=pytest.mark.full)])
    def test_with_hugging_faces_package(self, checkout, hugging_face, first):
        path = [checkout, hugging_face] if first == "checkout" else [hugging_face, checkout]
        code = f"""
            import kernels
            import kernels.layer
            assert kernels.WHO == kernels.layer.WHO == "hugging face"
            assert sys.modules["kernels"] is kernels and kernels.__spec__.origin == kernels.__file__
            assert {str(hugging_face)!r} in kernels.__file__
            from transformers import GPT2LMHeadModel
        """
        package, kernels, name = python(textwrap.dedent(USE) + textwrap.dedent(code), path=path).splitlines()
        assert package == str(checkout / "simctg_fast")
        assert kernels == str(checkout / "kernels")
        assert name == "taken True"

    @pytest.mark.full
    def test_the_clash_is_real(self, checkout, hugging_face, tmp_path):
        """The tests above could not fail if a plain `kernels/__init__.py` did no harm."""
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").touch()
        out = python("from transformers import GPT2LMHeadModel", path=[tmp_path, hugging_face], expect=1)
        assert "cannot import name" in out
        assert "from 'kernels'" in out

    def test_an_error_in_the_other_package_is_its_own(self, checkout, tmp_path):
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("import missing_dependency")
        out = python("import kernels", path=[checkout, tmp_path], expect=1)
        assert "No module named 'missing_dependency'" in out

    def test_a_folder_that_is_no_package_is_passed_over(self, checkout, hugging_face, tmp_path):
        (tmp_path / "kernels").mkdir()
        out = python("import kernels; print(kernels.WHO)", path=[checkout, tmp_path, hugging_face])
        assert out == "hugging face"


class TestClones:
    """Several clones on sys.path: each would step aside for the other, for ever."""

    CODE = "import kernels, sys; print(getattr(kernels, 'WHO', 'empty'), sys.modules['kernels'] is kernels)"

    @pytest.fixture
    def clones(self, tmp_path):
        """A folder, one with a symbolic link to it, a folder of its own, a zip file, and one without sources."""
        folders = [tmp_path / f"clone {number}" for number in range(3)]
        for folder in (folders[0], folders[2]):
            shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        folders[1].mkdir()
        (folders[1] / "kernels").symlink_to(folders[0] / "kernels")
        packed = tmp_path / "packed.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(ROOT / "kernels" / "__init__.py", "kernels/__init__.py")
        compiled = tmp_path / "compiled" / "kernels"
        compiled.mkdir(parents=True)
        py_compile.compile(str(ROOT / "kernels" / "__init__.py"), str(compiled / "__init__.pyc"))
        return [*folders, packed, compiled.parent]

    @pytest.mark.parametrize("reverse", [False, True])
    def test_alone(self, clones, reverse):
        assert python(self.CODE, path=clones[::-1] if reverse else clones) == "empty True"
        for pair in itertools.permutations(clones, 2):
            assert python(self.CODE, path=pair) == "empty True"

    @pytest.mark.parametrize("place", range(6))
    def test_with_hugging_faces_package(self, clones, hugging_face, place):
        path = [*clones[:place], hugging_face, *clones[place:]]
        assert python(self.CODE, path=path) == "hugging face True"
        assert python("import kernels.layer; print(kernels.layer.WHO)", path=path) == "hugging face"

    def test_with_folders_that_are_no_packages(self, clones, hugging_face, tmp_path):
        (tmp_path / "kernels").mkdir()
        path = [clones[0], tmp_path, clones[2], tmp_path, tmp_path / "nowhere"]
        assert python(self.CODE, path=path) == "empty True"
        assert python(self.CODE, path=[*path, hugging_face]) == "hugging face True"

    def test_from_the_working_directory(self, clones, hugging_face):
        """ "" on sys.path, as `python -c` has it, and the same folder once more by its name."""
        for path in ([clones[2]], [clones[2], clones[0], hugging_face]):
            expected = "empty True" if len(path) == 1 else "hugging face True"
            assert python(self.CODE, path=path, cwd=clones[0]) == expected

    def test_with_a_clone_of_an_older_version(self, clones, tmp_path, hugging_face):
        """One that steps aside for whatever it finds, so nothing may hand over to it."""
        old = tmp_path / "old" / "kernels"
        old.mkdir(parents=True)
        (old / "__init__.py").write_text("def _step_aside(): raise SystemExit('run')\n_step_aside()\n")
        assert python(self.CODE, path=[clones[0], old.parent]) == "empty True"
        assert python(self.CODE, path=[clones[0], old.parent, hugging_face]) == "hugging face True"


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, wheel):
        names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
        assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"simctg_fast"}
        expected = {"simctg_fast/py.typed"}
        expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "simctg_fast").rglob("*.py")}
        expected |= {
            p.relative_to(ROOT).as_posix() for p in (ROOT / "simctg_fast/assets/bundled").glob("*") if p.is_file()
        }
        expected |= {f"simctg_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
        assert expected <= names
        assert [name for name in names if re.fullmatch(r"simctg_fast/_C\..*", name)]

    def test_metadata(self, wheel):
        archive = zipfile.ZipFile(wheel)
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert metadata["Name"] == "simctg_fast"
        assert metadata["Version"] == simctg_fast.__version__
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        needs = metadata.get_all("Requires-Dist")
        assert "torch>=2.11" in needs
        assert "transformers<6,>=5.17" in needs
        assert 'triton>=3.6; platform_system == "Linux"' in needs
        required = {re.match(r"[\w-]+", need)[0] for need in needs if "extra ==" not in need}
        expected = {
            "torch",
            "triton",
            "transformers",
            "sentencepiece",
            "protobuf",
            "safetensors",
            "typer",
            "tqdm",
            "rich",
            "numpy",
            "pyyaml",
        }
        assert required == expected
        assert set(metadata.get_all("Provides-Extra")) >= {"test", "bench", "plot", "ray", "lightning", "zstd", "dev"}
        assert "simctg-fast = simctg_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")

    def test_the_tests_run_against_it(self, site):
        """As `pytest` in the root of the repository: all are collected, pages are found beside the tests."""
        code = """
            import sys
            sys.path = [place for place in sys.path if place]  # where the repository's own package is
            import pytest, simctg_fast
            print(simctg_fast.__file__)
            sys.exit(pytest.main(sys.argv[1:]))
        """
        some = "test_rooms or test_tagging_page or test_make_targets or test_type_checkers or test_submodules"
        options = ["-q", "-p", "no:cacheprovider", "-k", some, "-p", "no:xdist"]
        out = run(sys.executable, "-c", textwrap.dedent(code), *options, cwd=ROOT, path=[site])
        assert out.startswith(str(site / "simctg_fast"))
        assert re.search(r"\d\d passed(?!.*failed)", out), out

    @pytest.mark.full
    def test_from_a_source_distribution_in_isolation(self, tree, tmp_path):
        """What `pip install simctg_fast` does where there is no wheel: an environment of its own to build in."""
        python("from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=tree)
        (sdist,) = (tree / "dist").glob("*.tar.gz")
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", tmp_path, sdist]
        out = run(*command, SIMCTG_FAST_REQUIRE_EXT="1")
        installed = re.search(r"Successfully installed (.*)", out)[1]
        assert "pybind11" in installed
        assert "torch" not in installed
        (built,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            archive.extractall(tmp_path / "site")
        assert python(USE, path=[tmp_path / "site"]).splitlines()[0] == str(tmp_path / "site" / "simctg_fast")


needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")


class TestExtension:
    @needs_extension
    @pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
    def test_depends_on_the_c_and_cpp_runtimes_only(self):
        """No torch library, so it survives a torch upgrade; no OpenMP, so no second pool fights for the cores."""
        needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", _backends.extension().__file__))
        assert needed, "readelf found no dependency at all"
        allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|ld-linux.*|libc\+\+|libc\+\+abi)\.so.*"
        assert [name for name in needed if not re.fullmatch(allowed, name)] == []

    @needs_extension
    @pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
    def test_exports_the_entry_point_only(self):
        """A second library with the same C++ names in one process must not be linked with ours."""
        defined = run("nm", "-D", "-C", "--defined-only", _backends.extension().__file__)
        assert "PyInit__C" in defined
        assert [line for line in defined.splitlines() if re.match(r"[0-9a-f]* *\w simctg::", line)] == []

    @pytest.mark.skipif(not X86_64 or not shutil.which("nm"), reason="needs nm and x86-64")
    def test_wide_instructions_stay_where_they_belong(self, checkout):
        """The linker keeps one copy of a weak function: were it the AVX-512 one, every processor would get it."""
        (folder,) = (checkout / "build").glob(f"ninja-*-{sys.implementation.cache_tag}")
        wide = sorted((folder / "csrc" / "simd").glob("*.avx*.o"))
        sources = [path.read_text() for path in (checkout / "csrc" / "simd").glob("*.cpp")]
        extended = [path for path in wide if "_" in path.suffixes[-2]]
        assert {path.suffixes[-2] for path in extended} == {".avx512_bf16", ".avx512_vnni", ".avx2_vnni"}
        assert len(wide) == 2 * len(sources) + len(extended)
        for compiled in wide:
            symbols = run("nm", "-C", "--defined-only", compiled).splitlines()
            assert [line for line in symbols if re.match(r"[0-9a-f]* *W ", line)] == [], compiled.name


# A stand-in for csrc/: compiles in a moment, and its files refuse the wrong flags.
TOY = {
    "bind/bindings.cpp": """
        #include <Python.h>
        #include "host/value.h"
        static PyObject* get(PyObject*, PyObject*) { return PyLong_FromLong(value()); }
        static PyMethodDef methods[] = {{"get", get, METH_NOARGS, nullptr}, {}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
        PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
    """,
    "host/value.h": "int value();",
    "host/value.cpp": """
        #include "host/value.h"
        #if defined(__AVX2__) || defined(__AVX512F__) || defined(SIMCTG_ISA)
        #error "a portable file was compiled for one instruction set"
        #endif
        #define DECLARE(isa, ...) int wide_##isa();
        #define ADD(isa, ...) + wide_##isa()
        SIMCTG_ISAS(DECLARE, )
        int value() { return 40 SIMCTG_ISAS(ADD, ); }
    """,
    "simd/wide.cpp": """
        #if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
        constexpr int flags = 2;
        #elif defined(__AVX2__) && defined(__FMA__)
        constexpr int flags = 1;
        #else
        constexpr int flags = 0;
        #endif
        enum { generic = 0, neon = 0, avx2 = 1, avx512 = 2 };
        static_assert(SIMCTG_ISA == flags, "compiled with the flags of another instruction set");
        #define NAMED(isa) wide_##isa
        #define FUNCTION(isa) NAMED(isa)
        int FUNCTION(SIMCTG_ISA)() { return 1; }
    """,
}
SIMD = ["simd/wide.cpp"] * (3 if X86_64 else 1)  # once for each instruction set


@pytest.mark.skipif(sys.platform == "win32", reason="the build rules are written for GCC and Clang")
class TestBuild:
    """setup.py's build_ext on a toy csrc/."""

    @pytest.fixture
    def toy(self, tmp_path, build_tools):
        toy = tmp_path / "a toy"
        (toy / "simctg_fast").mkdir(parents=True)
        (toy / "simctg_fast" / "__init__.py").write_text("__version__ = '0'\n")
        (toy / "kernels").mkdir()
        (toy / "kernels" / "__init__.py").touch()
        for name, text in TOY.items():
            (toy / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
            (toy / "csrc" / name).write_text(textwrap.dedent(text))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, toy / name)
        return toy

    @staticmethod
    def build(toy, *arguments, **options) -> list[str]:
        """The sources that were compiled, in order of name."""
        out = run(sys.executable, "setup.py", *(arguments or ("build_ext", "--inplace")), cwd=toy, **options)
        return sorted(re.findall(r"compile csrc/(\S+)", out))

    @staticmethod
    def value(toy) -> str:
        return python("from simctg_fast import _C; print(_C.get())", path=[toy])

    @staticmethod
    def libraries(toy) -> list[str]:
        return sorted(path.relative_to(toy).parts[0] for path in toy.rglob("_C.*.so"))

    @staticmethod
    def edit(source, old, new):
        text = source.read_text()
        assert old in text
        source.write_text(text.replace(old, new))

    def test_an_edit_compiles_what_it_touches(self, toy):
        sources = ["bind/bindings.cpp", "host/value.cpp", *SIMD]
        assert self.build(toy) == sources
        assert self.value(toy) == str(40 + len(SIMD))
        assert self.build(toy) == []
        (toy / "csrc" / "host" / "value.cpp").touch()
        assert self.build(toy) == ["host/value.cpp"]
        self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return 50")
        assert self.build(toy) == ["host/value.cpp"]
        assert self.value(toy) == str(50 + len(SIMD))
        (toy / "csrc" / "host" / "value.h").touch()
        assert self.build(toy) == sources[:2]
        (toy / "csrc" / "simd" / "wide.cpp").touch()
        assert self.build(toy) == SIMD
        assert self.build(toy, CXXFLAGS="-DANOTHER_FLAG") == sources

    def test_one_build_serves_wheel_and_checkout(self, toy):
        assert self.build(toy) != []
        assert self.build(toy, "build") == []
        assert self.libraries(toy) == ["build", "build", "simctg_fast"]  # ninja's, the wheel's, the checkout's

    @pytest.mark.parametrize(("machine", "isa"), [("arm64", "neon"), ("ppc64le", "generic")])
    def test_other_processors_get_one_instruction_set(self, toy, machine, isa):
        code = f"""
            import platform, runpy, sys
            platform.machine = lambda: {machine!r}
            sys.argv = ["setup.py", "build_ext", "--inplace"]
            runpy.run_path("setup.py", run_name="__main__")
        """
        out = python(code, cwd=toy)
        assert len(re.findall(r"compile csrc/(\S+)", out)) == 3
        assert [path.name for path in (toy / "build").rglob("wide.*.o")] == [f"wide.{isa}.o"]
        assert self.value(toy) == "41"

    def test_a_broken_source_leaves_no_stale_library(self, toy):
        self.build(toy)
        self.build(toy, "build")
        assert self.libraries(toy) == ["build", "build", "simctg_fast"]
        self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return forty_two")
        out = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=toy)
        assert "forty_two" in out, "the compiler's own message has to be shown"
        assert "going on without it" in out
        assert self.libraries(toy) == ["build"]  # what an earlier build made for a wheel, which the next one replaces
        out = run(sys.executable, "setup.py", "build", cwd=toy)
        assert "forty_two" in out
        assert self.libraries(toy) == []
        self.edit(toy / "csrc" / "host" / "value.cpp", "return forty_two", "return 40")
        self.build(toy)
        assert self.libraries(toy) == ["build", "simctg_fast"]

    def test_a_broken_source_still_makes_a_wheel(self, toy):
        self.build(toy)
        self.build(toy, "build")
        self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return forty_two")
        python("from setuptools import build_meta; build_meta.build_wheel('dist')", cwd=toy)
        (wheel,) = (toy / "dist").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert "simctg_fast/__init__.py" in names
        assert not [name for name in names if "_C" in name]
        assert f"simctg_fast/{_backends.BUILD_RECORD}" in names

    def test_required(self, toy):
        self.build(toy)
        self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return forty_two")
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        out = run(*command, cwd=toy, SIMCTG_FAST_REQUIRE_EXT="1", expect=1)
        assert "forty_two" in out
        assert "the C++ extension was not built" in out
        assert self.libraries(toy) == []

    @staticmethod
    def record(toy) -> str:
        return (toy / "simctg_fast" / _backends.BUILD_RECORD).read_text()

    @pytest.mark.parametrize(
        ("compiler", "reason"),
        [
            ("/nowhere/c++ -x", "no C++ compiler: '/nowhere/c++' was not found (the variable CXX names another)"),
            ("false", "'false' failed without a message (ninja: exit status 1)"),
        ],
    )
    def test_no_compiler(self, toy, compiler, reason):
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        assert "going on without it" in run(*command, cwd=toy, CXX=compiler)
        assert self.record(toy).splitlines()[0] == reason
        run(*command, cwd=toy, CXX=compiler, SIMCTG_FAST_REQUIRE_EXT="1", expect=1)

    @pytest.mark.parametrize("tool", ["ninja", "pybind11"])
    def test_a_missing_tool(self, toy, tool, tmp_path):
        (tmp_path / "bin").mkdir()
        for name in ("g++", "c++", "cc", "gcc", "sh"):  # all but ninja
            if (found := shutil.which(name)) is not None:
                (tmp_path / "bin" / name).symlink_to(found)
        code = f"""
            import os, runpy, sys
            sys.modules[{tool!r}] = None
            os.environ["PATH"] = {str(tmp_path / "bin")!r}
            sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
            runpy.run_path("setup.py", run_name="__main__")
        """
        python(code, cwd=toy)
        assert self.record(toy).splitlines()[0] == f"{tool} was not found; `pip install {tool}` provides it"

    def test_an_old_setuptools(self, toy):
        code = """
            import runpy, setuptools, sys
            setuptools.__version__ = "70.0.0"
            sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
            runpy.run_path("setup.py", run_name="__main__")
        """
        reason = "setuptools 70.0.0 is too old to build simctg_fast: pip install 'setuptools>=77'"
        assert python(code, cwd=toy, expect=1) == reason
        assert self.record(toy).strip() == reason

    def test_the_reason_is_installed_and_goes_with_the_next_build(self, toy):
        """pip shows nothing of a build, so the wheel has to carry what the compiler said."""
        build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
        self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return forty_two")
        name = python(build, cwd=toy).splitlines()[-1]
        with zipfile.ZipFile(toy / "dist" / name) as wheel:
            first, second, *more = wheel.read(f"simctg_fast/{_backends.BUILD_RECORD}").decode().splitlines()
        assert "value.cpp" in first
        assert "forty_two" in first
        assert "compiler" in second
        assert any("forty_two" in line for line in more)
        assert not [line for line in more if re.match(r"\[\d+/\d+\]", line)]
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=toy)
        assert self.record(toy).splitlines()[0] == first
        self.edit(toy / "csrc" / "host" / "value.cpp", "return forty_two", "return 40")
        self.build(toy)
        assert self.libraries(toy) == ["build", "simctg_fast"]
        assert not (toy / "simctg_fast" / _backends.BUILD_RECORD).exists()
        shutil.rmtree(toy / "dist")
        name = python(build, cwd=toy).splitlines()[-1]
        assert not [name for name in zipfile.ZipFile(toy / "dist" / name).namelist() if _backends.BUILD_RECORD in name]

    def test_left_out(self, toy):
        self.build(toy)
        assert self.build(toy, SIMCTG_FAST_BUILD_CPP="0") == []
        assert self.libraries(toy) == ["build"]  # the objects, for the next build
        python("from setuptools import build_meta; build_meta.build_wheel('dist')", cwd=toy, SIMCTG_FAST_BUILD_CPP="0")
        (wheel,) = (toy / "dist").glob("*.whl")
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name]
        assert (
            zipfile.ZipFile(wheel).read(f"simctg_fast/{_backends.BUILD_RECORD}").decode() == f"{_backends.LEFT_OUT}\n"
        )

    def test_a_process_keeps_the_library_it_runs(self, toy):
        """The new library is renamed into place; writing into the mapped file would crash whoever uses it."""
        self.build(toy)
        (library,) = (toy / "simctg_fast").glob("_C.*.so")
        before = library.stat().st_ino
        with library.open("rb") as old:
            content = old.read()
            self.edit(toy / "csrc" / "host" / "value.cpp", "return 40", "return 50")
            self.build(toy)
            old.seek(0)
            assert old.read() == content
        assert library.stat().st_ino != before

    def test_builds_at_the_same_time(self, toy):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with contextlib.ExitStack() as children:
            jobs = [children.enter_context(started(command, cwd=toy, **pipes)) for _ in range(3)]
            out = [job.communicate(timeout=LIMIT)[0].decode() for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0, 0], out
        assert sum(text.count("compile csrc/bind/bindings.cpp") for text in out) == 1
        assert self.value(toy) == str(40 + len(SIMD))


class TestCommands:
    def test_make_knows_the_documented_commands(self):
        if not shutil.which("make"):
            pytest.skip("needs make")
        listed = run("make", "help", cwd=ROOT)
        for command in (
            "demo",
            "test",
            "lint",
            "gpu",
            "bench",
            "parity",
            "test-isa",
            "test-full",
            "test-oldest",
            "clean",
            "help",
        ):
            assert re.search(rf"^  {command} ", listed, re.MULTILINE), command
            run("make", "-n", command, cwd=ROOT)

    def test_environments_are_made_once(self, tmp_path):
        """What is done already is not done again: a second `make demo` installs nothing."""
        if not shutil.which("make"):
            pytest.skip("needs make")
        environment = tmp_path / "env"
        first = run("make", "-n", "demo", f"VENV={environment}", "TORCH=9.9", cwd=ROOT)
        assert re.search(r"pip install .*torch==9\.9", first)
        environment.mkdir()
        (environment / ".base-9.9").touch()
        again = run("make", "-n", "demo", f"VENV={environment}", "TORCH=9.9", cwd=ROOT)
        assert "pip" not in again
        assert "simctg-fast demo" in again
        assert "torch==9.8" in run("make", "-n", "demo", f"VENV={environment}", "TORCH=9.8", cwd=ROOT)

    def test_ci_runs_lint_and_tests(self):
        script = repository(".ci/run")
        assert os.access(script, os.X_OK)
        assert "make lint test" in script.read_text()
