"""What the operators of the low-rank CRF share: argument checks, what serves a call, counter-based randomness.

Names used in all of them, for `B` items of `T` positions with a beam of `K` tokens each, vocabulary `V`, rank `D`:

* ``scores`` `(B, T, K)` fp32 (fp64 on the PyTorch path): emission of every beam slot, already divided by the
  temperature.
* ``tokens`` `(B, T, K)` int64: which token a slot stands for.
* ``left``, ``right`` `(V, D)`: the transition from slot k at t to slot j at t + 1 is
  ``scale * left[tokens[b, t, k]] · right[tokens[b, t + 1, j]]``.
* ``lengths`` `(B,)` int64 or None: positions from ``lengths[b]`` on do not exist.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import embedding

from ..checks import check_devices
from . import _accumulate, dispatch

SINGLE = (torch.float32, torch.bfloat16, torch.float16)  # what C++ and the kernels compute in float32
TILE_LIMIT = 1024  # widest beam of the Triton kernels, which hold one in a tile
BEAM_LIMIT = 65536  # back-pointers are uint16 at most


class Potentials(NamedTuple):
    """What the recursions of the low-rank CRF run over."""

    scores: torch.Tensor
    tokens: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    lengths: torch.Tensor | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, T, K, V and D."""
        return (*self.scores.shape, *self.left.shape)

    def contiguous(self) -> Potentials:
        return Potentials(*dispatch.contiguous(*self))

    def step(self, t: int, scale: float = 1.0) -> torch.Tensor:
        """Transitions from position t - 1 to t: `(B, K, K)`, source slot first."""
        return transition(self.tokens, t - 1, self.left, self.right, scale)


def choose(impl: str, scores: torch.Tensor, *, triton: bool = True, beam: int | None = None) -> str:
    """The implementation that serves a call, see `dispatch.choose`; `triton`: whether there is a kernel."""
    beam = scores.shape[2] if beam is None else beam

    def cpu() -> str | None:
        if scores.dtype in SINGLE:
            return None
        return f"computes in float32; {str(scores.dtype).removeprefix('torch.')} needs impl='torch'"

    def kernel() -> str | None:
        if beam > TILE_LIMIT:
            return f"takes beams of at most {TILE_LIMIT} tokens, got {beam}; impl='torch' any"
        return cpu()

    return dispatch.choose(impl, scores.device, cpu=cpu, triton=kernel if triton else None)


def check_beside(name: str, values: torch.Tensor, lengths: torch.Tensor | None, **others: torch.Tensor | None) -> None:
    """Raises a ValueError for lengths that are not those of the items in `values`, the argument `name`, and for tensors
    on another device."""
    if lengths is not None and (lengths.shape != values.shape[:1] or lengths.dtype != torch.int64):
        raise ValueError(
            f"lengths is {lengths.dtype} {tuple(lengths.shape)}, must be int64 ({values.shape[0]},) as {name} has"
        )
    check_devices(name, values, **others, lengths=lengths)


def check_potentials(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    lengths: torch.Tensor | None,
) -> Potentials:
    """Raises a ValueError that names the argument for a wrong shape, dtype or device."""
    if scores.dim() != 3 or scores.shape[1] < 1 or scores.shape[2] < 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, must be (batch, length >= 1, beam >= 1)")
    if scores.shape[2] > BEAM_LIMIT:
        raise ValueError(f"the beam holds {scores.shape[2]} tokens, must be at most {BEAM_LIMIT}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores has dtype {scores.dtype}, must be float32 or float64")
    if tokens.shape != scores.shape or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens is {tokens.dtype} {tuple(tokens.shape)}, must be int64 {tuple(scores.shape)} as scores has"
        )
    if left.dim() != 2 or left.shape != right.shape:
        raise ValueError(
            f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}, must both be (vocabulary, rank)"
        )
    for name, tensor in (("left", left), ("right", right)):
        if tensor.dtype != scores.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be {scores.dtype} as scores has")
    check_beside("scores", scores, lengths, tokens=tokens, left=left, right=right)
    return Potentials(scores, tokens, left, right, lengths)


