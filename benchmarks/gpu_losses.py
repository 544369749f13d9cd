"""The losses' part of `gpu.py`: right on the device, within the memory promised, and then the tables of losses.py."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import losses

from simctg_fast import contrastive_loss, cosine_similarity_matrix, simcse_sup_loss, simcse_unsup_loss
from simctg_fast.reference import simcse as simcse_reference
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("highest", "high")  # of float32 products
Case = tuple[str, bool, str]


def value_and_gradient(loss: losses.Loss, data: Tensor) -> tuple[Tensor, Tensor]:
    value, gradient = losses.gradient_of(loss, data)
    return value.cpu(), gradient.cpu()


def judge(ours: losses.Loss, plain: losses.Loss, truth: losses.Loss, data: Tensor) -> tuple[bool, str]:
    """Ours against float64 on the CPU: allowed is three times plain torch's error in the same dtype, and a rounding."""
    value, gradient = value_and_gradient(truth, data.double().cpu())
    (got, got_gradient), (other, other_gradient) = (value_and_gradient(loss, data) for loss in (ours, plain))
    eps = torch.finfo(data.dtype).eps
    error, allowed = (got - value).abs(), 3 * (other - value).abs() + 1e-5 * value.abs() + 1e-8
    wrong = (got_gradient - gradient).norm()
    permitted = 3 * (other_gradient - gradient).norm() + 2 * eps * gradient.norm()
    if data.dim() == 3:
        permitted += losses.ties(data.cpu())
    figures = f"loss off by {error:.1e} of {allowed:.1e}, gradient {wrong:.1e} of {permitted:.1e}"
    return bool(error <= allowed) and bool(wrong <= permitted), figures


def check_losses(device: str) -> Iterator[Case]:
    impls = ("triton", "torch") if device == "cuda" else ("cpu", "torch")
    shapes = [(2, 2, 16), (3, 129, 40), (2, 700, 768), (1, 300, 4096)]
    for dtype, shape, kind, impl in itertools.product(DTYPES, shapes, losses.BIAS, impls):
        data = (torch.randn(shape) + losses.BIAS[kind] * torch.randn(shape[2])).to(device, dtype)
        mask = torch.ones(shape[:2], device=device)
        mask[0, : shape[1] // 5] = 0
        for precision in PRECISIONS if dtype == torch.float32 and device == "cuda" else PRECISIONS[:1]:
            torch.set_float32_matmul_precision(precision)
            passed, figures = judge(
                lambda s, mask=mask, impl=impl: contrastive_loss(s, 0.5, mask, impl=impl),
                lambda s, mask=mask: reference(s, mask, 0.5),
                lambda s, mask=mask: reference(s, mask.cpu(), 0.5),
                data,
            )
            again = losses.gradient_of(lambda s, mask=mask, impl=impl: contrastive_loss(s, 0.5, mask, impl=impl), data)
            first = losses.gradient_of(lambda s, mask=mask, impl=impl: contrastive_loss(s, 0.5, mask, impl=impl), data)
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            name = f"contrastive_loss {dtype} {'x'.join(map(str, shape))} {kind} {impl} {precision}"
            yield name, passed and same, figures + ("" if same else ", and differs from run to run")
    torch.set_float32_matmul_precision("highest")
    for dtype, rows, supervised in itertools.product(DTYPES, (6, 390, 2400, 9000), (False, True)):
        data = (torch.randn(rows, 96) + 0.3).to(device, dtype)
        ours = simcse_sup_loss if supervised else simcse_unsup_loss
        plain = simcse_reference.simcse_sup_loss if supervised else simcse_reference.simcse_unsup_loss
        yield f"simcse {dtype} {rows} rows{' supervised' * supervised}", *judge(ours, plain, plain, data)
    for dtype in DTYPES:
        data = torch.randn(2, 150, 200).to(device, dtype)
        truth = cosine_similarity_matrix(data.double().cpu())
        error = (cosine_similarity_matrix(data).double().cpu() - truth).abs().max().item()
        yield f"cosine_similarity_matrix {dtype}", error <= torch.finfo(dtype).eps + 2e-6, f"error {error:.1e}"
    yield from check_memory(device)


def check_memory(device: str) -> Iterator[Case]:
    """Peak minus the gradient: a bit a pair and 30 MB."""
    shapes = [(4, 4096, 768), (1, 16384, 4096)] if device == "cuda" else [(1, 2048, 256)]
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), shapes):
        data = (torch.randn(shape) + torch.randn(shape[2])).to(device, dtype)
        contrastive_loss(data.detach().requires_grad_()).backward()
        added = losses.peak_megabytes(contrastive_loss, data) - data.numel() * data.element_size() / 1e6
        allowed = shape[0] * shape[1] ** 2 / 8e6 + 30
        name = f"memory {dtype} {'x'.join(map(str, shape))}"
        yield name, added <= allowed, f"{added:.1f} MB beside the gradient, allowed {allowed:.1f} MB"


def measure_losses(device: str) -> Iterator[Case]:
    """The tables; a case fails where a result is wrong, not where a goal is missed."""
    if device == "cpu":  # to try the part itself
        quick = ["--shapes", "2x64x64", "--repeats", "1", "--peers", "ours,eager", "--csv", os.devnull]
        tables = {"contrastive loss": quick, "SimCSE": [*quick, "--simcse", "16"]}
    else:
        tables = {
            "contrastive loss, bf16": ["--dtype", "bf16"],
            "contrastive loss, fp32, precision high": ["--dtype", "fp32", "--precision", "high"],
            "contrastive loss, fp32, precision highest": ["--dtype", "fp32", "--precision", "highest"],
            "SimCSE, bf16": ["--dtype", "bf16", "--simcse", "256,1024,2048,8192,32768"],
            "SimCSE, fp32, precision high": ["--dtype", "fp32", "--precision", "high", "--simcse", "1024,2048,32768"],
            "crossover, bf16": ["--dtype", "bf16", "--crossover"],
        }
    for name, arguments in tables.items():
        print(f"\n{name}")
        yield name, losses.main(["--device", device, *arguments]) == 0, "figures above"
