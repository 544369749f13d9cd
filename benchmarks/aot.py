"""The Triton kernels of the decoding step compiled ahead of time, for GPUs that need not be there.

    python benchmarks/aot.py [--arch 90] [--kernel attention] [--csv FILE]

Prints what ptxas and the disassembly say of every shipped configuration: registers, spills, shared memory, the width of
the loads, the matrix instructions, and the most blocks of it that fit a multiprocessor.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simctg_fast.kernels import (
    candidate_select,
    centered_scan,
    earlier_text,
    prefix_commit,
    shared_prefix_attention,
    top_k,
)

BIN = Path(nvidia.__file__).parent / "bin"
ARCHITECTURES = (80, 90, 100)
# Of a multiprocessor: shared memory of a block and in all (a block loses 1 KiB to the system), registers, threads.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
I, L, F = "i32", "*i64", "*fp32"  # noqa: E741

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher starts it. ``variant``: dtype, sizes and flags, as the functions below read them."""

    kernel: str
    variant: str
    arch: int

    def __str__(self) -> str:
        return f"{self.kernel}-{self.variant}-sm{self.arch}"


@dataclass(frozen=True)
class Report:
    kernel: str
    variant: str
    arch: int
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int  # that fit a multiprocessor
    loads: str  # widths in bits of loads from global memory, and how many of each
    matrix: str  # instructions of the matrix units, and how many of each


VARIANTS = {
    "scoring": [
        f"{kind}-k{k}-{form}"
        for kind in (*SIZES, "fp32high", "mixed")
        for k in (4, 20, 64)
        for form in ("even", "ragged", "odd", "scan")
    ],
    "centered": [
        f"{kind}-k{k}-{form}"
        for kind in (*SIZES, "fp32high")
        for k in (4, 20, 60)
        for form in ("even", "ragged", "odd")
    ],
    "attention": [
        f"{kind}-d{dim}-m{rows}-{flags}"
        for kind in SIZES
        for dim in (64, 128, 256)
        for rows in ((16,) if kind == "fp32" or dim > 128 else (16, 64))
        for flags in ("plain", "all")
    ]
    + [f"bf16-{size}-all" for size in ("d32-m16", "d64-m32", "d80-m16", "d112-m64", "d128-m32")]
    + ["bf16-d64-m32-plain", "bf16-d80-m16-plain", "bf16-d128-m32-plain"]
    + [f"fp32high-d{dim}-m16-{flags}" for dim in (64, 128, 256) for flags in ("plain", "all")],
    "follower": [f"{kind}-k{k}-n{n}" for kind in SIZES for k in (3, 60) for n in (2, 4)],
    "commit": ["int64", "int16"],
    "top_k": ["fp32-k4", "bf16-k64"],
}


def cases(kernels=tuple(VARIANTS), archs=ARCHITECTURES) -> Iterator[Case]:
    for kernel in kernels:
        for variant in VARIANTS[kernel]:
            for arch in archs:
                if arch != 80 or not variant.startswith("fp32high-d256"):  # exact there: the case fp32-d256
                    yield Case(kernel, variant, arch)


def _options(config, registers: int | None):
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": registers}


def _scoring(variant: str, arch: int):
    """even: the step's launch; ragged: a mask, and penalties; odd: the same, of a width that is no multiple of 16;
    scan: the penalties alone. mixed: bf16 states, float32 history."""
    kind, k, form = variant.split("-")
    operand = "fp32" if kind.startswith("fp32") or kind == "mixed" else kind
    exact = kind not in ("fp32high", "mixed")
    block_k = max(16, triton.next_power_of_2(int(k[1:])))
    width = 8 if form == "odd" else 4096
    config = candidate_select.config_of(arch, SIZES[operand], width, block_k, exact, kind == "mixed")
    states = "bf16" if kind == "mixed" else operand
    signature = {
        "states_ptr": f"*{states}", "stride_sb": I, "stride_sk": I, "history_ptr": f"*{operand}", "stride_hb": "i64",
        "stride_ht": I, "mask_ptr": "*u8", "stride_mb": I, "lengths_ptr": L, "probs_ptr": F, "partial_ptr": L,
        "counter_ptr": "*i32", "selected_ptr": L, "winner_ptr": f"*{states}", "penalty_ptr": F, "position_ptr": L,
        "penalty_alpha": "fp32", "length": I, "splits": I, "k": I, "width": I, "capacity": I,
    }  # fmt: skip
    constants = {
        "HAS_MASK": form in ("ragged", "odd"), "HAS_LENGTHS": form != "scan", "SELECT": form != "scan",
        "KEEP": form != "even", "WIDEN": kind == "mixed", "EVEN": form in ("even", "scan"),
        "PRECISION": "ieee" if exact else "tf32x3", "SPLIT": True, "BLOCK_S": candidate_select._SPLIT_LIMIT,
        "BLOCK_K": block_k, "BLOCK_T": config.block_t, "BLOCK_D": config.block_d,
    }  # fmt: skip
    return candidate_select.candidate_select_kernel, signature, constants, _options(config, config.registers)


