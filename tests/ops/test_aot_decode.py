"""The decoding step's Triton kernels compiled ahead of time, as shipped, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import defaultdict

import pytest
import torch

from ..repository import repository

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, nothing is compiled", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("benchmark_aot", repository("benchmarks/aot.py"))
assert _spec is not None
aot = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = aot
_spec.loader.exec_module(aot)

TENSOR_CORE = {80: r"HMMA", 90: r"HG?MMA", 100: r"HMMA|UTC\w*MMA"}
# The telling ones for the fast set: what a model in bfloat16 with grouped heads runs on a Hopper GPU.
FAST = {
    "scoring-bf16-k4-even-sm90",
    "centered-bf16-k4-even-sm90",
    "follower-bf16-k3-n2-sm90",
    "attention-bf16-d128-m16-plain-sm90",
    "commit-int64-sm90",
    "top_k-fp32-k4-sm90",
}


def marks(case):
    return () if str(case) in FAST else pytest.mark.full


CASES = [pytest.param(case, id=str(case), marks=marks(case)) for case in aot.cases()]


@pytest.mark.parametrize("case", CASES)
def test_aot_decode_kernels(case):
    report = aot.report(case)
    assert report.spilled_bytes == 0, report
    assert report.registers <= 255
    assert report.shared_bytes <= aot.SHARED_LIMIT[case.arch]
    assert report.blocks >= 1
    exact = case.variant.startswith("fp32-")  # "highest": products on the plain units
    if case.kernel == "attention" or (case.kernel in ("scoring", "centered") and not exact):
        assert bool(re.search(TENSOR_CORE[case.arch], report.matrix)) != exact, report
    if case.kernel in ("scoring", "centered", "attention", "top_k") and not case.variant.endswith("odd"):
        wide = re.search(r"128×(\d+)", report.loads)
        assert wide, report
        assert int(wide[1]) >= (1 if case.kernel == "top_k" else 12), report


def test_every_configuration_is_compiled():
    """What the launchers can pick is what the cases hold."""
    from simctg_fast.kernels import candidate_select, centered_scan, shared_prefix_attention

    for table in (candidate_select.CONFIGS, candidate_select.WIDE):
        assert {arch for arch, _ in table} == set(aot.ARCHITECTURES)
    scoring = {case.variant.split("-")[:2][i] for case in aot.cases(["scoring"]) for i in (0, 1)}
    assert scoring == {*aot.SIZES, "fp32high", "mixed", "k4", "k20", "k64"}  # tiles of 16, 32 and 64 candidates
    centered = {case.variant.split("-")[:2][i] for case in aot.cases(["centered"]) for i in (0, 1)}
    assert centered == {*aot.SIZES, "fp32high", "k4", "k20", "k60"}
    assert {arch for arch, *_ in centered_scan.CONFIGS} == {80, 90}
    compiled: dict[int, set] = {16: set(), 32: set(), 64: set()}
    for case in aot.cases(["attention"]):
        kind, dim, rows, _ = case.variant.split("-")
        compiled[int(rows[1:])].add((case.arch, aot.SIZES[kind.removesuffix("high")], int(dim[1:])))
    assert set(shared_prefix_attention.CONFIGS) <= compiled[16]
    assert set(shared_prefix_attention.MIDDLE) <= compiled[32]
    assert set(shared_prefix_attention.TALL) <= compiled[64]


class Launches:
    """Records what the launchers would start, and counts the kernels that triton would compile for it."""

    def __init__(self, monkeypatch):
        from triton.runtime.jit import JITFunction

        from simctg_fast.kernels import candidate_select, centered_scan, shared_prefix_attention

        self.calls = []
        monkeypatch.setattr(JITFunction, "run", self._run())
        for module in (candidate_select, shared_prefix_attention):  # as on an H100
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        for module in (candidate_select, centered_scan, shared_prefix_attention):
            monkeypatch.setattr(module, "architecture", lambda device: 90)

    def _run(self):
        return lambda kernel, *args, grid, warmup, **options: self.calls.append((kernel, args, options))

    def kinds(self) -> dict[str, int]:
        """Compilations of each kernel so far, by triton's documented rule; forgets the launches."""
        found = defaultdict(set)
        for kernel, args, options in self.calls:
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
            key = tuple(_specialised(parameter, given.pop(parameter.name)) for parameter in kernel.params)
            found[kernel.__name__.removesuffix("_kernel")].add((key, tuple(sorted(given.items()))))
        self.calls.clear()
        return {name: len(keys) for name, keys in found.items()}


