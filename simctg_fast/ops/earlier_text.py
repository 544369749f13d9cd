"""What a text has to say against tokens that would repeat it: the penalties of frustratingly simple decoding.

Yang et al. 2023 (arXiv 2305.12675) weigh each of the most probable tokens against an n-gram model of the text so far:
one of counts (:func:`ngram_penalty`, section 3.2), or one whose contexts are hidden states (:func:`follower_scan`,
section 3.3). Both look at the text anew for every token, in one pass: there is no table that could go astray where rows
are copied, cleared or captured in a graph, and a pass takes microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._autograd import define, register
from .dispatch import NOT_TAKEN, address, addresses, choose, contiguous, float32_obstacle, is_deferred, lengths_obstacle


def follower_scan(
    history: Tensor,
    tokens: Tensor,
    picks: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    orders: Tensor | None = None,
    norms: Tensor | None = None,
    impl: str = "auto",
    longest: int = 2,
) -> tuple[Tensor, Tensor]:
    """For each pick v, the largest cosine of the newest states with those that were followed by v.

    Args:
        history: ``(B, T_max, D)`` unit-length states.
        tokens: ``(B, T)`` int64, the text; below 0: no token, which nothing matches.
        picks: ``(B, k)`` int64.
        lengths: ``(B,)`` int64 positions in use, at most T and T_max.
        starts: ``(B,)`` where the text begins, None: at 0.
        orders: ``(B,)`` int64, n ≥ 2: the last n − 1 states are compared, as one vector; None: 2.
        norms: ``(B, T_max)`` float32, the states' own lengths; wanted where ``longest`` is above 2.
        impl: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` (CUDA) or ``"torch"``.
        longest: the largest of ``orders``, on the host.

    Returns:
        ``penalty (B, k)`` float32 (float64 for float64 states), in [0, 1]: 0 where v is not in the text, or all that
        stood before it points away; NaN propagates. ``position (B, k)`` int64 of the v that says most, the earliest of
        equals; −1: there is none.

    Raises:
        ValueError: an unknown ``impl``, one that does not take these operands, or ``norms`` that are missing.
        RuntimeError: an ``impl`` that this installation lacks.
    """
    if longest > 2 and norms is None:
        raise ValueError(f"norms is None, must be (B, T_max) float32 where longest is {longest}")
    if orders is None:
        orders = torch.full_like(lengths, 2)
    if is_deferred(impl):
        return torch.ops.simctg_fast.follower_scan(
            history, tokens, picks, lengths, starts, orders, norms, impl=impl, longest=longest
        )
    return _follower_scan(history, tokens, picks, lengths, starts, orders, norms, impl=impl, longest=longest)


def ngram_penalty(
    tokens: Tensor,
    picks: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    *,
    orders: Tensor,
    betas: Tensor,
    impl: str = "auto",
    longest: int,
) -> tuple[Tensor, Tensor]:
    """For each pick v, its probability by the smoothed n-gram model of the text.

    Of the contexts that v has followed, from n − 1 tokens down to none, each takes ``beta`` of what longer ones have
    left: with c of N followers (of N + 1 but for the empty context, which takes all that is left).

    Args:
        tokens, picks, lengths, starts: as in :func:`follower_scan`; ``tokens (B, T)``, lengths at most T.
        orders: ``(B,)`` int64, n ≥ 1; longest: the largest of them, on the host.
        betas: ``(B,)`` float64, in [0, 1].
        impl: ``"auto"``, ``"cpu"`` (C++) or ``"torch"``.

    Returns:
        ``penalty (B, k)`` float32, 0 where v is not in the text or the text has fewer than n − 1 tokens; ``position
        (B, k)`` int64, the last v behind the longest of those contexts, −1: there is none.

    Raises:
        ValueError, RuntimeError: as :func:`follower_scan`.
    """
    if is_deferred(impl):
        return torch.ops.simctg_fast.ngram_penalty(
            tokens, picks, lengths, starts, orders, betas, impl=impl, longest=longest
        )
    return _ngram_penalty(tokens, picks, lengths, starts, orders, betas, impl=impl, longest=longest)


def token_counts(tokens: Tensor, picks: Tensor, lengths: Tensor, starts: Tensor | None = None) -> Tensor:
    """How often each of ``picks (B, k)`` stands in the text, ``(B, k)`` int64; arguments as in `ngram_penalty`."""
    return ((tokens[:, None] == picks[..., None]) & _is_text(tokens, lengths, starts)[:, None]).sum(dim=-1)


def _text_obstacle(tokens: Tensor, picks: Tensor, lengths: Tensor, starts: Tensor | None, orders: Tensor) -> str | None:
    for name, x in (("tokens", tokens), ("picks", picks)):
        if x.dtype is not torch.int64 or not x.is_cpu or x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
            return f"{NOT_TAKEN}{name} is {x.dtype} {tuple(x.shape)} on {x.device}, must be contiguous int64 on the CPU"
    problem = lengths_obstacle(len(tokens), lengths=lengths, starts=starts, orders=orders)
    return None if problem is None else NOT_TAKEN + problem


def _for_cpp(tokens, picks, lengths, starts, orders, capacity):
    """What both functions of C++ are given, what they write to, and what must live meanwhile."""
    picks = picks.contiguous()
    kept = (picks, *contiguous(lengths, starts, orders))
    penalty, position = torch.empty_like(picks, dtype=torch.float32), torch.empty_like(picks)
    sizes = (*picks.shape, capacity)
    return (sizes, (tokens.data_ptr(), tokens.stride(0)), *addresses(*kept)), penalty, position, kept


def _follower_scan(history, tokens, picks, lengths, starts, orders, norms, *, impl="auto", longest=2):
    def cpu() -> str | None:
        return float32_obstacle(history=history) or _text_obstacle(tokens, picks, lengths, starts, orders)

    def triton() -> str | None:
        from simctg_fast.kernels import earlier_text as kernels

        return kernels.obstacle(history, picks)

    history = history[:, : tokens.shape[1]]
    impl = choose(impl, history.device, cpu=cpu, triton=triton)
    norms = None if norms is None or longest <= 2 else norms[:, : history.shape[1]]
    if impl == "triton":
        from simctg_fast.kernels import earlier_text as kernels

        return kernels.follower_scan(history, tokens, picks, lengths, starts, orders, norms, longest)
    if impl == "torch":
        return _follower_scan_torch(history, tokens, picks, lengths, starts, orders, norms, longest)
    capacity, dim = history.shape[1:]
    given, penalty, position, _kept = _for_cpp(tokens, picks, lengths, starts, orders, capacity)
    norms = None if norms is None else norms.contiguous()
    _backends.require_extension().follower_scan(
        *given,
        dim,
        (history.data_ptr(), history.stride(0), history.stride(1)),
        (0, 0) if norms is None else (norms.data_ptr(), norms.stride(0)),
        penalty.data_ptr(),
        position.data_ptr(),
        torch.get_num_threads(),
    )
    return penalty, position


def _ngram_penalty(tokens, picks, lengths, starts, orders, betas, *, impl="auto", longest):
    def cpu() -> str | None:
        if betas.dtype is not torch.float64 or not betas.is_cpu or betas.shape != lengths.shape:
            return f"{NOT_TAKEN}betas is {betas.dtype} {tuple(betas.shape)}, must be float64 {tuple(lengths.shape)}"
        return _text_obstacle(tokens, picks, lengths, starts, orders)

    if choose(impl, tokens.device, cpu=cpu) == "torch":
        return _ngram_penalty_torch(tokens, picks, lengths, starts, orders, betas, longest)
    given, penalty, position, _kept = _for_cpp(tokens, picks, lengths, starts, orders, tokens.shape[1])
    betas = betas.contiguous()
    _backends.require_extension().ngram_penalty(
        *given, address(betas), penalty.data_ptr(), position.data_ptr(), torch.get_num_threads()
    )
    return penalty, position


# ---- PyTorch, on any device, without a look from the host -----------------------------------------------------------


def _is_text(tokens: Tensor, lengths: Tensor, starts: Tensor | None) -> Tensor:
    """``(B, T)``: which positions hold a token of the text."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    real = (tokens >= 0) & (place < lengths[:, None])
    return real if starts is None else real & (place >= starts[:, None])


def _later(x: Tensor, count: int) -> Tensor:
    """``x (B, T)`` moved by ``count`` places to the right, zeros in front."""
    return torch.nn.functional.pad(x, (count, 0))[:, : x.shape[1]] if count else x


def _newest(x: Tensor, lengths: Tensor, back: int) -> Tensor:
    """``x (B, T, …)`` at ``lengths − 1 − back``, of ``(B, …)``; what is before the first is that."""
    return x[torch.arange(len(x), device=x.device), (lengths - 1 - back).clamp(min=0, max=x.shape[1] - 1)]


def _follower_scan_torch(history, tokens, picks, lengths, starts, orders, norms, longest):
    wide = torch.promote_types(history.dtype, torch.float32)
    tokens = tokens[:, : history.shape[1]]
    real = _is_text(tokens, lengths, starts)
    products, sizes = (torch.zeros(real.shape, dtype=wide, device=real.device) for _ in range(2))
    own = torch.zeros(lengths.shape, dtype=wide, device=real.device)
    context = _later(real, 1)  # whether the positions compared, before each place, are text
    enough = torch.ones_like(lengths, dtype=torch.bool)
    for back in range(max(longest, 2) - 1):
        wanted = orders > back + 1
        newest = _newest(history, lengths, back)
        cosine = torch.matmul(history, newest[..., None])[..., 0].to(wide)
        if norms is not None:
            r, mine = norms.to(wide), _newest(norms, lengths, back).to(wide)
            cosine = cosine * r * mine[:, None]
            sizes = sizes + torch.where(wanted[:, None], _later(r * r, back + 1), 0.0)
            own = own + torch.where(wanted, mine * mine, 0.0)
        products = products + torch.where(wanted[:, None], _later(cosine, back + 1), 0.0)
        context = context & (~wanted[:, None] | _later(real, back + 1))
        enough = enough & (~wanted | ((lengths > back) & _newest(real, lengths, back)))
    if norms is not None:
        products = products / (sizes.sqrt() * own.sqrt()[:, None]).clamp_min(1e-24)
    matches = (tokens[:, None] == picks[..., None]) & (context & real & enough[:, None])[:, None]  # (B, k, T)
    best, position = torch.where(matches, products[:, None], float("-inf")).max(dim=-1)
    none = ~matches.any(dim=-1)
    return torch.where(none, 0.0, best.clamp(0.0, 1.0)), position.masked_fill(none, -1)


def _ngram_penalty_torch(tokens, picks, lengths, starts, orders, betas, longest):
    real = _is_text(tokens, lengths, starts)
    is_pick = (tokens[:, None] == picks[..., None]) & real[:, None]  # (B, k, T)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    contexts = [real]  # by length: the places whose last so many tokens are those at the end of the text
    for back in range(longest - 1):
        same = (tokens == _newest(tokens, lengths, back)[:, None]) & real & (lengths > back)[:, None]
        contexts.append(contexts[-1] & _later(same, back + 1) & (orders > back + 1)[:, None])
    beta = betas[:, None]
    left = torch.ones(picks.shape, dtype=torch.float64, device=picks.device)
    penalty, position = torch.zeros_like(left), torch.full_like(picks, -1)
    for size in range(longest - 1, -1, -1):
        followed = is_pick & contexts[size][:, None]
        times = followed.sum(dim=-1)
        share = times / (contexts[size].sum(dim=-1) + (size > 0)).clamp_min(1)[:, None]
        penalty = penalty + left * share * (beta if size else 1.0)
        left = torch.where(times > 0, left * (1 - beta), left)
        last = torch.where(followed, place, -1).amax(dim=-1)
        position = torch.where(position < 0, last, position)
    enough = real.sum(dim=-1) >= orders - 1
    return (penalty * enough[:, None]).float(), torch.where(enough[:, None], position, -1)


def _follower_fake(history, tokens, picks, lengths, starts, orders, norms, *, impl="auto", longest=2):
    dtype = torch.promote_types(history.dtype, torch.float32)
    return history.new_empty(picks.shape, dtype=dtype), picks.new_empty(picks.shape)


def _ngram_fake(tokens, picks, lengths, starts, orders, betas, *, impl="auto", longest=1):
    return picks.new_empty(picks.shape, dtype=torch.float32), picks.new_empty(picks.shape)


define(
    "follower_scan(Tensor history, Tensor tokens, Tensor picks, Tensor lengths, Tensor? starts, Tensor orders, "
    'Tensor? norms, *, str impl="auto", int longest=2) -> (Tensor, Tensor)',
    _follower_scan,
    _follower_fake,
)
define(
    "ngram_penalty(Tensor tokens, Tensor picks, Tensor lengths, Tensor? starts, Tensor orders, Tensor betas, *, "
    'str impl="auto", int longest=1) -> (Tensor, Tensor)',
    _ngram_penalty,
    _ngram_fake,
)
register("follower_scan")
register("ngram_penalty")
