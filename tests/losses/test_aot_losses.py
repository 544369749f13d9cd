"""The losses' Triton kernels compiled ahead of time, as shipped, for GPUs that need not be there."""

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

from simctg_fast.kernels import contraclm, contrastive_loss, cosine_similarity, simcse  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}

F, I = "*fp32", "i32"  # noqa: E741
HINGE = {
    "stride_xb": I, "stride_xt": I, "inverse_ptr": F, "totals_ptr": F, "radial_ptr": F, "bits_ptr": "*i16",
    "flags_ptr": "*u8", "length": I, "width": I, "tiles": I, "threshold": "fp32",
}  # fmt: skip
GRADIENT = {
    "stride_xb": I, "stride_xt": I, "inverse_ptr": F, "radial_ptr": F, "bits_ptr": "*i32", "flags_ptr": "*u8",
    "sums_ptr": F, "weights_ptr": F, "grad_ptr": F, "length": I, "width": I, "tiles": I,
}  # fmt: skip
NORMS = {
    "stride_xb": I, "stride_xt": I, "mask_ptr": "*i64", "high_ptr": "*fp16", "low_ptr": "*fp16", "inverse_ptr": F,
    "length": I, "width": I,
}  # fmt: skip
SUMS = {
    "inverse_ptr": F, "mask_ptr": "*i64", "totals_ptr": F, "partial_ptr": F, "normalizer_ptr": F, "loss_ptr": F,
    "weights_ptr": F, "radial_ptr": F, "batch": I, "length": I, "tiles": I, "pairs_of_tiles": I, "margin": "fp32",
}  # fmt: skip
TILE_SUMS = {
    "stride_xb": I, "stride_xt": I, "inverse_ptr": F, "sums_ptr": F, "length": I, "width": I, "tiles": I,
}  # fmt: skip
COSINE = {"stride_xb": I, "stride_xt": I, "inverse_ptr": F, "length": I, "width": I}
LSE = {
    "stride_q": I, "stride_k": I, "out_ptr": F, "count_q": I, "count_k": I, "width": I, "scale": "fp32",
    "tiles_each": I, "itself": I,
}  # fmt: skip
WEIGHTS = {
    "stride_q": I, "stride_k": I, "row_lse_ptr": F, "row_grad_ptr": F, "column_lse_ptr": F, "column_grad_ptr": F,
    "first_row": I, "end_row": I, "count_q": I, "count_k": I, "width": I, "scale": "fp32", "itself": I,
}  # fmt: skip
TOKEN_LSE = {
    "real_ptr": "*u8", "out_ptr": F, "count": I, "width": I, "scale": "fp32", "tiles_each": I, "shares": I,
}  # fmt: skip
TOKEN_WEIGHTS = {
    "lse_ptr": F, "grad_ptr": F, "first_row": I, "end_row": I, "count": I, "width": I, "scale": "fp32",
}  # fmt: skip
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def case(name: str, kind: str, capability: int, highest: bool = False):
    """Kernel, signature, constants and configuration as the launcher has them; kind: bf16, fp16, fp32 or planes."""
    split = kind == "planes"
    operand = "fp16" if split else kind
    x, low, out = f"*{operand}", f"*{operand}", "*fp32" if split else f"*{kind}"
    size = SIZES[operand]
    flags = {"SPLIT": split, "PRECISION": "ieee", "TILE": 128}
    if name == "hinge":
        config = contrastive_loss.HINGE_CONFIGS[capability, size, split]
        signature = {**HINGE, "x_ptr": x, "low_ptr": low}
        return contrastive_loss.hinge_kernel, signature, {**flags, "KEEP": True, "BLOCK_K": config.block_k}, config
    if name in ("gradient", "gradient_short"):
        config = contrastive_loss.GRADIENT_CONFIGS[capability, size, split]
        constants = {**flags, "HAS_SUMS": name == "gradient", "BLOCK_D": config.block_k}
        signature = {**GRADIENT, "x_ptr": x, "low_ptr": low, "out_ptr": out}
        return contrastive_loss.gradient_kernel, signature, constants, config
    if name == "norms":
        constants = {"HAS_MASK": True, "SPLIT": split, "BLOCK": 1024}
        return contrastive_loss.norms_kernel, {**NORMS, "x_ptr": out}, constants, contrastive_loss.Config(0, 4, 3)
    if name == "sums":
        constants = {
            "REDUCTION": 0, "HAS_MASK": True, "HAS_NORMALIZER": True, "KEEP": True, "TILE": 128, "BLOCK_B": 8,
            "BLOCK": 512,
        }  # fmt: skip
        return contrastive_loss.sums_kernel, SUMS, constants, contrastive_loss.Config(0, 8, 3)
    if name == "tile_sums":
        constants = {"SPLIT": split, "TILE": 128, "BLOCK_D": 64}
        signature = {**TILE_SUMS, "x_ptr": x, "low_ptr": low}
        return contrastive_loss.tile_sums_kernel, signature, constants, contrastive_loss.Config(0, 4, 3)
    precision = "tf32x3" if kind == "fp32" and not highest else "ieee"
    if name == "cosine":
        config = cosine_similarity.HIGHEST if highest else cosine_similarity.CONFIGS[capability, size]
        constants = {"PRECISION": precision, "TILE": 64, "BLOCK_K": config.block_k}
        return cosine_similarity.cosine_kernel, {**COSINE, "x_ptr": x, "out_ptr": out}, constants, config
    config = simcse.CONFIGS[capability, size]
    constants = {"SELF": True, "PRECISION": precision, "TILE": 128, "BLOCK_K": config.block_k}
    if name.startswith("token"):
        del constants["SELF"]
    if name == "token_lse":
        return contraclm.token_lse_kernel, {**TOKEN_LSE, "u_ptr": x}, constants, config
    if name == "lse":
        return simcse.lse_kernel, {**LSE, "q_ptr": x, "k_ptr": x}, constants, config
    tile, warps = simcse.weights_tile((capability, size))
    constants |= {"TILE": tile}
    config = simcse.Config(config.block_k, warps, config.num_stages)
    if name == "token_weights":
        return contraclm.token_weights_kernel, {**TOKEN_WEIGHTS, "u_ptr": x, "out_ptr": out}, constants, config
    constants |= {"ROW_TERM": True, "COLUMN_TERM": True}
    return simcse.weights_kernel, {**WEIGHTS, "q_ptr": x, "k_ptr": x, "out_ptr": out}, constants, config


