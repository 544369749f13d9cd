"""SIMCTG_FAST_ISA chooses the instruction set of the C++ kernels; a value that cannot serve is refused by name."""

from __future__ import annotations

import os
import platform
import textwrap

import pytest

from simctg_fast.ops import _backends

from ..repository import INSTALLED

ARM = platform.machine().lower() in ("aarch64", "arm64")
# Of a build for this machine, the best one first, with those that come with each.
COMES_WITH = {
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "generic"),
    "avx512_vnni": ("avx512_vnni", "avx512", "avx2", "generic"),
    "avx2_vnni": ("avx2_vnni", "avx2", "generic"),
    "avx512": ("avx512", "avx2", "generic"),
    "avx2": ("avx2", "generic"),
    "generic": ("generic",),
}
COMES_WITH = {"neon": ("neon",)} if ARM else COMES_WITH
NAMES = tuple(COMES_WITH)
needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")

WITHOUT_EXTENSION = 'import sys; sys.modules["simctg_fast._C"] = None\n'
# One use of every kind: a public function, a decoding method, the engine, support().
USES = """
import torch, transformers
import simctg_fast

torch.set_num_threads(1)
sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)
model = transformers.GPT2LMHeadModel(config).eval()
ids = torch.tensor([[5, 6, 7]])
search = simctg_fast.ContrastiveSearch(0.6, 4)
def support():  # which reports
    report = simctg_fast.support(model)
    if report.path == "none":
        raise RuntimeError(report.reason)
uses = {
    "loss": lambda: simctg_fast.contrastive_loss(torch.randn(1, 30, 8)),
    "viterbi": lambda: simctg_fast.viterbi_backtrace(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([2])),
    "generate": lambda: model.generate(ids, custom_generate=search, max_new_tokens=3, do_sample=False, pad_token_id=0),
    "support": support,
}
for name, use in uses.items():
    try:
        use()
        print(name, "done")
    except Exception as error:
        print(name, type(error).__name__, error)
"""


@pytest.fixture
def child(forks):
    """Runs code under a value of the variable; in a fork of a process that has imported torch."""

    def run(code: str, isa: str | None = None, expect: int = 0) -> tuple[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "SIMCTG_FAST_ISA"}
        environment |= {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
        if isa is not None:
            environment["SIMCTG_FAST_ISA"] = isa
        done = forks.run(textwrap.dedent(code), cwd="/", env=environment, quiet=True)
        assert done.returncode == expect, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture
def shown(child):
    """What `simctg-fast env` says."""

    def run(isa: str | None, prologue: str = "") -> tuple[dict[str, str], str]:
        out, errors = child(prologue + "from simctg_fast.cli import app; app(['env'])", isa)
        return dict(line.split(maxsplit=1) for line in out.splitlines()), errors

    return run


def available() -> list[str]:
    return _backends.extension().supported_isas()


@needs_extension
@pytest.mark.parametrize("best", NAMES)
def test_names(best):
    """On a processor whose best one is `best`, which need not be this one."""
    parse = _backends.extension().parse_isa
    has = available() if best == available()[0] else COMES_WITH[best]
    allowed = ", ".join(("auto", *has))
    for name in NAMES:
        if name in has:
            assert parse(name, "SIMCTG_FAST_ISA", best) == name
        else:
            with pytest.raises(ValueError) as caught:
                parse(name, "SIMCTG_FAST_ISA", best)
            told = f"SIMCTG_FAST_ISA is '{name}', which this processor lacks; it must be one of {allowed}"
            assert str(caught.value) == told
    assert parse("auto", "isa", best) == parse("", "isa", best) == best
    for name in ("sse9", "AVX2", "avx", " avx2"):
        with pytest.raises(ValueError) as caught:
            parse(name, "isa", best)
        assert str(caught.value) == f"isa is '{name}'; it must be one of {allowed}"


@needs_extension
def test_what_this_processor_has():
    best = _backends.extension().best_isa()
    also = {"avx2_vnni"}  # which some processors with AVX-512 have
    assert [name for name in available() if name not in also] == [n for n in COMES_WITH[best] if n not in also]
    assert available() == [name for name in NAMES if name in available()]


@needs_extension
def test_the_variable_chooses(shown):
    for name in available():
        info, _ = shown(name)
        assert info["instruction_set"] == name
        assert info["instruction_set_best"] == available()[0]
        assert info["instruction_set_from"] == "SIMCTG_FAST_ISA"
        assert "instruction_set_error" not in info
    for name in (None, "", "auto"):
        info, _ = shown(name)
        assert info["instruction_set"] == info["instruction_set_best"] == available()[0]
        assert info["instruction_set_from"] == "processor"


@needs_extension
def test_env_reports_a_bad_value_in_one_line(shown):
    info, errors = shown("sse9")
    assert info["instruction_set"] == "none"
    allowed = ", ".join(("auto", *available()))
    assert info["instruction_set_error"] == f"SIMCTG_FAST_ISA is 'sse9'; it must be one of {allowed}"
    assert info["extension"].endswith(".so"), "the extension itself is all right"
    assert "Traceback" not in errors


@pytest.mark.parametrize("built", [pytest.param(True, marks=needs_extension), False])
def test_every_use_refuses_a_bad_value(built, child):
    """Nothing is computed by PyTorch instead: the variable was set for the kernels' sake."""
    allowed = ("auto", *available()) if built else _backends.ISA_NAMES
    told = f"ValueError SIMCTG_FAST_ISA is 'sse9'; it must be one of {', '.join(allowed)}"
    out, _ = child(("" if built else WITHOUT_EXTENSION) + USES, "sse9")
    lines = [f"{name} {told}" for name in ("loss", "viterbi", "generate")]
    assert out.splitlines() == [*lines, f"support RuntimeError {told.replace('ValueError ', 'ValueError: ')}"]


def test_without_the_extension_the_names_are_known(child, shown):
    for name in (None, "", "auto", *NAMES):
        info, _ = shown(name, WITHOUT_EXTENSION)
        assert info["extension"] == info["instruction_set"] == "none"
        assert "instruction_set_error" not in info
    info, _ = shown("sse9", WITHOUT_EXTENSION)
    allowed = "auto, avx512_bf16, avx512_vnni, avx2_vnni, avx512, avx2, generic, neon"
    assert info["instruction_set_error"] == f"SIMCTG_FAST_ISA is 'sse9'; it must be one of {allowed}"
    out, _ = child(WITHOUT_EXTENSION + USES, "generic")
    assert out.split() == ["loss", "done", "viterbi", "done", "generate", "done", "support", "done"]


def test_the_command_line_says_it_in_one_error(child):
    code = "from simctg_fast.cli import app; app(['generate', 'bundled', '-n', '2', 'hello'])"
    _, errors = child(code, "sse9", expect=2)
    assert "SIMCTG_FAST_ISA is 'sse9'" in errors
    assert "Traceback" not in errors
