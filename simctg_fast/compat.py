"""Published APIs under their published names, over our own implementations."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

from .decoding import ContrastiveSearch
from .functional import cosine_similarity_matrix
from .loading import load_model
from .texts import text_list, tokenized

logger = logging.getLogger("simctg_fast")


class T5SimCTGGenerate:
    """Text to text by contrastive search, with the signature of the widely read T5 tutorial.

    Inputs are lower-cased, padded and truncated to ``max_length``; the encoder runs once; ``num_beams`` counts the
    candidates; a row stops at its end-of-sequence token and all rows after ``max_length`` steps. Unlike the tutorial's
    class, a chosen candidate's keys and values are the ones that later steps see (Su et al. 2022, eq. 5).

    Args:
        model_dir: folder (or hub name) of a T5 model and its tokenizer.
        gpu_id: CUDA device; the CPU when negative, or, with a warning, when there is no CUDA device.
        max_length: limit of input tokens and of generated tokens.
        num_beams: candidates a step.
        simctg_alpha: weight of the degeneration penalty, in [0, 1].

    Raises:
        FileNotFoundError, ValueError, OSError: as `simctg_fast.loading.load_model`.
        ValueError: an argument out of range, a model without an encoder, texts that are not strings, or one that the
            tokenizer cannot take.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        gpu_id: int = 0,
        max_length: int = 512,
        num_beams: int = 3,
        simctg_alpha: float = 0.5,
    ):
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.strategy = ContrastiveSearch(penalty_alpha=simctg_alpha, top_k=num_beams)
        self.max_length = max_length
        if gpu_id >= 0 and not torch.cuda.is_available():
            logger.warning("gpu_id=%d, but there is no CUDA device: running on the CPU (gpu_id=-1 says so).", gpu_id)
            gpu_id = -1
        self.device = torch.device("cpu" if gpu_id < 0 else f"cuda:{gpu_id}")
        self.model, self.tokenizer = load_model(model_dir, str(self.device))
        if not self.model.config.is_encoder_decoder:
            raise ValueError(
                f"model_dir must be an encoder-decoder, got a {type(self.model).__name__} in {os.fspath(model_dir)!r}; "
                "ContrastiveGenerator takes both"
            )

    def __call__(self, texts: str | Iterable[str]) -> list[str]:
        """One answer a text, without special tokens; a single string is one text."""
        texts = text_list(texts)
        if not texts:
            return []
        encoded = tokenized(
            self.tokenizer,
            [text.lower() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        tokens = self.model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            custom_generate=self.strategy,
            max_new_tokens=self.max_length,
            do_sample=False,
            num_beams=1,
        )
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def t5_cosine_similarity(outputs: Any) -> torch.Tensor:
    """Cosines of the last decoder hidden states: `(batch, length, length)`, differentiable.

    Args:
        outputs: of an encoder-decoder called with ``output_hidden_states=True``.
    """
    if getattr(outputs, "decoder_hidden_states", None) is None:
        raise ValueError("outputs has no decoder_hidden_states: call the model with output_hidden_states=True")
    return cosine_similarity_matrix(outputs.decoder_hidden_states[-1])


def compute_contrastive_loss(score_matrix: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of ``max(0, margin - s_ii + s_ij)`` over every entry of the matrices, diagonal and padding included.

    ``simctg_fast.contrastive_loss(hidden_states, margin, reduction="dense")`` is the same number without the matrix.

    Args:
        score_matrix: `(batch, length, length)` cosines, as from :func:`t5_cosine_similarity`.
        margin: rho.
    """
    if score_matrix.dim() != 3 or score_matrix.shape[1] != score_matrix.shape[2]:
        raise ValueError(f"score_matrix has shape {tuple(score_matrix.shape)}, must be (batch, length, length)")
    own = score_matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    return torch.relu(margin - own + score_matrix).mean()
