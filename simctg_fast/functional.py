"""Stateless public functions. Each checks what it was handed and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_devices, check_margin, check_positive, check_weight, is_integer, is_number
from .distributed import gather_columns, sum_over_processes, world_size
from .ops._contrastive_loss_torch import accumulator_dtype, full_precision
from .ops.contraclm import contraclm_loss as _contraclm_loss
from .ops.contrastive_loss import REDUCTIONS, check_mask, check_states
from .ops.contrastive_loss import contrastive_loss as _contrastive_loss
from .ops.cosine_similarity import cosine_similarity_matrix as _cosine_similarity_matrix
from .ops.dispatch import IMPLS
from .ops.simcse import pair_loss as _pair_loss
from .ops.simcse import self_loss as _self_loss
from .ops.simcse import unit_vectors
from .ops.viterbi_backtrace import IMPLS as _VITERBI_IMPLS
from .ops.viterbi_backtrace import viterbi_backtrace as _viterbi_backtrace
from .ranking import ranking_loss

__all__ = [
    "contraclm_token_loss",
    "contraclm_token_loss_items",
    "contrastive_loss",
    "contrastive_loss_items",
    "cosine_regularization",
    "cosine_similarity_matrix",
    "info_nce",
    "simcse_loss_from_embeddings",
    "simcse_sup_loss",
    "simcse_unsup_loss",
    "viterbi_backtrace",
]

TOKEN_REDUCTIONS = ("sequences", "tokens")


def viterbi_backtrace(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Follows back-pointers from the last slot of every sequence to its first.

    Args:
        backpointers: `(batch, length, slots)`, uint8, uint16, int32 or int64, any strides. ``backpointers[b, t, j]`` is
            the slot at ``t - 1`` that leads to slot ``j`` at ``t``. Row ``t = 0`` is not read, nor is a row beyond the
            item's length.
        last: `(batch,)`, the slot each sequence ends in, one of the same dtypes. Not read where the length is 0.
        lengths: `(batch,)`, one of the same dtypes, each in ``0..length``. None: all sequences are `length` long.
        impl: ``"cpu"`` is the C++ extension, ``"torch"`` PyTorch on any device, ``"auto"`` the first that can run.

    Returns:
        `(batch, length)` int64: the slots of each path, and -1 from the item's length on.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a wrong shape, dtype or device; an unknown `impl`; a length outside ``0..length``; a path that runs
            into a slot outside ``0..slots - 1`` (the text names the item, the step and the value).
        RuntimeError: ``impl="cpu"`` where the extension is absent.
    """
    require_tensor("backpointers", backpointers)
    require_tensor("last", last)
    if lengths is not None and not isinstance(lengths, torch.Tensor):
        raise TypeError(f"lengths is {lengths!r}, must be a tensor or None")
    check_choice("impl", impl, _VITERBI_IMPLS)
    return _viterbi_backtrace(backpointers, last, lengths, impl=impl)


