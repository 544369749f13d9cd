"""What this installation can run on: the C++ extension, Triton, CUDA. Looked up on first use, never at import."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
from types import ModuleType
from typing import Any

import torch

ISA_VARIABLE = "SIMCTG_FAST_ISA"  # `csrc/cpu_features.cpp` reads it
ISA_NAMES = ("auto", "avx512", "avx2", "generic")


@functools.cache
def _attempt(name: str) -> tuple[ModuleType | None, ImportError | None]:
    """The module, or None and the error that its import raised."""
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        return None, error


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
    module = _attempt("simctg_fast._C")[0]
    _check_instruction_set(module)
    return module


def extension_error() -> ImportError | None:
    """Why `extension()` is None: the ImportError that loading it raised. None when it loaded."""
    return _attempt("simctg_fast._C")[1]


def require_extension() -> ModuleType:
    """The C++ extension, for an ``impl="cpu"`` that was asked for by name.

    Raises:
        RuntimeError: it is not there; the ImportError is the cause and part of the text.
        ValueError: as `extension`.
    """
    module, error = _attempt("simctg_fast._C")
    _check_instruction_set(module)
    if module is None:
        raise RuntimeError(
            f"impl='cpu' needs the C++ extension, which does not load ({_describe(error)}); "
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


def require_triton(device: torch.device) -> None:
    """For an ``impl="triton"`` that was asked for by name.

    Raises:
        RuntimeError: triton does not load. ValueError: the tensors are not on a CUDA device.
    """
    if not has_triton():
        error = triton_error()
        raise RuntimeError(f"impl='triton' needs triton, which does not load ({_describe(error)})") from error
    if not triton_runs_on(device):
        raise ValueError(f"impl='triton' needs tensors on a CUDA device, got {device}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_info() -> dict[str, Any]:
    """Versions, processors and backends of this installation, for bug reports and `simctg-fast env`.

    Returns:
        A flat dict of strings, numbers, lists of strings and None (absent). ``extension`` and ``triton`` hold a path or
        version when they load, ``extension_error`` and ``triton_error`` the text of the real ImportError when not.
        ``instruction_set`` is the one in use, ``instruction_set_from`` says whether the variable SIMCTG_FAST_ISA chose
        it, and ``instruction_set_error`` what is wrong with that variable.
    """
    import simctg_fast

    module, error = _attempt("simctg_fast._C")
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
        "extension_error": None if module is not None else _describe(error),
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