def _centered(variant: str, arch: int):
    """even: the step's launch; ragged: with a mask; odd: the same, of a width that is no multiple of 16."""
    kind, k, form = variant.split("-")
    operand, exact = kind.removesuffix("high"), not kind.endswith("high")
    width = 8 if form == "odd" else 4096
    block_k, config = centered_scan.configuration(arch, SIZES[operand], width, int(k[1:]), exact)
    signature = {
        "states_ptr": f"*{operand}", "stride_sb": I, "stride_sk": I, "shift_ptr": f"*{operand}", "stride_cb": I,
        "history_ptr": f"*{operand}", "stride_hb": "i64", "stride_ht": I, "squares_ptr": F, "stride_qb": I,
        "sums_ptr": F, "stride_ub": I, "mask_ptr": "*u8", "stride_mb": I, "lengths_ptr": L, "partial_ptr": L,
        "counter_ptr": "*i32", "penalty_ptr": F, "position_ptr": L, "length": I, "splits": I, "k": I, "width": I,
        "capacity": I,
    }  # fmt: skip
    constants = {
        "HAS_MASK": form != "even", "HAS_LENGTHS": True, "EVEN": form == "even",
        "PRECISION": "ieee" if exact else "tf32x3", "SPLIT": True, "BLOCK_S": candidate_select._SPLIT_LIMIT,
        "BLOCK_K": block_k, "BLOCK_T": config.block_t, "BLOCK_D": config.block_d, "BLOCK_C": centered_scan._COUNTED,
    }  # fmt: skip
    return centered_scan.centered_scan_kernel, signature, constants, _options(config, config.registers)


def _follower(variant: str, arch: int):
    """n: the largest order."""
    operand, k, n = variant.split("-")
    signature = {
        "history_ptr": f"*{operand}", "stride_hb": "i64", "stride_ht": I, "tokens_ptr": L, "stride_tb": I,
        "picks_ptr": L, "lengths_ptr": L, "starts_ptr": L, "orders_ptr": L, "norms_ptr": F, "stride_nb": I,
        "partial_ptr": L, "k": I, "width": I, "capacity": I,
    }  # fmt: skip
    constants = {
        "HAS_STARTS": True, "LONGEST": int(n[1:]), "BLOCK_K": triton.next_power_of_2(int(k[1:])),
        "BLOCK_T": earlier_text.BLOCK_T, "BLOCK_D": earlier_text.BLOCK_D,
    }  # fmt: skip
    options = {"num_warps": earlier_text.NUM_WARPS, "num_stages": 3, "maxnreg": earlier_text.REGISTERS}
    return earlier_text.follower_scan_kernel, signature, constants, options


def _attention(variant: str, arch: int):
    kind, dim, rows, flags = variant.split("-")
    operand, dim, rows = kind.removesuffix("high"), int(dim[1:]), int(rows[1:])
    padded = shared_prefix_attention.padded(dim)
    config = shared_prefix_attention.config_of(arch, SIZES[operand], dim, dim, rows)
    x = f"*{operand}"
    signature = dict.fromkeys(shared_prefix_attention.shared_prefix_attention_kernel.arg_names, I)
    signature |= {
        "query_ptr": x, "key_ptr": x, "value_ptr": x, "new_key_ptr": x, "new_value_ptr": x, "mask_ptr": "*u8",
        "bias_ptr": x, "sinks_ptr": x, "lengths_ptr": L, "starts_ptr": L, "partial_ptr": F, "maxima_ptr": F,
        "counter_ptr": "*i32", "out_ptr": x, "scaling": "fp32", "softcap": "fp32", "stride_kb": "i64",
        "stride_vb": "i64",
    }  # fmt: skip
    every = flags == "all"
    constants = {
        "CANDIDATES": 4, "GROUPS": rows // 4, "KV_HEADS": 8, "DIM": dim, "VALUE_DIM": dim, "HAS_OWN": True,
        "HAS_MASK": every, "HAS_BIAS": every, "HAS_SOFTCAP": every, "HAS_SINKS": every, "HAS_LENGTHS": True,
        "HAS_STARTS": True, "HAS_WINDOW": every, "SPLIT": True,
        "PRECISION": "tf32x3" if kind.endswith("high") else "ieee", "BLOCK_M": rows, "BLOCK_N": config.block_n,
        "BLOCK_D": padded, "BLOCK_V": padded,
    }  # fmt: skip
    kernel = shared_prefix_attention.shared_prefix_attention_kernel
    exact = not kind.endswith("high")
    return kernel, signature, constants, _options(config, config.registers if exact else None)


