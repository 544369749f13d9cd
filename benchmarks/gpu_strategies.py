"""The strategies' part of `gpu.py`: kernels against float64, tokens captured and not, what a token costs."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_generate
from decoding_models import PAD, build, left_padded
from gpu_case import Case, Piece, Where, case, measured, within
from gpu_decode import unit_rows
from gpu_first import uncaptured, watched
from gpu_generate import Run
from gpu_losses import judge
from zoo_sweep.strategies import CLEAR, searches

from simctg_fast import contraclm_token_loss
from simctg_fast.ops.centered_scan import centered_scan
from simctg_fast.ops.earlier_text import follower_scan
from simctg_fast.reference.centered import centered_scan as centered_reference
from simctg_fast.reference.contraclm import contraclm_token_loss as contraclm_reference
from simctg_fast.reference.contrastive_search import contrastive_search
from simctg_fast.reference.fsd import vector_penalty
from simctg_fast.reference.one_text import Text

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K_RANGE = (5, 15)
NEW_TOKENS = 40  # enough to be captured


# ---- kernels --------------------------------------------------------------------------------------------------------


def check_centered(where: Where) -> Iterator[Case]:
    """States that share most of their direction, rows of other lengths, padding."""
    shapes = [(3, 4, 301, 768), (2, 15, 130, 1600), (1, 4, 2000, 4096)]
    for (batch, k, capacity, width), dtype in where.few(list(itertools.product(shapes, DTYPES))):
        common = 8 * torch.randn(batch, 1, width)
        raw = (common + torch.randn(batch, capacity + k, width)).to(dtype)
        lengths = torch.randint(3, capacity + 1, (batch,))
        lengths[0] = capacity
        mask = torch.rand(batch, capacity) > 0.2
        mask[:, :3] = True
        shift, sums = raw.new_zeros(batch, width), torch.zeros(batch, width)
        history, squares = torch.zeros(batch, capacity, width, dtype=dtype), torch.zeros(batch, capacity)
        truth = torch.zeros(batch, k, dtype=torch.float64)
        for row, length in enumerate(lengths.tolist()):
            real = mask[row, :length].nonzero()[:, 0]
            states = raw[row, real]
            shift[row] = states.float().mean(dim=0).to(dtype)
            history[row, real] = (states.float() - shift[row].float()).to(dtype)
            squares[row] = history[row].float().square().sum(dim=-1)
            sums[row] = history[row].float().sum(dim=0)
            truth[row] = centered_reference(raw[row, capacity:], states)[0]
        call = [x.to(where.device) for x in (raw[:, capacity:].contiguous(), shift, history, squares, sums)]
        rest = {"mask": mask.to(where.device), "lengths": lengths.to(where.device)}
        penalty, position = centered_scan(*call, capacity, **rest)
        plain, _ = centered_scan(*call, capacity, impl="torch", **rest)
        passed, figures = within(penalty, plain, truth)
        passed &= bool(mask.gather(1, position.cpu()).all()) and bool((position.cpu() < lengths[:, None]).all())
        yield case(f"centered scan {dtype} batch {batch} k {k} capacity {capacity} width {width}", passed, figures)


def check_followers(where: Where) -> Iterator[Case]:
    """Texts of a small alphabet, so that every pick but one has been followed; contexts of one state and of two."""
    shapes = [(3, 4, 301, 768), (2, 6, 130, 1600), (1, 3, 1000, 4096)]
    for (batch, k, capacity, width), dtype, order in where.few(list(itertools.product(shapes, DTYPES, (2, 3)))):
        raw = torch.randn(batch, capacity, width) * (1 + torch.rand(batch, capacity, 1))
        norms = raw.norm(dim=-1)
        unit = unit_rows(raw).to(dtype)
        tokens = torch.randint(0, k - 1, (batch, capacity))
        picks = torch.arange(k).expand(batch, k).contiguous()  # the last is nowhere
        lengths = torch.randint(order + 1, capacity + 1, (batch,))
        starts = torch.randint(0, 3, (batch,)).minimum(lengths - order - 1)
        kept = unit.double() * norms.double()[..., None]
        truth = torch.zeros(batch, k, dtype=torch.float64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            inside = tokens[row, start:length].tolist()
            for pick in range(k):
                truth[row, pick] = vector_penalty(kept[row, start:length], inside, pick, order)
        given = [x.to(where.device) for x in (unit, tokens, picks, lengths, starts)]
        orders = torch.full((batch,), order, device=where.device)
        rest = {"orders": orders, "norms": norms.to(where.device) if order > 2 else None, "longest": order}
        penalty, _ = follower_scan(*given, **rest)
        plain, _ = follower_scan(*given, **rest, impl="torch")
        passed, figures = within(penalty, plain, truth)
        name = f"follower scan {dtype} n {order} batch {batch} k {k} capacity {capacity} width {width}"
        yield case(name, passed, figures)


def plain_contraclm(views: Tensor, mask: Tensor) -> Tensor:
    """ContraCLM's token loss with its matrix, a sequence at a time."""
    losses = []
    for first, second, real in zip(*views, mask.bool(), strict=True):
        unit = unit_rows(torch.cat([first[real], second[real]]))
        count = int(real.sum())
        others = (unit @ unit.mT / 0.05).masked_fill(torch.eye(2 * count, device=unit.device).bool(), -torch.inf)
        twins = torch.arange(2 * count, device=unit.device).roll(count)
        losses.append(torch.nn.functional.cross_entropy(others, twins))
    return torch.stack(losses).mean()


