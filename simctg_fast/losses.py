"""The losses as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_devices, check_margin, check_positive, check_weight, is_integer
from .functional import (
    TOKEN_REDUCTIONS,
    contraclm_token_loss,
    contrastive_loss,
    cosine_regularization,
    require_tensor,
    simcse_sup_loss,
    simcse_unsup_loss,
)
from .ops.contrastive_loss import REDUCTIONS
from .ops.dispatch import IMPLS

__all__ = ["ContraCLMTokenLoss", "ContrastiveLoss", "CosReg", "SimCSELoss", "SimCTGLoss", "padding_mask"]


def padding_mask(tokens: Tensor, pad_token_id: int, ignore_index: int = -100) -> Tensor:
    """`(batch, length)` bool: False in the leading and in the trailing run of padding of each row, True elsewhere.

    Padding is `pad_token_id` or `ignore_index`; inside the text both are real tokens.

    Raises:
        TypeError: `tokens` is no tensor. ValueError: it is not `(batch, length)` of integers, or an id is no integer.
    """
    _check_tokens("tokens", tokens)
    for name, value in (("pad_token_id", pad_token_id), ("ignore_index", ignore_index)):
        _check_integer(name, value)
    real = (tokens != pad_token_id) & (tokens != ignore_index)
    begun = real.cumsum(dim=1) > 0
    unfinished = real.flip(1).cumsum(dim=1).flip(1) > 0
    return begun & unfinished


def _check_integer(name: str, value: Any, low: float = -(2**63)) -> None:
    if not is_integer(value, low, 2**63 - 1):
        raise ValueError(f"{name} is {value!r:.80}, must be an integer{f' of at least {low}' if low > 0 else ''}")


def _check_tokens(name: str, value: Any) -> None:
    require_tensor(name, value)
    if value.dim() != 2 or value.dtype == torch.bool or value.dtype.is_floating_point or value.dtype.is_complex:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}, must be (batch, length) of integers"
        )


class SimCTGLoss(nn.Module):
    """Likelihood and contrastive loss under the published signature; a change of import is the whole migration.

    Nothing is shifted inside: labels line up with logits. The contrastive term is the ``"pairs"`` reduction of
    :func:`simctg_fast.contrastive_loss`.

    Args:
        margin: a number in [-1, 1].
        vocab_size: size of the last dimension of the logits, at least 1.
        pad_token_id: padding is the leading and the trailing run of it; inside the text it is a real token.
        impl: as in :func:`simctg_fast.contrastive_loss`.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", eq. 1 to 3.
    """

    def __init__(self, margin: float, vocab_size: int, pad_token_id: int, *, impl: str = "auto"):
        super().__init__()
        check_margin(margin)
        _check_integer("vocab_size", vocab_size, 1)
        _check_integer("pad_token_id", pad_token_id)
        check_choice("impl", impl, IMPLS)
        self.margin = margin
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.impl = impl

    def forward(
        self,
        last_hidden_states: Tensor,
        logits: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(mle_loss, cl_loss)``, scalars of float32, or float64 where the logits or the states are.

        Args:
            last_hidden_states: `(batch, length, width)`; the decoder's, for an encoder-decoder.
            logits: `(batch, length, vocab_size)`.
            input_ids: `(batch, length)`, where padding is looked for; not read beside an `attention_mask`. An
                encoder-decoder may pass its encoder's, of any length: padding is then looked for in the labels.
            labels: `(batch, length)`, -100 where the likelihood ignores a position.
            attention_mask: `(batch, length)`, non-zero at real tokens, instead of looking for padding.

        Where every label is -100 (or there is none: batch or length 0) the likelihood is 0, with a zero gradient.

        Raises:
            TypeError: an argument that is no tensor.
            ValueError: shapes that do not belong together, logits that are not floating, labels or `input_ids` that are
                no integers, and on the CPU a label that is neither -100 nor in ``0..vocab_size - 1``.
        """
        floats = (("logits", logits), ("last_hidden_states", last_hidden_states))
        for name, value in floats:
            require_tensor(name, value)
        for name, value in floats:
            if value.dim() != 3 or not value.dtype.is_floating_point or value.layout != torch.strided:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, dtype {value.dtype} and layout {value.layout}, must be "
                    f"(batch, length, …) of floats and {torch.strided}"
                )
        _check_tokens("labels", labels)
        batch, length, vocab_size = logits.shape
        if vocab_size != self.vocab_size:
            raise ValueError(f"logits has a last dimension of {vocab_size}, must be vocab_size={self.vocab_size}")
        if labels.shape != (batch, length):
            raise ValueError(f"labels has shape {tuple(labels.shape)}, must be {(batch, length)} as logits has")
        if last_hidden_states.shape[:2] != labels.shape:
            raise ValueError(
                f"last_hidden_states has shape {tuple(last_hidden_states.shape)}, must begin with {(batch, length)} "
                "as logits does"
            )
        check_devices("logits", logits, labels=labels, last_hidden_states=last_hidden_states)
        wide = torch.promote_types(logits.dtype, torch.float32)  # as autocast has it
        rows, targets = logits.reshape(-1, vocab_size).to(wide), labels.reshape(-1).long()
        try:
            mle_loss = F.cross_entropy(rows, targets, ignore_index=-100)
        except IndexError as error:  # on the CPU; a GPU stops at an assertion
            raise ValueError(f"labels must be in 0..{vocab_size - 1}, or -100 where ignored: {error}") from error
        mle_loss = mle_loss.masked_fill((targets == -100).all(), 0.0)  # no NaN for the mean over no label
        if attention_mask is None:
            require_tensor("input_ids", input_ids)
            assert input_ids is not None
            tokens = input_ids if input_ids.shape == labels.shape else labels
            _check_tokens("input_ids", tokens)
            attention_mask = padding_mask(tokens, self.pad_token_id)
        cl_loss = contrastive_loss(last_hidden_states, self.margin, attention_mask, impl=self.impl)
        return mle_loss, cl_loss

    def extra_repr(self) -> str:
        return f"margin={self.margin}, vocab_size={self.vocab_size}, pad_token_id={self.pad_token_id}"


