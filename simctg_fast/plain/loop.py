"""``generate`` for a plain model: the loop of transformers' own over any step that returns logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..checks import require
from ..decoding.contrastive_search import ContrastiveSearch
from ..decoding.generate_arguments import DEFAULT_TOP_K
from ..decoding.generate_loop import BatchNoise, check_probabilities, stop_check_interval
from ..decoding.named import as_search
from ..decoding.packing import by_sequence, first_places, owners_of, run_of
from ..decoding.settings import check_center, check_penalty_alpha, check_streamer, check_top_k
from ..decoding.slots import Extent, History
from ..decoding.strategies import Contrastive, RowSettings, Strategy, View
from .protocols import PROTOCOLS, Select, StepOutput, Stepper, detect_protocol
from .settings import make_config, make_criteria, make_processors


@torch.no_grad()
def generate(
    step: Callable,
    input_ids: Tensor,
    *,
    max_new_tokens: int | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    penalty_alpha: float | None = None,
    center: bool = False,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    protocol: str = "auto",
    select: Select | None = None,
    strategy: Any = None,
    prefix_allowed_tokens_fn: Callable | None = None,
    tokenizer: Any = None,
    generation_config: GenerationConfig | None = None,
    **settings: Any,
) -> Tensor:
    """Prompt and continuation from any model that returns logits, with Hugging Face's processors and criteria.

    Within transformers' own ``generate`` it is `ContrastiveSearch`; many requests at once are `Engine.generate`'s.

    Settings are named and defaulted as in transformers' ``GenerationConfig``, all of whose fields may be given
    (``min_p``, ``bad_words_ids``, ``suppress_tokens``, ``max_time``, ``num_return_sequences``, …); processors are
    applied in the order of ``model.generate``, and the same model gives the same tokens as there, under the same seed.

    Args:
        step: a callable or ``nn.Module`` in one of three protocols; logits are ``(B, T, V)`` or ``(B, V)``.
            ``"stateless"``: ``(ids) -> logits``, called with all tokens so far.
            ``"positional"``: ``(ids, input_pos) -> logits``, with a cache of its own; called with the prompt and
            ``arange(L)``, then with one token ``(B, 1)`` and its position ``(1,)``.
            ``"stateful"``: ``(ids, state) -> logits, state[, hidden]``; called with the prompt and None, then with one
            token and the state it returned.
        input_ids: the prompt, ``(B, L)`` or ``(L,)`` integers; the result has as many dimensions.
        attention_mask: ``(B, L)``, zero at padding, which must be on the left. Handed on, one column longer each step,
            as the keyword ``attention_mask``; a step that does not take it cannot have padding. Without one, leading
            ``pad_token_id`` count as padding if that is not an end of sequence as well.
        logits_processor, stopping_criteria: one or a list of transformers' objects, or of callables like them.
        generator: random numbers of ``do_sample``; the device's global stream if None, as in transformers.
        streamer: gets the prompt, then each token, and is always ended.
        protocol: ``"auto"`` reads the names of the step's parameters: one alone is stateless, a second one called
            ``input_pos`` or ``state`` says the others. A step of any other shape has to be told.
        penalty_alpha: above 0, contrastive search over ``top_k`` candidates (4 unless given), for a step that returns
            ``hidden``, ``(B, T, D)`` for the prompt and ``(B, 1, D)`` or ``(B, D)`` after it.
        center: of ``penalty_alpha``: hidden states are compared less their mean, as in `ContrastiveSearch`.
        strategy: an `FSD`, `GUARD` or `AdaptiveContrastiveSearch`, or ``"fsd"``, ``"fsd-vec"``, ``"guard"`` or
            ``"adaptive"``. ``FSD("vector")`` needs ``hidden`` as well; adaptive search that and what ``penalty_alpha``
            needs.
        select: ``select(state, index) -> state``, rows ``index (N,)`` of a state, in memory of their own; contrastive
            search branches with it. (A stateless step needs none, and returns ``logits, hidden``.)
        prefix_allowed_tokens_fn, tokenizer, generation_config: as in ``model.generate``.

    Returns:
        ``(B, L + n)`` int64, ``n`` at most ``max_new_tokens`` (20 unless given); rows that ended early are filled with
        ``pad_token_id``. ``(L + n,)`` for a 1-D prompt and one returned sequence.

    Raises:
        ValueError: an argument outside the above, a step that returns another shape, NaN logits, or every token banned.
        TypeError: a setting that ``GenerationConfig`` does not know.
    """
    values = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "penalty_alpha": penalty_alpha,
    }
    if not callable(step):
        raise ValueError(f"step must be callable, got {type(step).__name__}")
    is_protocol = isinstance(protocol, str) and protocol in ("auto", *PROTOCOLS)
    require(is_protocol, "protocol", protocol, f"'auto' or one of {PROTOCOLS}")
    protocol = detect_protocol(step) if protocol == "auto" else protocol
    prompt = _checked_prompt(input_ids)
    config = make_config(generation_config, prompt, values | settings)
    mask = _checked_mask(attention_mask, prompt, config)
    if config.penalty_alpha:
        default_top_k = top_k is None and (generation_config is None or generation_config.top_k is None)
        check_penalty_alpha(config.penalty_alpha)
        if default_top_k:
            config.top_k = DEFAULT_TOP_K
        check_top_k(config.top_k)
    check_streamer(streamer)
    is_generator = generator is None or isinstance(generator, torch.Generator)
    require(is_generator, "generator", generator, "a torch.Generator")
    if generator is not None and generator.device.type != prompt.device.type:
        raise ValueError(f"generator must be on {prompt.device.type}, as input_ids are, got {generator.device.type}")
    stepper = Stepper(step, protocol, select)
    if mask is not None and not stepper.takes_mask:
        raise ValueError(
            "attention_mask marks padding, but step takes no attention_mask; allowed: prompts of equal length, or a "
            "step with a parameter of that name"
        )
    check_center(center, config.penalty_alpha is not None and strategy is None, "penalty_alpha=..., without a strategy")
    if strategy is not None:
        _check_own_settings(strategy, values | settings)
    chooser, row = _chooser(config, strategy, center, prompt, generator)
    if chooser is not None:
        _check_chooser(config, chooser, strategy, protocol, select)
    copies = config.num_return_sequences or 1
    if copies > 1:
        prompt = prompt.repeat_interleave(copies, dim=0)
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
    run = _Run(stepper, config, prompt, mask, generator, streamer, chooser, row)
    try:
        if streamer is not None:
            streamer.put(prompt.cpu())
        output = run.first()
        vocabulary = output.logits.shape[-1]
        processors = make_processors(config, prompt, mask, vocabulary, logits_processor, prefix_allowed_tokens_fn)
        criteria = make_criteria(config, vocabulary, stopping_criteria, tokenizer)
        # A look at the flags makes a GPU wait; criteria of the caller's may count their calls.
        interval = 1 if streamer is not None or stopping_criteria is not None else stop_check_interval(prompt.device)
        ids = run(output, processors, criteria, interval)
    finally:
        if streamer is not None:
            streamer.end()
    return ids[0] if input_ids.ndim == 1 and copies == 1 else ids


class _Run:
    """One call: the tokens so far and how the next ones are chosen."""

    def __init__(
        self,
        stepper: Stepper,
        config,
        prompt: Tensor,
        mask: Tensor | None,
        generator,
        streamer,
        chooser: Strategy | None,
        row: RowSettings | None,
    ):
        self.stepper, self.config, self.generator, self.streamer = stepper, config, generator, streamer
        self.ids, self.mask, self.chooser, self.row = prompt, mask, chooser, row
        self.history = History(Extent(len(prompt), len(prompt), max_length=config.max_length))

    def first(self) -> StepOutput:
        output, rows = self.stepper(self.ids, self.mask, first=True), len(self.ids)
        if self.chooser is not None:
            self.chooser.bind([self.row] * rows, self.ids.device)
            for index in range(rows):
                self.chooser.clear(index)
            if self.chooser.needs_history:
                self.history = self.history.of_kind(self.chooser.centers)
                self.history.keeps_norms = self.chooser.needs_norms
                self.history.write(slice(0, rows), 0, self._hidden(output, *self.ids.shape), self.mask)
        return output

    def __call__(self, output: StepOutput, processors, criteria, interval: int) -> Tensor:
        device, pad = self.ids.device, self.config._pad_token_tensor
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        unfinished = torch.ones(len(self.ids), dtype=torch.long, device=device)
        needed = torch.zeros((), dtype=torch.long, device=device)  # steps until every row had ended
        bad = torch.zeros(len(self.ids), dtype=torch.bool, device=device)
        done, finished = 0, False
        while True:
            # A copy: the logits may be a buffer of the step's, and processors may write.
            logits = output.logits.to(device=device, dtype=torch.float32, copy=True)
            scores = processors(self.ids, logits)
            ahead = None
            if self.chooser is not None:
                tokens, ahead, wrong = self._choose(scores, self.chooser)
            else:
                tokens, wrong = self._draw(scores) if self.config.do_sample else _best(scores)
            bad |= wrong & unfinished.bool()
            if interval == 1:
                check_probabilities(bad, done)
            if has_eos and pad is not None:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            needed += unfinished.max()
            unfinished = unfinished & ~criteria(self.ids, None)
            done += 1
            if done % interval == 0 or self.ids.shape[1] == self.config.max_length:
                check_probabilities(bad, done - 1)
                finished = not bool(unfinished.max())
            if finished:
                return self.ids[:, : self.ids.shape[1] - (done - int(needed))]
            output = self.stepper(self.ids, self.mask) if ahead is None else ahead
            if self.chooser is not None and self.chooser.needs_history and ahead is None:
                self.history.append(self._hidden(output, len(self.ids), 1)[:, 0])

    def _draw(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        probs = torch.nn.functional.softmax(scores, dim=-1)
        bad = probs[:, 0].isnan()  # one NaN, or nothing but −inf, makes the whole row NaN
        if probs.is_cuda:
            probs.nan_to_num_(1.0)  # torch.multinomial would end the process's use of the device
        else:
            check_probabilities(bad, self.ids.shape[1])
        return torch.multinomial(probs, num_samples=1, generator=self.generator).squeeze(1), bad

    def _choose(self, scores: Tensor, chooser: Strategy) -> tuple[Tensor, StepOutput | None, Tensor]:
        """The winners' tokens, where candidates were tried what the step returned for them, and bad rows."""
        rows, vocabulary = scores.shape
        chooser.check_vocabulary(vocabulary, "the step")
        view = self._view()
        chooser.reserve(self.ids.shape[1] + 1)
        chooser.draw(rows)
        proposal = chooser.propose(scores, view)
        tokens, output = proposal.tokens[:, 0], None
        if chooser.looks_ahead:
            narrow = proposal.narrowed()
            k = narrow.tokens.shape[1]
            packing = narrow.packing
            repeated = owners_of(rows, k, packing, scores.device)
            run = run_of(narrow.tokens, packing)
            self.stepper.branch(repeated)
            ids = torch.cat([self.ids[repeated], run[:, None]], dim=-1)
            mask = None
            if self.mask is not None:
                mask = torch.cat([self.mask[repeated], self.mask.new_ones(len(run), 1)], dim=-1)
            output = self.stepper(ids, mask)
            hidden = self._hidden(output, len(run), 1)[:, 0]
            selected = chooser.choose(by_sequence(hidden, rows, k, packing), narrow, view).selected
            winners = first_places(rows, k, packing, selected.device) + selected
            self.stepper.branch(winners)
            self.history.append(hidden[winners])
            tokens = run[winners.to(scores.device)]
            output = StepOutput(output.logits[winners.to(output.logits.device)], None)
        if view.tokens is not None:
            view.tokens[:, -1] = tokens
        chooser.advance(tokens, view)
        return tokens, output, proposal.bad

    def _view(self) -> View:
        assert self.chooser is not None
        (rows, length), tokens, starts = self.ids.shape, None, None
        if self.chooser.needs_tokens:
            tokens = torch.nn.functional.pad(self.ids, (0, 1), value=-1)
            if self.mask is not None:
                tokens[:, :length].masked_fill_(self.mask == 0, -1)
                starts = self.mask.argmax(dim=-1)
        return View(self.history, self.ids.new_full((rows,), length), tokens, starts, length)

    def _hidden(self, output: StepOutput, rows: int, length: int) -> Tensor:
        hidden = output.hidden
        if hidden is None:
            wanted = "(logits, hidden)" if self.stepper.protocol == "stateless" else "(logits, state, hidden)"
            what = f"penalty_alpha={self.config.penalty_alpha}" if self.config.penalty_alpha else "this strategy"
            raise ValueError(f"{what} needs a step that returns {wanted}")
        if length == 1 and hidden.ndim == 3:
            hidden = hidden[:, -1:]  # a stateless step returns those of all positions
        if length == 1 and hidden.ndim == 2:
            hidden = hidden[:, None]
        if hidden.ndim != 3 or hidden.shape[:2] != (rows, length) or not hidden.is_floating_point():
            raise ValueError(
                f"step returned hidden states of shape {tuple(output.hidden.shape)}, must be ({rows}, {length}, D)"  # type: ignore[union-attr]
            )
        return hidden


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    tokens = scores.argmax(dim=-1)  # NaN counts as the largest
    best = scores.gather(1, tokens[:, None]).squeeze(1)
    return tokens, ~(best > float("-inf"))


