"""One decoding step over slots: candidates are tried in one forward, winners chosen inside it, their keys committed.

For rows of one length it is ``generate``'s (:mod:`.slots_decoder`); for rows that stand at lengths of their own a
:class:`~.slot_step.SlotStep` runs it, in the engine and over static buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Attention, AttentionSwitch
from .hidden_states import HiddenStatesTap
from .packing import Packing, by_sequence, first_places
from .slots import Slots, on
from .unsupported import UnsupportedError

Choose = Callable[[Tensor], Tensor]  # candidates' states (rows, k, D) -> index of the winner (rows,)


def the_first(states: Tensor) -> Tensor:
    """Of each row's candidates: where there is one, nothing is chosen."""
    return torch.zeros(len(states), dtype=torch.long, device=states.device)


@dataclass
class StepResult:
    """Of the winners, one row a sequence."""

    candidates: Tensor  # (rows, k), as they were tried
    selected: Tensor  # (rows,) index among them
    hidden_states: Tensor  # (rows, D) last layer
    logits: Tensor  # (rows, V) float32, for the token after
    outputs: Any  # the model's output; per-layer tensors still have a row a candidate
    rows: Tensor  # (rows,) of the winners in ``outputs``

    @property
    def tokens(self) -> Tensor:
        return self.candidates.gather(1, on(self.candidates.device, self.selected)[:, None])[:, 0]


def try_candidates(
    model: Any,
    tap: HiddenStatesTap,
    inputs: dict[str, Any],
    candidates: Tensor,
    choose: Choose,
    head: bool = True,
    packing: Packing | None = None,
) -> StepResult:
    """One forward of ``inputs``, which hold ``candidates (rows, k)``, or those of them that ``packing`` says, in which
    ``choose`` picks each row's winner: before the output embedding, if ``head``, so that logits are those of the
    winners alone.

    Raises:
        UnsupportedError: the output embedding did not run once.
    """
    rows, k = candidates.shape
    chosen: dict[str, Tensor] = {}

    def select(hidden_states: Tensor) -> Tensor:
        last = hidden_states[:, -1]
        chosen["selected"] = choose(by_sequence(last, rows, k, packing))
        chosen["rows"] = first_places(rows, k, packing, last.device) + chosen["selected"].to(last.device)
        chosen["hidden_states"] = last.index_select(0, chosen["rows"])
        return chosen["hidden_states"][:, None]

    tap.listen(select if head else None)
    try:
        outputs = model(**inputs if head else inputs | tap.arguments, return_dict=True)
    finally:
        heard = tap.mute()
    logits = outputs.logits[:, -1].float()
    if not head:
        select(tap.last_layer(outputs, heard)[-1])
        logits = logits.index_select(0, chosen["rows"].to(logits.device))
    elif len(heard.head) != 1:
        raise UnsupportedError(f"the output embedding ran {len(heard.head)} times in one forward", head=True)
    return StepResult(candidates, chosen["selected"], chosen["hidden_states"], logits, outputs, chosen["rows"])


class Step:
    """A model's forwards over the candidates of the first rows of ``slots``."""

    def __init__(self, model: Any, tap: HiddenStatesTap, slots: Slots, head: bool = True):
        self.model, self.tap, self.slots, self.head = model, tap, slots, head
        self.switch = AttentionSwitch(model)
        # Whether the last forward has read anything through our attention; None before the first.
        self.was_used: bool | None = None

    def run(
        self,
        inputs: dict[str, Any],
        candidates: Tensor,
        choose: Choose,
        *,
        commit: Callable[[Tensor], None] | None = None,
        around: Callable[[Attention], AbstractContextManager[Any]] = nullcontext,
        packing: Packing | None = None,
        **known: Any,
    ) -> StepResult:
        """Try ``candidates (rows, k)`` and keep the winners' keys and values; lengths and history stay as they are.

        Args:
            inputs: of the model, candidates included, or those of them that ``packing`` says.
            commit: of the winners' rows; `Slots.commit` at the length of all rows if None.
            around: makes a context for the forward.
            known: what `Attention` is to know.

        Raises:
            UnsupportedError: the model did something that a step cannot honour.
        """
        offsets = None if packing is None else packing.offsets
        attention = Attention(self.slots, candidates.shape[1], offsets=offsets, **known)
        try:
            with self.switch(attention), around(attention):
                result = try_candidates(self.model, self.tap, inputs, candidates, choose, self.head, packing)
            attention.check_all_called()
            (commit or self.slots.commit)(result.rows)
        finally:
            self.was_used = attention.was_used
            self.slots.drop_pending()
        return result
