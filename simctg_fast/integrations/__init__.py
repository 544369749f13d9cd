"""Adapters to training frameworks. Each module imports its own framework; this one imports none.

* ``simctg_fast.integrations.trainer``: `SimCTGTrainer`, `SimCTGSeq2SeqTrainer`, `SimCTGComputeLoss` (Hugging Face)
* ``simctg_fast.integrations.lightning``: `SimCTGModule`, `T5FineTuner`
* ``simctg_fast.integrations.sentence_transformers``: `SimCSELoss`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import SimCTGComputeLoss as SimCTGComputeLoss
    from .trainer import SimCTGSeq2SeqTrainer as SimCTGSeq2SeqTrainer
    from .trainer import SimCTGTrainer as SimCTGTrainer

# The names of the other two modules depend on which framework is meant, so they are imported from there.
_EXPORTS = ("SimCTGComputeLoss", "SimCTGSeq2SeqTrainer", "SimCTGTrainer")

__all__ = ["SimCTGComputeLoss", "SimCTGSeq2SeqTrainer", "SimCTGTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.trainer"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
