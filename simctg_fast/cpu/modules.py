"""Linear layers that read their weights once per step, and small modules without their waste, for a ``with`` block.

A decoding step multiplies ``batch · top_k`` rows with every weight of the model; :mod:`simctg_fast.ops.linear` does
that at the price of one row. :func:`fast_linears` gives the model's `torch.nn.Linear` and `Conv1D` modules a
``forward`` of their own that uses it. Each call decides for itself: whatever the kernel does not take (many rows,
gradients, autocast, another dtype, tracing) runs the module's own forward. Weights are looked up at each call, so an
update, a LoRA merge or a replaced parameter counts at once. GPT-2's `NewGELUActivation` (eight tensor operations) and
the norms of T5 and Llama (six) become one pass each, `Dropout` outside of training nothing at all. On CUDA, where
launches count, these become one operation of PyTorch's each. Half precision is computed in float32 and rounded once,
where the modules round after each operation.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Dropout, LayerNorm, Linear, Module, Parameter
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ..memory import free_bytes
from ..ops import _backends
from ..ops.block_layers import native_layer, native_norm
from ..ops.dispatch import ELEMENT_TYPES
from ..ops.gelu import run_kernel as run_gelu
from ..ops.linear import ANY_ROWS, most_rows, narrowed, packed_size, run_kernel
from ..ops.linear import pack as pack_weight
from ..ops.linear_int8 import certified, quantized
from ..ops.rms_norm import run_kernel as run_rms_norm
from .forwards import Forwards, Use, has_own_forward, here

logger = logging.getLogger(__name__)

PACK = ("auto", True, False)
WEIGHTS = ("int8", "lossless")
MOST_EXACT = 64  # as many candidates as the kernel for the most probable tokens takes
_MEMORY_SHARE = 0.25  # of the free memory, at most, goes into packed copies
_PACKED_ROWS = 12  # from here on packed copies are faster by more than they cost
_MOST_PACKED_ROWS = 512  # up to here they are faster than a general matrix product

_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in float64 the modules compute in float32

_LINEAR_FORWARD = Linear.forward
_CONV1D_FORWARD = Conv1D.forward
_NEW_GELU_FORWARD = NewGELUActivation.forward
_DROPOUT_FORWARD = Dropout.forward

_CPU = torch.device("cpu")
_packing = threading.Lock()


class _Copy:
    """What is read in a weight's place, and what the weight was when it was made. ``data`` may be None: nothing is."""

    __slots__ = ("address", "data", "most_rows", "version", "weight")

    def __init__(self, weight: Tensor, data: Tensor | None, most_rows: int):
        self.weight, self.version, self.address = weight, _version(weight), weight.data_ptr()
        self.data, self.most_rows = data, most_rows

    def is_current(self, weight: Tensor) -> bool:
        return self.weight is weight and self.version == _version(weight) and self.address == weight.data_ptr()


def _version(weight: Tensor) -> int | None:
    """None: nobody counts its changes."""
    return None if weight.is_inference() else weight._version


class WeightCopies:
    """Copies of a model's weights that linear layers read in their place, kept for as long as this object is.

    Args:
        kind: ``"int8"``: in 8 bits, with a factor an output, the rows they are multiplied with as well; of the output
            layer's results the most probable are exact all the same (:mod:`simctg_fast.ops.linear_int8`).
            ``"lossless"``: float32 weights in 16 bits, those that lose nothing by it, with the bits of the weights.

    Raises:
        ValueError: another ``kind``.
    """

    def __init__(self, kind: str):
        check_weights(kind)
        self.kind = kind
        self._copies: weakref.WeakKeyDictionary[Module, _Copy] = weakref.WeakKeyDictionary()

    def check(self, model: Module) -> None:
        """Raise ValueError for a model that is not on the CPU, RuntimeError where the C++ extension is missing."""
        elsewhere = next((parameter.device for parameter in model.parameters() if not parameter.is_cpu), None)
        if elsewhere is not None:
            raise ValueError(f"weights={self.kind!r} is for models on the CPU, this one is on {elsewhere}")
        _backends.require_extension()

    def of(self, module: Module, weight: Tensor, transposed: bool) -> _Copy:
        copy = self._copies.get(module)
        if copy is None or copy.version is None or not copy.is_current(weight):
            if self.kind == "int8":
                copy = _Copy(weight, quantized(weight, transposed), ANY_ROWS)
            else:
                copy = _Copy(weight, narrowed(weight) if weight.dtype is torch.float32 else None, 0)
            self._copies[module] = copy
        return copy


