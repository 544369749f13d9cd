"""The CRF's Triton kernels compiled ahead of time, as shipped, for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, nothing is compiled", allow_module_level=True)

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from simctg_fast.kernels import crf_backward, crf_beam, crf_filter, crf_sample  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
BEAM, RANK = 256, 32

F, L, I, U8 = "*fp32", "*i64", "i32", "*u8"  # noqa: E741
FILTER = {
    "scores_ptr": F, "tokens_ptr": L, "left_ptr": F, "right_ptr": F, "lengths_ptr": L, "messages_ptr": F,
    "norms_ptr": F, "pointers_ptr": U8, "last_ptr": L, "scale": "fp32", "T": I, "K": I, "D": I,
}  # fmt: skip
FLOW = {
    "grad_ptr": F, "messages_ptr": F, "norms_ptr": F, "scores_ptr": F, "tokens_ptr": L, "left_ptr": F, "right_ptr": F,
    "lengths_ptr": L, "into_ptr": F, "flow_ptr": F, "scale": "fp32", "T": I, "K": I, "D": I,
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
COMMON = {"HAS_LENGTHS": True, "PRECISION": "ieee", "BLOCK_D": 32}
CASES = {
    "filter": (crf_filter._filter_kernel, FILTER, {**COMMON, "MAX": False, "BLOCK_K": 128, "BLOCK_J": 32}, 8),
    "max": (crf_filter._filter_kernel, FILTER, {**COMMON, "MAX": True, "BLOCK_K": 128, "BLOCK_J": 32}, 8),
    "backtrace": (crf_filter._backtrace_kernel, BACKTRACE, {"HAS_LENGTHS": True}, 1),
    "flow": (crf_backward._flow_kernel, FLOW, {**COMMON, "BLOCK_K": 64, "BLOCK_J": 32}, 8),
    "sources": (crf_backward._table_kernel, TABLE, {**COMMON, "SOURCES": True, "BLOCK_K": 64, "BLOCK_J": 32}, 4),
    "targets": (crf_backward._table_kernel, TABLE, {**COMMON, "SOURCES": False, "BLOCK_K": 64, "BLOCK_J": 32}, 4),
    "ffbs": (crf_sample._ffbs_kernel, FFBS, {**COMMON, "HAS_UNIFORMS": False, "BLOCK_K": 256, "BLOCK_N": 16}, 16),
    "stochastic": (
        crf_sample._stochastic_kernel, STOCHASTIC, {**COMMON, "HAS_UNIFORMS": False, "BLOCK_K": 256, "BLOCK_J": 16}, 16,
    ),
    "select": (crf_beam._select_kernel, SELECT, {"HAS_LENGTHS": True, "BLOCK_K": 256, "CAP": 1024}, 8),
}  # fmt: skip


def build(name: str, capability: int):
    kernel, signature, constants, warps = CASES[name]
    names = kernel.arg_names
    signature = {key: signature.get(key, "constexpr") for key in names}
    # What the launcher finds at run time: tensors and the vocabulary's and beam's strides are multiples of 16.
    aligned = {i for i, key in enumerate(names) if signature[key].startswith("*") or key in ("K", "D")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [BIN / "cuobjdump", "--dump-resource-usage", path], check=True, capture_output=True, text=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


# One GPU and the kernels that compile fast in the fast set, everything in the full one.
SLOW = ("select", "filter", "stochastic")
EVERYTHING = [
    pytest.param(name, capability, marks=[] if capability == 90 and name not in SLOW else pytest.mark.full)
    for name in CASES
    for capability in SHARED_LIMIT
]


@pytest.mark.parametrize(("name", "capability"), EVERYTHING)
def test_aot_no_spills(name, capability, tmp_path):
    compiled = build(name, capability)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["LOCAL"] == 0, used
    assert used["STACK"] == 0, used
    assert used["REG"] <= 255
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
