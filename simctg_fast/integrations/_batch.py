"""What a training batch says about the decoder's tokens: which are real, and how many the likelihood counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_margin, check_positive, is_number
from ..functional import TOKEN_REDUCTIONS
from ..ops.contrastive_loss import REDUCTIONS
from ..ops.dispatch import IMPLS

IGNORE_INDEX = -100
# Present where several sequences lie in one row; their hidden states must not be compared with each other.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

# What stands beside the likelihood: its own settings with their defaults, and what logs call it.
LOSSES: dict[str, dict[str, Any]] = {
    "simctg": {"margin": 0.5, "reduction": "pairs"},
    "contraclm": {"temperature": 0.05, "reduction": "sequences"},
    "cosreg": {},
}
TERMS = {"simctg": "contrastive_loss", "contraclm": "contraclm_loss", "cosreg": "cosreg_loss"}


def loss_settings(
    loss: str,
    margin: float | None,
    reduction: str | None,
    temperature: float | None,
    contrastive_weight: float,
    impl: str = "auto",
) -> dict[str, Any]:
    """The settings of a loss, all three of them: the loss's own default in place of None, None where it has none.

    Raises:
        ValueError: an unknown loss, a value outside its range, or one of a setting that the loss does not have.
        TypeError: a temperature that is no number.
    """
    check_choice("loss", loss, tuple(LOSSES))
    given = {"margin": margin, "reduction": reduction, "temperature": temperature}
    for name, value in given.items():
        if value is not None and name not in LOSSES[loss]:
            raise ValueError(f"{name} is {value!r:.80}, must be left out with loss={loss!r}, which has none")
    settings: dict[str, Any] = {
        name: LOSSES[loss].get(name) if value is None else value for name, value in given.items()
    }
    if loss == "contraclm":
        check_choice("reduction", settings["reduction"], TOKEN_REDUCTIONS)
        settings["temperature"] = check_positive("temperature", settings["temperature"])
    checked = settings if loss == "simctg" else LOSSES["simctg"]
    check_loss_settings(checked["margin"], checked["reduction"], contrastive_weight, impl)
    return settings


def check_loss_settings(margin: float, reduction: str, contrastive_weight: float, impl: str = "auto") -> None:
    check_margin(margin)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    if not is_number(contrastive_weight, 0):
        raise ValueError(f"contrastive_weight is {contrastive_weight!r:.80}, must be a number of at least 0")


def real_tokens(inputs: Mapping[str, Any], is_encoder_decoder: bool) -> Tensor:
    """``(B, T)``, non-zero at the decoder's real tokens.

    A decoder's own ``attention_mask``, or all tokens where there is none; for an encoder-decoder the labels that are
    not -100, without those that a ``decoder_attention_mask`` hides.
    """
    packed = [name for name in _PACKED if inputs.get(name) is not None]
    if packed:
        raise ValueError(
            f"the batch has {packed[0]}: several sequences share a row, and the contrastive loss would compare their "
            "tokens with each other; pad the sequences instead"
        )
    if is_encoder_decoder:
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"the batch must have labels, got {', '.join(inputs)}")
        mask, real = inputs.get("decoder_attention_mask"), labels.ne(IGNORE_INDEX)
        return real if mask is None else real & mask.ne(0)
    mask = inputs.get("attention_mask")
    if mask is None:
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "the batch has position_ids but no attention_mask, as a row of several sequences has; give an "
                "attention_mask (all ones if nothing is padded)"
            )
        for name in ("input_ids", "inputs_embeds"):
            if inputs.get(name) is not None:
                tokens = inputs[name]
                return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        raise ValueError(f"the batch must have attention_mask, input_ids or inputs_embeds, got {', '.join(inputs)}")
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, must be (batch, length)")
    return mask


def count_labels(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """How many labels the likelihood averages over, an int64 scalar; without the first of a row where the model
    shifts them."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"][..., 1:] if shifted else inputs["labels"]
    return labels.ne(IGNORE_INDEX).sum()


def check_lengths(hidden_states: Tensor, mask: Tensor) -> None:
    if hidden_states.shape[:2] != mask.shape:
        raise ValueError(
            f"the model's last hidden states have shape {tuple(hidden_states.shape)}, the batch's tokens "
            f"{tuple(mask.shape)}: a model that adds or drops positions (prefix or prompt tuning, images) needs a mask "
            "of its own"
        )


@torch.no_grad()
def isotropy_sums(hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of ``1 -`` the mean cosine of their pairs, and how many sequences have a pair; no sync."""
    unit = torch.nn.functional.normalize(hidden_states.detach().float(), dim=-1)
    unit = unit.masked_fill(mask.eq(0).unsqueeze(-1), 0.0)
    count = mask.ne(0).sum(dim=1)
    # The sum over all pairs is the squared length of the sum of the unit vectors, less the diagonal.
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    has_pair = count >= 2
    values = 1.0 - pairs / (count * (count - 1)).clamp_min(1)
    return values.masked_fill(~has_pair, 0.0).sum(), has_pair.sum()
