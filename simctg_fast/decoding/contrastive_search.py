"""Contrastive search as a decoding method for ``generate`` (Su et al. 2022, arXiv 2202.06417)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..checks import is_number
from ..ops import _backends
from ..ops.candidate_select import contrastive_scores
from ..ops.top_k import top_k_probs
from .call import Call, learned_prompt, own_cache
from .compiled_decoder import as_written
from .decode_step import DecodeStep, StaticStepUnsupportedError, open_decode_step
from .hidden_states import HiddenStatesHistory, HiddenStatesTap
from .kept_arguments import keep_arguments
from .linear_swap import fast_linears
from .padding_warning import no_padding_warning
from .paths import PATHS, HeadUnsupportedError, Path, PathUnsupportedError, StepResult, without_caches
from .prefix_cache import CACHE_NAME, fill_cache, self_attention_cache
from .processors import without_sampling_warpers
from .settings import TINY, check_penalty_alpha, check_settings, check_streamer, check_top_k
from .support import Check, SupportReport, announce, forget, recall, remember
from .t5_blocks import fast_t5_blocks
from .trial import Verdict, judge
from .truth import known_tokens, unknown_token

logger = logging.getLogger("simctg_fast")

DEFAULT_PENALTY_ALPHA = 0.6
DEFAULT_TOP_K = 4
_TRANSFORMERS_TOP_K = 50  # what generation configurations say when nobody chose
_SUPPORTED_CACHES = (None, "dynamic", "static")


class ContrastiveSearch:
    """Contrastive search with these settings, to be handed to ``model.generate(custom_generate=...)``.

    At each step the ``top_k`` most probable tokens are tried, and the one with the largest
    ``(1 − penalty_alpha) · p − penalty_alpha · max_j cos(h, h_j)`` is kept, where h is its last-layer hidden state and
    h_j those of all real positions before it (Su et al. 2022, eq. 5). Deterministic, unless ``temperature`` is given.

    Args:
        penalty_alpha: weight of the penalty in [0, 1]; 0 is greedy search. Default: what ``generate`` got, else 0.6.
        top_k: number of candidates, 1 … vocabulary; 1 is greedy search. Default: what ``generate`` got, else 4.
            (Not a 50, which is transformers' default, nor a checkpoint's own value for sampling: say those here.)
        temperature: makes the choice random: candidate i with probability ∝ exp(score_i / temperature).
        generator: random numbers for ``temperature``; the global generator of the device if None.
        streamer: a ``transformers`` streamer, in the place of ``generate``'s; it gets the prompt, then every token, and
            is always ended.
        tokenizer, stop_strings: end a sequence at any of these strings, beside those that ``generate`` is given.
        decode_step: keep a step's buffers in place and, on CUDA, replay it as one graph where 24 tokens or more follow:
            True, False, or ``"auto"`` (on CUDA, where the call allows it). The tokens are the same. ``"compiled"``:
            with the decoder compiled as well; a model's first call takes up to a minute longer, and half-precision
            scores round differently.
        path: ``"auto"``, or ``"shared_prefix"``, ``"reorder"``, ``"uncached"`` (see ``support``) to insist on one.
        fast_linear: on the CPU, route the linear layers of a float32 model through our small-batch kernel meanwhile.
        pack: on the CPU, also lay weights out anew for the call where that pays: True, False, or ``"auto"`` (only if
            the copy takes at most a quarter of the free memory).

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    def __init__(
        self,
        penalty_alpha: float | None = None,
        top_k: int | None = None,
        *,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        streamer: Any | None = None,
        tokenizer: Any | None = None,
        stop_strings: str | Sequence[str] | None = None,
        decode_step: bool | str = "auto",
        path: str = "auto",
        fast_linear: bool = True,
        pack: bool | str = "auto",
    ):
        if penalty_alpha is not None:
            check_penalty_alpha(penalty_alpha)
        if top_k is not None:
            check_top_k(top_k)
        if temperature is not None and not is_number(temperature, 0, above=True):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r:.80}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {generator!r:.80}")
        if generator is not None and temperature is None:
            raise ValueError("generator is given, but without a temperature contrastive search makes no random choice")
        check_streamer(streamer)
        strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        if strings is not None and (
            not isinstance(strings, (list, tuple, set)) or not all(isinstance(each, str) and each for each in strings)
        ):
            raise ValueError(
                f"stop_strings must be a string or a list of strings, none of them empty, got {stop_strings!r:.80}"
            )
        if stop_strings is not None and tokenizer is None:
            raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer: pass tokenizer=...")
        if not isinstance(path, str) or path not in ("auto", *PATHS):
            raise ValueError(f"path must be 'auto' or one of {tuple(PATHS)}, got {path!r:.80}")
        if not isinstance(decode_step, bool) and not _is_word(decode_step, "auto", "compiled"):
            raise ValueError(f"decode_step must be True, False, 'auto' or 'compiled', got {decode_step!r:.80}")
        if not isinstance(fast_linear, bool):
            raise ValueError(f"fast_linear must be True or False, got {fast_linear!r:.80}")
        if not isinstance(pack, bool) and not _is_word(pack, "auto"):
            raise ValueError(f"pack is {pack!r:.80}, must be one of 'auto', True, False")
        self.penalty_alpha, self.top_k, self.decode_step = penalty_alpha, top_k, decode_step
        self.temperature, self.generator = temperature, generator
        self.streamer, self.tokenizer, self.stop_strings = streamer, tokenizer, stop_strings
        self.path, self.fast_linear, self.pack = path, fast_linear, pack

    def __repr__(self) -> str:
        given = {
            n: v for n, v in vars(self).items() if v is not None and n in ("penalty_alpha", "top_k", "temperature")
        }
        return f"ContrastiveSearch({', '.join(f'{n}={v!r}' for n, v in given.items())})"

    def __call__(
        self,
        model,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
        """Called by ``generate``; see there for the arguments."""
        given = model_kwargs.pop("streamer", None)
        streamer = given if self.streamer is None else self.streamer
        synced_gpus = bool(model_kwargs.pop("synced_gpus", False))
        tokenizer = self.tokenizer or model_kwargs.pop("tokenizer", None)
        model_kwargs.pop("tokenizer", None)
        try:
            if self.streamer is not None:  # one that ``generate`` knows has had the prompt already
                streamer.put(input_ids.cpu())
            if self.stop_strings is not None:
                stopping_criteria = StoppingCriteriaList(
                    [*stopping_criteria, StopStringCriteria(tokenizer=tokenizer, stop_strings=self.stop_strings)]
                )
            run = _Run(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            run.synced_gpus, run.streamer = synced_gpus, streamer
            return run()
        finally:
            for each in {id(s): s for s in (streamer, given) if s is not None}.values():  # who has had the prompt waits
                each.end()


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """``ContrastiveSearch()`` as a plain function: ``model.generate(custom_generate=contrastive_search,
    penalty_alpha=0.6, top_k=4)``. For a random choice use the class."""
    return ContrastiveSearch()(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


def _is_word(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def _wanted(strategy: Any, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The first look at the arguments of a call of ``generate``: transformers computes with them next."""
    if isinstance(strategy, ContrastiveSearch) or strategy is contrastive_search:
        check_settings(settings)
        for name, check in (("penalty_alpha", check_penalty_alpha), ("top_k", check_top_k)):
            if getattr(strategy, name, None) is None and settings.get(name) is not None:
                check(settings[name])
    if isinstance(strategy, ContrastiveSearch):
        return given | {"tokenizer": strategy.tokenizer or given["tokenizer"]}
    return given if strategy is contrastive_search else {}


keep_arguments(_wanted)


class _Run:
    """One ``generate`` call: the loop over tokens, and what it collects on the way."""

    def __init__(self, strategy, model, input_ids, processors, criteria, config, model_kwargs):
        self.strategy, self.model, self.config = strategy, model, config
        self.streamer, self.synced_gpus = None, False
        self.penalty_alpha, self.top_k = self._settings(strategy, config, model)
        is_random = strategy.temperature is not None
        self.processors = without_sampling_warpers(processors, config, model.generation_config, is_random, self.top_k)
        self.criteria = criteria
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.input_ids = input_ids
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.model_kwargs = self._checked_kwargs(model_kwargs)
        prompt = self._prompt_mask(self.model_kwargs)
        if prompt is not None:
            empty = (prompt.sum(dim=-1) == 0).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"attention_mask has no real token in row {empty[0]} of the batch; allowed: at least 1"
                )
            if not self.is_encoder_decoder:
                padded = (prompt[:, -1] == 0).nonzero().flatten().tolist()
                if padded:
                    raise ValueError(
                        f"attention_mask is 0 at the end of row {padded[0]}: a prompt that is padded on the right is "
                        "continued after its padding; allowed: padding on the left (tokenizer.padding_side='left')"
                    )
        self.positions = position_table(model)
        embeds = None if self.is_encoder_decoder else self.model_kwargs.get("inputs_embeds")
        width = input_ids.shape[1] if embeds is None else embeds.shape[1]
        wrapper = learned_prompt(model)
        self.virtual = 0 if wrapper is None else wrapper.active_peft_config.num_virtual_tokens
        self.longest_prompt = self.virtual + (width if prompt is None else int(prompt.sum(dim=-1).max()))
        self.known_tokens: int | None = None  # those that the model can read, where it can write more
        if config.do_sample and strategy.temperature is None and (config.num_return_sequences or 1) > 1:
            logger.warning(
                "num_return_sequences=%d gives equal texts: contrastive search is deterministic unless "
                "ContrastiveSearch(temperature=...) is given.",
                config.num_return_sequences,
            )
        wanted = bool(config.return_dict_in_generate)
        self.record = {
            "output_hidden_states": wanted and bool(config.output_hidden_states),
            "output_attentions": wanted and bool(config.output_attentions),
        }
        self.scores: list[torch.Tensor] | None = [] if wanted and config.output_scores else None
        self.raw_logits: list[torch.Tensor] | None = [] if wanted and config.output_logits else None
        self.prefill_outputs: Any = None
        self.refused: dict[tuple[str, bool], str] = {}  # routes that gave up in the course of this call, and why
        self.step_scores: torch.Tensor | None = None  # (B, k) of the last step; None for one candidate
        self.streamed = 0  # steps whose tokens the streamer has
        self.layers: list[tuple[torch.Tensor, ...]] = []  # hidden states, one entry a step
        self.attentions: list[tuple[torch.Tensor, ...]] = []
        self.cross_attentions: list[tuple[torch.Tensor, ...]] = []

    # ---- arguments ------------------------------------------------------------------------------------------------

    @staticmethod
    def _settings(strategy: ContrastiveSearch, config: GenerationConfig, model) -> tuple[float, int]:
        check_settings(vars(config))  # also what comes from a configuration
        alpha = strategy.penalty_alpha
        if alpha is None:
            alpha = DEFAULT_PENALTY_ALPHA if config.penalty_alpha is None else config.penalty_alpha
        check_penalty_alpha(alpha)
        top_k = strategy.top_k
        if top_k is None:
            # Neither transformers' own default nor a checkpoint's setting for sampling was typed for this.
            untyped = {None, _TRANSFORMERS_TOP_K}
            if model.generation_config.do_sample:
                untyped.add(model.generation_config.top_k)
            top_k = DEFAULT_TOP_K if config.top_k in untyped else config.top_k
        check_top_k(top_k)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if top_k > vocabulary:
            raise ValueError(f"top_k must be at most the vocabulary size {vocabulary}, got {top_k}")
        if (config.num_beams or 1) != 1:
            raise ValueError(f"num_beams must be 1 for contrastive search, got {config.num_beams}")
        if config.cache_implementation not in _SUPPORTED_CACHES:
            raise ValueError(
                f"cache_implementation must be one of {_SUPPORTED_CACHES} for contrastive search, "
                f"got {config.cache_implementation!r}"
            )
        return float(alpha), int(top_k)

    def _checked_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {n: v for n, v in kwargs.items() if n not in ("output_hidden_states", "output_attentions")}
        self.callers_cache: Cache | None = None
        for name in (CACHE_NAME, "cache_params"):  # the other: state-space models before transformers 5.24
            cache = kwargs.get(name)
            if getattr(cache, "_is_user_defined", False):
                self._check_callers_cache(name, cache, kwargs)
                self.callers_cache = cache
                kwargs[name] = self._fresh_cache()
            elif isinstance(cache, Cache) and isinstance(self_attention_cache(cache), StaticCache):
                kwargs[name] = self._fresh_cache()  # a static one has no room for the last step's candidates
        if kwargs.get("use_cache") is False and self.model.generation_config.use_cache is False:
            kwargs["use_cache"] = True  # the model's default (often left over from training), not the caller's wish
            if self.model._supports_default_dynamic_cache():
                kwargs[CACHE_NAME] = self._fresh_cache()
        elif kwargs.get("use_cache") is False:
            logger.warning("use_cache=False: contrastive search recomputes every candidate's whole sequence (slow).")
        return kwargs

    def _fresh_cache(self) -> Any:
        return own_cache(self.model, self.config, len(self.input_ids), self.criteria.max_length)

    def _check_callers_cache(self, name: str, cache: Any, kwargs: dict[str, Any]) -> None:
        """A cache that the caller passed in is filled at the end. One that holds tokens lacks their hidden states, so
        the prompt is run again, provided it is all there."""
        own = self_attention_cache(cache) if isinstance(cache, Cache) else cache
        if type(own) not in (DynamicCache, StaticCache):
            raise ValueError(
                f"{name} must be a DynamicCache, StaticCache or EncoderDecoderCache of these, got {type(own).__name__}"
            )
        if type(own) is StaticCache and any(own.is_sliding):
            raise ValueError(f"{name} must not be a StaticCache for a model with sliding windows; pass a DynamicCache")
        held = int(cache.get_seq_length())
        if not held:
            return
        mask = kwargs.get("decoder_attention_mask" if self.is_encoder_decoder else "attention_mask")
        given = self.input_ids.shape[1]
        expected = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", given)
        if given <= held or expected != given:
            raise ValueError(
                f"{name} holds {held} tokens whose hidden states contrastive search does not have: pass the whole "
                f"prompt as input_ids (got {given} tokens) so that it can be run again"
            )
        logger.warning("%s holds %d tokens; their hidden states are needed, so the prompt is run again.", name, held)

    def _prompt_mask(self, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
        name = "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"
        mask = model_kwargs.get(name)
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @property
    def max_length(self) -> int | None:
        """Positions the sequences can reach, where a criterion bounds them (inputs_embeds are not counted in ids)."""
        bound = self.criteria.max_length
        embeds = self.model_kwargs.get("inputs_embeds")
        if bound is not None and embeds is not None and not self.is_encoder_decoder:
            bound += embeds.shape[1] - self.input_ids.shape[1]
        return bound if bound is None else bound + self.virtual

    # ---- the loop -------------------------------------------------------------------------------------------------

    @no_padding_warning()
    def __call__(self):
        _backends.extension()  # an instruction set that is not there is said as such, not as a path's failure
        with ExitStack() as stack:
            if self.strategy.decode_step != "compiled":
                stack.enter_context(as_written(self.model))
            self.tap = stack.enter_context(HiddenStatesTap(self.model))
            while True:
                verdict = self._verdict()
                try:
                    with self._ours():
                        self._run(verdict)
                    break
                except (PathUnsupportedError, HeadUnsupportedError) as error:
                    self._begin_again(verdict, error)
        return self._result()

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """What stands in for the model's modules while a path runs."""
        with ExitStack() as stack:
            if self.strategy.fast_linear:
                rows = self.input_ids.shape[0] * self._candidates
                stack.enter_context(fast_linears(self.model, rows, pack=self.strategy.pack))
                stack.enter_context(fast_t5_blocks(self.model))
            yield

    @property
    def _candidates(self) -> int:
        return 1 if self.penalty_alpha == 0 and self.strategy.temperature is None else self.top_k

    def _run(self, verdict: Verdict) -> None:
        logits = self._open(verdict)
        optimized = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        with optimized():
            self._loop(logits, self._candidates)

    def _loop(self, logits: torch.Tensor, k: int) -> None:
        input_ids, device = self.input_ids, self.input_ids.device
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=device)
        steps_needed = torch.zeros((), dtype=torch.long, device=device)
        pad_token = self.config._pad_token_tensor
        interval = 1 if self.streamer is not None else stop_check_interval(device)
        # Surplus steps must not leave a model's table of positions: from here on every step looks for the end.
        text_config = self.model.config.get_text_config(decoder=True)
        limit = self.positions or getattr(text_config, "max_position_embeddings", None) or math.inf
        closely = limit - interval - self.longest_prompt
        outputs, step, finished = self.prefill_outputs, 0, False
        self.prefill_outputs = None
        bad = torch.zeros_like(unfinished, dtype=torch.bool)  # rows whose logits left no probabilities
        asked = self.strategy.decode_step
        static = device.type == "cuda" if asked == "auto" else bool(asked)
        while self.model._has_unfinished_sequences(finished, self.synced_gpus, device=device):
            self._check_room(step)
            processed = self.processors(input_ids, logits)
            if self.raw_logits is not None:
                self.raw_logits.append(logits)
            if self.scores is not None:
                self.scores.append(processed)
            self._record(outputs)
            if k > processed.shape[-1]:
                raise ValueError(f"top_k must be at most the {processed.shape[-1]} logits of the model, got {k}")
            probs, candidates = top_k_probs(processed, k)
            if self.known_tokens is not None:
                beyond = candidates.masked_fill(unfinished[:, None] == 0, 0)
                if int(beyond.max()) >= self.known_tokens:
                    raise ValueError(unknown_token(self.model, int(beyond.max()), self.known_tokens))
                candidates = candidates.clamp(max=self.known_tokens - 1)
            without = probs.isnan().any(dim=-1) & unfinished.bool()
            bad |= without
            if interval == 1:
                self._check_nan(bad, step)
            result = self._step(input_ids, candidates, probs)
            outputs, logits = result, result.logits.to(device)
            if self.synced_gpus and finished:
                continue
            tokens = candidates.gather(1, result.selected.to(device)[:, None]).squeeze(1)
            decode = None
            if static and not bool(bad.any()):
                static = False
                decode = self._decode_step(k, probs, candidates, result)
            if self.has_eos:
                tokens = tokens * unfinished + pad_token.to(device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            self._stream(tokens, step)
            steps_needed += unfinished.max()
            unfinished = unfinished & ~self.criteria(input_ids, tuple(self.scores) if self.scores is not None else None)
            step += 1
            if step % interval == 0 or step >= closely or input_ids.shape[1] == self.criteria.max_length:
                if interval > 1:
                    self._check_nan(bad, step - 1)
                finished = not bool(unfinished.max())
            if decode is not None and not finished:
                return self._loop_static(decode, input_ids, unfinished, int(steps_needed), step, interval, closely)
        kept = int(steps_needed)
        self.input_ids = input_ids[:, : input_ids.shape[1] - (step - kept)]
        self.surplus = step - kept
        for recorded in (self.scores, self.raw_logits, self.layers, self.attentions, self.cross_attentions):
            if recorded:
                del recorded[kept:]

    def _decode_step(self, k: int, probs: torch.Tensor, candidates: torch.Tensor, result: StepResult):
        """What takes over from the step that has just been made; None where it cannot, unless it was insisted on."""
        asked = self.strategy.decode_step
        try:
            if self.known_tokens is not None:
                raise StaticStepUnsupportedError("its output embedding writes tokens that it cannot read")
            decode = open_decode_step(self, k, probs, candidates, result, self.step_scores)
        except StaticStepUnsupportedError as error:
            if asked != "auto":
                raise ValueError(f"decode_step={asked!r}, but {error}; allowed: False or 'auto'") from error
            logger.info("%s is decoded without static buffers: %s", type(self.model).__name__, error)
            return None
        self._check_compiled(decode)
        return decode

    def _check_compiled(self, decode: DecodeStep) -> None:
        if self.strategy.decode_step == "compiled" and decode.not_compiled is not None:
            raise ValueError(f"decode_step='compiled', but {decode.not_compiled}; allowed: True, False or 'auto'")

    def _loop_static(self, decode: DecodeStep, input_ids, unfinished, needed, step, interval, closely) -> None:
        """The rest of the loop, with the host looking at the device every ``interval`` steps only."""
        decode.begin(input_ids, unfinished.bool())
        first, bound, finished = step, self.criteria.max_length, False
        while not finished:
            self._check_room(step)
            decode()
            self._check_compiled(decode)
            self._stream(decode.input_ids[:, -1], step)
            step += 1
            at_end = decode.input_ids.shape[1] == bound
            if step % interval == 0 or step >= closely or at_end:
                self._check_nan(decode.bad, step - 1)
                finished = at_end or not bool(decode.unfinished.any())
        kept = needed + int(decode.steps_needed)
        self.input_ids = decode.input_ids[:, : decode.input_ids.shape[1] - (step - kept)].clone()
        self.surplus = step - kept
        self.not_captured, self.static_steps = decode.not_captured, step - first

    def _stream(self, tokens: torch.Tensor, step: int) -> None:
        if self.streamer is not None and step >= self.streamed:  # a call that began again says nothing twice
            self.streamer.put(tokens.cpu())
            self.streamed = step + 1

    def _check_room(self, step: int) -> None:
        """The candidates of the last token are run as well, so a table of positions ends one token earlier than for
        greedy search."""
        if self.positions is not None and self.longest_prompt + step >= self.positions:
            raise ValueError(
                f"max_new_tokens is too large: with a prompt of {self.longest_prompt} tokens this model's table of "
                f"{self.positions} positions ends after {self.positions - self.longest_prompt} new ones"
            )

    @staticmethod
    def _check_nan(bad: torch.Tensor, step: int) -> None:
        if bool(bad.any()):
            raise ValueError(
                f"the logits of row {int(bad.nonzero()[0])} left no probabilities at new token {step} or before (NaN, "
                "or every token banned); allowed: finite numbers, and −inf for banned tokens while one token is left"
            )

    def _choose(self, probs: torch.Tensor):
        self.step_scores = None
        if probs.shape[1] == 1:
            return lambda hidden_states: torch.zeros(len(probs), dtype=torch.long, device=hidden_states.device)

        noise = None
        if self.strategy.temperature is not None:  # drawn once a step, however many paths have to be tried
            noise = torch.empty_like(probs).exponential_(generator=self.strategy.generator).log_().neg_()

        def choose(hidden_states: torch.Tensor) -> torch.Tensor:
            penalty, _ = self.history.penalty(hidden_states)
            scores = contrastive_scores(probs.to(penalty.device), penalty, self.penalty_alpha)
            if noise is not None:
                scores = scores / max(self.strategy.temperature, TINY) + noise.to(penalty.device)
            # NaN (a hidden state that overflowed) loses; of equal scores the more probable, which comes first, wins.
            self.step_scores = scores.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
            return self.step_scores.argmax(dim=-1)

        return choose

    def _step(self, input_ids: torch.Tensor, candidates: torch.Tensor, probs: torch.Tensor) -> StepResult:
        result = self.opened.step(input_ids, candidates, self._choose(probs))
        if self.history is not None:
            self.history.append(result.hidden_states)
        return result

    # ---- which path -----------------------------------------------------------------------------------------------

    def _verdict(self) -> Verdict:
        """How this model serves this kind of call: what is known of it, or what a trial finds."""
        asked, use_cache = self.strategy.path, self.model_kwargs.get("use_cache") is not False
        names = [name for name in PATHS if asked in ("auto", name)]
        if not use_cache and asked == "auto":
            names = ["uncached"]
        refusals = []
        if self.record["output_attentions"] and "shared_prefix" in names:
            names.remove("shared_prefix")
            refusals.append("shared_prefix: output_attentions needs the model's own attention")
        for route, reason in self.refused.items():
            refusals += [f"{route[0]}: {reason}"] if route[0] in names and not route[1] else []
        routes = [(name, head) for name in names for head in (True, False)]
        routes = [(n, h) for n, h in routes if (n, h) not in self.refused and (self.tap.has_head or not h)]
        call = Call(
            model=self.model,
            input_ids=self.input_ids,
            model_kwargs=self.model_kwargs,
            generation_config=self.config,
            top_k=self._candidates,
            max_length=self.max_length,
            table=self.positions,
        )
        kind = (*call.kind(), *names) if asked == "auto" else None
        verdict = None if kind is None or self.refused else recall(self.model, kind)
        if verdict is None:
            verdict = judge(call, self.tap, routes, refusals, self._ours)
            if kind is not None and verdict is not None:
                remember(self.model, kind, verdict)
        elif verdict.asks:
            self.tap.decoder = None
        self.kind = kind
        if verdict is None:
            on = "" if asked == "auto" else f" on path={asked!r}"
            reason = f"{type(self.model).__name__} cannot be decoded by contrastive search{on}: {'; '.join(refusals)}"
            parts = [refusal.partition(":") for refusal in refusals]
            checks = tuple(Check(name, False, why.strip()) for name, _, why in parts)
            announce(SupportReport(type(self.model).__name__, "none", reason, False, checks))
            raise ValueError(reason)
        announce(verdict.report)
        return verdict

    def _open(self, verdict: Verdict) -> torch.Tensor:
        """Run the prompt on the path that was found to serve. Returns its logits."""
        name, head = verdict.route
        self.whole_steps = verdict.whole_steps
        self.opened: Path = PATHS[name](
            self.model,
            self.tap,
            head=head,
            generation_config=self.config,
            model_kwargs=self.model_kwargs,
            max_length=self.max_length,
            record=self.record,
        )
        logits, states, self.prefill_outputs = self.opened.prefill(self.input_ids)
        self.known_tokens = known_tokens(self.model, logits)
        mask = None if self._candidates == 1 else self._mask_of(states)
        self.history = None if self._candidates == 1 else HiddenStatesHistory(states, mask, self.max_length)
        return logits.to(self.input_ids.device)

    def _mask_of(self, states: torch.Tensor) -> torch.Tensor | None:
        """Which positions of the prompt's ``states (B, L, D)`` are real."""
        mask = self._prompt_mask(self.model_kwargs)
        more = 0 if mask is None else states.shape[1] - mask.shape[1]
        if mask is None or more == 0:
            return mask
        if more == self.virtual:  # a learned prompt stands in front
            return torch.cat([mask.new_ones(len(mask), more), mask], dim=1)
        if more > 0 and bool(mask.all()):  # an image's positions, say: all are real, wherever they stand
            return None
        if more > 0 and self._appends(more):
            return torch.cat([mask, mask.new_ones(len(mask), more)], dim=1)
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions, but {type(self.model).__name__} made hidden states for "
            f"{states.shape[1]}: which of them are padding cannot be told; allowed: prompts of one length, unpadded"
        )

    def _appends(self, count: int) -> bool:
        """Whether the model puts so many tokens of its own behind a text (XLM: one that stands for the next)."""
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids, is_first_iteration=True, **without_caches(self.model_kwargs)
        )
        ids, own = inputs.get("input_ids"), self.input_ids.shape[1]
        return ids is not None and ids.shape[1] == own + count and torch.equal(ids[:, :own], self.input_ids)

    def _begin_again(self, verdict: Verdict, error: Exception) -> None:
        """The path that was found to serve does not serve this call after all: another one takes it from its start."""
        name, head = verdict.route
        logger.info("%s does not take path %s: %s", type(self.model).__name__, name, error)
        if self.kind is not None:
            forget(self.model, self.kind)
        for route in [(name, True), (name, False)] if isinstance(error, PathUnsupportedError) else [(name, head)]:
            self.refused[route] = str(error)
        if self.model_kwargs.get(CACHE_NAME) is not None:
            self.model_kwargs[CACHE_NAME] = self._fresh_cache()
        for recorded in (self.scores, self.raw_logits, self.layers, self.attentions, self.cross_attentions):
            if recorded:
                recorded.clear()

    # ---- what is returned -----------------------------------------------------------------------------------------

    def _record(self, outputs: Any) -> None:
        """Hidden states and attentions of the step that made the current logits: the prompt's, or the winners'."""
        if not any(self.record.values()):
            return
        rows = outputs.rows if isinstance(outputs, StepResult) else None
        outputs = outputs.outputs if isinstance(outputs, StepResult) else outputs

        def pick(layers, batch: int, position: int):
            """The winners' rows, and where ``generate``'s own step is one position long, that one. Dimensions are
            counted from the last: some models stack their layers in front."""
            if layers is None:
                return ()
            if rows is None:
                return tuple(layers)
            layers = [layer.index_select(layer.ndim + batch, rows) for layer in layers]
            return tuple(layers if self.whole_steps else (layer.narrow(position, -1, 1) for layer in layers))

        prefix = "decoder_" if self.is_encoder_decoder else ""
        if self.record["output_hidden_states"]:
            self.layers.append(pick(getattr(outputs, f"{prefix}hidden_states", None), -3, -2))
        if self.record["output_attentions"]:
            self.attentions.append(pick(getattr(outputs, f"{prefix}attentions", None), -4, -2))
            if self.is_encoder_decoder:
                self.cross_attentions.append(pick(outputs.cross_attentions, -4, -2))

    def _result(self):
        cache = None
        if self.config.return_dict_in_generate or self.callers_cache is not None:
            cache = self.opened.result_cache(self.input_ids, self.surplus)
        if cache is not None and self.callers_cache is not None:
            cache = fill_cache(self.callers_cache, cache)
        if not self.config.return_dict_in_generate:
            return self.input_ids

        def collected(wanted: bool, items: list | None) -> tuple | None:
            return tuple(items) if wanted and items is not None else None

        common = {
            "sequences": self.input_ids,
            "scores": collected(True, self.scores),
            "logits": collected(True, self.raw_logits),
            CACHE_NAME: cache,
        }
        attentions = collected(self.record["output_attentions"], self.attentions)
        layers = collected(self.record["output_hidden_states"], self.layers)
        if not self.is_encoder_decoder:
            return GenerateDecoderOnlyOutput(**common, attentions=attentions, hidden_states=layers)
        encoder = self.model_kwargs["encoder_outputs"]
        return GenerateEncoderDecoderOutput(
            **common,
            encoder_attentions=encoder.get("attentions") if self.record["output_attentions"] else None,
            encoder_hidden_states=encoder.get("hidden_states") if self.record["output_hidden_states"] else None,
            decoder_attentions=attentions,
            cross_attentions=collected(self.record["output_attentions"], self.cross_attentions),
            decoder_hidden_states=layers,
        )


def position_table(model) -> int | None:
    """Size of the decoder's table of positions; None for models that compute theirs."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_table = isinstance(module, torch.nn.Embedding) and (last == "wpe" or "position" in last)
        if is_table and limit <= module.num_embeddings <= limit + 2:  # OPT and BART keep two rows for other uses
            return limit
    return None


def stop_check_interval(device: torch.device) -> int:
    """Steps between two looks at the end-of-text flags: on a GPU each look makes the host wait for the device."""
    return 8 if device.type == "cuda" else 1
