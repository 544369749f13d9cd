"""Slots: rows of different lengths over one cache, each replaced as soon as it is finished."""

from __future__ import annotations

from typing import Any


def slots_for_memory(model: Any, strategy: Any, parameters: Any, share: float) -> int:
    return 16


class SlotScheduler:
    @classmethod
    def open(cls, model: Any, strategy: Any, slots: int, memory: float | None) -> SlotScheduler | str:
        return "not built yet"
