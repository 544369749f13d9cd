"""What is handed to ``generate``: a way to choose tokens, and how it is run.

model.generate(**inputs, custom_generate=FSD(), max_new_tokens=128)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..cpu.modules import WeightCopies
from .generate_loop import Run
from .kept_arguments import keep_arguments
from .settings import check_settings, check_streamer
from .strategies import RowSettings, Strategy
from .trial import DECODERS


class Options(TypedDict, total=False):
    """How a search is run: see `Search`."""

    streamer: Any | None
    tokenizer: Any | None
    stop_strings: str | Sequence[str] | None
    decode_step: bool | str
    path: str
    fast_linear: bool
    pack: bool | str
    weights: str | None


class Search:
    """A callable for ``model.generate(custom_generate=...)``. What it chooses by is a subclass's.

    Args:
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

    Attributes:
        name, random_by: for messages: what it is called, and what makes it random.
        is_random: whether equal calls may give different texts.

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    name = "this search"
    random_by = ""
    generator: torch.Generator | None = None

    def __init__(
        self,
        *,
        streamer: Any | None = None,
        tokenizer: Any | None = None,
        stop_strings: str | Sequence[str] | None = None,
        decode_step: bool | str = "auto",
        path: str = "auto",
        fast_linear: bool = True,
        pack: bool | str = "auto",
        weights: str | None = None,
    ):
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
        self.decode_step = decode_step
        self.streamer, self.tokenizer, self.stop_strings = streamer, tokenizer, stop_strings
        self.path, self.fast_linear, self.pack = path, fast_linear, pack
        self.weights = None if weights is None else WeightCopies(weights)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        return f"{type(self).__name__}({shown})"

    def _shown(self) -> Mapping[str, Any]:
        """Its settings, by the names that its constructor has for them."""
        return {}

    @property
    def is_random(self) -> bool:
        return False

    def settings(self, config: GenerationConfig, model: Any) -> RowSettings:
        """What the rows of a call are bound with: this search's settings, completed by the call's.

        Raises:
            ValueError: one of them is not allowed.
        """
        return self.own_settings()

    def own_settings(self) -> RowSettings:
        """The same where the call has no say."""
        raise NotImplementedError

    def make_strategy(self, settings: Any, noise: Callable[[int, int], torch.Tensor]) -> Strategy:
        """What chooses the tokens of one call; ``noise`` makes Gumbel noise ``(rows, k)`` for what is drawn."""
        raise NotImplementedError

    def looked_at(self, settings: Mapping[str, Any]) -> None:
        """The first look at the settings of a call of ``generate``, before transformers computes with them. Raises
        ValueError."""

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


def check_generator(generator: Any, is_random: bool, wanted: str) -> None:
    """Raise ValueError unless ``generator`` is one, or None, and there is something to draw: ``wanted`` says what."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {generator!r:.80}")
    if generator is not None and not is_random:
        raise ValueError(f"generator is given, but without {wanted} no random choice is made")


def _is_word(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def _wanted(search: Any, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The first look at the arguments of a call of ``generate``: transformers computes with them next."""
    if not isinstance(search, Search):
        search = getattr(search, "search", None)  # of a plain function: what it stands for
        if not isinstance(search, Search):
            return {}
    check_settings(settings)
    search.looked_at(settings)
    return arguments | {"tokenizer": search.tokenizer or arguments["tokenizer"]}


keep_arguments(_wanted)