def build(name: str, kind: str, capability: int, highest: bool = False):
    kernel, signature, constants, config = case(name, kind, capability, highest)
    names = kernel.arg_names
    signature = {key: signature.get(key, "constexpr") for key in names}
    # What the launcher finds at run time: tensors, strides and widths are multiples of 16.
    aligned = {i for i, key in enumerate(names) if signature[key][0] == "*" or key.startswith(("stride", "width"))}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(cubin: bytes, folder: Path) -> tuple[dict[str, int], str]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", path], check=True, capture_output=True)
    code = subprocess.run([BIN / "cuobjdump", "--dump-sass", path], check=True, capture_output=True)
    numbers = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout.decode())
    return {key: int(value) for key, value in numbers}, code.stdout.decode()


EXPONENTIAL = ("lse", "weights", "token_lse", "token_weights")
MATRIX = [(name, kind) for name in ("hinge", "gradient") for kind in ("bf16", "fp16", "planes", "fp32")]
MATRIX += [(name, kind) for name in ("cosine", *EXPONENTIAL) for kind in ("bf16", "fp32")]
OTHERS = [("norms", "bf16"), ("norms", "planes"), ("sums", "fp32"), ("tile_sums", "bf16"), ("tile_sums", "planes")]
# The telling ones for the fast set: both phases, in the two kinds that training uses.
FAST = {("hinge", "bf16", 90), ("gradient", "bf16", 90), ("hinge", "planes", 90), ("gradient", "planes", 90)}


def grid(cases):
    for name, kind in cases:
        for capability in (80, 90, 100):
            marks = () if (name, kind, capability) in FAST else pytest.mark.full
            yield pytest.param(name, kind, capability, marks=marks, id=f"{name}-{kind}-sm{capability}")


# What triton 3.6 spills, in bytes, and can do nothing about: kernel, architecture.
SPILLS = {("weights", 90): 80} if triton.__version__.startswith("3.6.") else {}


def check_resources(used, compiled, capability, name=None):
    assert used["LOCAL"] == 0, used
    assert used["STACK"] <= SPILLS.get((name, capability), 0), used
    assert used["REG"] <= 255
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize(("name", "kind", "capability"), list(grid(MATRIX)))
def test_aot_matrix_kernels(name, kind, capability, tmp_path):
    if name == "hinge" and capability == 100 and triton.__version__.startswith("3.6."):
        pytest.skip("triton 3.6 does not compile it for Blackwell, where the operator takes PyTorch")
    compiled = build(name, kind, capability)
    used, code = inspect(compiled.asm["cubin"], tmp_path)
    check_resources(used, compiled, capability)
    if kind == "fp32" and name in ("hinge", "gradient"):  # "highest"
        assert "FFMA" in code
    else:
        assert re.search(TENSOR_CORE[capability], code)


@pytest.mark.parametrize(("name", "kind", "capability"), list(grid(OTHERS)))
def test_aot_streaming_kernels(name, kind, capability, tmp_path):
    compiled = build(name, kind, capability)
    used, code = inspect(compiled.asm["cubin"], tmp_path)
    check_resources(used, compiled, capability)
    if name == "norms":
        assert re.search(r"LDG\.E\.(64|128)", code)


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["cosine", *EXPONENTIAL])
def test_aot_highest_precision(name, capability, tmp_path):
    compiled = build(name, "fp32", capability, highest=True)
    used, code = inspect(compiled.asm["cubin"], tmp_path)
    check_resources(used, compiled, capability, name)
    assert "FFMA" in code
    assert not re.search(TENSOR_CORE[capability], code)
