"""Forwards put into modules for the length of a ``with`` block, and taken out again: the only place that does it.

A forward of ours belongs to the thread that put it there. It asks :func:`here` what that thread left for it; in every
other thread's forward the answer is None, and it runs the module's own. So it does in what is being compiled. Only
``forward`` is put in place, not ``__call__``: hooks run as always. It is a bound method of the module, under the name
of what it replaces: copying a module copies the binding, pickling one stores "the method `forward` of this module",
which is the class's own when it is loaded, and neither a copy nor what was loaded has anything in :func:`here`. To
whoever asks for its signature it is the class's, too (transformers checks a call's arguments by a decoder's).
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.nn import Module

Function = Callable[..., Any]


class Held:
    """A module that has a forward of ours, and those who use it, in whatever thread."""

    __slots__ = ("function", "module", "uses")

    def __init__(self, module: Module, function: Function):
        self.module, self.function = module, function  # kept alive, so that its id stays its own
        self.uses: list[Use] = []


class Use:
    """What one block needs the forward of one module for: ``value`` is the block's own."""

    __slots__ = ("held", "thread", "value")

    def __init__(self, held: Held, value: Any, thread: dict[int, Use]):
        self.held, self.value, self.thread = held, value, thread


class _Thread(threading.local):
    def __init__(self) -> None:
        self.uses: dict[int, Use] = {}  # by id(module), the innermost
        self.suspended = False


_thread = _Thread()
_held: dict[int, Held] = {}  # by id(module)
_lock = threading.RLock()


def here(module: Module) -> Use | None:
    """This thread's innermost use of ``module``'s forward; None in a forward that is not its own."""
    # The compiler cannot follow this. (`is_compiling` is true in every thread while one of them compiles.)
    return None if is_dynamo_compiling() or _thread.suspended else _thread.uses.get(id(module))


def uses_here() -> dict[int, Use]:
    """What :func:`here` finds, by the id of the module, for a forward of ours that has found its own."""
    return _thread.uses


@contextmanager
def suspended() -> Iterator[None]:
    """This thread's forwards run modules' own within the block."""
    outer, _thread.suspended = _thread.suspended, True
    try:
        yield
    finally:
        _thread.suspended = outer


def has_own_forward(module: Module) -> bool:
    """Whether a call runs the forward of the module's class, or one that is ours for the time being."""
    held = _held.get(id(module))
    return _is_free_for(module, None if held is None else held.function)


def _is_free_for(module: Module, function: Function | None) -> bool:
    """Nobody else's forward is there, as accelerate's; ``function`` itself may be left over in a copy."""
    forward = module.__dict__.get("forward")
    mine = type(forward) is types.MethodType and forward.__func__ is function and forward.__self__ is module
    return (forward is None or mine) and "_hf_hook" not in module.__dict__


@functools.cache
def _for_kind(function: Function, kind: type[Module]) -> Function:
    """``function`` under the name and with the signature of the forward that it stands in for."""
    forward = types.FunctionType(function.__code__, function.__globals__, "forward", function.__defaults__)
    return functools.wraps(kind.forward, assigned=("__doc__",), updated=())(forward)


class Forwards:
    """A ``with`` block's forwards. Blocks may be nested, need not end in the order in which they began, and may end in
    another thread; any number of threads may have the same forward in one module at a time. The last one to go
    restores the module, unless somebody has put another forward over ours."""

    def __init__(self) -> None:
        self._uses: list[Use] = []

    def __enter__(self) -> Forwards:
        return self

    def put(self, module: Module, function: Function, value: Any) -> Use | None:
        """Have ``module`` run ``function(module, ...)``, which finds ``value`` by :func:`here` in this thread. None,
        and nothing done, where the module has another forward than its class's."""
        function = _for_kind(function, type(module))  # type: ignore[arg-type]  # classes can be hashed
        with _lock:
            held = _held.get(id(module))
            if not _is_free_for(module, function) or (held is not None and held.function is not function):
                return None
            if held is None:
                held = _held[id(module)] = Held(module, function)
            use = Use(held, value, _thread.uses)
            self._uses.append(use)
            held.uses.append(use)
            use.thread[id(module)] = use
            # Module.__setattr__ would only put it here, after looking for parameters and buffers of that name.
            module.__dict__["forward"] = types.MethodType(function, module)
        return use

    def __exit__(self, *exc: object) -> None:
        with _lock:
            while self._uses:
                _end(self._uses.pop())


def _end(use: Use) -> None:
    held, key = use.held, id(use.held.module)
    held.uses.remove(use)
    outer = [other for other in held.uses if other.thread is use.thread]
    if outer:
        use.thread[key] = outer[-1]
    else:
        use.thread.pop(key, None)
    if not held.uses:
        del _held[key]
        if "forward" in held.module.__dict__ and _is_free_for(held.module, held.function):
            del held.module.__dict__["forward"]
