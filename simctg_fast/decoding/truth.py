"""The truth of a trial: transformers' own step, with nothing of ours in place."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from .call import PREFIXES, Call, Rows
from .hidden_states import HiddenStatesTap
from .inputs import grow_kwargs
from .own_step import OwnStep, error_of, input_embedding, moved_by_noise, wrong_head
from .report import Check, autocast_dtype
from .unsupported import FAILURES

RELATIVE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass
class _Round:
    """One step: ``states[head]`` are those of some candidates ``(rows, columns, D)`` as the output embedding gets them
    (True) or as the last layer leaves them (False); ``logits (rows, V)`` those after the winners."""

    candidates: torch.Tensor  # (rows, k)
    columns: torch.Tensor  # (rows, columns) which of them
    states: dict[bool, torch.Tensor]
    winners: torch.Tensor  # (rows,) index among the candidates
    logits: torch.Tensor


class Truth:
    """What transformers' own step makes of ``rows`` of ``call``: two steps, the first with ``k`` candidates.

    Args:
        replay: see `OwnStep`.
        like: try that one's candidates and not the most probable, which rounding may make others.

    Attributes:
        allowed: relative error of a path's logits and states.
        asks: the model has to be asked for its last hidden state.
        head: why winners cannot be chosen before the output embedding, None if they can.
        tokens: those of the two steps, ``(rows, 2)``.
        whole_steps: a step of transformers' own runs the whole text.
    """

    def __init__(
        self,
        call: Call,
        tap: HiddenStatesTap,
        rows: Rows,
        k: int,
        replay: bool = False,
        like: Truth | None = None,
    ):
        self.call, self.ids = call, rows.ids
        self.allowed = allowed_error(call.model, self.ids.device)
        self.own_step = own_step = OwnStep(call, tap, rows, replay)
        self.prefill_logits = own_step.prefill()
        self.asks = bool(tap.arguments)
        self.head: str | None = None
        self.whole_steps = False
        self.rounds: list[_Round] = []
        logits, index = self.prefill_logits, torch.arange(len(self.ids), device=self.ids.device)[:, None]
        # Then some that stand elsewhere than the first winners do: they must follow those, and not what stood there.
        for number, places in enumerate((range(k), sorted({0, min(1, k - 1)}))):
            readable = logits[:, : known_tokens(call.model, logits)]
            candidates = _candidates(readable, k) if like is None else like.rounds[number].candidates
            # Another one in each row, so that not all winners, the last, are in one place.
            columns = (torch.tensor(list(places), device=index.device) + index) % k
            states: dict[bool, list[torch.Tensor]] = {True: [], False: []}
            for place in range(columns.shape[1]):
                last = place == columns.shape[1] - 1
                seen, logits = own_step.step(candidates.gather(1, columns[:, place, None])[:, 0], keep=last)
                self.head = self.head or wrong_head(seen)
                for head in states:
                    if seen[head] is not None:
                        states[head].append(seen[head])  # type: ignore[arg-type]
            self.whole_steps |= own_step.positions > 1
            stacked = {h: torch.stack(found, dim=1) for h, found in states.items() if len(found) == columns.shape[1]}
            self.rounds.append(_Round(candidates, columns, stacked, columns[:, -1], logits))
        self.tokens = torch.cat([r.candidates.gather(1, r.winners[:, None]) for r in self.rounds], dim=1)
        own_step.kwargs = rows.kwargs  # and not its cache: one at a time is enough

    def again(self, tap: HiddenStatesTap, k: int, replay: bool = False) -> Truth:
        """What transformers' own step makes of the same text once more."""
        return Truth(self.call, tap, self.own_step.rows, k, replay, like=self)

    def differs_from(self, other: Truth) -> bool:
        """Whether transformers' own step makes something else of the same text: ``other`` is :meth:`again` of it."""
        return not error_of(self.logits, other.logits) <= self.allowed

    def error_of(self, other: Truth) -> float:
        """The largest relative error of what ``other``, :meth:`again` of it, makes: logits, and candidates' states."""
        errors = [error_of(other.logits, self.logits)]
        for mine, theirs in zip(self.rounds, other.rounds, strict=True):
            errors += [
                error_of(theirs.states[head], mine.states[head]) for head in mine.states if head in theirs.states
            ]
        return max(errors)

    @property
    def logits(self) -> torch.Tensor:
        """After the prompt and after each step, ``(3, rows, V)``."""
        return torch.stack([self.prefill_logits, *(step.logits for step in self.rounds)])

    def compare_whole(self) -> Check:
        """How a forward over the same text without a cache compares."""
        name = "same as recomputing every sequence in full"
        if not self.own_step.cached:
            return Check(name, True, "no cache was used")
        try:
            _, expected = self.own_step.whole(self.tokens)
        except FAILURES as error:
            return Check(name, False, f"could not be tried ({type(error).__name__}: {error})")
        logits = self.rounds[-1].logits
        finite = torch.isfinite(expected) & torch.isfinite(logits)
        difference = (expected - logits)[finite].abs().max().item() if bool(finite.any()) else 0.0
        largest = expected[finite].abs().max().item() if bool(finite.any()) else 0.0
        same = error_of(logits, expected) <= self.allowed
        detail = f"largest difference of logits {difference:.2g} (largest logit {largest:.3g})"
        return Check(name, same, detail if same else f"{detail}, by transformers' own cached step")

    def sees_ahead(self) -> bool:
        """Whether a forward over the whole text lets a position see those behind it, which is what the model's own
        cached step cannot do. What comes of it may be smaller than what a type of 16 bits is allowed; the prompt's last
        state behind one and another token is the same but for a rounding."""
        if not self.own_step.cached or self.whole_steps:
            return False
        logits = self.prefill_logits
        readable = logits[:, : known_tokens(self.call.model, logits)]
        others = _candidates(readable, min(3, readable.shape[-1]))  # of three, an expert near a tie leaves two alike
        seen = [self.own_step.whole(tokens[:, None], at=-2)[0][False] for tokens in others.unbind(dim=1)]
        if self.own_step.positions != self.ids.shape[1] + 1:  # XLM adds a token at the end
            return False
        pairs = [error_of(a, b) for a, b in itertools.combinations(seen, 2) if a is not None and b is not None]
        return min(pairs, default=0.0) > self.allowed / 5

    def compare_learned_prompt(self, wrapper: Any) -> float:
        """Relative error against the forward of a PEFT model with a learned prompt, over the whole text."""
        errors = []
        for tokens, logits in ((self.tokens[:, :0], self.prefill_logits), (self.tokens, self.rounds[-1].logits)):
            kwargs = grow_kwargs(self.call.model, self.own_step.rows.kwargs, tokens)
            names = ["attention_mask", "decoder_attention_mask", "task_ids", "encoder_outputs"]
            names += ["position_ids"] if wrapper.active_peft_config.peft_type in PREFIXES else []
            arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            ids = torch.cat([self.ids, tokens], dim=1)
            if self.call.is_encoder_decoder:
                arguments["decoder_input_ids"] = ids
            expected = wrapper(input_ids=ids, use_cache=False, return_dict=True, **arguments).logits[:, -1]
            errors.append(error_of(logits, expected))
        return max(errors)


