"""A library without its C++ extension: it works, says so once where it matters, and knows the true reason."""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
import re
import shutil
import sys
import textwrap

import pytest

import simctg_fast
from simctg_fast.ops import _backends

from ..processes import run_child

PACKAGE = pathlib.Path(simctg_fast.__file__).resolve().parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
WARNING = "the C++ extension is missing"
USE = """
import torch
from simctg_fast import viterbi_backtrace
def use(**options):
    return viterbi_backtrace(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([2]), **options).tolist()
"""


@pytest.fixture
def site(tmp_path):
    """A folder for sys.path with a copy of the library, never built. An editable installation may be there as well."""
    target = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", _backends.BUILD_RECORD)
    shutil.copytree(PACKAGE, target / "simctg_fast", ignore=ignore)
    if not (target / "simctg_fast" / "kernels").exists():  # a checkout keeps them beside the package
        shutil.copytree(PACKAGE.parent / "kernels", target / "simctg_fast" / "kernels", ignore=ignore)
    return target


@pytest.fixture
def python(forks, site):
    """Runs code, most of it in a fork of a process that has imported torch."""

    def run(code: str, *, folder=site, fork: bool = True):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SIMCTG_FAST_")}
        environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        if fork:
            done = forks.run(textwrap.dedent(code), cwd=folder, env=environment)
        else:
            done = run_child([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    return run


def shown(python, **how) -> str:
    """What `simctg-fast env` prints of the extension's error."""
    out = python("from simctg_fast.cli import app; app(['env'])", **how).stdout
    assert re.search(r"^extension +none$", out, re.MULTILINE)
    return re.search(r"^extension_error +(.*(?:\n +.*)*)", out, re.MULTILINE)[1]


def record(site, text: str) -> None:
    (site / "simctg_fast" / _backends.BUILD_RECORD).write_text(text)


class TestEnv:
    def test_the_compilers_message(self, site, python):
        record(site, "value.cpp:6: error: \x1b[31mno\x1b[0m\n(Python)\n" + "detail\n" * 100)
        reason, *more = shown(python).splitlines()
        assert reason == r"it could not be built: value.cpp:6: error: \x1b[31mno\x1b[0m"
        assert [line.strip() for line in more[:2]] == ["(Python)", "detail"]
        assert len(more) == _backends.RECORD_LINES
        assert _backends.BUILD_RECORD in more[-1]

    def test_left_out(self, site, python):
        record(site, _backends.LEFT_OUT + "\n")
        assert shown(python) == _backends.LEFT_OUT

    def test_never_built(self, site, python):
        assert shown(python, fork=False).startswith(_backends.NOT_BUILT)

    def test_built_for_another_python(self, site, python):
        (site / "simctg_fast" / "_C.cpython-27m-x86_64-linux-gnu.so").touch()
        assert shown(python) == (
            f"it was built for another Python: _C.cpython-27m-x86_64-linux-gnu.so is there, this one loads _C{SUFFIX}"
        )

    def test_a_file_that_is_no_library(self, site, python):
        (site / "simctg_fast" / f"_C{SUFFIX}").write_text("nothing")
        assert shown(python).startswith("ImportError: ")
        assert f"_C{SUFFIX}" in shown(python)

    def test_an_unreadable_record(self, site, python):
        (site / "simctg_fast" / _backends.BUILD_RECORD).mkdir()
        assert "which says why, cannot be read" in shown(python)

    # What is compiled can do whatever Python can.
    def test_an_import_that_raises_something_else(self, site, python):
        (site / "simctg_fast" / "_C.py").write_text("raise SystemError('type is already registered')")
        assert shown(python) == "ImportError: loading it raised SystemError: type is already registered"
        assert python(USE + "print(use())").stdout.strip() == "[[0, 2]]"

    @pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
    def test_an_illegal_instruction(self, site, python):
        (site / "simctg_fast" / "_C.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
        assert shown(python) == (
            "loading it ends the process with SIGILL (built for a processor with other instructions)"
        )

    def test_another_copys_extension_is_not_loaded(self, site, python, tmp_path):
        """What an editable installation of the library does for every copy of it on sys.path."""
        (tmp_path / "_C.py").write_text("raise SystemExit('the wrong one was loaded')")
        (tmp_path / "sitecustomize.py").write_text(
            textwrap.dedent(f"""
            import importlib.util, sys
            class Finder:
                @staticmethod
                def find_spec(name, path=None, target=None):
                    if name == "simctg_fast._C":
                        return importlib.util.spec_from_file_location(name, {str(tmp_path / "_C.py")!r})
            sys.meta_path.insert(0, Finder)
            """)
        )
        shutil.move(tmp_path / "sitecustomize.py", site)
        assert "belongs to another copy" in shown(python, fork=False)


class TestWarning:
    REASON = "no C++ compiler: 'c++' was not found"

    def test_once_where_it_would_have_been_used(self, site, python):
        record(site, f"{self.REASON}\ndetail\n")
        code = """
            import threading
            threads = [threading.Thread(target=use) for _ in range(8)]
            [t.start() for t in threads], [t.join() for t in threads]
            print(use())
        """
        done = python(USE + textwrap.dedent(code))
        assert done.stdout.strip() == "[[0, 2]]"
        (line,) = [line for line in done.stderr.splitlines() if WARNING in line]
        assert self.REASON in line
        assert "detail" not in done.stderr
        for part in ("C++17 compiler", "simctg-fast env"):
            assert part in line

    def test_its_reason_cannot_steer_a_terminal(self, site, python):
        record(site, "\x1b]0;title\x07" + "x" * 5000 + "\n")
        done = python(USE + "use()")
        assert "\x1b" not in done.stderr
        assert r"\x1b]0;title\x07" in done.stderr
        assert len(done.stderr) < 1000

    @pytest.mark.parametrize(
        "code",
        [
            "",
            "import simctg_fast.ops, simctg_fast.decoding, simctg_fast.losses",
            "use(impl='torch')",
            "simctg_fast.ops.backend_info()",
            "from simctg_fast.ops.top_k import top_k_probs; top_k_probs(torch.zeros(1, 5), 2, impl='torch')",
            "from simctg_fast.ops.top_k import top_k_probs; top_k_probs(torch.zeros(1, 5, dtype=torch.float64), 2)",
        ],
    )
    def test_silent_where_it_would_not(self, site, python, code):
        record(site, self.REASON)
        assert WARNING not in python(USE + "import simctg_fast.ops\n" + code).stderr

    @pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("bfloat16", 1), ("float64", 0)])
    def test_linear_layers(self, site, python, dtype, count):
        """Greedy search has no operator of ours but these; in float64 they are torch's with the extension as well."""
        record(site, self.REASON)
        code = f"""
            from simctg_fast.cpu.modules import fast_linears
            with fast_linears(torch.nn.Linear(4, 4).to(torch.{dtype}), rows_hint=1) as count:
                print(count)
        """
        done = python(USE + textwrap.dedent(code))
        assert done.stdout.strip() == "0"
        assert done.stderr.count(WARNING) == count

    def test_silent_where_it_was_left_out(self, site, python):
        record(site, _backends.LEFT_OUT + "\n")
        done = python(USE + "print(use())")
        assert done.stdout.strip() == "[[0, 2]]"
        assert WARNING not in done.stderr

    def test_asked_for_by_name(self, site, python):
        record(site, self.REASON)
        code = """
            try:
                use(impl="cpu")
            except RuntimeError as error:
                print(error)
        """
        done = python(USE + textwrap.dedent(code))
        assert self.REASON in done.stdout
        assert WARNING not in done.stderr

    def test_generate_gives_the_same_tokens(self, site, python):
        record(site, self.REASON)
        code = """
            from simctg_fast import ContrastiveSearch
            from simctg_fast.loading import load_model
            model, tokenizer, *_ = load_model("bundled")
            prompt = tokenizer("Return the name", return_tensors="pt")
            options = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12}
            for _ in range(2):
                found = model.generate(**prompt, custom_generate=ContrastiveSearch(), **options)
            print(found.tolist())
        """
        without = python(USE + textwrap.dedent(code))
        assert without.stderr.count(WARNING) == 1
        built = python(code, folder=PACKAGE.parent)
        assert without.stdout == built.stdout
