"""`import simctg_fast` is quick, touches neither CUDA nor transformers, and its lazy names behave like eager ones."""

from __future__ import annotations

import ast
import os
import sys
import textwrap

import pytest
import torch

import simctg_fast
from simctg_fast.ops import _backends

from ..processes import run_child
from ..repository import INSTALLED


def run(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that imports the library from where the tests import it."""
    result = run_child(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1", **environment},
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_lean():
    """Processor seconds, which a busy machine does not stretch; the best of three, as a first run reads from disk."""
    code = """
        import time
        import torch
        start = time.process_time()
        import simctg_fast
        from simctg_fast import backend_info, viterbi_backtrace
        spent = time.process_time() - start
        import sys
        assert not torch.cuda.is_initialized(), "CUDA was initialised"
        for name in ("transformers", "triton", "simctg_fast.kernels", "simctg_fast.decoding", "typer", "rich"):
            assert name not in sys.modules, name + " was imported"
        print(spent)
    """
    assert min(float(run(code)) for _ in range(3)) < 1.0


def test_the_package_itself_does_not_import_torch():
    assert run("import sys, simctg_fast; print('torch' in sys.modules)") == "False"


def test_public_names_are_listed():
    assert set(simctg_fast.__all__) == {"__version__", *simctg_fast._EXPORTS}
    assert set(simctg_fast.__all__) <= set(dir(simctg_fast))
    assert "functional" in dir(simctg_fast)


@pytest.mark.parametrize("name", sorted(simctg_fast._EXPORTS))
def test_every_public_name_resolves(name):
    value = getattr(simctg_fast, name)
    assert value.__name__ == name
    assert vars(simctg_fast)[name] is value, "the second look-up must not pass through __getattr__"


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING and the table have to agree."""
    tree = ast.parse((INSTALLED / "simctg_fast" / "__init__.py").read_text())
    seen = {
        alias.asname: f"simctg_fast.{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen.keys() == simctg_fast._EXPORTS.keys()
    for name, module in simctg_fast._EXPORTS.items():
        assert f"{seen[name]}.".startswith(f"{module}.")


def test_submodules_are_attributes():
    out = run("import simctg_fast; print(simctg_fast.functional.__name__, simctg_fast.ops.__name__)")
    assert out == "simctg_fast.functional simctg_fast.ops"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'simctg_fast' has no attribute 'contrastive_serach'"):
        _ = simctg_fast.contrastive_serach
    assert not hasattr(simctg_fast, "contrastive_serach")
    with pytest.raises(ImportError, match="cannot import name 'contrastive_serach'"):
        from simctg_fast import contrastive_serach  # noqa: F401


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("import missing_dependency", ModuleNotFoundError, "No module named 'missing_dependency'"),
        ("raise RuntimeError('the GPU is on fire')", RuntimeError, "the GPU is on fire"),
        (
            "import math; math.nothing",
            ImportError,
            "simctg_fast_broken failed: module 'math' has no attribute 'nothing'",
        ),
        ("", ImportError, "simctg_fast_broken does not define 'broken'"),
    ],
)
def test_a_name_whose_module_fails_shows_the_real_error(body, error, message, tmp_path, monkeypatch):
    (tmp_path / "simctg_fast_broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "simctg_fast_broken", raising=False)
    monkeypatch.setitem(simctg_fast._EXPORTS, "broken", "simctg_fast_broken")
    with pytest.raises(error, match=message):
        _ = simctg_fast.broken
    with pytest.raises(error, match=message):
        from simctg_fast import broken  # noqa: F401


def test_triton_is_optional():
    """Without triton the library imports, works, and says what was missing."""
    out = run(
        """
        import sys
        sys.modules["triton"] = None
        import torch
        from simctg_fast import backend_info, viterbi_backtrace
        info = backend_info()
        path = viterbi_backtrace(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([2]))
        print(info["triton"], "|", info["triton_error"], "|", path.tolist())
        """
    )
    assert out == "None | ModuleNotFoundError: import of triton halted; None in sys.modules | [[0, 2]]"


def test_the_extension_is_optional():
    out = run(
        """
        import sys
        sys.modules["simctg_fast._C"] = None
        import torch
        from simctg_fast import backend_info, viterbi_backtrace
        path = viterbi_backtrace(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([2]))
        print(backend_info()["extension_error"], "|", path.tolist())
        """
    )
    assert out == "ModuleNotFoundError: import of simctg_fast._C halted; None in sys.modules | [[0, 2]]"


def test_backend_info():
    info = simctg_fast.backend_info()
    assert info["simctg_fast"] == simctg_fast.__version__
    assert info["torch"] == torch.__version__
    assert (info["extension"] is None) == (info["extension_error"] is not None)
    assert (info["triton"] is None) == (info["triton_error"] is not None)
    if info["extension"] is not None:
        assert info["instruction_set"] in _backends.ISA_NAMES
        assert info["thread_pool"] in ("openmp", "std::thread")


class TestTheTestBench:
    """The poisoned allocations of conftest.py, without which a kernel that skips an output could pass."""

    @staticmethod
    def allocate(module: str, code: str) -> torch.Tensor:
        scope = {"__name__": module, "torch": torch}
        exec(f"result = {code}", scope)
        return scope["result"]

    @pytest.mark.parametrize(
        "code",
        [
            "torch.empty(7)",
            "torch.empty(7, dtype=torch.bfloat16)",
            "torch.empty_like(torch.zeros(3))",
            "torch.empty_strided((2, 3), (3, 1))",
            "torch.zeros(2).new_empty((2, 3))",
            "torch.zeros(2).new_empty_strided((2, 3), (3, 1))",
        ],
    )
    def test_library_code_sees_poison(self, code):
        assert self.allocate("simctg_fast.ops.some_op", code).isnan().all()

    def test_integers(self):
        code = "torch.empty(5, dtype=torch.int32)"
        assert (self.allocate("simctg_fast", code) == 2**31 - 1).all()

    def test_a_device_context_still_redirects(self):
        with torch.device("meta"):
            assert torch.nn.Linear(2, 2).weight.is_meta
            assert self.allocate("simctg_fast", "torch.empty(3)").is_meta
