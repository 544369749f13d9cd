"""The oracle's environment: transformers 4.55.4, the last release with contrastive search, on the torch of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

VERSION = "4.55.4"
VARIABLE = "SIMCTG_FAST_ORACLE_PYTHON"
FOLDER = Path(__file__).resolve().parents[2] / ".venv-oracle"
_PATHS = "running-environment.pth"


def oracle_python(report=print) -> str:
    """An interpreter with transformers 4.55.4: that of `SIMCTG_FAST_ORACLE_PYTHON`, or `.venv-oracle`, made if missing.

    Raises:
        RuntimeError: the environment cannot be made, or holds other versions than it has to.
    """
    if named := os.environ.get(VARIABLE):
        _check(named, f"{VARIABLE}={named}")
        return named
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and _versions(str(python)) == _expected():
        return str(python)
    report(f"{FOLDER.name}: installing transformers {VERSION} (once, about a minute)")
    venv.create(FOLDER, with_pip=True, clear=True)
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"transformers=={VERSION}",
    ]
    if subprocess.run(install).returncode:
        raise RuntimeError(f"transformers=={VERSION} could not be installed into {FOLDER}")
    # torch is the running one, byte for byte: its packages come after the environment's own on the path. A second copy
    # of the same release may well be another build, with other kernels and other rounding.
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    paths = dict.fromkeys([_torch_folder(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    Path(site.stdout.strip(), _PATHS).write_text("".join(f"{path}\n" for path in paths))
    _check(str(python), str(FOLDER))
    return str(python)


def _torch_folder() -> str:
    import torch

    return str(Path(torch.__file__).resolve().parents[1])


def _expected() -> list[str]:
    import torch

    return [VERSION, torch.__version__.partition("+")[0]]


def _versions(python: str) -> list[str] | str:
    """Versions of transformers and torch under that interpreter, or what went wrong."""
    versions = "[transformers.__version__, torch.__version__.partition('+')[0]]"
    script = f"import json, transformers, torch; print(json.dumps({versions}))"
    # Not from a folder whose modules could be taken for packages.
    run = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=Path(sys.prefix))
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else run.stderr.strip()


def _check(python: str, name: str) -> None:
    found, expected = _versions(python), _expected()
    if found != expected:
        raise RuntimeError(
            f"{name} must hold transformers {expected[0]} and, as this environment, torch {expected[1]}; found {found}"
        )
