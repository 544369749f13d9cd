"""The library's operators and their autograd: right, or an error, under every way of differentiating that torch has.

`torch.library.register_autograd` leaves three holes. A formula that calls another operator gives wrong second
derivatives, with a warning, where that operator has no formula of its own; tangents of forward mode are dropped without
a word; the transforms of `torch.func` are refused. :func:`register` takes its place::

    register("area", _backward, _setup_context)  # the operator; calls area_backward
    register("area_backward", _second, _second_setup, last=True)

* An operator whose formula is made of torch's differentiable functions of its inputs can be differentiated as often as
  they can.
* A formula that calls another operator of the library can be differentiated as that one can.
* ``last=True``: the formula holds constant what is none, or cannot be differentiated; its results carry a node that
  raises when it is. Second derivatives are linear in their directions all the same, and can be differentiated with
  respect to those, as `torch.autograd.functional.hvp` does: the operator's tensors then come before its constants, are
  all saved in their order, and the first of them is the gradient that comes in.
* Without a formula the operator's results carry such a node: an operator whose ``_backward`` has none is
  differentiable once.
* Forward mode raises. `torch.func.grad`, `vjp`, `jacrev` and `vmap`, nested as one likes, go through the same formulas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BASE = torch.autograd.Function
_ORDERS = (
    "is differentiable once: its gradient has no derivative",
    "is differentiable twice: its second derivatives have none",
)


_library = torch.library.Library("simctg_fast", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes an operator ``simctg_fast::…`` of a schema: `run` computes it on every device, `fake` gives the shapes and
    dtypes of its results."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simctg_fast::{name}", fake, lib=_library)


def register(
    name: str,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    *,
    last: bool = False,
) -> None:
    """Gives the operator ``simctg_fast::name`` its derivative.

    Args:
        name: of an operator whose arguments are tensors, None and constants, no lists of tensors; messages take
            ``x_backward`` for the gradient of ``x``.
        backward, setup_context: as `torch.library.register_autograd` takes them. `backward` runs under the grad mode of
            the backward pass: enabled where the gradient may be differentiated again. None: it is not differentiable.
        last: the results of `backward` cannot be differentiated; it runs without grad mode.
    """
    operator = getattr(torch.ops.simctg_fast, name).default
    arguments = operator._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    keywords = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
    below = torch._C._after_autograd_keyset
    forward_name = name.removesuffix("_backward")
    order = (forward_name != name) + (backward is not None)
    again = f"simctg_fast::{forward_name} {('has no derivative', *_ORDERS)[order]}"

    class Function(_BASE):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset, given = args
            with torch._C._AutoDispatchBelowAutograd(), _enclosing_transforms():
                output = operator.redispatch(keyset & below, *inputs, **given)
            if setup_context is not None:
                # The dispatcher leaves out what is equal to its default.
                inputs += [argument.default_value for argument in positional[len(inputs) :]]
                extra = {"keyword_only_inputs": keywords | given} if keywords else {}
                setup_context(ctx, tuple(inputs), output=output, **extra)
            ctx.constants = [value for value in inputs if not isinstance(value, Tensor)]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if backward is None:
                raise RuntimeError(again)
            if not last:
                results = backward(ctx, *grads)
            else:
                with torch.no_grad():
                    results = backward(ctx, *grads)
            results = results if isinstance(results, tuple) else (results,)
            if last and torch.is_grad_enabled():
                if forward_name == name or torch._C._are_functorch_transforms_active():
                    results = _refuse(again, results, (*grads, *ctx.saved_tensors))
                else:
                    results = _linear(again, results, grads, _Frozen(ctx), operator, backward)
            # None for arguments left out and the two behind them.
            return *results, *[None] * (len(ctx.needs_input_grad) - len(results))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(
                f"simctg_fast::{forward_name} has no forward-mode derivative; use reverse mode (torch.autograd.grad, "
                "torch.func.grad, vjp, jacrev; jacrev twice for a Hessian)"
            )

    Function.__name__ = Function.__qualname__ = f"simctg_fast_{name}"

    def kernel(keyset: Any, *args: Any, **given: Any) -> Any:
        tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not tracked and forward_ad._current_level < 0:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & below, *args, **given)
        if not torch._C._are_functorch_transforms_active():
            return Function.apply(*args, keyset, given)
        from torch._functorch.utils import enable_single_level_autograd_function

        # The dispatcher has already come down to one transform; `Function.apply` would begin again at the first.
        with enable_single_level_autograd_function():
            return super(_BASE, Function).apply(*args, keyset, given)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _enclosing_transforms() -> contextlib.AbstractContextManager[Any]:
    """Lets the transforms of `torch.func` around the innermost one differentiate what `forward` calls: in a `forward`
    every mode of differentiation is off."""
    if not torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    modes = contextlib.ExitStack()
    modes.enter_context(torch.enable_grad())
    modes.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return modes


def tracked(tensor: Tensor) -> bool:
    """Whether `tensor` may be differentiated with respect to. A tensor inside a transform of `torch.func` or with a
    tangent need not say so by ``requires_grad``: there it is always true."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Refused(torch.autograd.Function):
    """Its first results, as functions of everything, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(ctx.message)


def _refuse(message: str, results: tuple, sources: tuple) -> tuple:
    """`results`, tensors or None, which raise where they are differentiated with respect to any of `sources`."""
    made = [result for result in results if result is not None]
    differentiable = [source for source in sources if source is not None and source.is_floating_point()]
    refused = iter(_Refused.apply(message, len(made), *made, *differentiable))
    return tuple(None if result is None else next(refused) for result in results)


class _Frozen:
    """A context whose saved tensors outlive the graph they were saved for."""

    def __init__(self, ctx: Any):
        self.saved_tensors = ctx.saved_tensors
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Linear(torch.autograd.Function):
    """Its first tensors, as linear functions of the next ones, the directions, and as functions of the rest that have
    no derivative: their gradient here is 0, and raises further up."""

    @staticmethod
    def forward(ctx: Any, transposed: Callable, message: str, made: int, directions: int, *tensors: Tensor) -> Any:
        ctx.transposed, ctx.message, ctx.made, ctx.directions = transposed, message, made, directions
        ctx.rest = [(tensor.new_zeros(()), tensor.shape) for tensor in tensors[made + directions :]]
        return tuple(tensor.view_as(tensor) for tensor in tensors[:made])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            results = ctx.transposed(grads)
        if torch.is_grad_enabled():
            results = _refuse(ctx.message, results, grads)
        rest = [zero.expand(shape) for zero, shape in ctx.rest]
        return None, None, None, None, *[None] * ctx.made, *results, *rest


def _linear(message: str, results: tuple, directions: tuple, ctx: _Frozen, operator: Any, formula: Callable) -> tuple:
    """`results` of `formula`, the derivative of a gradient F(g, x) along `directions`, for derivatives by these: the
    transposed map is F's own derivative, F(dg, x) + H dx, and H is symmetric."""
    places = [i for i, result in enumerate(results) if result is not None]
    made = [results[i] for i in places]

    def transposed(grads: tuple) -> tuple:
        by = dict(zip(places, grads, strict=True))
        tensors = ctx.saved_tensors[1:]
        first = operator(by[0], *tensors, *ctx.constants)
        second = formula(ctx, *[by.get(i + 1, torch.zeros_like(each)) for i, each in enumerate(directions)])[1:]
        first = first if isinstance(first, tuple) else (first,)
        return tuple(a + b for a, b in zip(first, second, strict=False))

    sources = [tensor for tensor in ctx.saved_tensors if tensor is not None and tensor.is_floating_point()]
    guarded = _Refused.apply(message, len(sources), *sources)
    linear = iter(_Linear.apply(transposed, message, len(made), len(directions), *made, *directions, *guarded))
    return tuple(None if result is None else next(linear) for result in results)
