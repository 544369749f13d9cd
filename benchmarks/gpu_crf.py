"""The CRF's part of `gpu.py`: its kernels on a device against float64 on the CPU, and its benchmark there."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from simctg_fast import LowRankCRF, StochasticViterbiSamples
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.reference import crf as reference

Case = tuple[str, bool, str]
Within = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[bool, str]]
# Batch, positions, vocabulary, beam, rank: of one tile, of sizes that divide nothing, as captioners have them.
SHAPES = [(2, 1, 5, 1, 1), (3, 7, 333, 37, 5), (4, 33, 3000, 256, 32), (2, 9, 2000, 700, 48)]


def check_crf(device: str, within: Within) -> Iterator[Case]:
    yield from _selection(device)
    for shape, ragged in itertools.product(SHAPES, (False, True)):
        yield from _probabilities(device, shape, ragged, within)
        yield from _paths(device, shape, ragged)


def _selection(device: str) -> Iterator[Case]:
    for dtype, (batch, length, vocabulary, beam, _) in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), SHAPES
    ):
        emissions = torch.randn(batch, length, vocabulary, device=device).to(dtype)
        emissions[:, 0, ::3] = 0.5  # ties; a row of bans
        emissions[-1, -1, beam // 2 :] = float("-inf")
        tokens, values = crf_beam_select(emissions, beam)
        expected = crf_beam_select(emissions.cpu(), beam, impl="torch")
        wrong = int((tokens.cpu() != expected[0]).sum() + (values.cpu() != expected[1]).sum())
        name = f"beam selection {dtype} {batch} × {length} × {vocabulary}, beam {beam}"
        yield name, wrong == 0 and tokens.device.type == device, f"{wrong} differ"


def _models(device: str, shape: tuple[int, ...], ragged: bool):
    """The model and its emissions on the device, the same in float64 on the CPU, and the lengths."""
    batch, length, vocabulary, beam, rank = shape
    crf = LowRankCRF(vocabulary, rank, beam).to(device)
    exact = LowRankCRF(vocabulary, rank, beam, impl="torch").double()
    exact.load_state_dict(crf.state_dict())
    emissions = torch.randn(batch, length, vocabulary, device=device)
    emissions[:, :, 1] = float("-inf")
    lengths = torch.randint(length + 1, (batch,), device=device) if ragged else None
    return crf, exact, emissions, lengths


def _probabilities(device: str, shape: tuple[int, ...], ragged: bool, within: Within) -> Iterator[Case]:
    crf, exact, emissions, lengths = _models(device, shape, ragged)
    plain = LowRankCRF(*shape[2:3], shape[4], shape[3], impl="torch").to(device)
    plain.load_state_dict(crf.state_dict())
    there = None if lengths is None else lengths.cpu()
    beam = crf.beam(emissions, lengths).tokens
    drawn = crf.sample(emissions, lengths, num_samples=5)
    weights = torch.randn(shape[0], 5, dtype=torch.float64)

    def quantities(model: LowRankCRF, e: torch.Tensor, n: torch.Tensor | None) -> dict[str, torch.Tensor]:
        e = e.detach().clone().requires_grad_()
        model.zero_grad()
        where = {"beam_tokens": beam.to(e.device), "temperature": 0.8}
        score = model.log_prob(e, drawn.tokens.to(e.device), n, **where)
        (score.log_prob * weights.to(score.log_prob)).sum().backward()
        return {
            "log_partition": model.log_partition(e, n, **where).detach(),
            "token_log_probs": score.token_log_probs.detach(),
            "gradient of emissions": e.grad,
            "gradient of E1": model.E1.weight.grad,
            "gradient of E2": model.E2.weight.grad,
            "marginals": model.marginals(e, n, **where).probs,
            "entropy": model.entropy(e, n, **where).detach(),
        }

    ours, theirs = quantities(crf, emissions, lengths), quantities(plain, emissions, lengths)
    truth = quantities(exact, emissions.double().cpu(), there)
    for name, value in ours.items():
        passed, figures = within(value, theirs[name], truth[name])
        yield f"{name} {shape}{' ragged' * ragged}", passed and value.device.type == device, figures


def _paths(device: str, shape: tuple[int, ...], ragged: bool) -> Iterator[Case]:
    crf, exact, emissions, lengths = _models(device, shape, ragged)
    there = None if lengths is None else lengths.cpu()
    label = f"{shape}{' ragged' * ragged}"
    # The best path scores what the best path in float64 does.
    best, known = crf.viterbi(emissions, lengths), exact.viterbi(emissions.double().cpu(), there)
    worst = float((best.score.double().cpu() - known.score).detach().abs().max())
    yield (
        f"Viterbi {label}",
        worst < 1e-4 * max(1.0, float(known.score.detach().abs().max())),
        f"score off by {worst:.1e}",
    )
    here = LowRankCRF(*shape[2:3], shape[4], shape[3], impl="torch")
    here.load_state_dict(crf.state_dict())
    for mode in ("ffbs", "stochastic_viterbi"):
        ours, theirs = (
            model.sample(e, n, num_samples=20, mode=mode, generator=torch.Generator().manual_seed(3))
            for model, e, n in ((crf, emissions, lengths), (here, emissions.cpu(), there))
        )
        same = float((ours.slots.cpu() == theirs.slots).all(1).double().mean())
        yield f"{mode}, paths of the CPU {label}", same > 0.9, f"{same:.1%} the same"
    count = 4096
    drawn = crf.sample(emissions, lengths, num_samples=count)
    expected = count * crf.marginals(emissions, lengths).probs
    counts = torch.zeros_like(expected).scatter_add_(2, drawn.slots.clamp(min=0), (drawn.slots >= 0).to(expected.dtype))
    often = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[often].mean()) if bool(often.any()) else 0.0
    yield f"frequencies of slots {label}", statistic < 2, f"Pearson's statistic over its mean {statistic:.2f}"
    published = StochasticViterbiSamples(shape[2], shape[4], shape[3], num_samples=4).to(device)
    published.load_state_dict(crf.state_dict())
    uniforms = torch.rand(shape[0], shape[1] - 1, shape[3], 4, device=device)
    found = published(emissions, uniforms=uniforms)
    wanted = reference.published_samples(
        emissions.cpu(), crf.E1.weight.cpu(), crf.E2.weight.cpu(), shape[3], samples=4, uniforms=uniforms.cpu()
    )
    same = float((found[1].cpu() == wanted[1]).all(1).double().mean())
    yield f"published classes, uniforms given {label}", same > 0.8, f"{same:.1%} the same"


def check_crf_speed(device: str) -> Iterator[Case]:
    """The benchmark; its goals are reported, a case fails only where it does not run."""
    command = [sys.executable, str(Path(__file__).resolve().parent / "crf.py"), "--device", device]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout)
    lines = result.stdout.strip().splitlines() or ["no output"]
    yield "benchmarks/crf.py", result.returncode == 0, lines[-1]
