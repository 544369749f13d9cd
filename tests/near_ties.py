"""Tokens of two implementations compared, with near ties told from errors.

Two ways to add the same numbers round differently, and where two candidates' scores are closer than that, each may
choose its own: no error, but from there on the texts have nothing to do with each other. So the first token at which a
row differs is judged by a third computation, `simctg_fast.reference` on a float64 copy of the model: if both choices
are the best within the rounding of float32, it is a near tie, which is counted, named in pytest's summary, and ends the
comparison of that row. Otherwise one of the two is wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from simctg_fast.reference.contrastive_search import ReferenceStep, contrastive_search

# Rounding is measured: how far the reference in float32 is from the one in float64, at this very prefix. Another order
# of sums may be several times as far off. Below the floor one run says nothing; above the ceiling it excuses nothing.
TIMES, FLOOR, CEILING = 8.0, 5e-7, 2e-5  # of scores; twice that, and five times, of log-probabilities
MORE = 4  # candidates looked at beyond top_k: those that another rounding could have let in

PROPERTY = "near_tie"
_test: list[pytest.Item] = []  # the one that runs: conftest.py keeps it up to date


@dataclass(frozen=True)
class Verdict:
    """What the truth says about two different tokens after one prefix. `lead` is that of the one over the other."""

    near_tie: bool
    lead: float
    text: str


Judge = Callable[[int, list[int], int, int], Verdict]
"""`judge(row, prefix, found, expected)`."""


def watch(item: pytest.Item | None) -> None:
    """Near ties found from now on belong to this test."""
    _test[:] = [] if item is None else [item]


def record(text: str) -> None:
    for item in _test:
        item.user_properties.append((PROPERTY, text))


def same_tokens(
    found: Any,
    expected: Any,
    model: torch.nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    penalty_alpha: float = 0.6,
    top_k: int = 4,
    logits_processor: Callable | None = None,
    what: str = "",
) -> int:
    """Asserts that rows of tokens are equal but for near ties, and returns how many of these there are.

    Args:
        found, expected: `(B, T)`, or a list of lists; whole sequences, that is with the prompt (the decoder's, for an
            encoder-decoder).
        model: what made them, in float32. It is not run unless they differ.
        inputs: what `generate` was given; padding of the prompt is read from its mask, and other inputs
            (`pixel_values`, the encoder's ids …) go to the model. `greedy` search is `top_k=1`.
        what: begins the message.
    """
    return compare(found, expected, model_judge(model, inputs or {}, penalty_alpha, top_k, logits_processor), what)


def compare(found: Any, expected: Any, judge: Judge, what: str = "") -> int:
    """`same_tokens` with a judge of the caller's."""
    found, expected = (rows.tolist() if isinstance(rows, torch.Tensor) else rows for rows in (found, expected))
    prefix = f"{what}: " if what else ""
    assert len(found) == len(expected), f"{prefix}{len(found)} rows, expected {len(expected)}"
    ties = 0
    shorter = []
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            if len(ours) != len(theirs):
                shorter.append(f"{prefix}row {row} has {len(ours)} tokens, expected {len(theirs)}: {ours}, {theirs}")
            continue
        verdict = judge(row, list(theirs[:place]), ours[place], theirs[place])
        text = f"{prefix}row {row}, position {place}: {verdict.text}"
        assert verdict.near_tie, f"{text}\nfound    {ours}\nexpected {theirs}"
        record(text)
        ties += 1
    # Rows of one batch end together, so that a row that took another turn makes the others longer or shorter.
    batched = len({len(row) for row in found}) == 1 and len({len(row) for row in expected}) == 1
    assert not shorter or (ties and batched), shorter[0]
    return ties


def model_judge(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    penalty_alpha: float,
    top_k: int,
    logits_processor: Callable | None = None,
) -> Judge:
    """Judges by the reference, on copies of the model that are made when they are needed."""
    copies: list[torch.nn.Module] = []

    def judge(row: int, prefix: list[int], found: int, expected: int) -> Verdict:
        if not copies:
            single = copy.deepcopy(model).float().cpu().eval()
            copies.extend((single, copy.deepcopy(single).double()))
        steps = [_step(one, row, prefix, inputs, penalty_alpha, top_k + MORE, logits_processor) for one in copies]
        return verdict_of(steps[1], steps[0], penalty_alpha, top_k, found, expected)

    return judge


def _step(model, row, prefix, inputs, penalty_alpha, top_k, logits_processor) -> ReferenceStep:
    mine = {name: value[row : row + 1].cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if unknown := {"inputs_embeds", "decoder_inputs_embeds"} & mine.keys():
        raise NotImplementedError(
            f"the reference reads tokens, not {', '.join(unknown)}: rows that differ are not judged"
        )
    dtype = next(model.parameters()).dtype
    mine = {name: value.to(dtype) if value.is_floating_point() else value for name, value in mine.items()}
    which = "decoder_" if model.config.is_encoder_decoder else ""
    mine[f"{which}input_ids"] = ids = torch.tensor([prefix])
    if (mask := mine.get(f"{which}attention_mask")) is not None:
        grown = torch.ones(1, ids.shape[1] - mask.shape[1], dtype=mask.dtype)
        mine[f"{which}attention_mask"] = torch.cat([mask, grown], dim=1)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = mine.pop("input_ids", None)
    settings = {"penalty_alpha": penalty_alpha, "top_k": min(top_k, vocabulary), "max_new_tokens": 1}
    return contrastive_search(model, ids, **mine, **settings, logits_processor=logits_processor).steps[0]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def verdict_of(
    truth: ReferenceStep, single: ReferenceStep, penalty_alpha: float, top_k: int, found: int, expected: int
) -> Verdict:
    """Whether both tokens are the best that `truth`'s numbers allow, within rounding.

    `truth` and `single` (the same in float32) have one row and more than `top_k` candidates. A token may be chosen if
    rounding could have made it one of the `top_k` most probable, and its score is not below that of any which certainly
    is one.
    """
    numbers = {}
    for step in (truth, single):
        for token, p, score in zip(
            *(x[0].tolist() for x in (step.candidates, step.probabilities, step.scores)), strict=True
        ):
            numbers.setdefault(token, []).append((_log(p), score))
    both = [pair for pair in numbers.values() if len(pair) == 2]
    apart = ([abs(one[i] - other[i]) for one, other in both] for i in (0, 1))  # NaN where both are infinite
    rounding = [max((value for value in values if math.isfinite(value)), default=0.0) for values in apart]
    log_p_slack = min(max(TIMES * rounding[0], 2 * FLOOR), 5 * CEILING)
    score_slack = min(max(TIMES * rounding[1], FLOOR), CEILING)

    p = truth.probabilities[0].tolist()
    log_p = [_log(value) for value in p]
    places = {token: place for place, token in enumerate(truth.candidates[0].tolist())}
    # A candidate without a hidden state has no score, and is never chosen.
    scores = [score if math.isfinite(score) else -math.inf for score in truth.scores[0].tolist()]
    inside, outside = log_p[min(top_k, len(p)) - 1], log_p[top_k] if top_k < len(p) else -math.inf
    certain = [score for score, one in zip(scores, log_p, strict=True) if one > outside + log_p_slack]
    best = max(certain, default=-math.inf)

    said, may = [], []
    for name, token in (("found", found), ("expected", expected)):
        place = places.get(token)
        if place is None or log_p[place] < inside - log_p_slack:
            said.append(f"{name} {token} is none of the {top_k} most probable")
            may.append(False)
            continue
        may.append(scores[place] > -math.inf and scores[place] >= best - score_slack)
        said.append(f"{name} {token} scores {scores[place]:.9f} (p {p[place]:.9f})")
    lead = math.nan
    if found in places and expected in places:
        lead = scores[places[found]] - scores[places[expected]]
        said.append(f"apart {lead:.1e}")
    said.append(f"rounding allows {score_slack:.1e} of score, {log_p_slack:.1e} of log p; the best score is {best:.9f}")
    return Verdict(all(may), lead, "float64: " + ", ".join(said))
