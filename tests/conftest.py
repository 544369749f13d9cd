"""What every test runs under: no network, fixed seeds, few threads, and uninitialised memory that shows."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import torch.utils._device

from . import near_ties
from .forks import forking
from .instruction_sets import BASE

LIBRARY = "simctg_fast"

# The files that reach the C++ extension, with results that depend on its instruction set: `make test-isa` runs them
# under each set. An expression restricts a file to the tests whose names it finds.
CSRC = {
    # operators
    "test_block_layers.py": "",
    "test_candidate_select.py": "",
    "test_centered_scan.py": r"^(?!.*interpreted)",  # Triton's interpreter, to which instruction sets are all alike
    "test_cpu_attention.py": "",
    "test_crf_operators.py": r"^(?!.*opcheck)",  # schemas
    "test_earlier_text.py": r"^(?!.*triton)",
    "test_gelu.py": "",
    "test_linear.py": "",
    "test_linear_16.py": "",
    "test_loss_contrastive.py": "",
    "test_loss_modules.py": "",
    "test_prefix_commit.py": "",
    "test_rms_norm.py": "",
    "test_shared_prefix_attention.py": "",
    "test_top_k.py": "",
    "test_viterbi_backtrace.py": "",
    # what goes through them
    "test_centered.py": r"reference\[llama",
    "test_contrastive_search.py": "",
    "test_successors.py": r"one_text.*llama",
    "test_decode_step.py": "",
    "test_engine_is_generate.py": "",
    "test_engine_slots.py": "",
    "test_parity.py": r"transformers_4.*-padded\]",
    "test_blocks.py": "",
    "test_t5_blocks.py": "",
    "test_features.py": "16_bits",
    "test_text_to_text.py": r"kernels\[gpt2",  # its T5 would be trained again
}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # pyproject.toml sets it, and pytest is told to mind unknown settings
        parser.addini("timeout", "seconds a test may take, where pytest-timeout is installed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: part of the full set only (`make test-full`), not of `make test`")
    config.addinivalue_line(
        "markers", "csrc: `make test-isa` runs it under each instruction set (named in conftest.py)"
    )
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped without one")
    config.addinivalue_line("markers", "xdist_group(name): kept on one worker; known here for runs without xdist")
    config.addinivalue_line("markers", "timeout(seconds): known here for runs without pytest-timeout")
    # Tiny tensors gain nothing from threads, and waiting at barriers on a busy machine costs them a factor of ten.
    # Tests of threading ask for their own.
    torch.set_num_threads(1)
    _poison_uninitialised_memory()


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    """Files without the marker are not even imported where only its tests are wanted."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    wanted = config.getoption("markexpr").startswith("csrc")
    return True if wanted and is_test and collection_path.name not in CSRC else None


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = CSRC.get(item.path.name)
        # Those with the fixture `isa` run under every set as it is.
        if names is not None and re.search(names, item.name) and "isa" not in item.fixturenames:
            item.add_marker("csrc")
    if any(item.get_closest_marker("gpu") for item in items) and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    near_ties.watch(item)
    try:
        return (yield)
    finally:
        near_ties.watch(None)


def pytest_terminal_summary(terminalreporter) -> None:
    """How often two implementations chose differently because of rounding: it should stay rare."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    ties = [(r.nodeid, text) for r in reports for name, text in r.user_properties if name == near_ties.PROPERTY]
    if ties:
        terminalreporter.section(f"near ties: {len(ties)}")
        for test, text in ties:
            terminalreporter.write_line(f"{test}: {text}")


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from the global generator
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # training scripts that a test ran in this process switch it on


@pytest.fixture
def driver(monkeypatch):
    """CUDA's graphs, emulated, with none that other tests have kept."""
    from simctg_fast.decoding import graph

    from .emulated_cuda import emulated_cuda

    graph.release()
    with emulated_cuda(monkeypatch) as driver:
        yield driver
    graph.release()


@pytest.fixture(params=BASE)
def isa(request):
    """Runs the test's C++ kernels on one instruction set."""
    from simctg_fast.ops import _backends

    extension = _backends.extension()
    if extension is None:
        if not isinstance(error := _backends.extension_error(), ModuleNotFoundError):
            raise error  # built, but it does not load
        pytest.skip("the C++ extension is not built")
    if request.param not in extension.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.active_isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(before)


@pytest.fixture
def children():
    """An `ExitStack` for the processes of `processes.started`: they end with the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def forks():
    """Children that find torch and transformers imported: `forks.Forks`."""
    with forking() as forks:
        yield forks


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills memory nobody has written with what cannot pass for a result: NaN, or the dtype's largest integer."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poison_uninitialised_memory() -> None:
    """`torch.empty` and its kin return poisoned memory when the library under test calls them.

    Only there: torch's own modules and the tests fill what they allocate, and would pay for nothing.
    """
    # `with torch.device(...)` redirects the functions listed here on first use: they have to be the real ones.
    torch.utils._device._device_constructors()
    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    for owner, name in places:
        setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # the tracer cannot follow the frame, and the graph must stay the user's
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == LIBRARY or caller.startswith(LIBRARY + "."):
            return _poison(result)
        return result

    return wrapper
