"""What tests compile C++ with: the build's compiler and its flags."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sysconfig
from typing import Any

import pytest

from .repository import repository


def compiler() -> list[str]:
    """Its command; the test is skipped where there is none."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if not shutil.which(command[0]):
        pytest.skip(f"needs the compiler {command[0]}")
    return command


def setup_names() -> dict[str, Any]:
    """What `setup.py` defines, without its `setup()`."""
    setuptools = pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(repository("setup.py")))
