"""The decoder below the output embedding through `torch.compile`, for the length of a ``with`` block.

What is compiled is one function that runs the decoder with a step of static buffers as its argument: buffers, lengths
and weights are inputs of the compiled graph, never constants in it, so other buffers (another call, buffers that grew)
run the same code, and nothing is kept alive. The trace has to be whole. Inductor works in its default mode: a CUDA
graph, where there is one, is recorded around it by its caller.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..cpu.forwards import Forwards, has_own_forward, here
from .attention import Attention, traced

BACKEND = "inductor"

_compiled: weakref.WeakKeyDictionary[torch.nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def _decoder_body(decoder: torch.nn.Module, step: Attention, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What is traced."""
    traced.step = step
    try:
        return type(decoder).forward(decoder, *args, **kwargs)
    finally:
        traced.step = None


def _body_of(decoder: torch.nn.Module) -> Callable[..., Any]:
    """`_decoder_body`, compiled. Each decoder has a function of its own, as the compiler counts recompilations, and
    remembers which sizes vary, by function."""
    body = _compiled.get(decoder)
    if body is None:
        code = _decoder_body.__code__.replace(co_name=f"decoder_body_{next(_numbers)}")
        body = torch.compile(types.FunctionType(code, _decoder_body.__globals__), backend=BACKEND, fullgraph=True)
        _compiled[decoder] = body
    return body


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    use = here(self)
    if use is None:
        return type(self).forward(self, *args, **kwargs)
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        return _body_of(self)(self, use.value, args, kwargs)
    except FailOnRecompileLimitHit:  # too many kinds of calls over time: start afresh
        _compiled.pop(self, None)
        return _body_of(self)(self, use.value, args, kwargs)


def obstacle(decoder: torch.nn.Module | None) -> str | None:
    """Why a decoder cannot be compiled apart, None if nothing is known to be in the way."""
    if decoder is None:
        return "it has no decoder apart from the output embedding"
    return None if has_own_forward(decoder) else f"the forward of its {type(decoder).__name__} was replaced"


def as_written(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Forwards of a model that its owner compiled, as a whole or in parts, run uncompiled within the block: a prefix
    that grows and rows that vary would be compiled again and again, and what the attention function has to know is not
    in the trace. Only then is the compiler touched, whose stance is that of the process."""
    if any(_is_compiled(module) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _is_compiled(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


@contextmanager
def compiled_decoder(decoder: torch.nn.Module, step: Attention) -> Iterator[None]:
    """This thread's forwards of ``decoder`` run compiled, over ``step``; other threads' as ever. Raises RuntimeError
    where its forward was replaced since :func:`obstacle` was asked."""
    with Forwards() as forwards:
        if forwards.put(decoder, _forward, step) is None:
            raise RuntimeError(obstacle(decoder))
        yield
