"""transformers' own step over its cache, asked as the naive searches of `reference/` ask a model."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from . import judge


class OwnStep:
    """Stands for a model: of one row of a batch, left padding included, it runs what ``generate`` would run. (The
    others are given the same tokens. Some classes make other masks for a row alone: PaliGemma.)

    It answers for texts that grow: the prompt, what has been asked for before with one token behind it, and so on. The
    padding is no part of what it is asked, nor of the states that it shows. What is tried leaves nothing behind.

    Args:
        model: in float64 as a rule; its configuration may be changed.
        given: ``input_ids`` and ``attention_mask``, ``(B, T)`` each, and what else ``generate`` takes; row: of them.
        options: settings of ``generate``.

    Attributes:
        processor: those of ``generate``, as it made them. has_states: whether its hidden states can be read; if not,
            they are shown as zeros.
    """

    def __init__(self, model: Any, given: dict[str, torch.Tensor], row: int, **options: Any):
        self.config, self._parameters = SimpleNamespace(is_encoder_decoder=False), list(model.parameters())
        self._place, self._padding = row, int((given["attention_mask"][row] == 0).sum())
        judge.show_hidden_states(model)
        walks: list[judge.Walk] = []

        def loop(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("synced_gpus", "streamer")}
            walks.append(judge.Walk(model, input_ids, logits_processor, kwargs, True, None))
            return input_ids

        with torch.no_grad():
            model.generate(**given, **options, custom_generate=loop, max_new_tokens=64, do_sample=False)
        (self._walk,) = walks
        self.has_states = True
        self.processor = self._walk.processor
        self._known: list[int] | None = None
        self._tried: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def positions(self) -> int:
        """Of the prompt, as many as there are states of it."""
        exact = self._parameters[0].dtype == torch.float64
        with torch.no_grad(), judge.true_float64() if exact else nullcontext():
            return int(self(self._walk.ids[self._place, None, self._padding :]).hidden_states[-1].shape[1])

    def parameters(self):
        return iter(self._parameters)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        """Logits ``(B, 1, V)`` of the last position and states ``(B, T, D)`` of all of them. Called without gradients,
        and within `true_float64` if that is the precision."""
        hook = [self._walk.hear()] if self._walk.model.base_model is not self._walk.model else []
        try:
            rows = [self._row(ids) for ids in input_ids.tolist()]
        finally:
            for each in hook:
                each.remove()
        logits, states = (torch.stack(each) for each in zip(*rows, strict=True))
        return SimpleNamespace(logits=logits[:, None], hidden_states=(states,))

    def _row(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        walk = self._walk
        if self._known is None:
            self._known = walk.ids[self._place, self._padding :].tolist()
            inputs = walk.model.prepare_inputs_for_generation(walk.ids, is_first_iteration=True, **walk.kwargs)
            logits, states = self._run(inputs, walk.ids.shape[1], advance=True)
            self._logits, self._states = logits, states[self._padding :]
        while len(ids) > len(self._known) + 1:
            self._advance(ids[len(self._known)])
        if ids == self._known:
            return self._logits, self._states
        assert ids[:-1] == self._known, "a text that goes on from another"
        if ids[-1] not in self._tried:
            self._tried[ids[-1]] = self._try(ids[-1])
        logits, state = self._tried[ids[-1]]
        return logits, torch.cat([self._states, state])

    def _try(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        walk = self._walk
        kwargs = {n: v if isinstance(v, torch.Tensor) else copy.deepcopy(v) for n, v in walk.kwargs.items()}
        kept = walk.held()
        found = self._run(walk.inputs(kwargs, torch.full((len(walk.ids),), token)))
        for attributes, name, value in kept:
            attributes[name] = value
        return found

    def _advance(self, token: int) -> None:
        walk, chosen = self._walk, torch.full((len(self._walk.ids),), token)
        inputs = walk.inputs(walk.kwargs, chosen)
        walk.ids = torch.cat([walk.ids, chosen[:, None]], dim=1)
        self._logits, state = self._run(inputs, advance=True)
        self._known, self._states, self._tried = [*self._known, token], torch.cat([self._states, state]), {}

    def _run(self, inputs: dict[str, Any], positions: int = 1, advance: bool = False):
        """Logits ``(V,)`` and states ``(positions or more, D)``, of a step the last one's alone."""
        outputs, states = self._walk.run(inputs)
        if advance:
            self._walk.advance(outputs)
        if states is None:
            self.has_states, states = False, outputs.logits.new_zeros(len(outputs.logits), positions, 1)
        own = states[self._place]
        return outputs.logits[self._place, -1].to(states), own if positions > 1 else own[-1:]
