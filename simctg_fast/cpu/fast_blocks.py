"""The families of blocks that have a forward of ours, for a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module, ModuleList

from ..ops import _backends
from . import gpt2_blocks, llama_blocks, t5_blocks
from .blocks import CurrentStep, Plan
from .decoder_blocks import BlockPlan, Stack
from .forwards import Forwards, has_own_forward

_FAMILIES = {kind: each.FAMILY for each in (gpt2_blocks, llama_blocks, t5_blocks) for kind in each.FAMILY.blocks}


@contextmanager
def fast_blocks(model: Module, current_step: CurrentStep) -> Iterator[int]:
    """Routes the decoder blocks in ``model`` that are of a known family around their modules within the block.

    It holds for the thread that enters the block, and blocks may be nested. On the way out every module is as it was
    found.

    Args:
        current_step: says which forward over shared prefixes is under way in the calling thread, None where there is
            none; its ``attend`` and ``attend_natively`` are what the candidates attend with.

    Yields:
        The number of blocks that were routed: 0 without the C++ extension, and for other models.
    """
    with Forwards() as forwards:
        plans: dict[int, Plan] = {}
        if _backends.extension() is not None:
            for block in model.modules():
                family = _FAMILIES.get(type(block))
                if family is None or not family.is_eligible(block):
                    continue
                plan = family.plan(block, current_step)
                if forwards.put(block, family.forward, plan) is not None:
                    plans[id(block)] = plan
            for each in model.modules():
                _stack(each, plans)
        yield len(plans)


def _stack(model: Module, plans: dict[int, Plan]) -> None:
    """Have the blocks of ``model``, if it is one that hands each one's results to the next, run together."""
    for blocks in model.children():
        found = [plans.get(id(block)) for block in blocks] if isinstance(blocks, ModuleList) else []
        run = [plan for plan in found if isinstance(plan, BlockPlan)]
        if len(run) < 2 or len({id(plan) for plan in run}) < len(run) or run != found:
            continue
        models = _FAMILIES[type(run[0].block)].models
        if models.get(type(model)) is type(model).forward and has_own_forward(model):
            Stack(run)