def check_contraclm(where: Where) -> Iterator[Case]:
    """Values and gradients; the formula that is the truth is itself held against the paper's loops, in little."""
    little = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    apart = (plain_contraclm(little, mask) - contraclm_reference(*little, mask)).abs().item()
    yield case("contraclm: the formula with its matrix is the paper's", apart < 1e-12, f"off by {apart:.1e}")
    shapes = [(3, 129, 40), (2, 700, 768), (1, 300, 4096)]
    for shape, dtype in where.few(list(itertools.product(shapes, DTYPES))):
        views = (torch.randn(2, *shape) + 0.5 * torch.randn(shape)).to(where.device, dtype)
        mask = torch.ones(shape[:2], device=where.device)
        mask[0, -(shape[1] // 5) :] = 0

        def ours(states: Tensor, mask=mask) -> Tensor:
            return contraclm_token_loss(*states, mask)

        passed, figures = judge(ours, lambda states, mask=mask: plain_contraclm(states, mask), views)
        yield case(f"contraclm {dtype} {'x'.join(map(str, shape))}", passed, figures)


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _contrastive(model: Any, ids: list[int], *, processor: Any, max_new_tokens: int, top_k: int) -> Text:
    out = contrastive_search(
        model, torch.tensor([ids]), penalty_alpha=0.6, top_k=top_k, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    margins = [float(torch.minimum(step.score_margin, step.candidate_margin)) for step in out.steps]
    return Text(model, out.sequences[0].tolist(), margins=margins)


def _strategies() -> dict[str, Any]:
    """By name: how ``generate`` is told, and the naive search."""
    from simctg_fast import ContrastiveSearch

    found = {name: pair for name, pair in searches().items() if name != "dry"}  # processors run outside of a graph
    for name, k in (("greedy", 1), (f"contrastive k={K_RANGE[1]}", K_RANGE[1])):
        found[name] = (
            lambda k=k: {"custom_generate": ContrastiveSearch(0.6, k)},
            functools.partial(_contrastive, top_k=k),
        )
    return found


def written(where: Where, model: Any, inputs: dict, made: Any, step: bool) -> Tensor:
    search = made()["custom_generate"]
    search.decode_step = step
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    tokens = 12 if where.tiny else NEW_TOKENS
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    return model.generate(**inputs, custom_generate=search, **options)[:, -tokens:].cpu()


def check_tokens(where: Where, name: str) -> Iterator[Case]:
    """Padded rows: the step over static buffers, the plain loop, and the naive search in float64 on the CPU."""
    there, double, inputs = build(name).to(where.device), build(name).double(), left_padded(9, 6)
    for strategy, (made, naive) in _strategies().items():
        with watched() as seen:
            captured = written(where, there, inputs, made, True)
        plain, ties, wrong = written(where, there, inputs, made, False), 0, []
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            ids = inputs["input_ids"][row, mask].tolist()
            text = naive(double, ids, processor=None, max_new_tokens=captured.shape[1])
            for how, found in (("captured", captured), ("the plain loop", plain)):
                place = text.departure(found[row].tolist(), len(ids))
                if place is not None and text.margins[place] >= CLEAR:
                    wrong.append(f"{how}: row {row}, token {place}, clear by {text.margins[place]:.1e}")
                ties += place is not None
        problem = uncaptured(where, seen) or "; ".join(wrong)
        yield case(f"{name}, {strategy}: captured = uncaptured = naive", not problem, problem or f"{ties} near ties")


CHECKS: list[Piece] = [
    check_centered,
    check_followers,
    check_contraclm,
    *(functools.partial(check_tokens, name=name) for name in ("gpt2", "llama")),
]


# ---- what a token costs ---------------------------------------------------------------------------------------------

RUNS = [Run("gpt2-small", "bfloat16", 1, 512), Run("gpt2-small", "bfloat16", 32, 512)]
TRIALS = [Run("gpt2-tiny", "float32", batch, 12) for batch in (1, 2)]
MOST = f"contrastive k={K_RANGE[1]}"
# Beside whom, and the least that the other may take of its time. Rows that adaptive search does not try are masked.
BESIDE: dict[str, tuple[str, float | None]] = {
    "adaptive": (MOST, 1 / 1.05),
    "center": ("contrastive k=4", None),
    "fsd": ("greedy", None),
    "fsd-vec": ("greedy", None),
    "guard": ("greedy", None),
}


def timed_searches() -> dict[str, Any]:
    """With their own defaults."""
    from simctg_fast import FSD, GUARD, AdaptiveContrastiveSearch, ContrastiveSearch

    return {
        "greedy": lambda: ContrastiveSearch(0.6, 1, decode_step=True),
        "contrastive k=4": lambda: ContrastiveSearch(0.6, 4, decode_step=True),
        MOST: lambda: ContrastiveSearch(0.6, K_RANGE[1], decode_step=True),
        "fsd": lambda: FSD(decode_step=True),
        "fsd-vec": lambda: FSD("vector", decode_step=True),
        "guard": lambda: GUARD(sample=False, decode_step=True),
        "adaptive": lambda: AdaptiveContrastiveSearch(k_range=K_RANGE, decode_step=True),
        "center": lambda: ContrastiveSearch(0.6, 4, center=True, decode_step=True),
    }


def measure_strategies(where: Where, index: int) -> Iterator[Case]:
    """Each strategy captured, beside the search that runs as many rows."""
    run = (TRIALS if where.tiny else RUNS)[index]
    model = gpu_generate.make_model(run.shape, run.dtype, where.device)
    draw = torch.Generator().manual_seed(run.batch)
    ids = torch.randint(1, model.config.vocab_size, (run.batch, run.prompt), generator=draw).to(where.device)
    lengths = (5, 45) if where.tiny else gpu_generate.NEW_TOKENS
    ms: dict[str, float] = {}
    for name, made in timed_searches().items():
        label = f"{run.shape} {run.dtype} B={run.batch} prompt {run.prompt}, {name}"
        with watched() as seen:
            found = gpu_generate.timing(model, ids, lengths, 2, custom_generate=made)
        if problem := uncaptured(where, seen):
            yield case(label, False, problem)
            continue
        ms[name] = found.ms
        beside, goal = BESIDE.get(name, ("", None))
        others = {beside: ms.get(beside, f"{beside}: not captured")} if beside else {}
        goals = {} if goal is None else {beside: goal}
        yield measured(label, found.ms, call_ms=found.call_ms, others=others, goals=goals, peak_mb=found.peak_mb)


SPEED: list[Piece] = [functools.partial(measure_strategies, index=index) for index in range(len(RUNS))]
