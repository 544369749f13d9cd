"""What this installation can run on: the C++ extension, Triton, CUDA. Looked up on first use, never at import."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..printable import printable

logger = logging.getLogger("simctg_fast")

EXTENSION = "simctg_fast._C"
PACKAGE = Path(__file__).parents[1]
BUILD_RECORD = "_build_error.txt"  # in the package, written by setup.py in the extension's place
LEFT_OUT = "left out by SIMCTG_FAST_BUILD_CPP=0"
NOT_BUILT = "it was never built here: pip install ., or python setup.py build_ext --inplace"
RECORD_LINES = 20  # shown of a build's record
REASON_WIDTH = 300

ISA_VARIABLE = "SIMCTG_FAST_ISA"  # `csrc/host/cpu_features.cpp` reads it
ISA_NAMES = ("auto", "avx512_bf16", "avx512_vnni", "avx2_vnni", "avx512", "avx2", "generic", "neon")


@functools.cache
def _attempt(name: str) -> tuple[ModuleType | None, ImportError | None]:
    """The module, or None and the error that its import raised."""
    try:
        if name == EXTENSION and name not in sys.modules:
            _refuse_foreign(importlib.util.find_spec(name))
        return importlib.import_module(name), None
    except ImportError as error:
        return None, error
    except Exception as error:  # a module that is compiled raises what it likes
        if name != EXTENSION:
            raise
        wrapped = ImportError(f"loading it raised {type(error).__name__}: {error}", name=name)
        wrapped.__cause__ = error
        return None, wrapped


def _refuse_foreign(spec: importlib.machinery.ModuleSpec | None) -> None:
    """An editable installation answers for all of the library's modules, also where another copy of it is imported."""
    if spec is None or spec.origin is None:
        return
    if os.path.realpath(os.path.dirname(spec.origin)) != os.path.realpath(PACKAGE):
        raise ModuleNotFoundError(f"{spec.origin} belongs to another copy", name=EXTENSION, path=spec.origin)


@functools.cache
def _check_instruction_set(module: ModuleType | None) -> None:
    """Refuses a SIMCTG_FAST_ISA that cannot be used. What passed is not asked again; an error comes at every call."""
    if module is not None:
        module.active_isa()  # raises ValueError
    elif (name := os.environ.get(ISA_VARIABLE, "")) not in ("", *ISA_NAMES):
        raise ValueError(f"{ISA_VARIABLE} is {name!r}; it must be one of {', '.join(ISA_NAMES)}")


def extension() -> ModuleType | None:
    """The C++ extension `simctg_fast._C`, or None where it was not built or does not load.

    Raises:
        ValueError: SIMCTG_FAST_ISA is not the name of an instruction set that this processor has.
    """
    module = _attempt(EXTENSION)[0]
    _check_instruction_set(module)
    return module


def wanted_extension() -> ModuleType | None:
    """`extension` for work on the CPU that it would do, nobody having asked for another implementation. The first time
    that it is missing is a warning, unless it was left out by choice."""
    module = extension()
    if module is None:
        _warn_once()
    return module


def extension_error() -> ImportError | None:
    """The ImportError that loading the extension raised. None when it loaded."""
    return _attempt(EXTENSION)[1]


_unwarned = threading.Lock()  # taken by the first warning, and kept


def _warn_once() -> None:
    if not _unwarned.acquire(blocking=False):
        return
    reason = _absence(extension_error())[0]
    if reason != LEFT_OUT:
        logger.warning(
            "the C++ extension is missing, slower PyTorch code does its work: %s. Install a C++17 compiler, then "
            "simctg_fast again (pip: --force-reinstall --no-cache-dir); `simctg-fast env` shows the whole error.",
            printable(reason)[:REASON_WIDTH],
        )


def _absence(error: ImportError | None) -> list[str]:
    """Why the extension is not there: the reason in one line, and what is behind it in more."""
    if not isinstance(error, ModuleNotFoundError) or error.name != EXTENSION or EXTENSION in sys.modules:
        first, *others = _describe(error).split("\n")
        return [first, *others]
    try:
        lines = (PACKAGE / BUILD_RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as unreadable:
        return [f"it was not built, and {PACKAGE / BUILD_RECORD}, which says why, cannot be read: {unreadable}"]
    if lines:
        return lines if lines[0] == LEFT_OUT else [f"it could not be built: {lines[0]}", *lines[1:]]
    others = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))
    if others:
        wanted = importlib.machinery.EXTENSION_SUFFIXES[0]
        return [f"it was built for another Python: {', '.join(others)} is there, this one loads _C{wanted}"]
    return [NOT_BUILT if error.path is None else f"{NOT_BUILT} ({error})"]


