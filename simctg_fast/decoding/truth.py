"""The truth of a trial: transformers' own step, with nothing of ours in place."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from .call import PREFIXES, Call, Rows
from .hidden_states import HiddenStatesTap
from .paths import FAILURES, grow_kwargs, with_own_states, without_caches
from .prefix_cache import CACHE_NAME
from .support import Check, autocast_dtype

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


class _OwnStep:
    """transformers' own step: ``generate``'s loop, from the arguments it was called with. ``replay``: every step runs
    the text anew, for models that keep a state in themselves, where no copy of a cache reaches it."""

    def __init__(self, call: Call, tap: HiddenStatesTap, rows: Rows, replay: bool):
        self.call, self.model, self.tap = call, call.model, tap
        self.replay, self.kept = replay, []  # type: ignore[var-annotated]
        self.ids, self.kwargs = rows.ids, dict(rows.kwargs)
        self.rows = rows
        self.cached = bool(self.kwargs.get("use_cache", True))
        config = copy.deepcopy(call.generation_config)
        config.prefill_chunk_size = None
        self.config = config

    def prefill(self) -> torch.Tensor:
        """Logits ``(rows, V)`` after the prompt."""
        self.ids, self.kwargs = self.rows.ids, dict(self.rows.kwargs)
        if self.cached and (cache := self.call.new_cache()) is not None:
            self.kwargs[CACHE_NAME] = cache
        outputs, _ = self._listen(lambda: self.model._prefill(self.ids, self.config, with_own_states(self.kwargs)))
        self._advance(outputs)
        return outputs.logits[:, -1].float()

    def step(self, tokens: torch.Tensor, keep: bool = False) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        """States and logits after ``tokens (rows,)``, which stay part of the text if ``keep``."""
        if self.replay:
            self.prefill()
            for earlier in self.kept:
                self._step(earlier, keep=True)
        if keep:
            self.kept.append(tokens)
        return self._step(tokens, keep)

    def _step(self, tokens: torch.Tensor, keep: bool) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        before = None if keep else dict(self.kwargs)
        if not keep:
            self.kwargs = {n: v if _is_input(n, v) else copy.deepcopy(v) for n, v in self.kwargs.items()}
        ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=1 if self.kwargs.get("use_cache", True) else None, **self.kwargs
        )
        inputs = with_own_states(inputs) | self.tap.arguments
        outputs, states = self._listen(lambda: self.model(**inputs, return_dict=True))
        if before is None:
            self.ids = ids
            self._advance(outputs)
        else:
            self.kwargs = before
        return states, outputs.logits[:, -1].float()

    def whole(self, tokens: torch.Tensor) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        """The same for the prompt and ``tokens (rows, n)`` in one forward without any cache."""
        ids = torch.cat([self.rows.ids, tokens], dim=1)
        kwargs = grow_kwargs(self.model, self.rows.kwargs | {"use_cache": False}, tokens)
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        inputs = with_own_states(inputs) | self.tap.arguments
        outputs, states = self._listen(lambda: self.model(**inputs, return_dict=True))
        return states, outputs.logits[:, -1].float()

    def _advance(self, outputs: Any) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.call.is_encoder_decoder
        )
        if not self.cached:  # Llama hands back a prefix of PEFT's, with the text in it
            self.kwargs.pop(CACHE_NAME, None)

    def _listen(self, forward: Any) -> tuple[Any, dict[bool, torch.Tensor | None]]:
        self.tap.listen(lambda states: states)
        try:
            outputs = forward()
        finally:
            heard = self.tap.mute()
        layers = self.tap.last_layer(outputs, heard)
        self.positions = layers[-1].shape[1] if layers else 1
        head = heard.head[0] if len(heard.head) == 1 else None
        return outputs, {
            True: None if head is None else head[:, -1],
            False: layers[-1][:, -1] if layers else None,
        }


def _is_input(name: str, value: Any) -> bool:
    """Whether a model's forward leaves this argument as it is."""
    return isinstance(value, (torch.Tensor, bool, int, float, str)) or value is None or name == "encoder_outputs"


