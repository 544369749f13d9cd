"""From a request to the sequences that answer it: tokens, limits, processors."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList

from ..loading import context_length
from .requests import Request, RequestError
from .sequence import Sequence

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
    except (ImportError, AttributeError) as error:
        raise ValueError(f"processor {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"processor {name!r} must be a function or class, got {type(found).__name__}")
    return found


class Preparer:
    """Makes sequences for one model.

    Args:
        model, tokenizer: as `load_model` returns them.
        seed: of the run.
        factory: makes processors and criteria for a request, see :data:`Factory`.
        max_candidates: the widest ``top_k`` the run computes; None where the strategy has no candidates.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        seed: int = 0,
        factory: Factory | None = None,
        max_candidates: int | None = None,
        logprobs: bool = False,
        trace: bool = False,
    ):
        self.model, self.tokenizer, self.seed, self.factory = model, tokenizer, seed, factory
        self.max_candidates, self.logprobs, self.trace = max_candidates, logprobs, trace
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.limit = context_length(model)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        config = model._prepare_generation_config(None)
        self.generation_config = config[0] if isinstance(config, tuple) else config
        self.generation_config.do_sample = False
        model._prepare_special_tokens(self.generation_config, True, device=model.device)
        ends = self.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
        self._model_processors = bool(self._own_processors(4, 8, [0]))

    def __call__(self, request: Request) -> list[Sequence]:
        """The ``n`` sequences of ``request``.

        Raises:
            RequestError: too long, no chat template, a factory that raises …
        """
        prompt, source = self._tokens(request)
        parameters = request.parameters
        self._check_lengths(request, prompt, source)
        if self.max_candidates is not None and (parameters.top_k or 0) > self.max_candidates:
            raise self._error(
                request,
                "invalid_value",
                f"top_k is {parameters.top_k}, more than the {self.max_candidates} candidates this run computes a step "
                "(its own top_k)",
            )
        return [
            Sequence(
                request,
                index,
                prompt,
                source,
                seed=self.seed,
                processors=processors,
                criteria=criteria,
                ends=self.ends,
                tokenizer=self.tokenizer,
                record_logprobs=self.logprobs,
                record_trace=self.trace,
            )
            for index in range(parameters.n)
            for processors, criteria in [self._callables(request, len(prompt), source)]
        ]

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def _tokens(self, request: Request) -> tuple[list[int], list[int] | None]:
        if request.messages is not None:
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise self._error(request, "no_chat_template", "messages need a chat template, this tokenizer has none")
            try:
                text = self.tokenizer.apply_chat_template(
                    list(request.messages), add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # templates raise what they like
                raise self._error(request, "chat_template_error", f"the chat template refused: {error}") from error
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(request.prompt, tuple):
            ids = list(request.prompt)
        else:
            text = request.prompt if request.prompt is not None else request.source
            if request.source is not None and not self.is_encoder_decoder:
                raise self._error(request, "wrong_content", "source is for encoder-decoders; this model takes prompt")
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise self._error(request, "empty_prompt", "the prompt has no tokens")
        if max(ids) >= self.vocabulary:
            raise self._error(
                request,
                "token_out_of_range",
                f"the prompt has token {max(ids)}, the model knows 0 … {self.vocabulary - 1}",
            )
        if not self.is_encoder_decoder:
            return ids, None
        start = self.generation_config.decoder_start_token_id
        start = self.generation_config.bos_token_id if start is None else start
        return (list(start) if isinstance(start, list) else [int(start)]), ids

    def _check_lengths(self, request: Request, prompt: list[int], source: list[int] | None) -> None:
        if self.limit is None:
            return
        wanted = request.parameters.max_new_tokens
        if len(prompt) + wanted > self.limit:
            raise self._error(
                request,
                "too_long",
                f"{len(prompt)} prompt tokens and max_new_tokens={wanted} are more than the model's {self.limit}",
            )
        if source is not None and len(source) > self.limit:
            raise self._error(request, "too_long", f"source has {len(source)} tokens, the model takes {self.limit}")

    # ---- processors -----------------------------------------------------------------------------------------------

    def _own_processors(self, prompt: int, max_new_tokens: int, source: list[int] | None) -> list[Any]:
        """What the model's generation configuration asks for (repetition penalty, suppressed tokens …)."""
        config = self.generation_config
        config.max_length, config.max_new_tokens = prompt + max_new_tokens, max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = prompt + config.min_new_tokens
        encoder_ids = None if source is None else torch.tensor([source], device=self.model.device)
        made = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt,
            encoder_input_ids=encoder_ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(),
            device=self.model.device,
            model_kwargs={},
        )
        return list(made)

    def _callables(self, request: Request, prompt: int, source: list[int] | None) -> tuple[list[Any], list[Any]]:
        processors: list[Any] = []
        criteria: list[Any] = []
        if self._model_processors:
            processors += self._own_processors(prompt, request.parameters.max_new_tokens, source)
        if self.factory is None:
            return processors, criteria
        try:
            made = self.factory(dict(request.raw), self.tokenizer)
        except Exception as error:  # the user's code: one request pays for it
            raise self._error(
                request, "processor_error", f"the processor factory raised {type(error).__name__}: {error}"
            ) from error
        for item in made if isinstance(made, list | tuple) else [] if made is None else [made]:
            names = {base.__name__ for base in type(item).__mro__}
            (criteria if "StoppingCriteria" in names else processors).append(item)
        bad = [item for item in (*processors, *criteria) if not callable(item)]
        if bad:
            raise self._error(request, "processor_error", f"the processor factory returned {bad[0]!r}, not a processor")
        return processors, criteria

    @staticmethod
    def _error(request: Request, kind: str, message: str) -> RequestError:
        return RequestError(kind, message, request_id=request.id, openai=request.openai)


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