def check_draws(scores: torch.Tensor, samples: int, uniforms: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises a ValueError for a number of samples or for uniforms, `shape`, that do not belong to `scores`."""
    if samples < 1:
        raise ValueError(f"num_samples is {samples}, must be at least 1")
    if uniforms is not None and (uniforms.shape != shape or uniforms.dtype != scores.dtype):
        raise ValueError(f"uniforms is {uniforms.dtype} {tuple(uniforms.shape)}, must be {scores.dtype} {shape}")
    if uniforms is not None and uniforms.device != scores.device:
        raise ValueError(f"uniforms is on {uniforms.device}, must be on {scores.device} as the emissions are")


def transition(tokens: torch.Tensor, t: int, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Transitions from position t to t + 1: `(B, K, K)`, source slot first."""
    source, target = embedding(tokens[:, t], left), embedding(tokens[:, t + 1], right)
    return product(source * scale, target.transpose(1, 2))


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _matmul(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return product(grad, b.mT), product(a.mT, grad)

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, b = ctx.saved_tensors
        return product(tangent_a, b) + product(a, tangent_b)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for `(B, M, K)` and `(B, K, N)` in their own dtype: autocast rounds neither it nor its gradient."""
    if torch.compiler.is_dynamo_compiling():  # it knows no Function with a `jvp`, and takes the gradient here and now
        return _matmul(a, b)
    return _Product.apply(a, b)


def inside(lengths: torch.Tensor | None, t: int) -> torch.Tensor | None:
    """Which items have a position t, `(B, 1)`; None: all."""
    return None if lengths is None else (lengths > t)[:, None]


def last_law(messages: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """`(B, T, K)`: the law of each item's last slot, softmax(message + score), at its last position; 0 elsewhere. The
    marginals are this and what the reverse sweep makes of it."""
    if lengths is None:
        law = (messages[:, -1] + scores[:, -1]).softmax(1)
        return torch.nn.functional.pad(law[:, None], (0, 0, scores.shape[1] - 1, 0))
    items, last = torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)
    law = (messages[items, last] + scores[items, last]).softmax(1)
    ends = torch.arange(scores.shape[1], device=scores.device) == lengths[:, None] - 1  # nowhere, for a length of 0
    return torch.where(ends[..., None], law[:, None], 0)


# ---- gathering, with gradients that are the same in every run -------------------------------------------------------


def add_along_(table: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor) -> None:
    """`table.scatter_add_(dim, index, values)`, the same sum in every run; the other dimensions are of equal sizes."""
    if not _accumulate._has_atomics(table.device):
        table.scatter_add_(dim, index, values)
        return
    flat = index * table.stride(dim)
    for other in range(table.dim()):
        if other != dim:
            shape = [1] * table.dim()
            shape[other] = -1
            flat = flat + (torch.arange(table.shape[other], device=table.device) * table.stride(other)).view(shape)
    _accumulate.add_rows_(table.view(-1), flat.reshape(-1), values.reshape(-1))


class _TakeAlong(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.gather(2, index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        values, index = inputs
        ctx.shape = values.shape
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        result = grad.new_zeros(ctx.shape)
        add_along_(result, 2, index, grad)
        return result, None


def take_along(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values.gather(2, index)` for `(B, T, K)` and `(B, T, N)`, whose gradient on CUDA uses no atomics."""
    if not _accumulate._has_atomics(values.device):
        return values.gather(2, index)
    return _TakeAlong.apply(values, index)


# ---- randomness ------------------------------------------------------------------------------------------------------

_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Salmon et al. 2011, Philox4x32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(seed: int, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Four words of 32 bits (in int64) for every counter: Philox4x32-10, the generator that Triton and cuRAND use."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1  # wrapping leaves the 64 bits intact, only their sign is off
        c0 = ((product1 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def to_uniform(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """24 bits of each word as a number in [0, 1), exact in float32."""
    return (words >> 8).to(dtype) * (1.0 / (1 << 24))


def _indices(device: torch.device, *sizes: int) -> tuple[torch.Tensor, ...]:
    """The index along each dimension, everywhere in a tensor of these sizes."""
    return torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")


def uniforms_ffbs(seed: int, batch: int, length: int, samples: int, device: torch.device, dtype: torch.dtype):
    """`(B, T, N)`: word 0 of the counter (0, t, n, b)."""
    b, t, n = _indices(device, batch, length, samples)
    return to_uniform(philox(seed, (torch.zeros_like(t), t, n, b))[0], dtype)


def uniforms_stochastic(
    seed: int, batch: int, t: int, slots: int, samples: int, device: torch.device, dtype: torch.dtype
):
    """`(B, K, N)` for step t: word ``j % 4`` of the counter (1 + j // 4, t, n, b)."""
    b, group, n = _indices(device, batch, (slots + 3) // 4, samples)
    words = philox(seed, (group + 1, torch.full_like(group, t), n, b))
    return to_uniform(torch.stack(words, dim=2).flatten(1, 2)[:, :slots], dtype)


def pick(weights: torch.Tensor, uniform: torch.Tensor, dim: int) -> torch.Tensor:
    """Inverse CDF in slot order along `dim`: the first slot whose running sum exceeds ``uniform * total``.

    `weights` are in [0, 1]. They are added as integers, 2^-40 each: any order of the additions gives the same sums, and
    a slot without weight is never drawn.
    """
    running = (weights * float(1 << 40)).to(torch.int64).cumsum(dim)
    edge = (uniform.double() * running.select(dim, -1)).floor().to(torch.int64)
    slot = (running <= edge.unsqueeze(dim)).sum(dim)
    # Rounding may carry `uniform * total` up to the total itself: the last slot that has any weight, then.
    index = torch.arange(weights.shape[dim], device=weights.device)
    index = index.view([-1 if d == dim % weights.dim() else 1 for d in range(weights.dim())])
    return torch.minimum(slot, torch.where(weights > 0, index, 0).amax(dim))
