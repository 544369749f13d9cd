"""``--ray`` without Ray, or without what Ray imports only when it runs: the message names what is missing."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

from simctg_fast.engine.job.job import JobOptions
from simctg_fast.integrations.ray import run_on_ray

from ..processes import run_child
from ..repository import INSTALLED

NAMES = ("ray", "ray.data", "pandas", "pyarrow")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stands before site-packages: with `ray` and `ray.data`, which import pandas and pyarrow as late as the real."""
    for name in NAMES:
        path = tmp_path / name.replace(".", "/")
        path.mkdir()
        (path / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in NAMES:  # those of this folder; monkeypatch puts back what was there before
        sys.modules.pop(name, None)


def refusal(folder: pathlib.Path) -> str:
    options = JobOptions(str(folder / "in.jsonl"), str(folder / "out.jsonl"), "bundled")
    with pytest.raises(ImportError) as caught:
        run_on_ray(options)
    assert not (folder / "out.jsonl").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"), [("ray", "Ray"), ("pandas", "pandas"), ("pyarrow", "pyarrow"), ("ray.data", "ray.data")]
)
def test_what_is_missing_is_named(folder, name, shown, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert refusal(folder) == f"--ray needs {shown}, which is not installed: pip install 'simctg_fast[ray]'"


@pytest.mark.parametrize("name", ["ray", "pandas", "pyarrow"])
def test_what_is_there_but_broken_says_why(folder, name):
    (folder / name / "__init__.py").write_text("raise ImportError('libarrow.so: cannot open shared object file')")
    shown = "Ray" if name == "ray" else name
    assert refusal(folder) == (
        f"--ray needs {shown}, which does not load (libarrow.so: cannot open shared object file): "
        "pip install 'simctg_fast[ray]'"
    )


def test_a_package_that_lacks_another_is_not_said_to_be_missing(folder):
    (folder / "pandas" / "__init__.py").write_text("import dateutil_of_pandas")
    assert "pandas, which does not load (No module named 'dateutil_of_pandas')" in refusal(folder)


def test_on_the_command_line(folder):
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['pandas'] = None")
    (folder / "in.jsonl").write_text('{"id": 1, "prompt": "hello"}\n')
    done = run_child(
        [sys.executable, "-m", "simctg_fast.cli", "run", "in.jsonl", "-m", "bundled", "-o", "out.jsonl", "--ray"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(INSTALLED)]),
            "COLUMNS": "1000",
            "PYTHONIOENCODING": "utf-8",
        },
    )
    assert done.returncode == 2, done.stderr
    assert "--ray needs pandas, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out.jsonl").exists()