def check_weights(weights: Any) -> None:
    """Raise ValueError unless it is among `WEIGHTS`."""
    if not any(isinstance(weights, str) and weights == each for each in WEIGHTS):
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r:.80}")


class _Limit(threading.local):
    rows = ANY_ROWS


_limit = _Limit()


@contextmanager
def at_most(rows: int) -> Iterator[None]:
    """This thread's products of more than ``rows`` rows are left to the modules within the block."""
    outer, _limit.rows = _limit.rows, rows
    try:
        yield
    finally:
        _limit.rows = outer


class _Layer:
    """What a block does with a module: the rows up to which products go to the kernel, and a copy of the weight if it
    asked for one. (The sums of a packed one are in another order: who asks for none must not meet another thread's.)

    ``make`` makes the copy when it is first wanted, and when the weight has changed; without, it is dropped then.
    ``exact``: of an output layer, how many of a row's largest results are computed from the weight itself.
    """

    __slots__ = ("copy", "exact", "make", "most_rows")

    def __init__(self, most_rows: int, outer: _Layer | None):
        self.most_rows: int = most_rows if outer is None else max(most_rows, outer.most_rows)
        self.copy: _Copy | None = None if outer is None else outer.copy
        self.make: Callable[[Tensor], _Copy] | None = None if outer is None else outer.make
        self.exact: int = 0 if outer is None else outer.exact

    def current(self, weight: Tensor) -> tuple[Tensor | None, int]:
        """The copy of the weight if there is one, and the rows up to which the kernel is for products with it."""
        copy, limit = self.copy, min(self.most_rows, _limit.rows)
        if copy is None or not copy.is_current(weight):
            self.copy = copy = None if self.make is None else self.make(weight)
        return (None, limit) if copy is None else (copy.data, max(limit, copy.most_rows))


def _packed_wins() -> bool:
    """Whether packed weights are faster than those in place, by a product of a dozen rows and more: measured with AVX2
    (1.15 to 1.45 times), not with AVX-512 (`benchmarks/linear.py`)."""
    extension = _backends.extension()
    return extension is not None and extension.active_isa().startswith("avx2")


def is_plain_eager() -> bool:
    """Nothing follows the computation: no autocast, no tracer, no dispatch mode, no function transform. (What is being
    compiled has no forward of ours, see `here`.)"""
    return not (
        torch.is_autocast_enabled("cpu")
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
    )


def is_plain(value: Any, kind: Any = Parameter) -> TypeGuard[Tensor]:
    """Whether the kernels take it: an element type of theirs, contiguous, on the CPU, and of no other class than
    ``kind``."""
    return type(value) is kind and value.dtype in ELEMENT_TYPES and value.is_cpu and value.is_contiguous()


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class NativeLinear:
    """A `Linear` or `Conv1D` as :mod:`simctg_fast.ops.block_layers` takes it, made anew when its parameters change."""

    __slots__ = ("module", "shape", "state", "transposed")

    def __init__(self, module: Linear | Conv1D):
        self.module, self.transposed, self.shape = module, isinstance(module, Conv1D), module.weight.shape
        self.state: tuple[Tensor, Tensor, int, Tensor | None, int, Any] | None = None

    def current(self, rows: int, dtype: torch.dtype, uses: dict[int, Use]) -> tuple[Any, ...] | None:
        """For a product of so many rows of this type, with what `uses_here` gives: what has to be kept alive meanwhile,
        and last the layer. None if the kernel is not for it."""
        module = self.module
        parameters = module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if not is_plain(weight) or weight.dtype is not dtype or weight.shape != self.shape:
            return None
        if bias is not None and not (is_plain(bias) and bias.dtype is dtype):
            return None
        use = uses.get(id(module))
        copy, limit = (None, most_rows(dtype)) if use is None else use.value.current(weight)
        if rows > limit:
            return None
        data: Tensor = weight if copy is None else copy
        state, address, bias_address = self.state, data.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (
            state is None
            or state[0] is not weight
            or state[1] is not data
            or state[2] != address
            or state[3] is not bias
            or state[4] != bias_address
        ):
            if bias is not None and bias.shape != (self.shape[1 if self.transposed else 0],):
                return None
            layer = native_layer(weight, bias, self.transposed, copy)
            self.state = state = (weight, data, address, bias, bias_address, layer)
        return state


