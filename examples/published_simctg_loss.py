"""The published SimCTG loss class, restated: the same signature, the same numbers on right-padded batches, and the same
costs (a (B, T, T) matrix and a mask that is built row by row on the CPU). The baseline of `train_simctg.py`.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", eq. 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimCTGLoss(nn.Module):
    def __init__(self, margin: float, vocab_size: int, pad_token_id: int):
        super().__init__()
        self.margin, self.vocab_size, self.pad_token_id = margin, vocab_size, pad_token_id

    def forward(
        self, last_hidden_states: Tensor, logits: Tensor, input_ids: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert labels.size() == input_ids.size()
        mle_loss = F.cross_entropy(logits.view(-1, self.vocab_size), labels.view(-1), ignore_index=-100)
        unit = last_hidden_states / last_hidden_states.norm(dim=2, keepdim=True)
        similarity = unit @ unit.transpose(1, 2)  # (B, T, T)
        own = similarity.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        hinge = F.relu(self.margin - own + similarity)
        mask = self._pairs(input_ids).to(hinge)
        return mle_loss, (hinge * mask).sum() / mask.sum()

    def _pairs(self, input_ids: Tensor) -> Tensor:
        """1 at pairs of different real tokens; one row at a time, by way of the CPU."""
        length = input_ids.shape[1]
        rows = []
        for row in input_ids.cpu():
            real = int((row != self.pad_token_id).sum())
            pairs = torch.zeros(length, length)
            pairs[:real, :real] = 1.0 - torch.eye(real)
            rows.append(pairs)
        return torch.stack(rows)