class ContrastiveLoss(nn.Module):
    """:func:`simctg_fast.contrastive_loss` as a module."""

    def __init__(self, margin: float = 0.5, reduction: str = "pairs", *, impl: str = "auto"):
        super().__init__()
        check_margin(margin)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("impl", impl, IMPLS)
        self.margin = margin
        self.reduction = reduction
        self.impl = impl

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A scalar from `(batch, length, width)` and, unless the reduction is ``"dense"``, an optional mask."""
        return contrastive_loss(hidden_states, self.margin, attention_mask, self.reduction, impl=self.impl)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


class ContraCLMTokenLoss(nn.Module):
    """:func:`simctg_fast.contraclm_token_loss` as a module."""

    def __init__(self, temperature: float = 0.05, reduction: str = "sequences", *, impl: str = "auto"):
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        check_choice("reduction", reduction, TOKEN_REDUCTIONS)
        check_choice("impl", impl, IMPLS)
        self.reduction = reduction
        self.impl = impl

    def forward(self, hidden_states: Tensor, hidden_states_2: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A scalar from two views `(batch, length, width)` of the same tokens."""
        return contraclm_token_loss(
            hidden_states, hidden_states_2, attention_mask, self.temperature, self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class CosReg(nn.Module):
    """:func:`simctg_fast.cosine_regularization` as a module."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A scalar from `(batch, length, width)`."""
        return cosine_regularization(hidden_states, attention_mask)


class SimCSELoss(nn.Module):
    """:func:`simctg_fast.simcse_unsup_loss` and :func:`simctg_fast.simcse_sup_loss` as a module over embeddings.

    The class of the same name in `simctg_fast.integrations.sentence_transformers` encodes the sentences as well.

    Args:
        temperature: from 1e-30 to 1e30.
        supervised: False takes `(2n, width)` interleaved pairs, True `(3n, width)` interleaved triples.
        symmetric: for triples, also each positive against all anchors. Pairs are symmetric as they are.
        hard_negative_weight: for triples, see :func:`simctg_fast.simcse_sup_loss`.
        gather_across_devices: the rows of all processes are negatives, with gradients; see
            :func:`simctg_fast.simcse_unsup_loss`.
        impl: as in :func:`simctg_fast.contrastive_loss`.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        supervised: bool = False,
        symmetric: bool = False,
        hard_negative_weight: float = 0.0,
        gather_across_devices: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        if symmetric and not supervised:
            raise ValueError("symmetric=True is for supervised=True; the unsupervised loss is symmetric as it is")
        self.temperature = check_positive("temperature", temperature)
        self.hard_negative_weight = check_weight("hard_negative_weight", hard_negative_weight)
        if self.hard_negative_weight != 0.0 and not supervised:
            raise ValueError(
                f"hard_negative_weight={hard_negative_weight} is for supervised=True: pairs have no hard one"
            )
        self.supervised = supervised
        self.symmetric = symmetric
        self.gather_across_devices = gather_across_devices
        self.impl = impl

    def forward(self, embeddings: Tensor) -> Tensor:
        """A scalar."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "gather_across_devices": self.gather_across_devices,
            "impl": self.impl,
        }
        if not self.supervised:
            return simcse_unsup_loss(embeddings, **options)
        options["hard_negative_weight"] = self.hard_negative_weight
        return simcse_sup_loss(embeddings, symmetric=self.symmetric, **options)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, supervised={self.supervised}, symmetric={self.symmetric}, "
            f"hard_negative_weight={self.hard_negative_weight}, gather_across_devices={self.gather_across_devices}"
        )