def _specialised(parameter, value):
    """What an argument adds to the kernel's key: a constexpr its value, an integer its width, whether it is 1 and
    whether 16 divides it, a tensor its dtype and whether 16 divides its address."""
    if parameter.is_constexpr:
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, not parameter.do_not_specialize and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return wide, not parameter.do_not_specialize and (value == 1, value % 16 == 0)
    return type(value)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


BATCHES = (1, 2, 3, 8, 16, 33, 64)
LENGTHS = (*range(1, 66), *range(67, 5000, 83), 5000)


def test_growing_texts_compile_few_scorings(launches):
    """One kernel for histories that are split and one for those that are not; three tiles for 1 to 64 candidates."""
    from simctg_fast.kernels import candidate_select

    def step(batch, length, k=4, width=64):
        states, history = torch.empty(batch, k, width), torch.empty(batch, length + 1, width)
        lengths = torch.full((batch + 1,), length)[1:]  # a slice, whose address is as it comes
        candidate_select.candidate_select(states, torch.empty(batch, k), history, lengths, None, 0.6, False)

    for batch in BATCHES:
        for length in LENGTHS:
            step(batch, length)
    assert launches.kinds() == {"candidate_select": 2}
    for batch in BATCHES:
        for length in LENGTHS:
            states, history = torch.empty(batch, 4, 64), torch.empty(batch, length, 64)
            mask = torch.ones(batch, length, dtype=torch.bool)
            candidate_select.candidate_scan(states, history, length, mask, None)
    assert launches.kinds() == {"candidate_select": 2}
    for k in range(1, 65):
        for length in (5, 500, 5000):
            step(2, length, k)
    assert launches.kinds() == {"candidate_select": 6}
    for length in LENGTHS:  # where 16 does not divide the width, rows are aligned by chance
        step(2, length, width=72)
    assert launches.kinds() == {"candidate_select": 4}


def test_growing_texts_compile_few_centered_scans(launches):
    """As many as scorings: one for histories that are split and one for those that are not, in three tiles."""
    from simctg_fast.kernels import centered_scan

    def step(batch, length, k=4, masked=False):
        states, history, row = torch.empty(batch, k, 64), torch.empty(batch, length + 1, 64), torch.empty(batch, 64)
        lengths, mask = torch.full((batch + 1,), length)[1:], torch.ones(batch, length + 1, dtype=torch.bool)
        squares = torch.empty(batch + 1, length + 1)[1:]
        centered_scan.centered_scan(states, row, history, squares, row, 0, mask if masked else None, lengths)

    for masked in (False, True):
        for batch in BATCHES:
            for length in LENGTHS:
                step(batch, length, masked=masked)
        assert launches.kinds() == {"centered_scan": 2}
    for k in range(1, 64):
        for length in (5, 500, 5000):
            step(2, length, k)
    assert launches.kinds() == {"centered_scan": 6}


def test_growing_texts_compile_few_attentions(launches):
    """One kernel where prefixes are split and one where they are not."""
    from simctg_fast.kernels.shared_prefix_attention import shared_prefix_attention

    def steps(arguments):
        for batch in BATCHES:
            for length in LENGTHS:
                arguments(batch, length)
        return launches.kinds()

    def attend(batch, length, mask=None, bias=None, start=0, lengths=None, starts=None, window=None, ahead=1, dim=16):
        query, new = (torch.empty(batch * 4, heads, 1, dim, dtype=torch.bfloat16) for heads in (8, 2))
        prefix = torch.empty(batch, 2, length + ahead, dim, dtype=torch.bfloat16)
        options = (0.125, mask, bias, None, None, start, lengths, starts, window)
        shared_prefix_attention(query, prefix, prefix, length, new, new, *options)

    def masked(batch, length):  # the last row of a mask for the whole text
        rows = min(length, 3) + 1
        mask = torch.empty(batch, 1, rows, length + 1, dtype=torch.bool)[:, :, -1:]
        bias = torch.empty(1, 8, rows, length + 1, dtype=torch.bfloat16)[:, :, -1:]
        attend(batch, length, mask, bias, start=max(0, length - 100))

    def captured(batch, length):
        lengths, starts = torch.full((2, batch), length)
        attend(batch, length, lengths=lengths, starts=starts, window=100, ahead=0)

    assert steps(attend) == {"shared_prefix_attention": 2}
    assert steps(masked) == {"shared_prefix_attention": 1}  # a window of 100 is never split
    assert steps(captured) == {"shared_prefix_attention": 2}
    assert steps(lambda batch, length: attend(batch, length, dim=24)) == {"shared_prefix_attention": 4}


