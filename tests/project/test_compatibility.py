"""The compatibility table says what happens: its cells are run again and compared."""

from __future__ import annotations

import logging
import sys

import pytest
import transformers

from ..repository import repository

BENCHMARKS = repository("benchmarks")
sys.path.insert(0, str(BENCHMARKS))
try:
    import compatibility
finally:
    sys.path.remove(str(BENCHMARKS))

TABLE = compatibility.read_page(compatibility.PAGE.read_text(encoding="utf-8"))
SLOW = [setup for setup in compatibility.SETUPS if "compile" in setup or "bitsandbytes" in setup]


def outcome(cell: str) -> str:
    """Which way it went: rounding, the text behind a semicolon and how far off a path is are the machine's."""
    return cell.partition(";")[0].partition("contrastive search: ")[0].rstrip(")")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize(
    "setup",
    [pytest.param(setup, marks=[pytest.mark.full] if setup in SLOW else []) for setup in compatibility.SETUPS],
)
def test_the_table_says_what_happens(setup, caplog):
    caplog.set_level(logging.ERROR)
    tried = 0
    for check, expected in TABLE[setup].items():
        if expected.startswith("not tried"):
            continue
        found = compatibility.run_cell(setup, check)
        if found.startswith("not tried"):
            continue
        tried += 1
        assert outcome(found) == outcome(expected), f"{setup}, {check}; python benchmarks/compatibility.py --write"
    if not tried:
        pytest.skip("the table, or this machine, has not tried it")


def test_the_table_is_whole():
    assert list(TABLE) == list(compatibility.SETUPS)
    assert all(list(cells) == list(compatibility.CHECKS) for cells in TABLE.values())
    assert set(TABLE["float32"].values()) == {"yes", "yes (shared_prefix)"}


def test_a_wrong_token_is_seen(monkeypatch):
    """What the cells stand on: a decoder that writes other tokens than the definition is called out."""
    from simctg_fast import ContrastiveSearch

    real = ContrastiveSearch.__call__

    def wrong(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        tokens = getattr(out, "sequences", out)  # `support` asks for more than tokens
        tokens[0, -1] = (tokens[0, -1] + 1) % compatibility.VOCABULARY
        return out

    monkeypatch.setattr(ContrastiveSearch, "__call__", wrong)
    assert compatibility.run_cell("float32", "decodes, decoder").startswith("no: another token at step 11")
