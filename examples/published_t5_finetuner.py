"""The T5 tutorial's Lightning module, restated: the same batch keys, the same loss, and the same two flaws (it writes
-100 into the batch's `target_ids`, and its contrastive term counts padding). The baseline of `train_t5.py`."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, T5ForConditionalGeneration

try:
    from lightning.pytorch import LightningModule
except ImportError:
    from pytorch_lightning import LightningModule


def t5_cosine_similarity(outputs) -> Tensor:
    """(B, T, T) from the decoder's last hidden states."""
    states = outputs.decoder_hidden_states[-1]
    unit = states / states.norm(dim=2, keepdim=True)
    return unit @ unit.transpose(1, 2)


def compute_contrastive_loss(score_matrix: Tensor, margin: float) -> Tensor:
    """The mean over all entries, diagonal and padding included."""
    own = score_matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    return F.relu(margin - own + score_matrix).mean()


class T5FineTuner(LightningModule):
    def __init__(self, hparams: argparse.Namespace):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.model = T5ForConditionalGeneration.from_pretrained(hparams.model_name_or_path)
        self.tokenizer = AutoTokenizer.from_pretrained(hparams.tokenizer_name_or_path)

    def forward(self, input_ids, attention_mask=None, decoder_attention_mask=None, labels=None):
        return self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            output_hidden_states=True,
        )

    def _step(self, batch):
        labels = batch["target_ids"]
        labels[labels == self.tokenizer.pad_token_id] = -100
        outputs = self(
            input_ids=batch["source_ids"],
            attention_mask=batch["source_mask"],
            decoder_attention_mask=batch["target_mask"],
            labels=labels,
        )
        scores = t5_cosine_similarity(outputs)
        return outputs.loss + compute_contrastive_loss(scores, 0.5)

    def training_step(self, batch, batch_idx):
        loss = self._step(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        sizes = {True: [], False: []}
        for parameter in self.model.parameters():
            sizes[parameter.ndim > 1].append(parameter)
        groups = [
            {"params": sizes[True], "weight_decay": self.hparams.weight_decay},
            {"params": sizes[False], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.hparams.learning_rate, eps=self.hparams.adam_epsilon)