class Truth:
    """What transformers' own step makes of ``rows`` of ``call``: two steps, the first with ``k`` candidates.

    Args:
        replay: see `_OwnStep`.
        like: try that one's candidates and not the most probable.

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
        self.own = own = _OwnStep(call, tap, rows, replay)
        self.prefill_logits = own.prefill()
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
                seen, logits = own.step(candidates.gather(1, columns[:, place, None])[:, 0], keep=last)
                self.head = self.head or wrong_head(seen)
                for head in states:
                    if seen[head] is not None:
                        states[head].append(seen[head])  # type: ignore[arg-type]
            self.whole_steps |= own.positions > 1
            stacked = {h: torch.stack(found, dim=1) for h, found in states.items() if len(found) == columns.shape[1]}
            self.rounds.append(_Round(candidates, columns, stacked, columns[:, -1], logits))
        self.tokens = torch.cat([r.candidates.gather(1, r.winners[:, None]) for r in self.rounds], dim=1)
        own.kwargs = rows.kwargs  # and not its cache: one at a time is enough
        self._whole_logits: torch.Tensor | str | None = None

    def differs_from(self, other: Truth) -> bool:
        """Whether transformers' own step makes something else of the same text there."""
        return self.distance(other) > self.allowed

    def distance(self, other: Truth) -> float:
        """The largest relative error of logits; infinite where other candidates were tried."""
        pairs = list(zip(self.rounds, other.rounds, strict=True))
        if not all(torch.equal(a.candidates, b.candidates) for a, b in pairs):
            return math.inf
        logits = [(self.prefill_logits, other.prefill_logits), *((a.logits, b.logits) for a, b in pairs)]
        return max(error_of(mine, others) for mine, others in logits)

    def compare_whole(self) -> Check:
        """How a forward over the same text without a cache compares."""
        name = "same as recomputing every sequence in full"
        if not self.own.cached:
            return Check(name, True, "no cache was used")
        if self._whole_logits is None:
            try:
                self._whole_logits = self.own.whole(self.tokens)[1]
            except FAILURES as error:
                self._whole_logits = f"could not be tried ({type(error).__name__}: {error})"
        expected, logits = self._whole_logits, self.rounds[-1].logits
        if isinstance(expected, str):
            return Check(name, False, expected)
        finite = torch.isfinite(expected) & torch.isfinite(logits)
        difference = (expected - logits)[finite].abs().max().item() if bool(finite.any()) else 0.0
        largest = expected[finite].abs().max().item() if bool(finite.any()) else 0.0
        same = error_of(logits, expected) <= self.allowed
        detail = f"largest difference of logits {difference:.2g} (largest logit {largest:.3g})"
        return Check(name, same, detail if same else f"{detail}, by transformers' own cached step")

    def compare_learned_prompt(self, wrapper: Any) -> float:
        """Relative error against the forward of a PEFT model with a learned prompt, over the whole text."""
        errors = []
        for tokens, logits in ((self.tokens[:, :0], self.prefill_logits), (self.tokens, self.rounds[-1].logits)):
            kwargs = grow_kwargs(self.call.model, self.own.rows.kwargs, tokens)
            names = ["attention_mask", "decoder_attention_mask", "task_ids", "encoder_outputs"]
            names += ["position_ids"] if wrapper.active_peft_config.peft_type in PREFIXES else []
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            ids = torch.cat([self.ids, tokens], dim=1)
            if self.call.is_encoder_decoder:
                given["decoder_input_ids"] = ids
            expected = wrapper(input_ids=ids, use_cache=False, return_dict=True, **given).logits[:, -1]
            errors.append(error_of(logits, expected))
        return max(errors)


@dataclass(frozen=True)
class OwnText:
    """transformers' own steps along a text: ``ids (B, L)`` as ``generate`` begins it, and for every round what each of
    the tokens tried gives, as ``_OwnStep.step`` returns it."""

    ids: torch.Tensor
    rounds: list[list[tuple[dict[bool, torch.Tensor | None], torch.Tensor]]]


