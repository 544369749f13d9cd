"""The last layer's hidden states: how they are read off a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


@dataclass
class Heard:
    """What reached the tap since it began to listen: one tensor ``(rows, T, D)`` a forward."""

    head: list[torch.Tensor] = field(default_factory=list)  # input of the output embedding
    last_layer: list[torch.Tensor] = field(default_factory=list)  # output of the decoder below it


class HiddenStatesTap:
    """Stands before the output embedding during our own forwards, takes the hidden states that reach it, and lets only
    the rows through whose logits are wanted. It also hears what the decoder returns, to compare.

    Almost half of the generative models scale, cap or bias their logits after the output embedding, so it is never
    called from outside; choosing *here* makes the model's own code compute logits for the winners alone. (Asking for
    ``output_hidden_states`` instead would make transformers hook every layer of the caller's model, for good.)
    """

    def __init__(self, model):
        self.model, self.head = model, model.get_output_embeddings()
        self.decoder = decoder_of(model)
        if self.decoder is not None and any(module is self.head for module in self.decoder.modules()):
            self.decoder = None  # FSMT's makes its logits itself
        if isinstance(self.head, torch.nn.Embedding):  # and reads this at the input
            self.head = None
        self._hooks: list[RemovableHandle] = []
        self._owner = threading.get_ident()
        self._listening = False
        self._select: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._all_positions = False
        self._heard = Heard()

    @property
    def has_head(self) -> bool:
        return isinstance(self.head, torch.nn.Module)

    @property
    def arguments(self) -> dict[str, bool]:
        """What a forward must be given for its last layer to be known."""
        return {} if self.decoder is not None else {"output_hidden_states": True}

    def __enter__(self) -> HiddenStatesTap:
        self._hooks = [self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)]
        if self.has_head:
            self._hooks.append(self.head.register_forward_pre_hook(self._before_head))
        if self.decoder is not None:
            self._hooks.append(self.decoder.register_forward_hook(self._after_decoder))
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._heard = [], Heard()

    def listen(
        self, select: Callable[[torch.Tensor], torch.Tensor] | None = None, *, all_positions: bool = False
    ) -> None:
        """From now on hand ``hidden_states (rows, T, D)`` to ``select`` and feed the head what it returns.
        ``all_positions``: have the model let every position come as far as the head."""
        self._heard, self._select, self._all_positions = Heard(), select, all_positions
        self._listening = True

    def mute(self) -> Heard:
        """Stop listening; returns what was heard. (What ``select`` holds on to is let go: all of a step's tensors.)"""
        self._listening, self._select = False, None
        heard, self._heard = self._heard, Heard()
        return heard

    def last_layer(self, outputs: Any, heard: Heard) -> list[torch.Tensor]:
        """Last-layer states ``(rows, T, D)`` of what was run while ``heard``, in order; empty where there are none."""
        if heard.last_layer:
            return heard.last_layer
        self.decoder = None  # if it is not called, the model has to be asked
        name = "decoder_hidden_states" if self.model.config.is_encoder_decoder else "hidden_states"
        layers = getattr(outputs, name, None)
        return [layers[-1]] if layers else []

    def _ours(self) -> bool:
        return self._listening and threading.get_ident() == self._owner

    def _before_model(self, module, args, kwargs):
        if self._all_positions and self._ours() and "logits_to_keep" in kwargs:
            return args, kwargs | {"logits_to_keep": 0}
        return None

    def _before_head(self, module, args):
        if self._select is None or not self._ours() or not args:
            return None
        self._heard.head.append(args[0])
        return (self._select(args[0]), *args[1:])

    def _after_decoder(self, module, args, output):
        if self._ours():
            states = getattr(output, "last_hidden_state", None)
            if states is None and isinstance(output, tuple) and output:
                states = output[0]
            if isinstance(states, torch.Tensor):
                self._heard.last_layer.append(states)


def decoder_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The part of ``model`` whose ``last_hidden_state`` goes to the output embedding, if there is one."""
    get_decoder = getattr(model, "get_decoder", None)
    for found in (get_decoder() if callable(get_decoder) else None, getattr(model, "base_model", None)):
        if isinstance(found, torch.nn.Module) and found is not model:
            return found
    return None


def last_position(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states[:, -1:]
