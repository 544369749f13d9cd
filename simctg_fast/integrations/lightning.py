"""SimCTG with Lightning: a module that fine-tunes T5, BART or GPT-2, and the T5 tutorial's class over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..assets import resolve_model
from ..checks import is_integer, is_number
from ..functional import contrastive_loss
from ._batch import IGNORE_INDEX, check_lengths, check_loss_settings, isotropy_sums, real_tokens

try:
    from lightning.pytorch import LightningModule
except ImportError:
    try:
        from pytorch_lightning import LightningModule
    except ImportError as error:
        raise ImportError("this needs Lightning: pip install 'simctg_fast[lightning]'") from error

__all__ = ["Losses", "SimCTGModule", "T5FineTuner", "simctg_step"]

# The tutorial's names of what a batch holds, and the model's.
_TUTORIAL_KEYS = {
    "source_ids": "input_ids",
    "source_mask": "attention_mask",
    "target_ids": "labels",
    "target_mask": "decoder_attention_mask",
}

_OF_LOSS = ("margin", "reduction", "contrastive_weight", "pad_token_id", "impl")
_OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps")


class Losses(NamedTuple):
    """Scalars; ``loss = mle_loss + contrastive_weight * contrastive_loss``. ``isotropy`` carries no gradient."""

    loss: Tensor
    mle_loss: Tensor
    contrastive_loss: Tensor
    isotropy: Tensor


def simctg_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    margin: float = 0.5,
    reduction: str = "pairs",
    contrastive_weight: float = 1.0,
    pad_token_id: int | None = None,
    impl: str = "auto",
) -> Losses:
    """One batch through the model, and the terms of its loss. The batch is not written to.

    Args:
        batch: what the model takes (``input_ids``, ``attention_mask``, ``labels``, …) or the tutorial's ``source_ids``,
            ``source_mask``, ``target_ids``, ``target_mask``. Without labels a decoder learns its ``input_ids``.
        pad_token_id: labels that are this become -100 in a copy, as the tutorial does in place. None: labels are used
            as they are, except under the tutorial's names, where the model's own ``pad_token_id`` is taken.
        margin, reduction, contrastive_weight, impl: as in `SimCTGModule`.
    """
    check_loss_settings(margin, reduction, contrastive_weight)
    inputs = {_TUTORIAL_KEYS.get(name, name): value for name, value in batch.items()}
    config: Any = model.config
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    if pad_token_id is None and "target_ids" in batch:
        pad_token_id = config.pad_token_id
    if not two_sided:
        inputs.pop("decoder_attention_mask", None)
        if inputs.get("labels") is None:
            inputs["labels"] = inputs["input_ids"]
            if inputs.get("attention_mask") is not None:
                inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].eq(0), IGNORE_INDEX)
    if inputs.get("labels") is None:
        raise ValueError(f"the batch must have labels (or target_ids), got {', '.join(batch)}")
    if pad_token_id is not None:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"].eq(pad_token_id), IGNORE_INDEX)

    outputs = model(**inputs, output_hidden_states=True)
    states = (outputs.decoder_hidden_states if two_sided else outputs.hidden_states)[-1]
    mask = real_tokens(inputs, two_sided)
    check_lengths(states, mask)
    contrastive = contrastive_loss(states, margin, None if reduction == "dense" else mask, reduction, impl=impl)
    total, sequences = isotropy_sums(states, mask)
    return Losses(
        loss=outputs.loss + contrastive_weight * contrastive,
        mle_loss=outputs.loss.detach(),
        contrastive_loss=contrastive.detach(),
        isotropy=total / sequences.clamp_min(1),
    )


class SimCTGModule(LightningModule):
    """Fine-tunes a decoder or an encoder-decoder with likelihood plus contrastive loss.

    Args:
        model: a transformers model, or a name for ``from_pretrained`` (``"bundled"``, a folder, a hub name).
        margin: in [-1, 1].
        reduction: ``"pairs"``, ``"paper"`` or ``"dense"``, see :func:`simctg_fast.contrastive_loss`.
        contrastive_weight: at least 0.
        pad_token_id: labels that are this become -100, see `simctg_step`.
        learning_rate, weight_decay, adam_epsilon: of AdamW; biases and norms are not decayed.
        warmup_steps: the learning rate rises over these and then falls linearly to zero by the trainer's last step.
            None: it is constant.
        impl: as in :func:`simctg_fast.contrastive_loss`.

    Logs ``train_loss``, ``train_mle_loss``, ``train_contrastive_loss``, ``train_isotropy``, and the same with ``val_``.
    Under gradient accumulation Lightning averages the losses of the pieces; `SimCTGTrainer` weights them exactly.

    Raises:
        ValueError: a setting outside the above.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        margin: float = 0.5,
        reduction: str = "pairs",
        contrastive_weight: float = 1.0,
        pad_token_id: int | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-8,
        warmup_steps: int | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        check_loss_settings(margin, reduction, contrastive_weight, impl)
        for name, value in (("learning_rate", learning_rate), ("adam_epsilon", adam_epsilon)):
            if not is_number(value, 0, above=True):
                raise ValueError(f"{name} is {value!r:.80}, must be a finite number above 0")
        if not is_number(weight_decay, 0):
            raise ValueError(f"weight_decay is {weight_decay!r:.80}, must be a finite number of at least 0")
        if warmup_steps is not None and not is_integer(warmup_steps, 0):
            raise ValueError(f"warmup_steps is {warmup_steps!r:.80}, must be an integer of at least 0")
        if pad_token_id is not None and not is_integer(pad_token_id):
            raise ValueError(f"pad_token_id is {pad_token_id!r:.80}, must be an integer")
        # By name, so that a subclass's own arguments are its own business.
        self.save_hyperparameters(*_OF_LOSS, *_OF_OPTIMIZER)
        self.model = model if isinstance(model, nn.Module) else _load(model)
        # `from_pretrained` hands models over in evaluation mode, and Lightning leaves modes as it finds them.
        self.model.train()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def losses(self, batch: Mapping[str, Any]) -> Losses:
        """See `simctg_step`."""
        return simctg_step(self.model, batch, **{name: self.hparams[name] for name in _OF_LOSS})

    def _step(self, batch: Mapping[str, Any]) -> Tensor:
        return self.losses(batch).loss

    def _logged(self, stage: str, batch: Mapping[str, Any]) -> Tensor:
        losses = self.losses(batch)
        rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
        values = {f"{stage}_{name}": value.detach() for name, value in losses._asdict().items()}
        self.log_dict(values, batch_size=rows, prog_bar=stage == "train", sync_dist=stage == "val")
        return losses.loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._logged("train", batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._logged("val", batch)

    def configure_optimizers(self) -> Any:
        settings = self.hparams
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        decayed = [p for _, p in parameters if p.ndim > 1]
        others = [p for _, p in parameters if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], eps=settings["adam_epsilon"])
        if settings["warmup_steps"] is None:
            return optimizer
        from transformers import get_linear_schedule_with_warmup

        last = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, settings["warmup_steps"], last)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class T5FineTuner(SimCTGModule):
    """The T5 tutorial's module under its own signature and with its own numbers: the ``"dense"`` reduction, margin 0.5.

    Args:
        hparams: an `argparse.Namespace` or a dict with ``model_name_or_path`` and, where wanted,
            ``tokenizer_name_or_path``, ``learning_rate`` (3e-4), ``weight_decay`` (0), ``adam_epsilon`` (1e-8),
            ``warmup_steps``; others are kept and not read. ``margin``, ``reduction`` and ``contrastive_weight`` may be
            given too.

    Batches have ``source_ids``, ``source_mask``, ``target_ids``, ``target_mask``. Unlike the tutorial's, the module
    does not write -100 into the batch's ``target_ids``.
    """

    def __init__(self, hparams: Any):
        values = dict(hparams) if isinstance(hparams, Mapping) else dict(vars(hparams))
        if "model_name_or_path" not in values:
            raise ValueError(f"hparams must have model_name_or_path, got {', '.join(values) or 'none'}")
        name = values["model_name_or_path"]
        read = ("margin", "reduction", "contrastive_weight", *_OF_OPTIMIZER)
        settings: dict[str, Any] = {"reduction": "dense", "learning_rate": 3e-4} | {
            key: values[key] for key in read if key in values
        }
        super().__init__(name, **settings)
        self.hparams.update({key: value for key, value in values.items() if key not in self.hparams})
        self.hparams["hparams"] = values  # what `load_from_checkpoint` hands to this class; a plain dict, loaded safely
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(resolve_model(values.get("tokenizer_name_or_path") or name))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            **options,
        )


def _load(name: str | os.PathLike[str]) -> nn.Module:
    from ..loading import load_model

    return load_model(name, "cpu", dtype=torch.float32)[0]
