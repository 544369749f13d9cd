"""A model backend for EleutherAI's lm-evaluation-harness: texts by the engine, likelihoods as its ``hf`` backend.

    python -m simctg_fast.integrations.lm_eval run --model simctg_fast \\
        --model_args pretrained=bundled,penalty_alpha=0.6,top_k=4,slots=32 --tasks my_task --include_path DIR

is the harness's own command line with the backend registered; its other commands (``ls``, ``validate``) are there too.
``lm_eval run --model simctg_fast`` finds it by the entry point of this package, in releases that look for entry
points: 0.4.13 does not. In Python, ``import simctg_fast.integrations.lm_eval`` registers it.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
except ImportError as error:
    raise ImportError(f"this backend needs the harness: pip install 'simctg_fast[lm-eval]' ({error})") from error

from ..assets import resolve_model
from ..checks import is_integer, is_number, require
from ..engine import Engine
from ..engine.parameters import USED_BY
from ..engine.prepare import load_factory
from ..engine.requests import Request
from ..loading import context_length, load_model
from ..printable import printable
from ..strategy_names import RANDOM
from ._likelihood import continuation_log_likelihoods

__all__ = ["SimCTGLM"]

logger = logging.getLogger("simctg_fast")

NAME = "simctg_fast"
DEFAULT_MAX_NEW_TOKENS = 256  # where a task names none, as the harness's own backend
DEFAULT_MAX_LENGTH = 2048  # where neither model nor tokenizer names one, as the harness's own backend
HARNESS_DEVICE = "cuda:0"  # what its command line passes where nobody has named a device

# A task's names for the same thing; the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# Settings of `generate` that tasks write down although they say nothing, with the value at which they say nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "use_cache": True,
}
_KNOWN = ("until", *_LENGTHS, "max_length", "do_sample", *_SAMPLING, "penalty_alpha", *_NEUTRAL)


class SimCTGLM(TemplateLM):
    """Answers ``generate_until`` by :class:`simctg_fast.engine.Engine`, and likelihoods by one forward a batch.

    Tokens, lengths, prefix and stop strings are those of the harness's ``hf`` backend for the same arguments; but for
    encoder-decoders it adds the length of the longest context of a batch to ``max_gen_toks``, here it is what it says.
    Whatever the strategy is, likelihoods are the model's own: a strategy only writes.

    A task that does not sample (``do_sample: false`` or ``temperature: 0``) gets no random text from any strategy:
    ``sample`` then takes the most probable token, ``stochastic-contrastive`` and ``guard`` the best of theirs. A task
    that does sample is refused by a strategy that does not. Where it says neither, the strategy decides.

    Args:
        pretrained: folder, hub name or ``bundled``.
        device, dtype: see `load_model`.
        batch_size: slots, and rows of a forward for likelihoods, if it is above 1, the harness's default; ``slots``
            has precedence. ``auto`` leaves it to us.
        max_batch_size: accepted and not used.
        max_length: tokens that a context and its continuation may have; default what the model or tokenizer says.
        add_bos_token: whether a text begins with the BOS token; default what the tokenizer does. One that begins with
            the BOS text (a chat template's) gets no second one.
        prefix_token_id: what stands before a text without context; default the BOS, else the EOS token.
        softmax_dtype: of likelihoods, ``float32`` …; default that of the logits.
        options: of the engine: ``strategy``, ``slots``, ``penalty_alpha``, ``top_k``, ``max_new_tokens`` (for tasks
            that name no length) …

    Raises:
        ValueError, TypeError: an argument outside the above; see `Engine` and `load_model`.
    """

    # What the command line named; None where the harness's own default reaches us.
    named_device: str | None = None

    def __init__(
        self,
        pretrained: str = "bundled",
        *,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        softmax_dtype: str | torch.dtype | None = None,
        processor: Any = None,
        **options: Any,
    ):
        super().__init__()
        if options.get("n") not in (None, 1):
            raise ValueError(
                f"n must be 1, got {options['n']!r}: the task's `repeats` says how often a request is answered"
            )
        rows = _batch_rows(batch_size)
        if "slots" not in options and "memory" not in options and rows is not None:
            options["slots"] = rows
        self.batch_rows = int(options.get("slots") or rows or 16)
        self.pretrained = pretrained
        is_flag = add_bos_token is None or isinstance(add_bos_token, bool)
        require(is_flag, "add_bos_token", add_bos_token, "True or False")
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.softmax_dtype = _dtype("softmax_dtype", softmax_dtype)
        model, self.tokenizer = load_model(pretrained, device, dtype)
        if self.add_bos_token is not None:
            self.tokenizer = _with_bos(pretrained, self.tokenizer, self.add_bos_token)
        self.backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
        self.max_length = _max_length(model, self.tokenizer, max_length)
        self._user_factory = load_factory(processor) if isinstance(processor, str) else processor
        self.engine = Engine(model, self.tokenizer, processor=self._criteria, **options)
        # What a user has named stands for tasks that name nothing.
        fitting = DEFAULT_MAX_NEW_TOKENS if self.max_length > DEFAULT_MAX_NEW_TOKENS + 1 else self.max_length // 2
        self.default_new_tokens = int(options.get("max_new_tokens") or fitting)
        self._device = model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> SimCTGLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> SimCTGLM:
        """``arg_dict`` is what a user wrote as ``--model_args``: it counts before ``additional_config``, which is what
        the harness passes to every backend."""
        passed = {name: value for name, value in (additional_config or {}).items() if value is not None}
        named = cls.named_device
        if named is not None and arg_dict.get("device", named) != named:
            raise ValueError(f"--device {named} and --model_args device={arg_dict['device']} differ: name one of them")
        by_default = passed.get("device") == HARNESS_DEVICE and named is None
        if by_default and "device" not in arg_dict and not torch.cuda.is_available():
            logger.warning("there is no GPU for the harness's default device %r: running on the CPU", HARNESS_DEVICE)
            passed["device"] = "cpu"
        return cls(**(passed | arg_dict))

    # ---- what the harness asks of a backend -------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return str(self.pretrained).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context. Raises ValueError where the tokenizer has neither BOS nor EOS."""
        for token in (self.custom_prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither a BOS nor an EOS token: give prefix_token_id in --model_args")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with what the tokenizer adds. None adds no second BOS to a text that begins with one."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if string.startswith(prefix) else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """``chat_history`` as text. A template that refuses it is asked again without system messages, with a warning,
        as the ``hf`` backend does."""
        from jinja2.exceptions import TemplateError

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("the chat template refuses the messages (%s): the system message is left out", error)
            return render(others)

    # ---- texts ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each request's context, in their order, cut at the first stop string.

        Raises:
            ValueError: settings of a task that are unknown or cannot be kept, before anything is computed.
            RuntimeError: the engine could not answer a request. The others are finished and in the cache by then.
        """
        from tqdm import tqdm

        texts: list[str | None] = [None] * len(requests)
        failed: list[tuple[int, str]] = []
        asked = self._asked(requests, texts)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            bar.update(len(requests) - len(asked))
            for result in self.engine.generate(asked):
                index = int(result.id)  # type: ignore[arg-type]
                bar.update()
                if result.error is not None:
                    failed.append((index, result.error["message"]))
                    continue
                texts[index] = self._text(result.token_ids, self._stops(requests[index].args[1]))
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        if failed:
            index, message = min(failed)
            more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise RuntimeError(f"{_named(index, requests[index].args[0])} failed: {message}{more}")
        return texts  # type: ignore[return-value]

    def _asked(self, requests: list[Any], texts: list[str | None]) -> list[Request]:
        """The engine's requests, all checked before the first is run. One that asks for no token has its text."""
        asked: list[Request] = []
        notes: set[str] = set()
        cut = 0
        for index, request in enumerate(requests):
            context, kwargs = request.args
            try:
                line, was_cut = self._line(context, kwargs, notes)
                line["id"] = index
                if line["max_new_tokens"] == 0:
                    texts[index] = ""
                    self.cache_hook.add_partial("generate_until", request.args, "")
                    continue
                asked.append(self.engine.parse(line, number=index))
            except ValueError as error:
                raise ValueError(f"{_named(index, context)}: {error}") from error
            cut += was_cut
        self._say_cut(cut, len(requests))
        for note in sorted(notes):
            logger.warning("%s", note)
        return asked

    def _say_cut(self, cut: int, count: int) -> None:
        if cut:
            logger.warning(
                "%d of %d contexts do not fit into max_length=%d beside their continuation: they lose their beginning",
                cut,
                count,
                self.max_length,
            )

    def _line(self, context: str, kwargs: Mapping[str, Any], notes: set[str]) -> tuple[dict[str, Any], bool]:
        """The line of one request but for its id, and whether its context was cut. What is to be said about settings
        that do not count is added to ``notes``."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        unknown = [name for name in kwargs if name not in _KNOWN]
        if unknown:
            raise ValueError(f"unknown generation setting {unknown[0]!r}; known: {', '.join(_KNOWN)}")
        for name, neutral in _NEUTRAL.items():
            if kwargs.get(name, neutral) != neutral:
                raise ValueError(f"{name} must be {neutral!r} with this backend, got {kwargs[name]!r}")
        lengths = [name for name in _LENGTHS if name in kwargs]
        if len(lengths) > 1:
            notes.add(f"of {', '.join(f'{name}={kwargs[name]!r}' for name in lengths)} the first counts")
        named = lengths[0] if lengths else None
        wanted = self.default_new_tokens if named is None else _integer(named, kwargs[named])
        ids = self._context(context)
        causal = self.backend == "causal"
        room = self.max_length - wanted if causal else self.max_length
        if room < 1:
            raise ValueError(
                f"{named or 'max_new_tokens'} must be less than the context length {self.max_length}, got {wanted}"
            )
        cut = len(ids) > room
        ids = ids[-room:]
        if "max_length" in kwargs:  # of the context as well, and before the other names
            before = len(ids) if causal else 1
            total = _integer("max_length", kwargs["max_length"])
            wanted = total - before
            if wanted < 1:
                raise ValueError(f"max_length must be more than the context's {before} tokens, got {total}")
        line = {"prompt": ids, "max_new_tokens": wanted, "stop": self._stops(kwargs)}
        return line | self._settings(kwargs, notes), cut

    def _context(self, context: str) -> list[int]:
        """Tokens of a context that is to be continued, as the ``hf`` backend has them."""
        options = {}
        if self.backend == "causal":
            bos = self.tokenizer.bos_token
            if bos is not None and context.startswith(bos):
                options["add_special_tokens"] = False
            elif self.add_bos_token is not None:
                options["add_special_tokens"] = self.add_bos_token
        return list(self.tokenizer(context, verbose=False, **options)["input_ids"]) or [self.prefix_token_id]

    def _stops(self, kwargs: Mapping[str, Any]) -> list[str]:
        """The stop strings of ``--model_args`` and of a task, and the end of a text by the tokenizer's account."""
        end = "" if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        return list(dict.fromkeys(stop for stop in (*self.engine.parameters.stop, *_until(kwargs), end) if stop))

    def _settings(self, kwargs: Mapping[str, Any], notes: set[str]) -> dict[str, Any]:
        """What the strategy is to be told of a task's settings."""
        strategy = self.engine.strategy_name
        settings: dict[str, Any] = {}
        sampling = {name: kwargs[name] for name in _SAMPLING if name in kwargs}
        penalised = strategy in USED_BY["penalty_alpha"]
        if "penalty_alpha" in kwargs and (kwargs["penalty_alpha"] != 0 or penalised):
            settings["penalty_alpha"] = kwargs["penalty_alpha"]  # the engine refuses it where it is not used
            if penalised and "top_k" in sampling:  # beside it, the number of candidates
                settings["top_k"] = sampling.pop("top_k")
        random = _draws(kwargs)
        if random and strategy not in RANDOM:
            raise ValueError(
                f"the task samples (do_sample={kwargs.get('do_sample')!r}, temperature={kwargs.get('temperature')!r}), "
                f"strategy {strategy!r} does not: give strategy=sample in --model_args, or --gen_kwargs "
                "do_sample=False,temperature=0"
            )
        if random is False and strategy in RANDOM:
            # The most probable token; of candidates the one with the best score, which the temperature divides.
            return settings | ({"top_k": 1} if strategy == "sample" else {"temperature": 1e-9})
        if strategy == "sample":
            return settings | sampling | ({"top_k": None} if sampling.get("top_k") == 0 else {})
        if random is not False:  # they are of the distribution of tokens, from which only `sample` draws
            unused = [name for name, value in sampling.items() if value not in (0, 1)]
            if unused:
                notes.add(f"strategy {strategy!r} does not use the task's {', '.join(unused)}")
        return settings

    def _text(self, tokens: list[int], stops: Sequence[str]) -> str:
        """Tokens as text, as the ``hf`` backend has it: decoded alone, and cut at the first stop string."""
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]

    @functools.cached_property
    def _special_texts(self) -> list[str]:
        """Of special tokens that do not end a text for the engine."""
        tokens = set(self.tokenizer.all_special_ids) - self.engine.prepare.ends
        return [text for text in map(self.tokenizer.decode, sorted(tokens)) if text]

    def _criteria(self, request: dict[str, Any], tokenizer: Any) -> list[Any]:
        """The engine's factory: a user's own, and stop strings in which there are special tokens."""
        found = [] if self._user_factory is None else self._user_factory(request, tokenizer)
        found = list(found) if isinstance(found, list | tuple) else [] if found is None else [found]
        stops = [stop for stop in request.get("stop", ()) if any(text in stop for text in self._special_texts)]
        return [*found, _SpecialStop(tokenizer, stops)] if stops else found

    # ---- likelihoods ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``(log-probability, whether greedy search would write it)`` of each ``(context, continuation)``.

        The model's own, whatever the strategy.

        Raises:
            ValueError: a continuation without a token, or with more than ``max_length`` of them.
        """
        pairs = []
        cut = 0
        for index, request in enumerate(requests):
            context, continuation = request.args
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                begins = bool(ids) and ids[0] == self.prefix_token_id
                pair = (ids[:1], ids[1:]) if begins else ([self.prefix_token_id], ids)
            else:
                pair = self._encode_pair(context, continuation)
                pair = (pair[0] or [self.prefix_token_id], pair[1])  # of spaces alone none is left
            if not 0 < len(pair[1]) <= self.max_length:
                raise ValueError(
                    f"{_named(index, context)}: the continuation adds {len(pair[1])} tokens to the context, must add "
                    f"at least 1 and at most {self.max_length}"
                )
            read = len(pair[0]) + len(pair[1]) - 1 if self.backend == "causal" else len(pair[0])
            cut += read > self.max_length
            pairs.append(pair)
        self._say_cut(cut, len(requests))
        return self._loglikelihoods(pairs, "loglikelihood", disable_tqdm, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, by windows of ``max_length`` where it is longer; 0.0 of an empty one."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        answers = self._loglikelihoods(pairs, "loglikelihood_rolling", disable_tqdm)
        for owner, (total, _) in zip(owners, answers, strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of ``(key, context tokens, continuation tokens)`` each: the harness's own name for it."""
        return self._loglikelihoods([(context, written) for _, context, written in requests], "loglikelihood", True)

    def _loglikelihoods(
        self,
        pairs: list[tuple[list[int], list[int]]],
        what: str,
        disable_tqdm: bool,
        requests: Sequence[Any] = (),
    ) -> list[tuple[float, bool]]:
        """``requests``: whose answers these are, for the harness's cache."""
        from tqdm import tqdm

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        scores = continuation_log_likelihoods(
            self.engine.model,
            pairs,
            max_length=self.max_length,
            batch_rows=self.batch_rows,
            softmax_dtype=self.softmax_dtype,
        )
        for scored in tqdm(scores, total=len(pairs), disable=disable_tqdm, desc=what):
            answers[scored.index] = scored.total, scored.is_greedy
            if requests:
                self.cache_hook.add_partial(what, requests[scored.index].args, answers[scored.index])
        return answers


class _SpecialStop(transformers.StoppingCriteria):
    """Ends a sequence whose tokens spell a stop string, special tokens included: the engine looks at texts without."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        # As its own tokens, or with others around it.
        self.window = 2 + max(len(tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in stops)
        self.begin: int | None = None  # of what is written: behind the prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[1]
        # It is asked from the first token on, and again from there where a sequence is written anew.
        self.begin = length - 1 if self.begin is None else min(self.begin, length - 1)
        tail = self.tokenizer.decode(input_ids[0, max(self.begin, length - self.window) :].tolist())
        return torch.tensor([any(stop in tail for stop in self.stops)])


def _until(kwargs: Mapping[str, Any]) -> list[str]:
    until = kwargs.get("until")
    strings = [until] if isinstance(until, str) else [] if until is None else until
    is_list = isinstance(strings, list | tuple) and all(isinstance(stop, str) for stop in strings)
    require(is_list, "until", until, "a string or a list of strings")
    return [stop for stop in strings if stop]


def _draws(kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a task samples; None where it does not say."""
    do_sample, temperature = kwargs.get("do_sample"), kwargs.get("temperature")
    require(do_sample is None or isinstance(do_sample, bool), "do_sample", do_sample, "true or false")
    is_valid = temperature is None or is_number(temperature, 0, math.inf)
    require(is_valid, "temperature", temperature, "a number of at least 0")
    if do_sample is False or temperature == 0:
        return False
    return None if do_sample is None and temperature is None else True


def _integer(name: str, value: Any) -> int:
    require(is_number(value, 0) and float(value).is_integer(), name, value, "an integer of at least 0")
    return int(value)


def _named(index: int, context: str) -> str:
    beginning = context if len(context) <= 60 else context[:59] + "…"
    return f"request {index} ({printable(beginning)!r})"


def _batch_rows(batch_size: int | str | None) -> int | None:
    """None for what says nothing: 1, the harness's default, and ``auto``."""
    text = str(batch_size).strip()
    if batch_size is None or text.partition(":")[0] == "auto":
        return None
    is_count = text.isdigit() and int(text) >= 1
    require(is_count, "batch_size", batch_size, "an integer of at least 1 or auto")
    return int(text) if int(text) > 1 else None


def _dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    is_valid = value is None or (isinstance(found, torch.dtype) and found.is_floating_point)
    require(is_valid, name, value, "the name of a floating point dtype")
    return found


def _with_bos(pretrained: str, tokenizer: Any, add_bos_token: bool) -> Any:
    """The tokenizer made anew: it takes this setting only while it is made."""
    fresh = transformers.AutoTokenizer.from_pretrained(resolve_model(pretrained), add_bos_token=add_bos_token)
    fresh.pad_token, fresh.padding_side = tokenizer.pad_token, tokenizer.padding_side
    return fresh


def _max_length(model: Any, tokenizer: Any, asked: int | None) -> int:
    """Tokens of a context and its continuation, where the ``hf`` backend looks for them too."""
    limit = context_length(model)
    if asked is not None:
        most = "" if limit is None else f" and at most {limit}, the model's own"
        is_valid = is_integer(asked, 2, math.inf if limit is None else limit)
        require(is_valid, "max_length", asked, f"an integer of at least 2{most}")
        return asked
    config = getattr(model.config, "text_config", None) or model.config
    named = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    length = next((value for value in named if value is not None), getattr(tokenizer, "model_max_length", None))
    # A tokenizer without a limit names 10 ** 30.
    return int(length) if length is not None and length < 10**29 else DEFAULT_MAX_LENGTH


def _register() -> None:
    """Make the harness know the backend; it may know it already, by the entry point or from before a reload."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(SimCTGLM)


def main() -> None:
    """The harness's command line, with this backend registered."""
    from lm_eval.__main__ import cli_evaluate

    # The harness does not say whether a device is the user's or its own default.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device")
    SimCTGLM.named_device = parser.parse_known_args(sys.argv[1:])[0].device
    cli_evaluate()


if __name__ == "__main__":
    # As a script this module has another name; the harness must get the class of the real one.
    import simctg_fast.integrations.lm_eval as backend

    backend.main()
else:
    _register()
