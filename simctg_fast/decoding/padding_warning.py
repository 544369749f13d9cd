"""A few models (GPT-2's) look at their input for padding wherever they get no attention mask: for tokens of ours, which
are never padding, a false warning, and on a GPU a wait of the host in every step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

_NAME = "warn_if_padding_and_no_attention_mask"
_thread = threading.local()


def _let_us_be_spared() -> None:
    original = getattr(PreTrainedModel, _NAME, None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def warn(self, *args: Any, **kwargs: Any) -> None:
        if not getattr(_thread, "spared", False):
            original(self, *args, **kwargs)

    setattr(PreTrainedModel, _NAME, warn)


_let_us_be_spared()


@contextmanager
def no_padding_warning() -> Iterator[None]:
    """This thread's forwards do not look for padding within the block."""
    outer, _thread.spared = getattr(_thread, "spared", False), True
    try:
        yield
    finally:
        _thread.spared = outer