def contrastive_loss(
    hidden_states: Tensor,
    margin: float = 0.5,
    attention_mask: Tensor | None = None,
    reduction: str = "pairs",
    *,
    normalizer: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """The contrastive loss of SimCTG: pulls apart the hidden states of a sequence that are more similar than allowed.

    With ``s_ij`` the cosine of tokens i and j, the hinge of a pair is ``max(0, margin - s_ii + s_ij)``, ``j != i``. A
    zero vector has similarity 0 to everything, itself included, and gradient 0.

    Args:
        hidden_states: `(batch, length, width)`, any floating dtype, any strides.
        margin: a number in [-1, 1].
        attention_mask: `(batch, length)` of bool, integers or floats, non-zero at real tokens; padding may be on either
            side. None: all are real.
        reduction: which of three means, all in use, is taken over the hinges of the ``n_b`` real tokens of sequence b:

            * ``"pairs"``: sum over all sequences / sum of ``n_b (n_b - 1)``. The authors' package.
            * ``"paper"``: mean over the pairs of each sequence, then over the sequences; one with fewer than two
              real tokens counts as 0. Equation 2 of the paper.
            * ``"dense"``: mean over all `length * length` entries of all sequences, the diagonal, worth
              ``max(0, margin)`` each, included. The T5 tutorial; it takes no mask.
        normalizer: replaces the count that the reduction divides by (real pairs, or sequences): pass the count of a
            whole accumulated batch and all processes, see :func:`contrastive_loss_items`. A number above 0, or a tensor
            of one element without a gradient, whose value is not looked at (that would make the host wait): NaN gives
            NaN, and 0 / 0, a batch without pairs, is 0.
        impl: ``"triton"`` (CUDA), ``"cpu"`` (C++), ``"torch"`` (tiled PyTorch, any device and dtype), or ``"auto"``.

    Returns:
        A scalar; float32, or float64 for float64 input, whatever the default dtype, and the same number under autocast.
        0, with a zero gradient, where there is no pair (batch 0, fewer than two real tokens); only ``"dense"`` counts
        the diagonal of a single token. Vectors of width 0 are zero vectors. NaN where a real hidden state is not
        finite.

    Raises:
        TypeError: `hidden_states` or `attention_mask` is no tensor.
        ValueError: a shape, dtype, layout, device, margin, reduction, normalizer or impl outside the above; ``"dense"``
            with a mask.
        RuntimeError: a named impl that is not installed.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", eq. 2. There is never a
    `length x length` matrix of floats: `length**2 / 8` bytes a sequence are kept for the backward pass. Twice
    differentiable, also under `torch.func` (grad, vjp, jacrev, vmap); a third derivative and forward mode raise a
    RuntimeError. The second derivative takes a hinge's derivative, 0 or 1, as constant, as PyTorch does for a relu.
    """
    require_tensor("hidden_states", hidden_states)
    if attention_mask is not None:
        require_tensor("attention_mask", attention_mask)
    check_margin(margin)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    divisor = None if normalizer is None else _normalizer(normalizer, hidden_states)
    return _contrastive_loss(hidden_states, attention_mask, divisor, float(margin), reduction, impl)


def _normalizer(value: Any, hidden_states: Tensor) -> Tensor:
    """A scalar on the hidden states' device."""
    dtype = accumulator_dtype(hidden_states.dtype)
    if not isinstance(value, Tensor):
        range_ = torch.finfo(dtype)
        if not is_number(value, range_.tiny, range_.max):
            raise ValueError(
                f"normalizer is {value!r:.80}, must be a number above 0 that fits {dtype}, or a tensor of one element"
            )
        return torch.full((), float(value), dtype=dtype, device=hidden_states.device)  # a copy would make the host wait
    if value.numel() != 1 or value.dtype == torch.bool or value.dtype.is_complex:
        raise ValueError(
            f"normalizer has shape {tuple(value.shape)} and dtype {value.dtype}, must be one integer or real number"
        )
    if value.requires_grad:
        raise ValueError("normalizer requires a gradient, which the loss does not have: pass normalizer.detach()")
    if value.is_meta and not hidden_states.is_meta:
        raise ValueError(f"normalizer is on meta and has no value, hidden_states is on {hidden_states.device}")
    return value.to(hidden_states.device).reshape(())


def contrastive_loss_items(attention_mask: Tensor, reduction: str = "pairs") -> Tensor:
    """What `contrastive_loss` divides by, as an int64 scalar on the mask's device: to be summed over micro-batches.

    Args:
        attention_mask: `(batch, length)`, non-zero at real tokens.
        reduction: ``"pairs"`` counts ordered pairs of real tokens, ``"paper"`` and ``"dense"`` count sequences.

    Raises:
        TypeError: the mask is no tensor. ValueError: another shape, a complex dtype, another reduction.
    """
    require_tensor("attention_mask", attention_mask)
    check_choice("reduction", reduction, REDUCTIONS)
    check_mask(attention_mask)
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, must be (batch, length)")
    if reduction != "pairs":
        return torch.full((), attention_mask.shape[0], dtype=torch.int64, device=attention_mask.device)
    tokens = (attention_mask != 0).sum(dim=1)
    return (tokens * (tokens - 1)).sum()


def contraclm_token_loss(
    hidden_states: Tensor,
    hidden_states_2: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.05,
    reduction: str = "sequences",
    *,
    normalizer: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """ContraCLM's token-level loss: two views of a sequence, as dropout makes them; each state is to find its twin.

    For each of the ``2 n`` real states of a sequence: the cross-entropy, with cosine / temperature as logits, of its
    twin (the same token in the other view) among the ``2 n - 1`` other real states of both views of that sequence. So
    the twin is in the denominator once, the state itself is not, and other sequences and padding are not either.

    Args:
        hidden_states, hidden_states_2: `(batch, length, width)`, any floating dtype, the same of both, not yet
            normalised; a zero vector has similarity 0 to everything and gradient 0. From two passes in training mode.
        attention_mask: `(batch, length)`, non-zero at real tokens; padding may be anywhere. None: all are real.
        temperature: from 1e-30 to 1e30.
        reduction: ``"sequences"`` is the mean over the states of each sequence, then over the sequences, as published;
            ``"tokens"`` the mean over the states of all sequences together.
        normalizer: replaces the count that the reduction divides by (sequences, or real tokens), as in
            :func:`contrastive_loss`; see :func:`contraclm_token_loss_items`.
        impl: as in :func:`contrastive_loss`; ``"cpu"`` and ``"torch"`` are one implementation here.

    Returns:
        A scalar; float32, or float64 for float64. A sequence of fewer than two real tokens adds 0 with a zero gradient,
        and is counted. NaN where a real state, in a sequence of two or more, is not finite.

    Raises:
        TypeError: `hidden_states`, `hidden_states_2` or `attention_mask` is no tensor; a temperature that is no number.
        ValueError: a shape, dtype, layout, device, temperature, reduction, normalizer or impl outside the above.

    Source: Jain et al. 2023, "ContraCLM: Contrastive Learning For Causal Language Model". The authors' code takes both
    the state and its twin out of the sum of the negatives and then adds the twin, once, to the denominator; it leaves
    padding out, averages over the ``2 n`` states of a sequence and then over the sequences. The default is that value,
    but for a sequence without real tokens, which makes theirs NaN, and where an exponential overflows theirs. Memory
    linear in the length; differentiable as :func:`info_nce`.
    """
    require_tensor("hidden_states", hidden_states)
    require_tensor("hidden_states_2", hidden_states_2)
    check_choice("reduction", reduction, TOKEN_REDUCTIONS)
    real = _real_states(hidden_states, attention_mask)
    scale = 1.0 / check_positive("temperature", temperature)
    losses = _contraclm_loss(hidden_states, hidden_states_2, real, scale, impl) / 2
    count = real.sum(dim=1)
    if reduction == "sequences":
        losses = losses / count.clamp_min(1)
    if normalizer is None:
        return losses.sum() / (count.sum().clamp_min(1) if reduction == "tokens" else max(1, real.shape[0]))
    return _divide(losses.sum(), _normalizer(normalizer, hidden_states))


def contraclm_token_loss_items(attention_mask: Tensor, reduction: str = "sequences") -> Tensor:
    """What `contraclm_token_loss` divides by, as :func:`contrastive_loss_items`: sequences, or real tokens."""
    check_choice("reduction", reduction, TOKEN_REDUCTIONS)
    if reduction == "sequences":
        return contrastive_loss_items(attention_mask, "paper")
    contrastive_loss_items(attention_mask)  # the same checks
    return (attention_mask != 0).sum()


def cosine_regularization(
    hidden_states: Tensor, attention_mask: Tensor | None = None, *, normalizer: Tensor | float | None = None
) -> Tensor:
    """Mean cosine of the pairs of different real tokens of each sequence, averaged over the sequences: 1 - isotropy.

    ``(|sum h|² - sum |h|²) / (n (n - 1))`` over unit vectors h, so in time and memory linear in the length.

    Args:
        hidden_states: `(batch, length, width)`, any floating dtype; a zero vector has cosine 0 to everything.
        attention_mask: `(batch, length)`, non-zero at real tokens; padding may be anywhere. None: all are real.
        normalizer: replaces the number of sequences that the sum is divided by, as in :func:`contrastive_loss`; that
            number is ``contrastive_loss_items(attention_mask, "paper")``.

    Returns:
        A scalar; float32, or float64 for float64. A sequence of fewer than two real tokens adds 0 and is counted (the
        metric `isotropy` leaves it out). NaN where a real state beside another is not finite.
        Differentiable as often as one likes.

    Raises:
        TypeError: an argument that is no tensor. ValueError: a shape, dtype, layout, device or normalizer outside the
            above.

    Source: Gao et al. 2019, "Representation Degeneration Problem in Training Natural Language Generation Models", who
    regularise word embeddings and divide by n² where this divides by the number of pairs; here for hidden states.
    """
    require_tensor("hidden_states", hidden_states)
    check_states(hidden_states)
    real = _real_states(hidden_states, attention_mask)
    with full_precision(hidden_states.device):
        count = real.sum(dim=1)
        counted = real & (count >= 2).unsqueeze(1)
        unit = unit_vectors(hidden_states.masked_fill(~counted.unsqueeze(-1), 0.0))
        pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
        cosines = pairs / (count * (count - 1)).clamp_min(1)
        if normalizer is None:
            return cosines.sum() / max(1, real.shape[0])
        return _divide(cosines.sum(), _normalizer(normalizer, hidden_states))


def _real_states(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``(batch, length)`` bool; shapes that do not fit are left to others."""
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    require_tensor("attention_mask", attention_mask)
    check_mask(attention_mask)
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, must be {tuple(hidden_states.shape[:2])} "
            "as hidden_states has"
        )
    check_devices("hidden_states", hidden_states, attention_mask=attention_mask)
    return attention_mask != 0


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """A batch with nothing in it over a count of 0 is 0."""
    empty = (count == 0) & (total == 0)
    return total / count.to(total.dtype).masked_fill(empty, 1.0)


def cosine_similarity_matrix(hidden_states: Tensor | Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """Cosine of every two tokens of a sequence; 0 (value and gradient) at zero vectors. Differentiable as often as one
    likes, also under `torch.func`, in reverse mode; forward mode raises a RuntimeError.

    Args:
        hidden_states: `(batch, length, width)`, or a tuple of `layers` of them, as a model returns.
        impl: as in :func:`contrastive_loss`; ``"cpu"`` and ``"torch"`` are one implementation here.

    Returns:
        `(batch, length, length)`, or `(layers, batch, length, length)`, of the input's dtype; computed in float32 (in
        float64 for float64), under autocast too. Vectors of width 0 are zero vectors.

    Raises:
        TypeError: no tensor, nor a tuple or list of them. ValueError: a shape, dtype, layout or impl outside the above,
            or no layer.
    """
    check_choice("impl", impl, IMPLS)
    if isinstance(hidden_states, Tensor):
        return _cosine_similarity_matrix(hidden_states, impl)
    if not isinstance(hidden_states, (tuple, list)):
        raise TypeError(f"hidden_states is {hidden_states!r:.80}, must be a tensor or a tuple of tensors")
    if not hidden_states:
        raise ValueError("hidden_states is an empty sequence, must hold at least one layer")
    for index, layer in enumerate(hidden_states):
        require_tensor(f"hidden_states[{index}]", layer)
        if layer.shape != hidden_states[0].shape or layer.dtype != hidden_states[0].dtype:
            raise ValueError(
                f"hidden_states[{index}] has shape {tuple(layer.shape)} and dtype {layer.dtype}, must be "
                f"{tuple(hidden_states[0].shape)} and {hidden_states[0].dtype} as hidden_states[0] has"
            )
    return torch.stack([_cosine_similarity_matrix(layer, impl) for layer in hidden_states])


def info_nce(
    queries: Tensor,
    keys: Tensor,
    temperature: float = 0.05,
    *,
    targets: int | Tensor = 0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of each query to its own key among all keys, with cosine / temperature as logits.

    Args:
        queries: `(N, width)`, any floating dtype, not yet normalised; a zero vector has similarity 0.
        keys: `(M, width)`, same dtype and device.
        temperature: from 1e-30 to 1e30.
        targets: the key of each query: `(N,)` indices of any integer dtype on the device of `queries`, each in
            ``0..M - 1``, or the index of query 0's key as an int in ``0..M - N``, the others following it (the rank's
            offset where keys were gathered from all processes). Indices are looked at on the CPU only: on another
            device, where the host would wait for them, one that is out of range is an error of the device or, where
            negative, counts from the end.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: as in :func:`contrastive_loss`.

    Returns:
        A scalar, or `(N,)`; float32, or float64 for float64. No queries: 0. Width 0: ``log(M)``, as of zero vectors.
        Twice differentiable in memory linear in N and M, also under `torch.func`; a third derivative and forward mode
        raise a RuntimeError.

    Raises:
        TypeError: `queries` or `keys` is no tensor; a temperature that is no number; `targets` that are neither an
            integer nor a tensor.
        ValueError: a shape, dtype, device, temperature, target or reduction outside the above.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean', 'sum' or 'none'")
    _check_embeddings("queries", queries)
    _check_embeddings("keys", keys)
    temperature = check_positive("temperature", temperature)
    return _reduce(_pair_loss(queries, keys, _targets(targets, queries, keys), 1.0 / temperature, impl), reduction)


def _targets(targets: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """The int64 index of the key of each query."""
    rows, columns = queries.shape[0], keys.shape[0]
    if isinstance(targets, Tensor):
        if targets.shape != (rows,):
            raise ValueError(f"targets has shape {tuple(targets.shape)}, must be ({rows},) as queries has rows")
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            raise ValueError(f"targets has dtype {targets.dtype}, must be an integer one: indices in 0..{columns - 1}")
        if targets.device != queries.device:
            raise ValueError(f"targets is on {targets.device}, must be on {queries.device} as queries is")
        return targets.to(torch.int64)
    if not is_integer(targets):
        raise TypeError(f"targets is {targets!r:.80}, must be an int or a tensor of {rows} indices")
    first = int(targets)
    if not 0 <= first <= columns - rows:
        several = "" if columns >= rows else "; where queries share keys, a tensor of indices"
        raise ValueError(f"targets is {first}, must be in 0..{columns - rows}: {rows} queries, {columns} keys{several}")
    return torch.arange(first, first + rows, device=queries.device)


def simcse_unsup_loss(
    y_pred: Tensor,
    device: Any = None,
    temp: float = 0.05,
    *,
    temperature: float | None = None,
    gather_across_devices: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Unsupervised SimCSE: rows 2i and 2i+1 are two views of one sentence, every other row is a negative.

    Cross-entropy to the partner, with cosine / temperature as logits and the row itself left out; mean over 2n rows.

    Args:
        y_pred: `(2n, width)` embeddings, any floating dtype, not yet normalised; a zero vector has similarity 0.
        device: accepted and ignored: the loss is computed where `y_pred` is.
        temp: the temperature, positive.
        temperature: the same under its usual name; goes before `temp`.
        gather_across_devices: the rows of all processes of `torch.distributed` are negatives, with gradients. Processes
            may hold different numbers of rows. Each returns the terms of its own rows times the number of processes,
            over the rows of all: the average over the processes, which data-parallel training takes of the gradients,
            is the loss of the whole batch. With one process nothing changes.
        impl: as in :func:`contrastive_loss`.

    Raises:
        ValueError: another shape or an odd number of rows, or a temperature that is not positive.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings". Memory linear in n.
    """
    _check_embeddings("y_pred", y_pred, multiple=2)
    scale = 1.0 / _pick_temperature("temp", temp, temperature)
    (rows,), first, processes = gather_columns([y_pred], gather_across_devices)
    if processes == 1:
        return _reduce(_self_loss(y_pred, scale, impl), "mean")
    partners = first + (torch.arange(y_pred.shape[0], device=y_pred.device) ^ 1)
    losses = _pair_loss(y_pred, rows, partners, scale, impl, itself=first)
    return losses.sum() * (processes / max(1, rows.shape[0]))


def simcse_sup_loss(
    y_pred: Tensor,
    device: Any = None,
    lamda: float = 0.05,
    *,
    temperature: float | None = None,
    symmetric: bool = False,
    hard_negative_weight: float = 0.0,
    gather_across_devices: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Supervised SimCSE: rows 3i, 3i+1, 3i+2 are an anchor, its positive and its hard negative.

    Each anchor against all positives and all hard negatives of the batch; mean over the anchors.

    Args:
        y_pred: `(3n, width)` embeddings, any floating dtype, not yet normalised; a zero vector has similarity 0.
        device: accepted and ignored.
        lamda: the temperature, positive.
        temperature: the same under its usual name; goes before `lamda`.
        symmetric: also each positive against all anchors, the two losses averaged.
        hard_negative_weight: added to the logit of each anchor's own hard negative: the logarithm of its weight in the
            sum of exponentials, so 0 counts it as the others, -inf leaves it out, and log 2 counts it twice.
        gather_across_devices: as in :func:`simcse_unsup_loss`.
        impl: as in :func:`contrastive_loss`.

    Raises:
        TypeError, ValueError: as :func:`info_nce`; a `hard_negative_weight` that is NaN or above 1e30.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", eq. 5 and appendix.
    """
    _check_embeddings("y_pred", y_pred, multiple=3)
    temperature = _pick_temperature("lamda", lamda, temperature)
    return simcse_loss_from_embeddings(
        *(y_pred[i::3] for i in range(3)),
        temperature=temperature,
        symmetric=symmetric,
        hard_negative_weight=hard_negative_weight,
        gather_across_devices=gather_across_devices,
        impl=impl,
    )


def simcse_loss_from_embeddings(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    in_view_negatives: bool = False,
    hard_negative_weight: float = 0.0,
    gather_across_devices: bool = False,
    impl: str = "auto",
) -> Tensor:
    """SimCSE from embeddings that are held apart: what GradCache calls with its representations.

    Args:
        anchors: `(n, width)`.
        positives: `(n, width)`, row i the positive of anchor i and a negative of all others.
        negatives: `(m, width)` hard negatives for every anchor, or None.
        temperature: positive.
        symmetric: also each positive against all anchors, the two losses averaged.
        in_view_negatives: the loss of :func:`simcse_unsup_loss`, where anchors are negatives of anchors too and both
            views are rows; takes no `negatives`.
        hard_negative_weight: as in :func:`simcse_sup_loss`. `negatives` are then `(m * n, width)`, m for each anchor:
            rows i, n + i, 2n + i … are those of anchor i (m columns, one after the other).
        gather_across_devices: as in :func:`simcse_unsup_loss`.
        impl: as in :func:`contrastive_loss`.

    Returns:
        A scalar; float32, or float64 for float64.

    Raises:
        TypeError, ValueError: as :func:`simcse_sup_loss`; `negatives` where there can be none, or not m for each
            anchor where they are weighted.
    """
    temperature = check_positive("temperature", temperature)
    hard_negative_weight = check_weight("hard_negative_weight", hard_negative_weight)
    _check_embeddings("anchors", anchors)
    _check_embeddings("positives", positives)
    if anchors.shape != positives.shape:
        raise ValueError(f"positives has shape {tuple(positives.shape)}, must be {tuple(anchors.shape)} as anchors has")
    if negatives is not None:
        _check_embeddings("negatives", negatives)
        if negatives.shape[1] != anchors.shape[1] or negatives.dtype != anchors.dtype:
            raise ValueError(
                f"negatives is {negatives.dtype} of width {negatives.shape[1]}, must be {anchors.dtype} of width "
                f"{anchors.shape[1]} as anchors are"
            )
    if in_view_negatives:
        if negatives is not None or hard_negative_weight != 0.0:
            raise ValueError("in_view_negatives=True takes no negatives and no hard_negative_weight")
        views = torch.stack([anchors, positives], dim=1).flatten(0, 1)
        return simcse_unsup_loss(views, temperature=temperature, gather_across_devices=gather_across_devices, impl=impl)
    if hard_negative_weight != 0.0:
        rows = anchors.shape[0]
        if negatives is None or negatives.shape[0] == 0 < rows or negatives.shape[0] % max(1, rows):
            found = "None" if negatives is None else f"{negatives.shape[0]} rows"
            raise ValueError(
                f"negatives is {found}, must have a multiple of {rows} as anchors has rows for "
                f"hard_negative_weight={hard_negative_weight}"
            )
        columns = negatives.split(rows) if rows else [negatives]
        if gather_across_devices and world_size() > 1:
            # A process without rows learns from the others how many columns there are to gather.
            total, of = sum_over_processes(torch.tensor([negatives.shape[0], rows], device=anchors.device)).tolist()
            columns = columns if rows else [negatives] * (total // max(1, of))
        return ranking_loss(
            anchors,
            [positives, *columns],
            1.0 / temperature,
            directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
            partition_mode="per_direction",
            hard_negative_weight=hard_negative_weight,
            gather_across_devices=gather_across_devices,
            impl=impl,
        )
    columns = [positives] if negatives is None else [positives, negatives]
    columns, first, processes = gather_columns(columns, gather_across_devices)
    options: dict[str, Any] = {"targets": first, "reduction": "sum", "impl": impl}
    keys = columns[0] if negatives is None else torch.cat(columns)
    loss = info_nce(anchors, keys, temperature, **options)
    if symmetric:
        everyone = gather_columns([anchors], gather_across_devices)[0][0]
        loss = (loss + info_nce(positives, everyone, temperature, **options)) / 2
    return loss * (processes / max(1, columns[0].shape[0]))


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, losses.shape[0]) if reduction == "mean" else 1)


def require_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {value!r:.80}, must be a tensor")


def _check_embeddings(name: str, value: Any, multiple: int = 1) -> None:
    require_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must be (rows, width)")
    if value.shape[0] % multiple:
        raise ValueError(f"{name} has {value.shape[0]} rows, must have a multiple of {multiple}")


def _pick_temperature(old_name: str, old: float, temperature: float | None) -> float:
    return check_positive(old_name, old) if temperature is None else check_positive("temperature", temperature)