def own_text(model: Any, tap: HiddenStatesTap, inputs: dict[str, Any], rounds: list[torch.Tensor]) -> OwnText:
    """Run ``generate``'s own steps on ``inputs``; ``rounds``: tokens tried ``(B, c)``, the last of which is kept."""
    found: list[OwnText] = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        call = Call(model, input_ids, kwargs, generation_config, top_k=1, max_length=None, table=None)
        own = _OwnStep(call, tap, Rows(input_ids, without_caches(kwargs)), replay=False)
        own.prefill()
        steps = [
            [own.step(tokens[:, i], keep=i == tokens.shape[1] - 1) for i in range(tokens.shape[1])] for tokens in rounds
        ]
        found.append(OwnText(input_ids, steps))
        return input_ids

    with tap:
        model.generate(
            **inputs,
            custom_generate=loop,
            max_new_tokens=len(rounds) + 1,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
        )
    return found[0]


def sensitivity(truth: Truth, tap: HiddenStatesTap, k: int) -> float:
    """How far the smallest noise moves the model's logits: two draws, a unit in the last place of its embeddings (of
    bitsandbytes' and other quantisers' float16)."""
    model = truth.call.model
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    embedding = decoder.get_input_embeddings()
    quantised = getattr(model, "hf_quantizer", None) is not None
    scale = torch.finfo(torch.float16 if quantised else model.dtype).eps / 8**quantised
    moved = 0.0
    for seed in (0, 1):
        random = torch.Generator(truth.ids.device).manual_seed(seed)

        def shake(module, args, states, random=random):
            noise = torch.randn(states.shape, generator=random, device=states.device)
            return (states * (1 + scale * noise)).to(states.dtype)

        with embedding.register_forward_hook(shake):
            moved = max(moved, Truth(truth.call, tap, truth.own.rows, k, truth.own.replay, like=truth).distance(truth))
    return moved


def known_tokens(model: Any, logits: torch.Tensor) -> int | None:
    """Tokens that the decoder can read, where there are ``logits (…, V)`` for more."""
    get_decoder = getattr(model, "get_decoder", None)
    try:
        embedding = (get_decoder() if callable(get_decoder) else model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if getattr(type(embedding), "forward", None) is not torch.nn.Embedding.forward:  # Idefics' is made of two
        return None
    return embedding.num_embeddings if logits.shape[-1] > embedding.num_embeddings else None


def unknown_token(model: Any, token: int, known: int) -> str:
    return (
        f"{type(model).__name__} would go on with token {token}, but its input embedding has {known}: what it writes "
        f"is not what it reads; allowed: tokens below {known} (suppress_tokens=...)"
    )


def wrong_head(seen: dict[bool, torch.Tensor | None]) -> str | None:
    """What reaches the output embedding must be the last hidden state up to a factor: cosines are made of it."""
    state, last = seen[True], seen[False]
    if state is None:
        return "the output embedding did not run once in a forward"
    if last is None or state.shape != last.shape:
        return "the last hidden state cannot be read beside the output embedding's input"
    cosine = torch.cosine_similarity(state.float(), last.float(), dim=-1)
    return "the output embedding's input is not the last hidden state" if bool((cosine < 1 - 1e-3).any()) else None


def _candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=-math.inf, neginf=-3e38).topk(k, dim=-1).indices


def allowed_error(model: Any, device: torch.device) -> float:
    return RELATIVE_ERROR.get(autocast_dtype(device) or model.dtype, 1e-1)


def error_of(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a vector (the last dimension). A vector that is not finite (an overflow in float16,
    a banned token) proves nothing where both are not."""
    ours, expected = ours.float(), expected.float().to(ours.device)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(ours)):
        whole = ~finite.all(dim=-1) & ~torch.isfinite(ours).all(dim=-1)
        if not bool((whole | (finite == torch.isfinite(ours)).all(dim=-1)).all()):
            return math.inf
        finite = finite & torch.isfinite(ours)
    difference = torch.where(finite, ours - expected, 0.0).norm(dim=-1)
    size = torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)
    return float((difference / size).max())
