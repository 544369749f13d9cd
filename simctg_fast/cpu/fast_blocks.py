"""The families of blocks that have a forward of ours, for a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module

from ..ops import _backends
from . import gpt2_blocks, llama_blocks, t5_blocks
from .blocks import CurrentStep
from .forwards import Forwards

_FAMILIES = {kind: each.FAMILY for each in (gpt2_blocks, llama_blocks, t5_blocks) for kind in each.FAMILY.blocks}


@contextmanager
def fast_blocks(model: Module, current_step: CurrentStep) -> Iterator[int]:
    """Routes the decoder blocks in ``model`` that are of a known family around their modules within the block.

    It holds for the thread that enters the block, and blocks may be nested. On the way out every module is as it was
    found.

    Args:
        current_step: says which forward over shared prefixes is under way in the calling thread, None where there is
            none; its ``attend`` is what the candidates attend with.

    Yields:
        The number of blocks that were routed: 0 without the C++ extension, and for other models.
    """
    blocks = [(block, _FAMILIES[type(block)]) for block in model.modules() if type(block) in _FAMILIES]
    with Forwards() as forwards:
        routed = 0
        if _backends.extension() is not None:
            for block, family in blocks:
                if not family.is_eligible(block):
                    continue
                if forwards.put(block, family.forward, family.plan(block, current_step)) is not None:
                    routed += 1
        yield routed