def test_growing_texts_compile_one_top_k_and_one_commit(launches):
    from simctg_fast.kernels import prefix_commit, top_k

    for batch in BATCHES:
        for length in LENGTHS:
            winners, table = torch.zeros(batch, dtype=torch.long), torch.zeros(2, prefix_commit.COLUMNS)
            top_k.top_k_probs(torch.empty(batch, 5000), 4)
            prefix_commit.launch(table, torch.int64, winners, length)
    assert launches.kinds() == {"top_k": 1, "prefix_commit": 1}
    for k in range(1, 65):
        top_k.top_k_probs(torch.empty(2, 5000), k)
    assert launches.kinds() == {"top_k": 6}  # powers of two


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_cases_are_what_the_launchers_start(launches, monkeypatch, arch):
    """Constants and options of a case of each kernel: what is compiled here is what runs there."""
    from simctg_fast.kernels import candidate_select, centered_scan, prefix_commit, shared_prefix_attention, top_k

    for module in (candidate_select, centered_scan, shared_prefix_attention):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
    half, lengths = {"dtype": torch.bfloat16}, torch.full((2,), 900)
    states, history = torch.empty(2, 4, 4096, **half), torch.empty(2, 999, 4096, **half)
    candidate_select.candidate_select(states, torch.empty(2, 4), history, lengths, None, 0.6, False)
    row, squares, sums = torch.empty(2, 4096, **half), torch.empty(2, 999), torch.empty(2, 4096)
    centered_scan.centered_scan(states, row, history, squares, sums, 0, None, lengths)
    query, new = (torch.empty(8, heads, 1, 128, **half) for heads in (32, 8))
    prefix = torch.empty(2, 8, 999, 128, **half)
    options = (0.125, None, None, None, None, 0, lengths, lengths)
    shared_prefix_attention.shared_prefix_attention(query, prefix, prefix, 999, new, new, *options, None)
    top_k.top_k_probs(torch.empty(2, 128256), 4)
    prefix_commit.launch(torch.zeros(2, prefix_commit.COLUMNS), torch.int64, lengths, lengths)
    variants = (
        "scoring-bf16-k4-even",
        "centered-bf16-k4-even",
        "attention-bf16-d128-m16-plain",
        "top_k-fp32-k4",
        "commit-int64",
    )
    for (kernel, _, given), variant in zip(launches.calls, variants, strict=True):
        name, variant = variant.split("-", 1)
        compiled, _, constants, options = aot._MAKERS[name](variant, arch)
        assert compiled is kernel
        assert {"num_stages": 3, **given} == {**constants, **options}  # triton's own number of stages is 3


def test_rule_of_specialisation_is_tritons(launches):
    """The count above, by the function that triton's launches go through."""
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("triton's binder has another name")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from simctg_fast.kernels import top_k

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for rows in (1, 2):
        for vocabulary in (15, 16, 17, 48, 5000):
            for k in (1, 3, 4):
                for offset in (0, 1):
                    logits = torch.empty(vocabulary * rows + offset)[offset:].view(rows, vocabulary)
                    top_k.top_k_probs(logits, k)
    calls = list(launches.calls)
    kernel = top_k.top_k_kernel
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    keys = {str(bind(*args, **options)[1:]) for _, args, options in calls}
    assert launches.kinds() == {"top_k": len(keys)}
    assert len(keys) > 8
