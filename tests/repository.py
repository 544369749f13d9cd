"""What tests need of the repository beside this folder: where it is not there, they are skipped and say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import simctg_fast

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(simctg_fast.__file__).resolve().parents[1]  # PYTHONPATH of children: the package that is tested
WITH_TESTS = f"{INSTALLED}{os.pathsep}{ROOT}"  # of children that import test files as well


def repository(name: str) -> Path:
    """The path of a file or folder of the repository; skips the test, or the whole file that is being imported."""
    path = ROOT / name
    if not path.exists():
        if (ROOT / ".git").exists():  # the repository itself: a name that is wrong, or a file that is lost
            raise FileNotFoundError(path)
        pytest.skip(f"needs {name} of the repository, which is not beside the tests", allow_module_level=True)
    return path
