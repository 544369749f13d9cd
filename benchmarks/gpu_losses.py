"""The losses' part of `gpu.py`: right on the device, within the memory promised, and their speed beside their peers."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import losses
from common import interleaved
from gpu_case import Case, Piece, Where, case, measured, tried

from simctg_fast import contrastive_loss, cosine_similarity_matrix, simcse_sup_loss, simcse_unsup_loss
from simctg_fast.reference import simcse as simcse_reference
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference

PRECISIONS = ("highest", "high")  # of float32 products
# What ends in time: the published class builds its mask on the host, row by row, and the broadcast SimCSE has (N, N, d)
# products. Their tables are `losses.py`.
PEERS = ["ours", "eager", "compile"]
SHAPES = ("32x256x768", "16x1024x768", "4x4096x768")
ROUNDS = 20


def judge(ours: losses.Loss, plain: losses.Loss, data: Tensor) -> tuple[bool, str]:
    """Ours against ``plain`` in float64: allowed is three times plain's error in the same dtype, and a rounding."""
    value, gradient = losses.gradient_of(plain, data.double())
    (got, got_gradient), (other, other_gradient) = (losses.gradient_of(loss, data) for loss in (ours, plain))
    eps = torch.finfo(data.dtype).eps
    error, allowed = (got - value).abs(), 3 * (other - value).abs() + 1e-5 * value.abs() + 1e-8
    wrong = (got_gradient - gradient).norm()
    permitted = 3 * (other_gradient - gradient).norm() + 2 * eps * gradient.norm()
    if data.dim() == 3:
        permitted += losses.ties(data)
    figures = f"loss off by {error:.1e} of {allowed:.1e}, gradient {wrong:.1e} of {permitted:.1e}"
    return bool(error <= allowed) and bool(wrong <= permitted), figures


