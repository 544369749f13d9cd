"""The Hugging Face Trainer with likelihood plus ``contrastive_weight`` times the contrastive loss, or another.

`SimCTGTrainer` is exact: gradient accumulation and several processes give the gradient of one big batch.
`SimCTGComputeLoss` plugs into a plain Trainer through ``compute_loss_func`` and is an approximation.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from ..decoding.caches import CACHE_NAME
from ..distributed import sum_over_processes, world_size
from ..functional import (
    contraclm_token_loss,
    contraclm_token_loss_items,
    contrastive_loss,
    contrastive_loss_items,
    cosine_regularization,
)
from ._batch import (
    IGNORE_INDEX,
    TERMS,
    check_lengths,
    check_loss_settings,
    count_labels,
    isotropy_sums,
    loss_settings,
    real_tokens,
)

__all__ = ["SimCTGComputeLoss", "SimCTGSeq2SeqTrainer", "SimCTGTrainer", "SimCTGTrainerMixin"]

HIDDEN_STATES = ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")

# Newer releases of transformers take the index of the one layer to keep; others keep all, of which the last is used.
_LAST_LAYER: int | bool = -1 if importlib.util.find_spec("transformers.utils.output_capturing") else True
if _LAST_LAYER is not True:
    from transformers.utils import output_capturing

    _LAST_LAYER = -1 if hasattr(output_capturing, "selected_hidden_states") else True

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SimCTGTrainerMixin(_Base):
    """Puts the loss into any `Trainer`: ``class MyTrainer(SimCTGTrainerMixin, Trainer)``.

    Args:
        loss: what stands beside the likelihood: ``"simctg"``, the contrastive loss; ``"contraclm"``, ContraCLM's
            token-level loss, see :func:`simctg_fast.contraclm_token_loss`; or ``"cosreg"``, the mean cosine, see
            :func:`simctg_fast.cosine_regularization`.
        margin: of ``"simctg"``, in [-1, 1]; None: 0.5.
        reduction: of ``"simctg"`` ``"pairs"`` (None), ``"paper"`` or ``"dense"``, see
            :func:`simctg_fast.contrastive_loss`; of ``"contraclm"`` ``"sequences"`` (None) or ``"tokens"``.
        temperature: of ``"contraclm"``, from 1e-30 to 1e30; None: 0.05.
        contrastive_weight: factor of the loss beside the likelihood, at least 0.
        impl: as in :func:`simctg_fast.contrastive_loss`.
        All other arguments are Trainer's.

    What the terms are divided by is counted over the whole accumulated batch and all processes: the likelihood by the
    labels that count, ``"pairs"`` by the pairs of real tokens, ``"tokens"`` by the real tokens, ``"paper"``,
    ``"sequences"`` and ``"cosreg"`` by the sequences. ``"dense"`` counts padding, whose amount depends on how the batch
    was cut, so it is refused where there is more than one piece. Real tokens are those of ``attention_mask``; for an
    encoder-decoder the labels that are not -100.

    ``"contraclm"`` takes a second forward pass a training step, whose dropout makes the second view; a model without
    dropout gives the same view twice. In evaluation, without dropout, the one view is compared with itself.

    The likelihood is the model's own loss (or that of Trainer's ``compute_loss_func`` or label smoothing), asked for as
    the mean over the micro-batch and weighted by its labels here: many models, T5 and BART among them, take
    ``num_items_in_batch`` and ignore it.

    Training logs carry ``mle_loss``, ``contrastive_loss`` (unweighted; ``contraclm_loss`` or ``cosreg_loss``) and
    ``isotropy`` beside ``loss``, evaluation ``eval_mle_loss`` and ``eval_contrastive_loss``. Hidden states are not
    gathered in evaluation.

    Raises:
        TypeError: a temperature that is no number.
        ValueError: a setting outside the above, or one that the loss does not have; ``"dense"`` with accumulation or
            several processes; several GPUs in one process; a batch whose rows hold several sequences each.
    """

    # The loss is divided by the counts of the whole accumulated batch; Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        loss: str = "simctg",
        margin: float | None = None,
        reduction: str | None = None,
        temperature: float | None = None,
        contrastive_weight: float = 1.0,
        impl: str = "auto",
        **kwargs: Any,
    ):
        settings = loss_settings(loss, margin, reduction, temperature, contrastive_weight, impl)
        super().__init__(*args, **kwargs)
        self.loss, self.contrastive_weight, self.impl = loss, contrastive_weight, impl
        self.margin, self.reduction, self.temperature = (settings[n] for n in ("margin", "reduction", "temperature"))
        self._totals: tuple[Tensor, Tensor] | None = None
        self._micro_batches_left = 0
        self._train_sums: Tensor | None = None
        self._steps_summed = 0
        self._eval_sums: Tensor | None = None

        steps, processes = self.args.gradient_accumulation_steps, world_size()
        if reduction == "dense" and (steps > 1 or processes > 1):
            raise ValueError(
                "reduction='dense' averages over padding too, so it cannot be added up over pieces of a batch; got "
                f"gradient_accumulation_steps={steps} and {processes} processes; take 'pairs' or 'paper'"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process; start one process a GPU (torchrun) instead")
        for what in ("get_cp_size", "get_sp_size"):
            if hasattr(self, what) and getattr(self, what)() > 1:
                raise ValueError(f"loss={loss!r} compares all tokens of a sequence: no sequence parallelism")

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            counts += torch.stack([count.to(device) for count in self._count(batch)])
        total = sum_over_processes(counts)
        self._totals, self._micro_batches_left = (total[0], total[1]), len(batches)
        self._steps_summed += bool(batches)
        return batches, num_items

    def _count(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels and pairs (or sequences, or real tokens) of a micro-batch."""
        mask = real_tokens(batch, self._is_encoder_decoder)
        if self.loss == "contraclm":
            items = contraclm_token_loss_items(mask, self.reduction)
        else:
            items = contrastive_loss_items(mask, "paper" if self.loss == "cosreg" else self.reduction)
        return count_labels(batch, shifted=not self._is_encoder_decoder), items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        mask, (labels, _) = real_tokens(inputs, self._is_encoder_decoder), self._count(inputs)
        given = inputs
        inputs = {**inputs, "output_hidden_states": _LAST_LAYER}
        mle, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=None)
        states = self._last_states(outputs)
        check_lengths(states, mask)

        totals = self._totals_of_this_micro_batch() if model.training else None
        items = None if totals is None or self.reduction == "dense" else totals[1]
        if self.loss == "cosreg":
            contrastive = cosine_regularization(states, mask, normalizer=items)
        elif self.loss == "contraclm":
            second = self._second_view(model, given) if model.training else states
            contrastive = contraclm_token_loss(
                states, second, mask, self.temperature, self.reduction, normalizer=items, impl=self.impl
            )
        else:
            real = None if self.reduction == "dense" else mask
            contrastive = contrastive_loss(states, self.margin, real, self.reduction, normalizer=items, impl=self.impl)
        if totals is not None:
            # Data-parallel training averages over processes what is a share of one sum here.
            share = labels.to(mle.dtype) / totals[0].clamp_min(1)
            mle = torch.where(labels > 0, mle, torch.zeros_like(mle)) * share * world_size()
            contrastive = contrastive * world_size()
        loss = mle + self.contrastive_weight * contrastive
        self._sum_terms(model.training, mle, contrastive, states, mask)
        if totals is not None and self._trainer_divides(num_items_in_batch):
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _last_states(self, outputs: Any) -> Tensor:
        states: Tensor = outputs["decoder_hidden_states" if self._is_encoder_decoder else "hidden_states"][-1]
        return states

    def _second_view(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The last hidden states of another pass, with a dropout of its own."""
        inputs = {**inputs, "output_hidden_states": _LAST_LAYER}
        if not self._is_encoder_decoder:  # which makes its decoder's inputs from the labels
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                inputs["logits_to_keep"] = 1  # nobody looks at them
        return self._last_states(model(**inputs))

    def _totals_of_this_micro_batch(self) -> tuple[Tensor, Tensor] | None:
        """None where `get_batch_samples` did not prepare this step: then the micro-batch is the batch."""
        if self._micro_batches_left == 0:
            return None
        self._micro_batches_left -= 1
        return self._totals

    def _trainer_divides(self, num_items_in_batch: Any) -> bool:
        """Releases that do not know `loss_is_scaled_for_ga` divide by the accumulation steps unless told so by this."""
        if hasattr(Trainer, "loss_is_scaled_for_ga"):
            return False
        return (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None

    def _sum_terms(self, training: bool, mle: Tensor, contrastive: Tensor, states: Tensor, mask: Tensor) -> None:
        """Adds up what the next log line shows; everything stays on the device."""
        if training:
            terms = torch.stack([mle, contrastive, *isotropy_sums(states, mask)]).detach().float()
            self._train_sums = terms if self._train_sums is None else self._train_sums + terms
        else:
            rows = states.shape[0]
            terms = torch.stack([mle * rows, contrastive * rows, torch.full_like(contrastive, rows)]).detach().float()
            self._eval_sums = terms if self._eval_sums is None else self._eval_sums + terms

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # The line of training steps, which every process writes; callers may log other lines from one process only.
        if "loss" in logs and "learning_rate" in logs and self._train_sums is not None:
            mle, contrastive, isotropy, sequences = (sum_over_processes(self._train_sums) / world_size()).tolist()
            steps = max(1, self._steps_summed)
            logs = {**logs, "mle_loss": mle / steps, TERMS[self.loss]: contrastive / steps}
            if sequences:
                logs["isotropy"] = isotropy / sequences
            self._train_sums, self._steps_summed = None, 0
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [CACHE_NAME])
        ignore_keys = [*ignore_keys, *HIDDEN_STATES]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._eval_sums = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_sums is not None and output.metrics is not None:
            mle, contrastive, rows = sum_over_processes(self._eval_sums).tolist()
            output.metrics[f"{metric_key_prefix}_mle_loss"] = mle / rows
            output.metrics[f"{metric_key_prefix}_{TERMS[self.loss]}"] = contrastive / rows
        return output


class SimCTGTrainer(SimCTGTrainerMixin, Trainer):
    __doc__ = SimCTGTrainerMixin.__doc__


class SimCTGSeq2SeqTrainer(SimCTGTrainerMixin, Seq2SeqTrainer):
    """`SimCTGTrainer` on top of `Seq2SeqTrainer`: evaluation can generate."""


class SimCTGComputeLoss:
    """``Trainer(..., compute_loss_func=SimCTGComputeLoss(model))``: the loss without a subclass, approximately.

    The likelihood is exact: the sum over labels over ``num_items_in_batch``. The contrastive term of each micro-batch
    is weighted by its share of the *labels*, the only count Trainer hands on, where exact would be its share of the
    pairs (or sequences). Where ``c`` are the contrastive losses of the micro-batches, ``v`` their shares of the labels
    and ``w`` those of the pairs, the error is at most ``(max c - min c) * sum(|v - w|) / 2``: zero for a single
    micro-batch, or when all are of one shape. `SimCTGTrainer` has no such error.

    Real tokens are the labels that are not -100 (Trainer hands on no mask), so the tokens of a prompt that is masked
    out of the labels are left out of the contrastive term too.

    The last hidden states are read where they enter the output embedding: the model's outputs and configuration stay
    as they are, and nothing more is gathered in evaluation. Make it before the Trainer.

    An encoder-decoder gets no labels in its forward, as Trainer takes them out, so the collator has to make
    ``decoder_input_ids``: ``DataCollatorForSeq2Seq(tokenizer, model=model)``.

    Args:
        model: the model that is trained, wrapped by nothing but PEFT.
        margin, reduction, contrastive_weight, impl: as in `SimCTGTrainer`, without ``"dense"``.

    Raises:
        ValueError: a setting outside the above, or a model without an output embedding.
    """

    def __init__(
        self,
        model: Any,
        *,
        margin: float = 0.5,
        reduction: str = "pairs",
        contrastive_weight: float = 1.0,
        impl: str = "auto",
    ):
        check_loss_settings(margin, reduction, contrastive_weight, impl)
        if reduction == "dense":
            raise ValueError("reduction='dense' cannot be added up over micro-batches; take 'pairs' or 'paper'")
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no output embedding to read hidden states at; take SimCTGTrainer"
            )
        self.margin, self.reduction, self.contrastive_weight, self.impl = margin, reduction, contrastive_weight, impl
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._hidden_states: Tensor | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not self.is_encoder_decoder and getattr(base, "loss_type", None) is None:
            # GPT-2 among others names no loss and is given this one; but Trainer goes by the name when it counts the
            # labels, and would count the first of each row, which predicts nothing.
            base.loss_type = "ForCausalLM"
        self._hooks = [head.register_forward_pre_hook(self._keep_hidden_states)]
        if self.is_encoder_decoder:
            self._hooks.append(model.register_forward_pre_hook(self._check_decoder_inputs, with_kwargs=True))

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hidden_states = [], None

    def _keep_hidden_states(self, module: nn.Module, args: tuple) -> None:
        # Not in generation, whose calls nobody collects.
        self._hidden_states = args[0] if args else None

    @staticmethod
    def _check_decoder_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = ("labels", "decoder_input_ids", "decoder_inputs_embeds")
        if not args and all(kwargs.get(name) is None for name in inputs):
            raise ValueError(
                "the batch has no decoder_input_ids, and Trainer takes the labels out when compute_loss_func is given; "
                "use DataCollatorForSeq2Seq(tokenizer, model=model), or SimCTGTrainer"
            )

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A scalar.

        Args:
            outputs: of the model, with ``logits`` ``(B, T, V)``.
            labels: ``(B, T)``, not shifted, -100 where nothing is predicted.
            num_items_in_batch: labels of the whole accumulated batch; None: of this micro-batch.
        """
        states, self._hidden_states = self._hidden_states, None  # the graph is not kept alive until the next step
        if labels is None:
            raise ValueError("the batch has no labels")
        if states is None:
            raise RuntimeError(
                "no hidden states reached the output embedding in the last forward (a fused kernel may have taken its "
                "place); take SimCTGTrainer"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if states.shape[:2] != labels.shape or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, hidden states {tuple(states.shape)} and logits "
                f"{tuple(logits.shape)} must begin with it"
            )
        if self.is_encoder_decoder:
            targets, predictions = labels, logits
        else:
            targets, predictions = labels[:, 1:], logits[:, :-1]
        total = targets.ne(IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        total = torch.as_tensor(total, device=labels.device).clamp_min(1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        mle = F.cross_entropy(
            predictions.flatten(0, 1).to(wide), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        contrastive = contrastive_loss(states, self.margin, labels.ne(IGNORE_INDEX), self.reduction, impl=self.impl)
        share = targets.ne(IGNORE_INDEX).sum().to(contrastive.dtype) / total
        return mle / total + self.contrastive_weight * share * contrastive