def sensitivity(truth: Truth, tap: HiddenStatesTap, k: int) -> float:
    """How far the smallest noise moves what is compared, see `moved_by_noise`. (In 16 bits, states of a model of
    experts move several times as far as its logits.)"""
    replay = truth.own_step.replay
    return moved_by_noise(truth.call.model, lambda: truth.error_of(truth.again(tap, k, replay)))


def known_tokens(model: Any, logits: torch.Tensor) -> int | None:
    """Tokens that the decoder can read, where there are ``logits (…, V)`` for more."""
    embedding = input_embedding(model)
    if not isinstance(embedding, torch.nn.Embedding) or type(embedding).forward is not torch.nn.Embedding.forward:
        return None  # Idefics' is made of two
    return embedding.num_embeddings if logits.shape[-1] > embedding.num_embeddings else None


def unknown_token(model: Any, token: int, known: int) -> str:
    return (
        f"{type(model).__name__} would go on with token {token}, but its input embedding has {known}: what it writes "
        f"is not what it reads; allowed: tokens below {known} (suppress_tokens=...)"
    )


def _candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=-math.inf, neginf=-3e38).topk(k, dim=-1).indices


def allowed_error(model: Any, device: torch.device) -> float:
    return RELATIVE_ERROR.get(autocast_dtype(device) or model.dtype, 1e-1)