def _commit(variant: str, arch: int):
    signature = {"table_ptr": L, "winners_ptr": L, "positions_ptr": L, "position": I}
    unit = prefix_commit._TRITON[getattr(torch, variant)]
    constants = {"HAS_POSITIONS": True, "UNIT": unit, "COLUMNS": prefix_commit.COLUMNS, "BLOCK": 256}
    return prefix_commit.prefix_commit_kernel, signature, constants, {"num_warps": 4, "num_stages": 3}


def _top_k(variant: str, arch: int):
    kind, k = variant.split("-")
    signature = {
        "logits_ptr": f"*{kind}", "stride_row": I, "entries_ptr": L, "sums_ptr": F, "counter_ptr": "*i32",
        "probs_ptr": F, "tokens_ptr": L, "vocabulary": I, "k": I,
    }  # fmt: skip
    constants = {"SPLIT": True, "BLOCK_S": 32, "BLOCK_K": int(k[1:]), "BLOCK": top_k.BLOCK}
    return top_k.top_k_kernel, signature, constants, {"num_warps": top_k.NUM_WARPS, "num_stages": 3}


_MAKERS = {
    "scoring": _scoring,
    "centered": _centered,
    "follower": _follower,
    "attention": _attention,
    "commit": _commit,
    "top_k": _top_k,
}
_SCAN = {"width", "stride_sk", "stride_ht", "stride_sb", "stride_hb"}
_ODD = {"scoring": _SCAN, "centered": {*_SCAN, "stride_cb", "stride_ub"}}  # where the variant says odd


def build(case: Case):
    """The compiled kernel; its launcher would find the same alignment at run time."""
    kernel, signature, constants, options = _MAKERS[case.kernel](case.variant, case.arch)
    names = kernel.arg_names
    unaligned = _ODD.get(case.kernel, set()) if case.variant.endswith("odd") else set()
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants
        and name not in unaligned
        and (signature[name][0] == "*" or name.startswith("stride") or name in ("width", "vocabulary"))
        and not kernel.params[index].do_not_specialize
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """What cuobjdump says of resources, and the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([BIN / "cuobjdump", flag, path], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}, code


def _count(found: list[str]) -> str:
    return " ".join(f"{name}×{found.count(name)}" for name in sorted(set(found)))


def report(case: Case) -> Report:
    *_, options = _MAKERS[case.kernel](case.variant, case.arch)
    warps, stages = options["num_warps"], options["num_stages"]
    compiled = build(case)
    used, code = disassemble(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    registers = max(used["REG"], 24)
    blocks = min(
        BLOCKS,
        THREADS // (32 * warps),
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        SHARED_TOTAL[case.arch] // (shared + 1024),
    )
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", code)
    widths = [next((w for w in ("128", "64", "U8", "U16", "S16") if f".{w}" in load.replace("LTC128B", "")), "32")
              for load in loads]  # fmt: skip
    matrix = [name.split(".")[0] for name in re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA|DMMA)[\w.]*", code)]
    return Report(
        case.kernel, case.variant, case.arch, warps, stages, used["REG"], used["LOCAL"] + used["STACK"], shared, blocks,
        _count(widths), _count(matrix),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="80, 90 or 100; all of them")
    parser.add_argument("--kernel", choices=list(VARIANTS), action="append", help="all of them by default")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    options = parser.parse_args()
    print(f"triton {triton.__version__}")
    print(f"{'kernel':10}{'variant':24}  sm warps  regs spill  shared blocks  loads; matrix")
    reports = []
    for case in cases(options.kernel or tuple(VARIANTS), options.arch or ARCHITECTURES):
        r = report(case)
        reports.append(r)
        print(
            f"{r.kernel:10}{r.variant:24}{r.arch:4}{r.warps:6}{r.registers:6}{r.spilled_bytes:6}{r.shared_bytes:8}"
            f"{r.blocks:7}  {r.loads}; {r.matrix or '-'}",
            flush=True,
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(reports[0])))
            writer.writeheader()
            writer.writerows(asdict(r) for r in reports)
    bad = [r for r in reports if r.spilled_bytes or r.shared_bytes > SHARED_LIMIT[r.arch]]
    print(f"{len(reports)} configurations, {len(bad)} spill or do not fit")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