def _checked_prompt(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of int64 or int32, got {got}")
    if input_ids.ndim not in (1, 2) or not input_ids.numel():
        raise ValueError(
            f"input_ids must be (B, L) or (L,) with at least one token, got shape {tuple(input_ids.shape)}"
        )
    return input_ids.long().reshape(-1, input_ids.shape[-1])


def _checked_mask(mask: Tensor | None, prompt: Tensor, config: GenerationConfig) -> Tensor | None:
    """The mask as int64 if it marks padding; None if all tokens are real."""
    if mask is None:
        pad, ends = config.pad_token_id, config._eos_token_tensor
        if pad is None or (ends is not None and bool((ends == pad).any())):
            return None
        mask = (prompt != pad).cumsum(dim=1) > 0  # inside the text it is a token like any other
    elif not isinstance(mask, Tensor) or mask.shape not in (prompt.shape, prompt.shape[1:]):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape of input_ids {tuple(prompt.shape)}, got {got}")
    mask = mask.reshape(prompt.shape).to(device=prompt.device, dtype=torch.long)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must be 0 at padding and 1 elsewhere")
    if bool((mask[:, -1] == 0).any()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"attention_mask ends with padding in row {row}; prompts must be padded on the left")
    return None if bool(mask.all()) else mask


def _chooser(
    config: GenerationConfig, strategy: Any, center: bool, prompt: Tensor, generator: torch.Generator | None
) -> tuple[Strategy | None, RowSettings | None]:
    """What chooses, and the settings of its rows; None: the most probable token, or a draw."""
    if strategy is None:
        if not config.penalty_alpha:
            return None, None
        return Contrastive(config.top_k, center=center), RowSettings(config.penalty_alpha)
    search = as_search(strategy)
    if config.penalty_alpha or isinstance(search, ContrastiveSearch):
        raise ValueError(f"strategy={strategy!r:.80}: contrastive search is penalty_alpha=..., without a strategy")
    row = search.own_settings()
    rows = len(prompt) * (config.num_return_sequences or 1)
    noise = BatchNoise(rows, prompt.device, search.generator if generator is None else generator)
    return search.make_strategy(row, noise), row


def _check_own_settings(strategy: Any, values: dict[str, Any]) -> None:
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
        if values.get(name) is not None:
            raise ValueError(
                f"{name}={values[name]!r:.80} is not used by strategy={strategy!r:.80}: its settings are "
                f"those of the object, {type(as_search(strategy)).__name__}(...)"
            )


def _check_chooser(
    config: GenerationConfig, chooser: Strategy, strategy: Any, protocol: str, select: Select | None
) -> None:
    what = f"penalty_alpha={config.penalty_alpha}" if strategy is None else f"strategy={strategy!r:.80}"
    if config.do_sample:
        by = "is contrastive search, which draws nothing" if strategy is None else "chooses by itself"
        raise ValueError(f"{what} {by}; leave do_sample=True out")
    if chooser.looks_ahead and protocol == "positional":
        raise ValueError(
            f"{what} needs a state that can be branched, and a positional step keeps its own cache; allowed: a "
            "stateful step with select=, or a stateless one"
        )
    if chooser.looks_ahead and protocol == "stateful" and select is None:
        raise ValueError(f"{what} tries several candidates: pass select=, (state, index) -> state")
