"""The three ways in which a plain model can be called step by step, behind one interface.

=============  ==========================================  ==========================================================
``protocol``   the step                                    is called with
=============  ==========================================  ==========================================================
``stateless``  ``(ids) -> logits[, hidden]``               all tokens so far, ``(B, L)``
``positional`` ``(ids, input_pos) -> logits``              the prompt and ``arange(L)``, then one token ``(B, 1)`` and
                                                           its position ``(1,)``; the step keeps its own cache
``stateful``   ``(ids, state) -> logits, state[, hidden]`` the prompt and None, then one token ``(B, 1)`` and the state
                                                           that the call before returned
=============  ==========================================  ==========================================================

Logits are ``(B, T, V)``, of which the last position counts, or ``(B, V)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROTOCOLS = ("stateless", "positional", "stateful")

Select = Callable[[Any, Tensor], Any]
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class StepOutput(NamedTuple):
    """Logits of the last position ``(B, V)`` in the step's dtype, and the hidden states it returned, if any."""

    logits: Tensor
    hidden: Tensor | None


class Signature(NamedTuple):
    """What the parameters of a step say."""

    names: list[str]  # of the positional parameters, attention_mask left out
    required: list[str]  # those that have no default, keyword-only ones included
    mask: bool  # takes attention_mask
    mask_required: bool
    open: bool  # *args or **kwargs: the rest is unknown


def read_signature(step: Callable) -> Signature:
    """Raises ValueError where Python cannot tell, as for some compiled callables."""
    function = getattr(step, "_orig_mod", step)  # torch.compile's wrapper takes anything
    if isinstance(function, torch.nn.Module):
        function = function.forward
    parameters = inspect.signature(function).parameters.values()
    mask = next((p for p in parameters if p.name == "attention_mask"), None)
    named = [p for p in parameters if p is not mask and p.kind in _POSITIONAL]
    keyword = [p for p in parameters if p is not mask and p.kind is inspect.Parameter.KEYWORD_ONLY]
    return Signature(
        names=[p.name for p in named],
        required=[p.name for p in (*named, *keyword) if p.default is p.empty],
        mask=mask is not None,
        mask_required=mask is not None and mask.default is mask.empty,
        open=len(named) + len(keyword) + (mask is not None) < len(parameters),
    )


def detect_protocol(step: Callable) -> str:
    """The protocol by parameter names: one parameter is stateless, a second one named ``input_pos`` positional, a
    second one named ``state`` stateful. ``attention_mask`` does not count.

    Raises:
        ValueError: anything else.
    """
    ask = f"pass protocol=, one of {PROTOCOLS}"
    try:
        found = read_signature(step)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the parameters of step cannot be read ({error}); {ask}") from error
    second = found.names[1] if len(found.names) > 1 else None
    protocol = {"input_pos": "positional", "state": "stateful"}.get(second or "")
    if protocol is None and len(found.names) == 1 and not found.open:
        protocol = "stateless"
    taken = 1 if protocol == "stateless" else 2
    missing = [name for name in found.required if name not in found.names[:taken]]
    if protocol is None or missing:
        listed = ", ".join(found.names) + (", …" if found.open else "")
        raise ValueError(
            f"protocol='auto' cannot tell how to call a step with the parameters ({listed})"
            + (f": {', '.join(missing)} would be missing" if protocol else "")
            + f"; {ask}, or wrap it in a function of (ids), (ids, input_pos) or (ids, state)"
        )
    return protocol


class Stepper:
    """Calls a step under its protocol, checks what comes back, and keeps what the next call needs."""

    def __init__(self, step: Callable, protocol: str, select: Select | None = None):
        self.step, self.protocol, self.select = step, protocol, select
        try:
            found = read_signature(step)
        except (TypeError, ValueError):
            found = Signature([], [], False, False, True)
        self.takes_mask, self.mask_required = found.mask, found.mask_required
        self.state: Any = None
        self.vocabulary: int | None = None
        self._positions = torch.empty(0, dtype=torch.long)

    def __call__(self, ids: Tensor, mask: Tensor | None, first: bool = False) -> StepOutput:
        """One call of the step.

        Args:
            ids: all tokens so far ``(B, L)``, the last of them new, or all of them where ``first``.
            mask: ``(B, L)`` or None; handed on as ``attention_mask`` if the step takes one.
        """
        options: dict[str, Any] = {}
        if self.takes_mask and (mask is not None or self.mask_required):
            options["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        new = ids if first or self.protocol == "stateless" else ids[:, -1:]
        if self.protocol == "stateless":
            returned = self.step(new, **options)
        elif self.protocol == "positional":
            end = ids.shape[1]
            returned = self.step(new, self._arange(end, ids.device)[end - new.shape[1] :], **options)
        else:
            returned = self.step(new, self.state, **options)
        return self._checked(returned, new)

    def branch(self, index: Tensor) -> None:
        """Go on with these rows of the state, each as often as ``index (N,)`` names it."""
        if self.protocol == "stateful":
            assert self.select is not None
            self.state = self.select(self.state, index)

    def _arange(self, length: int, device: torch.device) -> Tensor:
        """Positions 0 … length − 1, a view of one buffer that doubles when it is used up."""
        if len(self._positions) < length or self._positions.device != device:
            self._positions = torch.arange(2 * length, device=device)
        return self._positions[:length]

    def _checked(self, returned: Any, ids: Tensor) -> StepOutput:
        parts = returned if isinstance(returned, tuple | list) else (returned,)
        if self.protocol == "stateful":
            if len(parts) not in (2, 3):
                raise ValueError(
                    f"a stateful step must return (logits, state) or (logits, state, hidden), got {_describe(returned)}"
                )
            self.state = parts[1]
            parts = (parts[0], *parts[2:])
        logits = parts[0] if parts else None
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(
                f"step must return floating-point logits (B, T, V) or (B, V), got {_describe(logits)}"
                + ("; return its .logits" if hasattr(logits, "logits") else "")
            )
        rows, length = ids.shape
        good = logits.ndim == 2 or (logits.ndim == 3 and logits.shape[1] in (1, length))
        if not good or logits.shape[0] != rows or not logits.shape[-1]:
            raise ValueError(
                f"step returned logits of shape {tuple(logits.shape)} for ids of shape {(rows, length)}; allowed: "
                f"({rows}, {length}, V), ({rows}, 1, V) or ({rows}, V)"
            )
        if self.vocabulary not in (None, logits.shape[-1]):
            raise ValueError(
                f"step returned logits over {logits.shape[-1]} tokens, in its first call over {self.vocabulary}"
            )
        self.vocabulary = logits.shape[-1]
        hidden = parts[1] if len(parts) > 1 and isinstance(parts[1], Tensor) else None
        return StepOutput(logits if logits.ndim == 2 else logits[:, -1], hidden)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