def check_contrastive(where: Where) -> Iterator[Case]:
    shapes = [(3, 129, 40), (2, 2, 16), (2, 700, 768), (1, 300, 4096)]
    dtype, cuda = getattr(torch, where.dtype), where.cuda
    impls = ("triton", "torch") if cuda else ("cpu", "torch")
    for shape, kind, impl in itertools.product(where.few(shapes), losses.BIAS, impls):
        data = (torch.randn(shape) + losses.BIAS[kind] * torch.randn(shape[2])).to(where.device, dtype)
        mask = torch.ones(shape[:2], device=where.device)
        mask[0, : shape[1] // 5] = 0
        for precision in PRECISIONS if dtype == torch.float32 and cuda else PRECISIONS[:1]:
            torch.set_float32_matmul_precision(precision)

            def ours(states: Tensor, mask=mask, impl=impl) -> Tensor:
                return contrastive_loss(states, 0.5, mask, impl=impl)

            passed, figures = judge(ours, lambda states, mask=mask: reference(states, mask, 0.5), data)
            first, again = losses.gradient_of(ours, data), losses.gradient_of(ours, data)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                passed, figures = False, f"{figures}, and differs from run to run"
            name = f"contrastive_loss {dtype} {'x'.join(map(str, shape))} {kind} {impl} {precision}"
            yield case(name, passed, figures)
    torch.set_float32_matmul_precision("highest")


def check_simcse(where: Where) -> Iterator[Case]:
    dtype = getattr(torch, where.dtype)
    for rows, supervised in itertools.product(where.few((6, 390, 2400, 9000)), (False, True)):
        data = (torch.randn(rows, 96) + 0.3).to(where.device, dtype)
        ours = simcse_sup_loss if supervised else simcse_unsup_loss
        plain = simcse_reference.simcse_sup_loss if supervised else simcse_reference.simcse_unsup_loss
        yield case(f"simcse {dtype} {rows} rows{' supervised' * supervised}", *judge(ours, plain, data))
    data = torch.randn(2, 150, 200).to(where.device, dtype)
    truth = cosine_similarity_matrix(data.double().cpu())
    error = (cosine_similarity_matrix(data).double().cpu() - truth).abs().max().item()
    yield case(f"cosine_similarity_matrix {dtype}", error <= torch.finfo(dtype).eps + 2e-6, f"error {error:.1e}")


def check_memory(where: Where) -> Iterator[Case]:
    """Peak minus the gradient: a bit a pair and 30 MB."""
    dtype = getattr(torch, where.dtype)
    for shape in [(4, 4096, 768), (1, 16384, 4096)] if where.cuda else where.few([(1, 512, 256), (1, 2048, 256)]):
        data = (torch.randn(shape) + torch.randn(shape[2])).to(where.device, dtype)
        contrastive_loss(data.detach().requires_grad_()).backward()
        added = losses.peak_megabytes(contrastive_loss, data) - data.numel() * data.element_size() / 1e6
        allowed = shape[0] * shape[1] ** 2 / 8e6 + 30
        name = f"memory {dtype} {'x'.join(map(str, shape))}"
        yield case(name, added <= allowed, f"{added:.1f} MB beside the gradient, allowed {allowed:.1f} MB")


CHECKS: list[Piece] = [check_contrastive, check_simcse, check_memory]


# ---- speed ----------------------------------------------------------------------------------------------------------


def compared(where: Where, name: str, providers: dict[str, losses.Loss], data: Tensor, goals: dict) -> Case:
    """Forward and backward together, the least of rounds that go through all in turn; ours has been found right."""
    now = losses.stopwatch(where.device, "wall")

    def once(loss: losses.Loss) -> float:
        return losses.timed(loss, data, now, {mode: [] for mode in losses.MODES})

    # The first time compiles, and says who cannot run here.
    failed = {who: found for who, loss in providers.items() if isinstance(found := tried(lambda x=loss: once(x)), str)}
    running = {who: loss for who, loss in providers.items() if who not in failed}
    if "ours" in failed:
        return case(name, False, failed["ours"])
    seconds = interleaved({who: lambda x=x: once(x) for who, x in running.items()}, 2 if where.tiny else ROUNDS)
    ms = {who: 1e3 * min(values) for who, values in seconds.items()}
    peaks = {who: losses.peak_megabytes(loss, data) for who, loss in running.items()}
    others = {who: ms[who] if who in ms else f"{who}: {failed[who]}" for who in providers if who != "ours"}
    note = "peak MB " + ", ".join(f"{who} {peak:.0f}" for who, peak in peaks.items())
    return measured(name, ms["ours"], others=others, goals=goals, note=note, peak_mb=peaks)


def measure_contrastive(where: Where, dtype: str, shape: str) -> Iterator[Case]:
    """Some hinges active, and none; compiled once for both."""
    torch.set_float32_matmul_precision("high")
    providers = losses.contrastive_providers(PEERS, "auto", "eager" if where.tiny else "inductor")
    goals = losses.GOALS["cuda", dtype].get(shape, {})
    size = (2, 48, 32) if where.tiny else tuple(map(int, shape.split("x")))
    for place, kind in enumerate(("mixed", "isotropic")):
        data = torch.randn(size) + losses.BIAS[kind] * torch.randn(size[2])
        data = data.to(where.device, losses.DTYPES[dtype])
        name = f"contrastive loss {'x'.join(map(str, size))} {dtype}{' high' * (dtype == 'fp32')} {kind}"
        if not losses.agrees(providers["ours"], losses.eager, lambda s: reference(s, None, losses.MARGIN), data[:1]):
            yield case(name, False, "wrong beside float64: not timed")
            continue
        wanted = {peer: pair[place] for peer, pair in goals.items() if pair[place] is not None}
        yield compared(where, name, providers, data, wanted)


def measure_simcse(where: Where, dtype: str, rows: int) -> Iterator[Case]:
    torch.set_float32_matmul_precision("high")
    data = (torch.randn(16 if where.tiny else rows, 768) + 0.5).to(where.device, losses.DTYPES[dtype])
    providers = {"ours": simcse_unsup_loss, "matmul": losses.simcse_reference}
    name = f"SimCSE {len(data)}x768 {dtype}{' high' * (dtype == 'fp32')}"
    if not losses.agrees(simcse_unsup_loss, losses.simcse_reference, losses.simcse_reference, data[:2050]):
        yield case(name, False, "wrong beside float64: not timed")
        return
    yield compared(where, name, providers, data, losses.SIMCSE_GOALS["cuda", dtype].get(rows, {}))


SPEED: list[Piece] = [
    *(functools.partial(measure_contrastive, dtype=d, shape=s) for d in ("bf16", "fp32") for s in SHAPES),
    *(functools.partial(measure_simcse, dtype=d, rows=n) for d in ("bf16", "fp32") for n in (2048, 32768)),
]