def _crash() -> str | None:
    """What kills a process that loads the extension, tried in one of its own; None where it lives."""
    code = "import sys; sys.path[:0] = [sys.argv[1]]; import importlib; importlib.import_module(sys.argv[2])"
    command = [sys.executable, "-c", code, str(PACKAGE.parent), EXTENSION]
    status = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
    if status >= 0:  # what it raised is known better when it is raised here
        return None
    name = signal.Signals(-status).name
    hint = " (built for a processor with other instructions)" if -status == signal.SIGILL else ""
    return f"loading it ends the process with {name}{hint}"


def require_extension() -> ModuleType:
    """The C++ extension, for an ``impl="cpu"`` that was asked for by name.

    Raises:
        RuntimeError: it is not there; the reason is part of the text, the ImportError the cause.
        ValueError: as `extension`.
    """
    module, error = _attempt(EXTENSION)
    _check_instruction_set(module)
    if module is None:
        raise RuntimeError(
            f"impl='cpu' needs the C++ extension, which does not load ({printable(_absence(error)[0])}); "
            "SIMCTG_FAST_REQUIRE_EXT=1 makes the installation stop where building it fails"
        ) from error
    return module


def has_triton() -> bool:
    """Whether triton can be imported. It says nothing about a GPU."""
    return _attempt("triton")[0] is not None


def triton_error() -> ImportError | None:
    """The ImportError of triton, None when it loaded."""
    return _attempt("triton")[1]


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on tensors of this device: CUDA, or the CPU in Triton's interpreter."""
    triton = _attempt("triton")[0]
    return triton is not None and (device.type == "cuda" or bool(triton.knobs.runtime.interpret))


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured from this thread's current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def require_triton() -> None:
    """For an ``impl="triton"`` that was asked for by name.

    Raises:
        RuntimeError: triton does not load; the reason is part of the text, the ImportError the cause.
    """
    if (error := triton_error()) is not None:
        raise RuntimeError(f"impl='triton' needs triton, which does not load ({_describe(error)})") from error


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_info(*, probe: bool = False) -> dict[str, Any]:
    """Versions, processors and backends of this installation, for bug reports and `simctg-fast env`.

    Args:
        probe: load the extension in a process of its own first, so that one that kills its process is reported.

    Returns:
        A flat dict of strings, numbers, lists of strings and None (absent). ``extension`` and ``triton`` hold a path or
        version when they load, ``extension_error`` and ``triton_error`` say why not: the text of the real ImportError,
        or what the build of the extension recorded, in several lines.
        ``instruction_set`` is the one in use, ``instruction_set_from`` says whether the variable SIMCTG_FAST_ISA chose
        it, and ``instruction_set_error`` what is wrong with that variable.
    """
    import simctg_fast

    crash = _crash() if probe else None
    module, error = (None, None) if crash is not None else _attempt(EXTENSION)
    why = None
    if module is None:
        lines = _absence(error) if crash is None else [crash]
        more = [f"… the rest is in {PACKAGE / BUILD_RECORD}"] if len(lines) > RECORD_LINES else []
        why = "\n".join([*lines[:RECORD_LINES], *more])
    isa_error = None
    try:
        _check_instruction_set(module)
    except ValueError as refused:
        isa_error = str(refused)
    chosen = os.environ.get(ISA_VARIABLE, "") not in ("", "auto")
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            gpus.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return {
        "simctg_fast": simctg_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton") if has_triton() else None,
        "triton_error": None if has_triton() else _describe(triton_error()),
        "extension": None if module is None else module.__file__,
        "extension_error": why,
        "instruction_set": None if module is None or isa_error else module.active_isa(),
        "instruction_set_best": None if module is None else module.best_isa(),
        "instruction_set_from": None if module is None else ISA_VARIABLE if chosen else "processor",
        "instruction_set_error": isa_error,
        "threads": torch.get_num_threads(),
        "thread_pool": None if module is None else module.parallel_backend(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _describe(error: ImportError | None) -> str:
    return "unknown" if error is None else f"{type(error).__name__}: {error}"
