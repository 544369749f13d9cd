"""Published APIs under their published names, over our own implementations."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .checks import is_integer, require
from .decoding import ContrastiveSearch
from .functional import cosine_similarity_matrix
from .loading import load_model
from .text.batches import pad_token, stacked
from .text.contrastive_generator import search_tokens
from .text.texts import short, text_list

logger = logging.getLogger("simctg_fast")


class T5SimCTGGenerate:
    """Text to text by contrastive search, with the signature of the widely read T5 tutorial.

    Inputs are lower-cased, padded and truncated to ``max_length``; the encoder runs once; ``num_beams`` counts the
    candidates; a row stops at its end-of-sequence token and all rows after ``max_length`` steps. Unlike the tutorial's
    class, a chosen candidate's keys and values are the ones that later steps see (Su et al. 2022, eq. 5).

    As there, a call is :meth:`preprocess` of each text, :meth:`forward` of all, and the tokenizer's ``decode``; what a
    subclass overrides is used, and so are ``max_length``, ``num_beams`` and ``simctg_alpha`` where they are set later.

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
        require(is_integer(max_length, 1), "max_length", max_length, "an integer of at least 1")
        require(is_integer(gpu_id), "gpu_id", gpu_id, "an integer, negative for the CPU")
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

    @property
    def num_beams(self) -> int | None:
        return self.strategy.top_k

    @num_beams.setter
    def num_beams(self, value: int) -> None:
        self.strategy = ContrastiveSearch(penalty_alpha=self.strategy.penalty_alpha, top_k=value)

    @property
    def simctg_alpha(self) -> float | None:
        return self.strategy.penalty_alpha

    @simctg_alpha.setter
    def simctg_alpha(self, value: float) -> None:
        self.strategy = ContrastiveSearch(penalty_alpha=value, top_k=self.strategy.top_k)

    def __call__(self, texts: str | Iterable[str]) -> list[str]:
        """One answer a text, without special tokens; a single string is one text."""
        texts = text_list(texts)
        if not texts:
            return []
        tokens = self.forward(*self._batch(texts))
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def forward(self, batch_input_ids: torch.Tensor, batch_attention_mask: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens)`` int64, special tokens among them, from ``(batch, length)`` tokens and their mask."""
        inputs = {"input_ids": batch_input_ids.to(self.device), "attention_mask": batch_attention_mask.to(self.device)}
        pad = pad_token(self.tokenizer, self.model.config)
        return search_tokens(self.model, inputs, 1 + self.max_length, self.strategy, pad)

    def preprocess(self, text: str) -> Any:
        """The tokens of one text, for subclasses to override: here those of the text in lower case, truncated.

        Returns:
            A mapping with ``input_ids`` and ``attention_mask``, ``(1, length)`` or ``(length,)`` each, padded or not;
            lengths may differ. An override may also return a string: its tokens are taken, as it is.
        """
        return self._tokens(text.lower())

    def _tokens(self, text: str) -> Any:
        return self.tokenizer([text], truncation=True, max_length=self.max_length, return_tensors="pt")

    def _batch(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(batch, length)`` tokens and mask, no longer than the longest text."""
        ids, masks = [], []
        for index, text in enumerate(texts):
            try:
                tokens = self.preprocess(text)
                if isinstance(tokens, str):
                    tokens = self._tokens(tokens)
            except Exception as error:  # of any kind, by tokenizer
                raise ValueError(
                    f"texts[{index}] cannot be preprocessed ({type(error).__name__}: {error}), got {short(text)}"
                ) from error
            if not isinstance(tokens, Mapping) or not {"input_ids", "attention_mask"} <= set(tokens):
                raise ValueError(
                    "preprocess must return a string or a mapping with input_ids and attention_mask, got "
                    f"{type(tokens).__name__} {short(tokens)} for texts[{index}]"
                )
            row, mask = (torch.as_tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
            if row.numel() != row.shape[-1] or mask.shape != row.shape or not bool(mask.any()):
                raise ValueError(
                    f"preprocess must return (1, length) input_ids and attention_mask with a real token, got "
                    f"{tuple(row.shape)} and {tuple(mask.shape)} for texts[{index}]"
                )
            ids.append(row.reshape(-1))
            masks.append(mask.reshape(-1))
        length = max(int(mask.nonzero().max()) + 1 for mask in masks)
        pad = self.tokenizer.pad_token_id or 0
        return stacked([row[:length] for row in ids], pad), stacked([mask[:length] for mask in masks], 0)


def t5_cosine_similarity(outputs: Any) -> torch.Tensor:
    """Cosines of the last decoder hidden states: `(batch, length, length)`, differentiable.

    Args:
        outputs: of an encoder-decoder called with ``output_hidden_states=True``.
    """
    if getattr(outputs, "decoder_hidden_states", None) is None:
        raise ValueError("outputs has no decoder_hidden_states: call the model with output_hidden_states=True")
    return cosine_similarity_matrix(outputs.decoder_hidden_states[-1])


def t5_cosine_simirality(outputs: Any) -> torch.Tensor:
    """:func:`t5_cosine_similarity`, as the tutorial spells it."""
    return t5_cosine_similarity(outputs)


def compute_contrastive_loss(score_matrix: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of ``max(0, margin - s_ii + s_ij)`` over every entry of the matrices, diagonal and padding included.

    ``simctg_fast.contrastive_loss(hidden_states, margin, reduction="dense")`` is the same number without the matrix.

    Args:
        score_matrix: `(batch, length, length)` cosines, as from :func:`t5_cosine_similarity`.
        margin: rho.
    """
    if score_matrix.dim() != 3 or score_matrix.shape[1] != score_matrix.shape[2]:
        raise ValueError(f"score_matrix has shape {tuple(score_matrix.shape)}, must be (batch, length, length)")
    diagonal = score_matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    return torch.relu(margin - diagonal + score_matrix).mean()
