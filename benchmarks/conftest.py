"""Short forms of the benchmarks: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: the tests' mark; the configuration names it")
