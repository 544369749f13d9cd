"""The CRF's part of `gpu.py`: its kernels on a device against float64 on the CPU, and its rows of `crf.py` there."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import crf as benchmark
from gpu_case import Case, Piece, Where, case, measured, within

from simctg_fast import LowRankCRF, StochasticViterbiSamples, viterbi_backtrace
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.reference import crf as reference
from simctg_fast.reference.viterbi import viterbi_backtrace as viterbi_reference

# Batch, positions, vocabulary, beam, rank: of one tile, of sizes that divide nothing, as captioners have them.
SHAPES = [(3, 7, 333, 37, 5), (2, 1, 5, 1, 1), (4, 33, 3000, 256, 32), (2, 9, 2000, 700, 48)]


def check_backtrace(where: Where) -> Iterator[Case]:
    dtypes = (torch.uint16, torch.uint8, torch.int32, torch.int64)
    shapes = [(33, 65, 64), (1, 1, 1), (128, 200, 256)]
    for dtype, (batch, length, slots), ragged in where.few(list(itertools.product(dtypes, shapes, (True, False)))):
        backpointers = torch.randint(0, slots, (batch, length, slots), device=where.device).to(dtype)
        last = torch.randint(0, slots, (batch,), device=where.device)
        lengths = torch.randint(0, length + 1, (batch,), device=where.device) if ragged else None
        path = viterbi_backtrace(backpointers, last, lengths)
        expected = viterbi_reference(backpointers.cpu(), last.cpu(), None if lengths is None else lengths.cpu())
        different = int((path.cpu() != expected).sum())
        name = f"backtrace {dtype} batch {batch} length {length} slots {slots}{' ragged' * ragged}"
        yield case(name, different == 0 and path.device.type == where.device, f"{different} slots differ")


def check_selection(where: Where) -> Iterator[Case]:
    dtypes, device = (torch.float32, torch.float16, torch.bfloat16), where.device
    for dtype, (batch, length, vocabulary, beam, _) in where.few(list(itertools.product(dtypes, SHAPES))):
        emissions = torch.randn(batch, length, vocabulary, device=device).to(dtype)
        emissions[:, 0, ::3] = 0.5  # ties; a row of bans
        emissions[-1, -1, beam // 2 :] = float("-inf")
        tokens, values = crf_beam_select(emissions, beam)
        expected = crf_beam_select(emissions.cpu(), beam, impl="torch")
        wrong = int((tokens.cpu() != expected[0]).sum() + (values.cpu() != expected[1]).sum())
        name = f"beam selection {dtype} {batch} × {length} × {vocabulary}, beam {beam}"
        yield case(name, wrong == 0 and tokens.device.type == device, f"{wrong} differ")


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


def check_probabilities(where: Where, shape: tuple[int, ...], ragged: bool) -> Iterator[Case]:
    crf, exact, emissions, lengths = _models(where.device, shape, ragged)
    plain = LowRankCRF(*shape[2:3], shape[4], shape[3], impl="torch").to(where.device)
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
        yield case(f"{name} {shape}{' ragged' * ragged}", passed and value.device.type == where.device, figures)


def check_paths(where: Where, shape: tuple[int, ...], ragged: bool) -> Iterator[Case]:
    crf, exact, emissions, lengths = _models(where.device, shape, ragged)
    there = None if lengths is None else lengths.cpu()
    label = f"{shape}{' ragged' * ragged}"
    # The best path scores what the best path in float64 does.
    best, known = crf.viterbi(emissions, lengths), exact.viterbi(emissions.double().cpu(), there)
    worst = float((best.score.double().cpu() - known.score).detach().abs().max())
    allowed = 1e-4 * max(1.0, float(known.score.detach().abs().max()))
    yield case(f"Viterbi {label}", worst < allowed, f"score off by {worst:.1e}")
    here = LowRankCRF(*shape[2:3], shape[4], shape[3], impl="torch")
    here.load_state_dict(crf.state_dict())
    for mode in ("ffbs", "stochastic_viterbi"):
        ours, theirs = (
            model.sample(e, n, num_samples=20, mode=mode, generator=torch.Generator().manual_seed(3))
            for model, e, n in ((crf, emissions, lengths), (here, emissions.cpu(), there))
        )
        same = float((ours.slots.cpu() == theirs.slots).all(1).double().mean())
        yield case(f"{mode}, paths of the CPU {label}", same > 0.9, f"{same:.1%} the same")
    count = 4096
    drawn = crf.sample(emissions, lengths, num_samples=count)
    expected = count * crf.marginals(emissions, lengths).probs
    counts = torch.zeros_like(expected).scatter_add_(2, drawn.slots.clamp(min=0), (drawn.slots >= 0).to(expected.dtype))
    often = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[often].mean()) if bool(often.any()) else 0.0
    yield case(f"frequencies of slots {label}", statistic < 2, f"Pearson's statistic over its mean {statistic:.2f}")
    published = StochasticViterbiSamples(shape[2], shape[4], shape[3], num_samples=4).to(where.device)
    published.load_state_dict(crf.state_dict())
    uniforms = torch.rand(shape[0], shape[1] - 1, shape[3], 4, device=where.device)
    found = published(emissions, uniforms=uniforms)
    wanted = reference.published_samples(
        emissions.cpu(), crf.E1.weight.cpu(), crf.E2.weight.cpu(), shape[3], samples=4, uniforms=uniforms.cpu()
    )
    same = float((found[1].cpu() == wanted[1]).all(1).double().mean())
    yield case(f"published classes, uniforms given {label}", same > 0.8, f"{same:.1%} the same")


def every(where: Where, check) -> Iterator[Case]:
    for shape, ragged in where.few(list(itertools.product(SHAPES, (True, False)))):
        yield from check(where, shape, ragged)


CHECKS: list[Piece] = [
    check_backtrace,
    check_selection,
    *(functools.partial(every, check=check) for check in (check_probabilities, check_paths)),
]


# ---- speed ----------------------------------------------------------------------------------------------------------


@functools.cache
def sizes(where: Where) -> benchmark.Sizes:
    small = {"batch": 2, "length": 12, "vocabulary": 500, "beam": 16, "rank": 8} if where.tiny else {}
    return benchmark.Sizes(device=where.device, **small)


def measure_row(where: Where, name: str) -> Iterator[Case]:
    """One row of `crf.py`; it compares the results before it returns what is to be timed."""
    title, goals, make = benchmark.ON_CUDA[name]
    benchmark.SECONDS = 0.1 if where.tiny else 4.0
    s = sizes(where)
    runs = {who: benchmark.timed(run, True, s.device) for who, run in make(s).items()}
    ms = {who: 1e3 * min(seconds) for who, seconds in benchmark.rounds_of(runs).items()}
    goals = goals | ({"ms": benchmark.SELECT_GOAL_ON_CUDA} if name == "select" else {})
    yield measured(f"CRF, {title}", ms.pop(benchmark.OURS), others=ms, goals=goals)


SPEED: list[Piece] = [functools.partial(measure_row, name=name) for name in benchmark.ON_CUDA]
