"""Contrastive search as a decoding method for ``generate`` (Su et al. 2022, arXiv 2202.06417)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..checks import is_number
from ..cpu.modules import WeightCopies
from .generate_loop import Run
from .kept_arguments import keep_arguments
from .settings import check_penalty_alpha, check_settings, check_streamer, check_top_k
from .strategies import Contrastive, Greedy, Strategy
from .trial import DECODERS


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
        center: take the mean of the history out of the states before cosines are taken: cos(h − μ, h_j − μ), μ the mean
            of the h_j, or 0 where these are fewer than 3. For models whose states point much the same way.
        streamer: a ``transformers`` streamer, in the place of ``generate``'s; it gets the prompt, then every token, and
            is always ended.
        tokenizer, stop_strings: end a sequence at any of these strings, beside those that ``generate`` is given.
        decode_step: keep a step's buffers in place and, on CUDA, replay it as one graph where 24 tokens or more follow:
            True, False, or ``"auto"`` (on CUDA, where the call allows it). The tokens are the same. ``"compiled"``:
            with the decoder compiled as well; a model's first call takes up to a minute longer, and half-precision
            scores round differently.
        path: ``"auto"``, or ``"shared_prefix"``, ``"reorder"``, ``"uncached"`` (see ``support``) to insist on one.
        fast_linear: on the CPU, route linear layers through our small-batch kernel, and blocks of some models around
            their modules, meanwhile.
        pack: on the CPU, also lay weights out anew for the call where that pays: True, False, or ``"auto"`` (only if
            the copy takes at most a quarter of the free memory).
        weights: on the CPU, what linear layers read in the place of their weights, in copies that this object keeps:
            ``"int8"``: a quarter of float32's bytes and rounded so far, but for the output layer, whose most probable
            tokens stay exact (``docs/precision.md`` says what it costs); ``"lossless"``: float32 weights that are as
            good in 16 bits are read from half the bytes, with the same result.

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
        center: bool = False,
        streamer: Any | None = None,
        tokenizer: Any | None = None,
        stop_strings: str | Sequence[str] | None = None,
        decode_step: bool | str = "auto",
        path: str = "auto",
        fast_linear: bool = True,
        pack: bool | str = "auto",
        weights: str | None = None,
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
        if not isinstance(center, bool):
            raise ValueError(f"center must be True or False, got {center!r:.80}")
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
        if not isinstance(path, str) or path not in ("auto", *DECODERS):
            raise ValueError(f"path must be 'auto' or one of {tuple(DECODERS)}, got {path!r:.80}")
        if not isinstance(decode_step, bool) and not _is_word(decode_step, "auto", "compiled"):
            raise ValueError(f"decode_step must be True, False, 'auto' or 'compiled', got {decode_step!r:.80}")
        if not isinstance(fast_linear, bool):
            raise ValueError(f"fast_linear must be True or False, got {fast_linear!r:.80}")
        if not isinstance(pack, bool) and not _is_word(pack, "auto"):
            raise ValueError(f"pack is {pack!r:.80}, must be one of 'auto', True, False")
        if weights is not None and (pack is True or not fast_linear):
            raise ValueError(f"weights={weights!r:.80} goes with fast_linear=True and without pack=True")
        self.penalty_alpha, self.top_k, self.decode_step = penalty_alpha, top_k, decode_step
        self.temperature, self.generator, self.center = temperature, generator, center
        self.streamer, self.tokenizer, self.stop_strings = streamer, tokenizer, stop_strings
        self.path, self.fast_linear, self.pack = path, fast_linear, pack
        self.weights = None if weights is None else WeightCopies(weights)

    def __repr__(self) -> str:
        named = [(name, getattr(self, name)) for name in ("penalty_alpha", "top_k", "temperature")]
        named += [("center", True)] if self.center else []
        return f"ContrastiveSearch({', '.join(f'{n}={v!r}' for n, v in named if v is not None)})"

    def make_strategy(self, candidates: int, noise: Callable[[int, int], torch.Tensor]) -> Strategy:
        """What chooses the tokens of one call; ``noise`` makes Gumbel noise ``(rows, k)`` for what is drawn."""
        if candidates == 1:
            return Greedy()
        is_random = self.temperature is not None
        return Contrastive(candidates, is_random, noise if is_random else None, self.center)

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
        callers = model_kwargs.pop("streamer", None)
        streamer = callers if self.streamer is None else self.streamer
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
            run = Run(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            run.synced_gpus, run.streamer = synced_gpus, streamer
            return run()
        finally:
            for each in {id(s): s for s in (streamer, callers) if s is not None}.values():  # who had the prompt waits
                each.end()


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """``ContrastiveSearch()`` as a plain function: ``model.generate(custom_generate=contrastive_search,
    penalty_alpha=0.6, top_k=4)``. For a random choice use the class."""
    return ContrastiveSearch()(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


def _is_word(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def _wanted(strategy: Any, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The first look at the arguments of a call of ``generate``: transformers computes with them next."""
    if isinstance(strategy, ContrastiveSearch) or strategy is contrastive_search:
        check_settings(settings)
        for name, check in (("penalty_alpha", check_penalty_alpha), ("top_k", check_top_k)):
            if getattr(strategy, name, None) is None and settings.get(name) is not None:
                check(settings[name])
    if isinstance(strategy, ContrastiveSearch):
        return arguments | {"tokenizer": strategy.tokenizer or arguments["tokenizer"]}
    return arguments if strategy is contrastive_search else {}


keep_arguments(_wanted)
