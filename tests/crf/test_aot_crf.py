"""The CRF's Triton kernels compiled ahead of time, as shipped, for GPUs that need not be there."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, nothing is compiled", allow_module_level=True)

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from simctg_fast.kernels import crf_backward, crf_beam, crf_filter, crf_sample, crf_transitions  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

F, L, I, U8 = "*fp32", "*i64", "i32", "*u8"  # noqa: E741
FORM = {
    "tokens_ptr": L, "left_ptr": F, "right_ptr": F, "lengths_ptr": L, "tiles_ptr": F, "scale": "fp32", "item": I,
    "first": I, "STEPS": I, "T": I, "K": I, "WIDE": I, "D": I,
}  # fmt: skip
FILTER = {
    "tiles_ptr": F, "scores_ptr": F, "lengths_ptr": L, "messages_ptr": F, "norms_ptr": F, "pointers_ptr": U8,
    "last_ptr": L, "item": I, "first": I, "STEPS": I, "T": I, "K": I, "WIDE": I,
}  # fmt: skip
FLOW = {
    "tiles_ptr": F, "grad_ptr": F, "messages_ptr": F, "norms_ptr": F, "scores_ptr": F, "lengths_ptr": L, "into_ptr": F,
    "flow_ptr": F, "item": I, "first": I, "STEPS": I, "T": I, "K": I, "WIDE": I,
}  # fmt: skip
TABLE = {
    "messages_ptr": F, "norms_ptr": F, "scores_ptr": F, "tokens_ptr": L, "left_ptr": F, "right_ptr": F,
    "lengths_ptr": L, "flow_ptr": F, "out_ptr": F, "scale": "fp32", "T": I, "K": I, "D": I,
}  # fmt: skip
FFBS = {
    "messages_ptr": F, "norms_ptr": F, "scores_ptr": F, "tokens_ptr": L, "left_ptr": F, "right_ptr": F,
    "lengths_ptr": L, "uniforms_ptr": F, "slots_ptr": L, "seed": "i64", "scale": "fp32", "T": I, "K": I, "D": I, "N": I,
}  # fmt: skip
STOCHASTIC = {
    "scores_ptr": F, "tokens_ptr": L, "left_ptr": F, "right_ptr": F, "lengths_ptr": L, "uniforms_ptr": F,
    "slots_ptr": L, "prefixes_ptr": F, "pointers_ptr": U8, "seed": "i64", "inverse": "fp32", "T": I, "K": I, "D": I,
    "N": I,
}  # fmt: skip
SELECT = {
    "emissions_ptr": F, "lengths_ptr": L, "scratch_ptr": L, "tokens_ptr": L, "values_ptr": F, "stride_b": "i64",
    "stride_t": "i64", "T": I, "V": I, "K": I,
}  # fmt: skip
BACKTRACE = {"pointers_ptr": U8, "last_ptr": L, "lengths_ptr": L, "path_ptr": L, "T": I, "K": I}
LENGTHS = {"HAS_LENGTHS": True}
SAMPLER = {**LENGTHS, "HAS_UNIFORMS": False}
BEAMS, RANKS = (64, 128, 256, 512, 1024), (16, 32, 64, 128, 256)
# Kernel, signature, flags, and how the launcher starts it for a beam and a rank.
KERNELS = {
    "transitions": (crf_transitions._transition_kernel, FORM, LENGTHS, lambda k, d: crf_transitions.config()),
    "filter": (crf_filter._filter_kernel, FILTER, {**LENGTHS, "MAX": False}, lambda k, d: crf_filter.config(k)),
    "max": (crf_filter._filter_kernel, FILTER, {**LENGTHS, "MAX": True}, lambda k, d: crf_filter.config(k)),
    "backtrace": (crf_filter._backtrace_kernel, BACKTRACE, LENGTHS, lambda k, d: {"num_warps": 1}),
    "flow": (crf_backward._flow_kernel, FLOW, LENGTHS, lambda k, d: crf_backward.flow_config(k)),
    "sources": (crf_backward._table_kernel, TABLE, {**LENGTHS, "SOURCES": True}, crf_backward.table_config),
    "targets": (crf_backward._table_kernel, TABLE, {**LENGTHS, "SOURCES": False}, crf_backward.table_config),
    "ffbs": (crf_sample._ffbs_kernel, FFBS, SAMPLER, lambda k, d: crf_sample.ffbs_config(k)),
    "stochastic": (crf_sample._stochastic_kernel, STOCHASTIC, SAMPLER, lambda k, d: crf_sample.stochastic_config(k)),
    "select": (crf_beam._select_kernel, SELECT, LENGTHS, lambda k, d: crf_beam.config(k)),
}
SINGLE = ("filter", "max", "flow", "backtrace", "select")  # none meets the rank


@functools.cache
def build(name: str, beam: int, rank: int, precision: str, capability: int):
    kernel, _, flags, config = KERNELS[name]
    launch = config(beam, rank)
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in launch}
    # What the launcher finds at run time: tensors begin at a multiple of 16, and so may a beam and a rank be.
    even = tuple(key for key, size in (("K", beam), ("D", rank)) if size % 16 == 0)
    even += ("WIDE",)
    names = kernel.arg_names
    constants = {**flags, **launch, **({"PRECISION": precision} if "PRECISION" in names else {})}
    return compiled(name, tuple(constants.items()), tuple(options.items()), even, capability)


@functools.cache  # the grid meets equal constants again and again
def compiled(name: str, constants: tuple, options: tuple, even: tuple[str, ...], capability: int):
    kernel, signature, _, _ = KERNELS[name]
    names = kernel.arg_names
    signature = {key: signature.get(key, "constexpr") for key in names}
    aligned = {i for i, key in enumerate(names) if signature[key].startswith("*") or key in even}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [BIN / "cuobjdump", "--dump-resource-usage", path], check=True, capture_output=True, text=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def grid() -> Iterator[tuple]:
    """Beams and ranks that divide everything, ones that divide nothing, and products in TF32."""
    for name in KERNELS:
        if name in SINGLE:
            yield from ((name, beam, 32, "ieee") for beam in (*BEAMS, 100, 250, 700, 1000))
            continue
        yield from ((name, beam, rank, "ieee") for beam in BEAMS for rank in RANKS)
        yield from ((name, beam, 33, "ieee") for beam in (100, 250, 700, 1000))
        yield from ((name, beam, 64, "tf32") for beam in BEAMS)


# In the fast set, for one GPU: captioners' sizes, and what a whole row of the tables would not leave room for.
FAST = {(name, 256, 32, "ieee", 90) for name in KERNELS if name != "select"}
FAST |= {(name, 1024, 64, "ieee", 90) for name in ("ffbs", "stochastic")} | {("sources", 1024, 256, "ieee", 90)}
CASES = [
    pytest.param(
        *case,
        arch,
        id="-".join(map(str, (*case, f"sm{arch}"))),
        marks=[] if (*case, arch) in FAST else pytest.mark.full,
    )
    for case in grid()
    for arch in SHARED_LIMIT
]


# What triton 3.6 spills, in bytes, with beams above 512.
SPILLS = {"select": 40, "ffbs": 160, "stochastic": 40} if triton.__version__.startswith("3.6.") else {}


@pytest.mark.parametrize(("name", "beam", "rank", "precision", "capability"), CASES)
def test_aot_no_spills(name, beam, rank, precision, capability, tmp_path):
    built = build(name, beam, rank, precision, capability)
    used = resources(built.asm["cubin"], tmp_path)
    assert used["LOCAL"] == 0, used
    assert used["STACK"] <= (SPILLS.get(name, 0) if beam > 512 else 0), used
    assert used["REG"] <= 255
    assert built.metadata.shared <= SHARED_LIMIT[capability]


def test_the_fast_set_is_of_the_grid():
    assert {(*case, 90) for case in grid()} >= FAST
