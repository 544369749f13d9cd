"""From a request to the sequences that answer it: tokens, limits, processors."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList

from ..decoding.dry import DRYLogitsProcessor
from ..loading import context_length
from .parameters import Parameters
from .requests import Request, RequestError
from .sequence import Sequence, special_tokens

Factory = Callable[..., Any]  # (request: dict, tokenizer) -> processors and stopping criteria, one or several


def load_factory(name: str) -> Factory:
    """The callable that ``module:factory`` names.

    Raises:
        ValueError: it is not spelled so, cannot be imported, or is not callable.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"processor must be spelled module:factory, got {name!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a module of the user's raises what it likes
        raise ValueError(f"processor {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"processor {name!r} must be a function or class, got {type(found).__name__}")
    return found


class Preparer:
    """Makes sequences for one model.

    Args:
        model, tokenizer: as `load_model` returns them.
        seed: of the run.
        factory: makes processors and criteria for a request, see :data:`Factory`.
        limits: the most that a request may ask for, by its strategy and the parameter's name: what the run has made
            room for.
        center: whether the run compares hidden states less their mean.
        trace: record how every token was chosen.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        seed: int = 0,
        factory: Factory | None = None,
        limits: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
        center: bool = False,
        trace: bool = False,
    ):
        self.model, self.tokenizer, self.seed, self.factory = model, tokenizer, seed, factory
        self.limits, self.center, self.trace = limits, center, trace
        self.special = special_tokens(tokenizer)
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.limit = context_length(model)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        config = model._prepare_generation_config(None)
        self.generation_config = config[0] if isinstance(config, tuple) else config
        self.generation_config.do_sample = False
        model._prepare_special_tokens(self.generation_config, True, device=model.device)
        ends = self.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
        self._dry = lru_cache(maxsize=64)(partial(DRYLogitsProcessor, tokenizer=tokenizer))  # it keeps no state
        self._model_processors = bool(self._own_processors(4, 8, [0]))

    def __call__(self, request: Request, on_text: Callable[[int, str], None] | None = None) -> list[Sequence]:
        """The sequences of ``request``, ``count`` of them. ``on_text`` gets the number of one and what it has written.

        Raises:
            RequestError: too long, no chat template, a tokenizer, template or factory that raises …
        """
        parameters = request.parameters
        for name, most in self.limits.get(request.strategy, {}).items():
            value = getattr(parameters, name)
            if (value[-1] if isinstance(value, tuple) else value or 0) > most:
                message = f"{name} is {value}, more than the {most} that this run computes (its own {name})"
                raise self._error(request, "invalid_value", message)
        if parameters.center != self.center:
            given, own = (str(value).lower() for value in (parameters.center, self.center))
            message = f"center is {given}, but {own} in this run: it is of all its requests alike"
            raise self._error(request, "invalid_value", message)
        for name in ("stop_token_ids", "fsd_stop_tokens", "dry_sequence_breakers"):
            unknown = [t for t in getattr(parameters, name) if not isinstance(t, str) and t >= self.vocabulary]
            if unknown:
                raise self._token_out_of_range(request, name, unknown[0])
        tokens = [self._tokens(request, prompt) for prompt in (request.prompt, *request.more_prompts)]
        request = self._fitting(request, tokens)
        return [
            Sequence(
                request,
                number * parameters.n + index,
                prompt,
                source,
                seed=self.seed,
                processors=processors,
                criteria=criteria,
                ends=self.ends,
                tokenizer=self.tokenizer,
                special=self.special,
                record_trace=self.trace,
                on_text=None if on_text is None else partial(on_text, number * parameters.n + index),
            )
            for number, (prompt, source) in enumerate(tokens)
            for index in range(parameters.n)
            for processors, criteria in [self._callables(request, len(prompt), source)]
        ]

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def _tokens(self, request: Request, prompt: str | tuple[int, ...] | None) -> tuple[list[int], list[int] | None]:
        if request.source is not None and not self.is_encoder_decoder:
            raise self._error(request, "wrong_content", "source is for encoder-decoders; this model takes prompt")
        if isinstance(prompt, tuple):
            ids = list(prompt)
        elif request.messages is not None:
            ids = self._tokenize(request, self._chat(request), add_special_tokens=False)
        else:
            ids = self._tokenize(request, prompt if prompt is not None else request.source)
        if not ids:
            raise self._error(request, "empty_prompt", "the prompt has no tokens")
        if max(ids) >= self.vocabulary:
            raise self._token_out_of_range(request, "the prompt", max(ids))
        if not self.is_encoder_decoder:
            return self._truncated(request, ids), None
        start = self.generation_config.decoder_start_token_id
        start = self.generation_config.bos_token_id if start is None else start
        begin = list(start) if isinstance(start, list) else [int(start)]
        return begin, self._truncated(request, ids)

    def embedded(self, request: Request) -> list[list[int]]:
        """Tokens of each of the texts that ``request`` wants embedded. Raises `RequestError`."""
        rows = []
        for index, text in enumerate(request.inputs or ()):
            row = list(text) if isinstance(text, tuple) else self._tokenize(request, text)
            if not row:
                raise self._error(request, "empty_prompt", f"body.input[{index}] has no tokens")
            if max(row) >= self.vocabulary:
                raise self._token_out_of_range(request, f"body.input[{index}]", max(row))
            if self.limit is not None and len(row) > self.limit:
                message = f"body.input[{index}] has {len(row)} tokens, the model takes {self.limit}"
                raise self._error(request, "too_long", message)
            rows.append(row)
        return rows

    def _chat(self, request: Request) -> str:
        """The conversation as the tokenizer's template writes it."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise self._error(request, "no_chat_template", "messages need a chat template, this tokenizer has none")
        going_on = request.parameters.continue_final_message
        text = self._guarded(
            lambda: self.tokenizer.apply_chat_template(
                list(request.messages or ()),
                tokenize=False,
                add_generation_prompt=not going_on,
                continue_final_message=going_on,
            ),
            request,
            "chat_template_error",
            "the chat template",
        )
        if not isinstance(text, str):
            raise self._error(request, "chat_template_error", f"the chat template made {type(text).__name__}, no text")
        return text

    def _tokenize(self, request: Request, text: Any, **options: Any) -> list[int]:
        def run() -> list[int]:
            ids = self.tokenizer(text, verbose=False, **options)["input_ids"]
            return [int(token) for token in ids or ()]

        return self._guarded(run, request, "tokenizer_error", "the tokenizer")

    def _guarded(self, call: Callable[[], Any], request: Request, kind: str, who: str) -> Any:
        """What ``call`` returns. Whatever it raises is this request's affair: templates and tokenizers raise what they
        like, those written in Rust even what is no Exception."""
        try:
            return call()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise self._error(request, kind, f"{who} refused it: {reason}") from error

    def _truncated(self, request: Request, ids: list[int]) -> list[int]:
        """``ids`` cut to what the request allows: a prompt behind its beginning-of-text token, a source before its
        end."""
        most = request.parameters.truncate_prompt_tokens
        if most is None:
            return ids
        if most == -1:
            if self.limit is None:
                return ids
            reserved = self.limit // 2 if request.parameters.clamp_max_new_tokens else self.limit - 1
            new = 0 if self.is_encoder_decoder else min(request.parameters.max_new_tokens, reserved)
            most = self.limit - new
        if len(ids) <= most:
            return ids
        if self.is_encoder_decoder:
            end = ids[-1:] if most > 1 and ids[-1] == self.tokenizer.eos_token_id else []
            return ids[: most - len(end)] + end
        begin = ids[:1] if most > 1 and ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(begin) - most :]

    def _fitting(self, request: Request, tokens: list[tuple[list[int], list[int] | None]]) -> Request:
        """The request as the model's context allows it."""
        if self.limit is None:
            return request
        wanted, longest = request.parameters.max_new_tokens, max(len(prompt) for prompt, _ in tokens)
        for _, source in tokens:
            if source is not None and len(source) > self.limit:
                message = f"source has {len(source)} tokens, the model takes {self.limit}"
                raise self._error(request, "too_long", f"{message}; truncate_prompt_tokens cuts it")
        room = self.limit - longest
        if wanted <= room:
            return request
        if room < 1 or not request.parameters.clamp_max_new_tokens:
            message = f"{longest} prompt tokens and max_new_tokens={wanted} are more than the model's {self.limit}"
            raise self._error(
                request, "too_long", f"{message}; truncate_prompt_tokens and clamp_max_new_tokens make them fit"
            )
        return replace(request, parameters=replace(request.parameters, max_new_tokens=room))

    def _token_out_of_range(self, request: Request, what: str, token: int) -> RequestError:
        known = f"the model knows 0 … {self.vocabulary - 1}"
        return self._error(request, "token_out_of_range", f"{what} has token {token}, {known}")

    # ---- processors: the model's own, then DRY, then the user's ---------------------------------------------------

    def _own_processors(self, prompt: int, max_new_tokens: int, source: list[int] | None) -> list[Any]:
        """What the model's generation configuration asks for (repetition penalty, suppressed tokens …)."""
        config = self.generation_config
        config.max_length, config.max_new_tokens = prompt + max_new_tokens, max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = prompt + config.min_new_tokens
        encoder_ids = None if source is None else torch.tensor([source], device=self.model.device)
        processors = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt,
            encoder_input_ids=encoder_ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(),
            device=self.model.device,
            model_kwargs={},
        )
        return list(processors)

    def _callables(self, request: Request, prompt: int, source: list[int] | None) -> tuple[list[Any], list[Any]]:
        processors: list[Any] = []
        criteria: list[Any] = []
        if self._model_processors:
            processors += self._own_processors(prompt, request.parameters.max_new_tokens, source)
        if request.parameters.dry_multiplier:
            settings = _dry_settings(request.parameters)
            processors.append(self._guarded(lambda: self._dry(*settings), request, "tokenizer_error", "the tokenizer"))
        if self.factory is None:
            return processors, criteria
        factory = self.factory
        found = self._guarded(
            lambda: factory(dict(request.raw), self.tokenizer), request, "processor_error", "the processor factory"
        )
        for item in found if isinstance(found, list | tuple) else [] if found is None else [found]:
            names = {base.__name__ for base in type(item).__mro__}
            (criteria if "StoppingCriteria" in names else processors).append(item)
        bad = [item for item in (*processors, *criteria) if not callable(item)]
        if bad:
            raise self._error(request, "processor_error", f"the processor factory returned {bad[0]!r}, not a processor")
        return processors, criteria

    @staticmethod
    def _error(request: Request, kind: str, message: str) -> RequestError:
        return RequestError(kind, message, request_id=request.id, openai=request.openai)


def _dry_settings(p: Parameters) -> tuple[Any, ...]:
    """In the order of `DRYLogitsProcessor`."""
    return p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_sequence_breakers, p.dry_penalty_range


def apply_processors(sequence: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """``logits (1, V)`` as the sequence's processors leave them. A processor that raises fails the sequence."""
    ids = sequence.input_ids(logits.device)
    scores = logits.clone()
    try:
        for processor in sequence.processors:
            if len(inspect.signature(processor.__call__).parameters) > 2:
                raise TypeError(f"{type(processor).__name__} takes more than input_ids and scores")
            scores = processor(ids, scores)
        if not isinstance(scores, torch.Tensor) or scores.shape != logits.shape:
            raise TypeError(f"a logits processor must return scores of shape {tuple(logits.shape)}")
    except Exception as error:  # the user's code: one request pays for it
        sequence.fail("processor_error", f"a logits processor raised {type(error).__name__}: {error}")
        return logits
    return scores
