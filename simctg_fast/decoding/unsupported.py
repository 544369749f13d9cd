"""What is raised where a model cannot be decoded in one of our ways."""

from __future__ import annotations

import math

# What a model that cannot do something raises; anything else is somebody's own, and goes on.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class UnsupportedError(Exception):
    """This way cannot serve this model; the message says why.

    Attributes:
        head: whether it is the choice before the output embedding alone that cannot be.
        error: how far its outcome is from the truth, relative, where that is what is wrong.
    """

    def __init__(self, reason: str, *, head: bool = False, error: float = math.inf):
        super().__init__(reason)
        self.head, self.error = head, error