class NativeNorm:
    """A `LayerNorm` or a root mean square norm likewise."""

    __slots__ = ("centred", "epsilon_name", "module", "shape", "state")

    def __init__(self, module: Any):
        self.module, self.centred, self.shape = module, isinstance(module, LayerNorm), module.weight.shape
        self.epsilon_name = "eps" if self.centred else "variance_epsilon"
        self.state: tuple[Tensor, int, Tensor | None, int, float, Any] | None = None

    @property
    def width(self) -> int:
        return int(self.shape.numel())

    def current(self, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """For rows of this type: what has to be kept alive while it is used, and last the norm. None if the kernel is
        not for it."""
        module = self.module
        parameters = module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if not is_plain(weight) or weight.dtype is not dtype or weight.shape != self.shape:
            return None
        if bias is not None and not (
            self.centred and is_plain(bias) and bias.dtype is dtype and bias.shape == self.shape
        ):
            return None
        epsilon = getattr(module, self.epsilon_name)
        state, address, bias_address = self.state, weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (
            state is None
            or state[0] is not weight
            or state[1] != address
            or state[2] is not bias
            or state[3] != bias_address
            or state[4] != epsilon
        ):
            norm = native_norm(weight, bias, epsilon, self.centred)
            self.state = state = (weight, address, bias, bias_address, epsilon, norm)
        return state


class Snapshot:
    """Linear layers and norms as `NativeLinear.current` and `NativeNorm.current` have found them, for so many rows: to
    see in a fraction of the time that they still are."""

    __slots__ = ("limit", "numbers", "tensors", "uses")

    def __init__(self, linears: Iterable[NativeLinear], norms: Iterable[NativeNorm], uses: dict[int, Use]):
        layers = list(linears)
        modules = [each.module for each in layers] + [each.module for each in norms]
        parameters = [(m._parameters, name, m._parameters.get(name)) for m in modules for name in ("weight", "bias")]
        self.tensors = [
            (of, name, x, *((None, None, None) if x is None else (x.data_ptr(), x.dtype, x.shape)))
            for of, name, x in parameters
        ]
        self.numbers = [(norm.module, norm.epsilon_name, getattr(norm.module, norm.epsilon_name)) for norm in norms]
        found = [(id(each.module), uses.get(id(each.module)), each.module.weight) for each in layers]
        self.uses = [(key, use, None if use is None else use.value.copy, weight) for key, use, weight in found]
        self.limit = _limit.rows

    def holds(self, uses: dict[int, Use]) -> bool:
        if self.limit != _limit.rows:
            return False
        for parameters, name, tensor, address, dtype, shape in self.tensors:
            if parameters.get(name) is not tensor:
                return False
            if tensor is not None and (
                tensor.data_ptr() != address
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or not tensor.is_contiguous()
            ):
                return False
        for key, use, copy, weight in self.uses:
            if uses.get(key) is not use:
                return False
            if use is not None and (use.value.copy is not copy or not (copy is None or copy.is_current(weight))):
                return False
        return all(getattr(module, name) == value for module, name, value in self.numbers)


def _product(self: Module, x: Tensor, transposed: bool) -> Tensor | None:
    """None if the kernel is not for it."""
    use, parameters = here(self), self._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if use is None or not is_plain(weight) or type(x) is not Tensor or not is_plain_eager():
        return None
    out_features, in_features = weight.shape
    if transposed:
        out_features, in_features = in_features, out_features
    copy, limit = use.value.current(weight)
    takes = (
        x.dtype is weight.dtype
        and x.is_cpu
        and x.shape[-1] == in_features
        and 0 < x.numel() <= limit * in_features
        and out_features > 0
        and (bias is None or (is_plain(bias) and bias.dtype is x.dtype and bias.numel() == out_features))
        and not _wants_gradient(x, weight, bias)
    )
    if takes and copy is not None and copy.dtype is torch.int8 and use.value.exact:
        return certified(x, weight, bias, copy, use.value.exact)
    return run_kernel(x, weight, bias, transposed, copy) if takes else None


def _linear_forward(self: Linear, input: Tensor) -> Tensor:
    y = _product(self, input, False)
    return _LINEAR_FORWARD(self, input) if y is None else y


def _conv1d_forward(self: Conv1D, x: Tensor) -> Tensor:
    y = _product(self, x, True)
    return _CONV1D_FORWARD(self, x) if y is None else y


def _on_cuda(x: Any) -> bool:
    """Whether one operation of PyTorch's may stand for a module's own on ``x``. What follows an operation follows these
    as well; what is compiled is fused by the compiler."""
    return isinstance(x, Tensor) and x.is_cuda and x.dtype in _CUDA_DTYPES and not torch.is_autocast_enabled("cuda")


def _is_on_cuda(model: Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _new_gelu_forward(self: NewGELUActivation, input: Tensor) -> Tensor:
    if here(self) is None:
        return _NEW_GELU_FORWARD(self, input)
    if (
        is_plain(input, Tensor)
        and not _wants_gradient(input)
        and is_plain_eager()
        and _backends.extension() is not None
    ):
        return run_gelu(input)
    if _on_cuda(input):
        return torch.nn.functional.gelu(input, approximate="tanh")
    return _NEW_GELU_FORWARD(self, input)


def _dropout_forward(self: Dropout, input: Tensor) -> Tensor:
    return _DROPOUT_FORWARD(self, input) if self.training else input


def _rms_norm_forward(self: Module, hidden_states: Tensor) -> Tensor:
    if here(self) is None:
        return type(self).forward(self, hidden_states)
    weight, epsilon = self._parameters.get("weight"), self.__dict__["variance_epsilon"]
    if (
        is_plain(hidden_states, Tensor)
        and is_plain(weight)
        and weight.dtype is hidden_states.dtype
        and hidden_states.shape[-1:] == weight.shape
        and not _wants_gradient(hidden_states, weight)
        and is_plain_eager()
        and _backends.extension() is not None
    ):
        return run_rms_norm(hidden_states, weight, epsilon)
    if (
        _on_cuda(hidden_states)
        and isinstance(weight, Tensor)
        and weight.device == hidden_states.device
        and weight.dtype is hidden_states.dtype
        and weight.shape == hidden_states.shape[-1:]
    ):
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)
    return type(self).forward(self, hidden_states)


# The class's forward, ours, and for linear layers whether the weight is [in, out].
_FORWARDS: dict[type[Module], tuple[Any, Any, bool | None]] = {
    Linear: (_LINEAR_FORWARD, _linear_forward, False),
    Conv1D: (_CONV1D_FORWARD, _conv1d_forward, True),
    NewGELUActivation: (_NEW_GELU_FORWARD, _new_gelu_forward, None),
    Dropout: (_DROPOUT_FORWARD, _dropout_forward, None),
}


def _code(kind: type[Module]) -> tuple[Any, ...]:
    code = kind.forward.__code__
    return code.co_code, code.co_consts, code.co_names


@functools.cache
def _rms_norms() -> tuple[Any, ...]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return _code(LlamaRMSNorm), _code(T5LayerNorm)


def _is_rms_norm(kind: type[Module]) -> bool:
    """Whether it computes what T5's or Llama's does: transformers gives most models a copy of one of these."""
    named = kind.__name__.endswith(("RMSNorm", "LayerNorm")) and hasattr(kind.forward, "__code__")
    if not named or kind.forward.__code__.co_freevars:  # a decorator's code says nothing of what it wraps
        return False
    if not kind.__module__.startswith("transformers.models.") or _code(kind) not in _rms_norms():
        return False
    _FORWARDS[kind] = (kind.forward, _rms_norm_forward, None)
    return True


def _stand_in(module: Module) -> Any | None:
    """Our forward for a module of its kind, None if there is none or the module is not what it is for."""
    kind = type(module)
    if kind not in _FORWARDS and not _is_rms_norm(kind):
        return None
    original, replacement, transposed = _FORWARDS[kind]
    if kind.forward is not original:
        return None
    if transposed is None:
        return replacement
    weight = module._parameters.get("weight")
    takes = is_plain(weight) and weight.dim() == 2 and _backends.extension() is not None
    return replacement if takes else None


def _limit_of(module: Module, limits: dict[torch.dtype, int]) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else limits.get(weight.dtype, 0)


def _room_for(weights: Iterable[tuple[Tensor, bool]]) -> tuple[bool, int, int | None]:
    """Whether packed copies of weights (each with how it lies) may be made, the bytes they take, and those that are
    free."""
    needed, free = sum(4 * packed_size(weight, transposed) for weight, transposed in weights), free_bytes(_CPU)
    return free is not None and needed <= _MEMORY_SHARE * free, needed, free


def _weight_of(module: Module) -> tuple[Tensor, bool] | None:
    """The weight of a linear layer that there are packed copies of, and whether it lies transposed."""
    transposed, weight = _FORWARDS[type(module)][2], module._parameters.get("weight")
    return None if transposed is None or weight is None or weight.dtype is not torch.float32 else (weight, transposed)


def _pack_all(uses: list[Use]) -> None:
    """Copies for those linear layers that have none yet, in whatever block or thread."""
    todo: list[tuple[_Layer, Tensor, bool]] = []
    for use in uses:
        if (found := _weight_of(use.held.module)) is None:
            continue
        weight, transposed = found
        copies = (other.value.copy for other in list(use.held.uses) if other.value.make is None)
        use.value.copy = next((copy for copy in copies if copy is not None and copy.is_current(weight)), None)
        if use.value.copy is None and not weight.is_inference():
            todo.append((use.value, weight, transposed))
    fits, needed, free = _room_for((weight, transposed) for _, weight, transposed in todo)
    if not fits:
        known = "unknown" if free is None else f"{free / 2**20:.0f} MiB"
        logger.warning(
            "pack=True would copy %.0f MiB of weights, more than %.0f%% of the free memory (%s): not packed.",
            needed / 2**20,
            100 * _MEMORY_SHARE,
            known,
        )
        return
    for layer, weight, transposed in todo:
        layer.copy = _Copy(weight, pack_weight(weight, transposed), _MOST_PACKED_ROWS if _packed_wins() else 0)


def _copy_all(model: Module, uses: list[Use], weights: WeightCopies, exact: int) -> None:
    """Have linear layers read copies."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    for use in uses:
        module = use.held.module
        transposed, weight = _FORWARDS[type(module)][2], module._parameters.get("weight")
        if transposed is None or weight is None or not weight.is_cpu:
            continue
        use.value.make = functools.partial(weights.of, module, transposed=transposed)
        use.value.exact = exact if module is head and not transposed else 0
        use.value.copy = None


def lossless_bytes(model: Module) -> tuple[int, int]:
    """Of the float32 weights that linear layers read: the bytes of those that are as good in 16 bits, and of all."""
    routable = [module for module in model.modules() if _stand_in(module) is not None and has_own_forward(module)]
    weights = {id(found[0]): found[0] for module in routable if (found := _weight_of(module)) is not None}
    as_good = (weight.nbytes for weight in weights.values() if narrowed(weight) is not None)
    return sum(as_good), sum(weight.nbytes for weight in weights.values())


def packing_pays(model: Module, rows: int) -> bool:
    """Whether ``fast_linears(model, pack=True)`` is faster than reading in place for some tens of products of so many
    rows, and its copies fit in memory."""
    if rows < _PACKED_ROWS or not _packed_wins():
        return False
    routable = (module for module in model.modules() if _stand_in(module) is not None and has_own_forward(module))
    weights = [weight for module in routable if (weight := _weight_of(module)) is not None]
    return bool(weights) and _room_for(weights)[0]


@contextmanager
def fast_linears(
    model: Module,
    rows_hint: int = 1,
    pack: bool | str = "auto",
    max_rows: int | None = None,
    weights: WeightCopies | None = None,
    exact: int = MOST_EXACT,
) -> Iterator[int]:
    """Routes the linear layers of ``model`` through the small-M kernel within the block.

    Taken are modules that are exactly `torch.nn.Linear` or transformers' `Conv1D`, with the class's own forward and a
    contiguous weight on the CPU, of float32, bfloat16 or float16, and `NewGELUActivation`, `Dropout` and root mean
    square norms (of these also what computes on CUDA). It holds for the thread that enters the block: in another one
    the model computes what it always does. Blocks may be nested. On the way out, also by an exception, every module is
    as it was found.

    Args:
        model: any module.
        rows_hint: rows the caller is going to multiply at a time. Above ``max_rows`` the block changes nothing on the
            CPU, but where packed layers take more.
        pack: True copies float32 weights in the order in which the kernel reads them, unless that takes more than a
            quarter of the free memory, and frees the copies at the end. A change of a weight is noticed by its version
            counter, its address and its identity, and the copy dropped; writing through ``weight.data`` within the
            block is not seen. With AVX2, packed layers take up to 512 rows. ``"auto"`` does not pack: the copies cost
            memory, and time at the beginning; see :func:`packing_pays`.
        max_rows: products of more rows than this are left to the modules; None: up to where the kernel is faster. A
            caller to whom it matters that a row's result does not depend on the other rows may go further.
        weights: what linear layers read in the place of their weights, instead of packed copies. With ``"int8"`` they
            take any number of rows.
        exact: how many of the largest results of the model's output layer are exact, whatever ``weights``.

    Yields:
        The number of modules that were routed: 0 without the C++ extension, unless part of the model is on CUDA.

    Raises:
        ValueError: a ``pack`` that is none of these, a ``rows_hint`` below 1, ``weights`` for a model not on the CPU.
        RuntimeError: ``weights`` without the C++ extension.
    """
    if not any(pack is allowed or pack == allowed for allowed in PACK):
        raise ValueError(f"pack is {pack!r}, must be one of {', '.join(map(repr, PACK))}")
    if rows_hint < 1:
        raise ValueError(f"rows_hint is {rows_hint!r}, must be at least 1")
    if weights is not None:
        weights.check(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_cpu}.intersection(ELEMENT_TYPES)
    limits = {dtype: most_rows(dtype) if max_rows is None else max_rows for dtype in dtypes}
    uses: list[Use] = []
    with Forwards() as forwards:
        copies = (pack is True and _packed_wins()) or weights is not None
        wanted = rows_hint <= max(limits.values(), default=most_rows()) or copies
        if (wanted and _backends.extension() is not None) or _is_on_cuda(model):
            for module in model.modules():
                function, outer = _stand_in(module), here(module)
                if function is not None:
                    limit = _limit_of(module, limits)
                    use = forwards.put(module, function, _Layer(limit, None if outer is None else outer.value))
                    if use is not None:
                        uses.append(use)
            if weights is not None:
                _copy_all(model, uses, weights, exact)
            elif pack is True:
                with _packing:
                    _pack_all(uses)
        elif wanted and limits:
            _backends.wanted_extension()  # says that it is missing
        yield len(uses)
