"""transformers' own step, with nothing of ours in place: what everything of ours is compared with."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .caches import CACHE_NAME, without_caches
from .call import Call, Rows
from .hidden_states import HiddenStatesTap
from .inputs import grow_kwargs, with_own_states
from .padding_warning import no_padding_warning

# Of ``generate``, where a checkpoint's configuration may say otherwise: the loop alone, no tokenizer wanted.
PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "stop_strings": None,
    "token_healing": False,
    "cache_implementation": None,
    "max_length": None,
}

NOISE, MOST_NOISE = 3, 0.1  # what is allowed, in multiples of what noise moves a model's logits, and at most
_COARSE = 1.2e-4  # relative: a tenth of the last bit of float16


class OwnStep:
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

    def whole(self, tokens: torch.Tensor, at: int = -1) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        """The same for the prompt and ``tokens (rows, n)`` in one forward without any cache; ``at``: the position whose
        states of the last layer are given."""
        ids = torch.cat([self.rows.ids, tokens], dim=1)
        kwargs = grow_kwargs(self.model, self.rows.kwargs | {"use_cache": False}, tokens)
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        inputs = with_own_states(inputs) | self.tap.arguments
        outputs, states = self._listen(lambda: self.model(**inputs, return_dict=True), at)
        return states, outputs.logits[:, -1].float()

    def _advance(self, outputs: Any) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.call.is_encoder_decoder
        )
        if not self.cached:  # Llama hands back a prefix of PEFT's, with the text in it
            self.kwargs.pop(CACHE_NAME, None)

    def _listen(self, forward: Any, at: int = -1) -> tuple[Any, dict[bool, torch.Tensor | None]]:
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
            False: layers[-1][:, at] if layers else None,
        }


def _is_input(name: str, value: Any) -> bool:
    """Whether a model's forward leaves this argument as it is."""
    return isinstance(value, (torch.Tensor, bool, int, float, str)) or value is None or name == "encoder_outputs"


@dataclass(frozen=True)
class OwnText:
    """transformers' own steps along a text: ``ids (B, L)`` as ``generate`` begins it, and for every round what each of
    the tokens tried gives, as `OwnStep.step` returns it."""

    inputs: dict[str, Any]
    tried: list[torch.Tensor]
    ids: torch.Tensor
    rounds: list[list[tuple[dict[bool, torch.Tensor | None], torch.Tensor]]]

    @property
    def logits(self) -> torch.Tensor:
        """After the token that was kept, ``(rounds, B, V)``."""
        return torch.stack([tried[-1][1] for tried in self.rounds])

    def again(self, model: Any) -> OwnText:
        return own_text(model, self.inputs, self.tried)


@no_padding_warning()
def own_text(model: Any, inputs: dict[str, Any], rounds: list[torch.Tensor]) -> OwnText:
    """Run ``generate``'s own steps on ``inputs``; ``rounds``: tokens tried ``(B, c)``, the last of which is kept."""
    found: list[OwnText] = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        call = Call(model, input_ids, kwargs, generation_config, top_k=1, max_length=None, table=None)
        own_step = OwnStep(call, tap, Rows(input_ids, without_caches(kwargs)), replay=False)
        own_step.prefill()
        steps = [
            [own_step.step(tokens[:, i], keep=i == tokens.shape[1] - 1) for i in range(tokens.shape[1])]
            for tokens in rounds
        ]
        found.append(OwnText(inputs, rounds, input_ids, steps))
        return input_ids

    with HiddenStatesTap(model) as tap:
        model.generate(**inputs, **PLAIN, custom_generate=loop, max_new_tokens=len(rounds) + 1)
    return found[0]


def input_embedding(model: Any) -> torch.nn.Module | None:
    """What the decoder reads its tokens with; None where it does not say."""
    get_decoder = getattr(model, "get_decoder", None)
    try:
        embedding = (get_decoder() if callable(get_decoder) else model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, torch.nn.Module) else None


def most_noise(allowed: float = 0.0) -> float:
    """The largest error that noise may explain where the type alone is ``allowed`` so much: in 16 bits a model of large
    weights rounds away more than a tenth itself."""
    return max(MOST_NOISE, 2.5 * allowed)


def allowed_for_noise(moved: float, allowed: float = 0.0) -> float:
    """The relative error that is allowed to a model whose logits noise moves by ``moved``."""
    return min(most_noise(allowed), NOISE * moved)


def draw_tokens(model: Any) -> Callable[..., torch.Tensor]:
    """Draws token ids of any shape, the same ones each time; special ones, which come first, are not among them."""
    vocabulary = max(4, min(model.config.get_text_config(decoder=True).vocab_size, 1000))
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(3, vocabulary, shape, generator=random)


def moved_by_noise(model: Any, error: Callable[[], float]) -> float:
    """How far rounding may move what a model makes: the larger ``error`` of two runs with noise in the decoder's
    embeddings; where it has none, that of a run.

    The noise is one in their last bit; with a quantised model a coarser one, where that moves the model out of all
    proportion: layers that round their inputs (bitsandbytes) swallow a small change most of the time, and make a large
    one of it at times. (So do experts and sparse attention, but there the last bit is what decides.)
    """

    def moved(scale: float) -> float:
        errors = []
        for seed in (0, 1):
            with _shaken(model, seed, scale):
                errors.append(error())
        return max(errors)

    fine = torch.finfo(model.dtype).eps if isinstance(getattr(model, "dtype", None), torch.dtype) else _COARSE
    small = moved(fine)
    quantised = getattr(model, "hf_quantizer", None) is not None
    large = moved(_COARSE) if quantised and fine < _COARSE else 0.0
    return large if large > 10 * small * _COARSE / fine else small


@contextmanager
def _shaken(model: Any, seed: int, scale: float) -> Iterator[None]:
    """Noise of relative size ``scale`` in what this thread's forwards of ``model`` read."""
    embedding, owner = input_embedding(model), threading.get_ident()
    if embedding is None:
        yield
        return
    noises: dict[torch.device, torch.Generator] = {}

    def shake(module, args, states):
        if threading.get_ident() != owner or not isinstance(states, torch.Tensor):
            return None
        random = noises.setdefault(states.device, torch.Generator(states.device).manual_seed(seed))
        noise = torch.randn(states.shape, generator=random, dtype=torch.float32, device=states.device)
        return (states * (1 + scale * noise)).to(states.dtype)

    with embedding.register_forward_hook(shake):
        yield


def wrong_head(seen: dict[bool, torch.Tensor | None]) -> str | None:
    """What reaches the output embedding must be the last hidden state up to a factor: cosines are made of it."""
    state, last = seen[True], seen[False]
    if state is None:
        return "the output embedding did not run once in a forward"
    if last is None or state.shape != last.shape:
        return "the last hidden state cannot be read beside the output embedding's input"
    cosine = torch.cosine_similarity(state.float(), last.float(), dim=-1)
    return "the output embedding's input is not the last hidden state" if bool((cosine < 1 - 1e-3).any()) else None


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
