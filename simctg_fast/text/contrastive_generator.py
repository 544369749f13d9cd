"""Lists of texts in, lists of texts out, by contrastive search, from a model folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..checks import is_integer, require
from ..cpu.modules import fast_linears, packing_pays
from ..decoding import ContrastiveSearch
from ..decoding.generate_arguments import position_table
from ..decoding.hidden_states import decoder_of
from ..decoding.named import as_search
from ..decoding.search import Search
from ..decoding.settings import check_center, check_penalty_alpha, check_top_k
from ..loading import fitting_threads, load_model
from .batches import by_length, cut_rows, pad_token, padded_rows
from .continuation import continuation_text
from .texts import text_list

__all__ = ["ContrastiveGenerator"]


class ContrastiveGenerator:
    """Text to text by contrastive search: T5, mT5, BART, Pegasus, GPT-2 and every other model with ``generate``.

    >>> generator = ContrastiveGenerator.from_pretrained("t5-small", device=0)
    >>> generator(["translate English to German: The house is wonderful."], max_length=128)

    Texts are sorted by length, run in batches, and answered in the order they came in. An encoder runs once a batch;
    a row stops at its end-of-sequence token and a batch when all its rows have; nothing but the model is kept between
    calls. On a processor with AVX2 and no AVX-512, a call with batches of a dozen rows (texts times ``top_k``) reads a
    packed copy of the decoder's weights, where that takes no more than a quarter of the free memory.

    Args:
        model, tokenizer: of transformers. ``from_pretrained`` loads both.
        batch_size: texts that run together, at least 1.

    Attributes:
        truncated: indices of the texts that the last call cut to ``max_length`` tokens; a warning names them as well.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16):
        require(is_integer(batch_size, 1), "batch_size", batch_size, "an integer of at least 1")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.truncated: list[int] = []

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: int | str | None = None,
        dtype: str | torch.dtype = "auto",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> ContrastiveGenerator:
        """Loads model and tokenizer.

        Args:
            name: ``"bundled"``, a local folder or a hub name; the tokenizer may be sentencepiece or ``tokenizer.json``.
            device: -1 is the CPU and another number that GPU, as in ``transformers.pipeline``; or a torch device; None
                is the first GPU if there is one, else the CPU.
            dtype: a torch dtype, its name, or ``"auto"`` for the one in the config.
            trust_remote_code: run Python code that the model's folder brings along.

        Raises:
            FileNotFoundError, ValueError, OSError: as :func:`simctg_fast.loading.load_model`.
        """
        if isinstance(device, int):
            device = "cpu" if device < 0 else f"cuda:{device}"
        return cls(*load_model(name, device, dtype, trust_remote_code=trust_remote_code), batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(
        self,
        texts: str | Iterable[str],
        max_length: int = 512,
        top_k: int = 3,
        penalty_alpha: float = 0.5,
        *,
        temperature: float | None = None,
        seed: int | None = None,
        center: bool = False,
        strategy: str | Search = "contrastive",
    ) -> list[str]:
        """One text a text: an encoder-decoder's answer to it, or a decoder's continuation without the prompt.

        A continuation begins with the space that stands between it and the prompt: ``text + answer`` is the whole.

        Args:
            texts: strings, in a list or anything else that holds them in order; may be none. A string is one text.
            max_length: the most input tokens (longer texts are cut, an encoder-decoder's at their end, a prompt at its
                beginning) and the most new tokens. A prompt and its continuation may be shorter where the model's table
                of positions ends first.
            top_k, penalty_alpha: candidates a step, and the weight of their penalty, as in `ContrastiveSearch`.
            temperature: draw among the candidates, as in `ContrastiveSearch`.
            seed: of what is drawn; without one from the global stream.
            center: compare hidden states less their mean, as in `ContrastiveSearch`.
            strategy: another search in its place: `FSD`, `GUARD` or `AdaptiveContrastiveSearch` with its settings, or
                ``"fsd"``, ``"fsd-vec"``, ``"guard"``, ``"adaptive"`` as they are by default.

        Raises:
            ValueError: texts that are not strings, or one that the tokenizer cannot take or finds no token in; a value
                out of range; a text longer than the model's table of positions, where ``max_length`` does not cut it.
        """
        texts = text_list(texts)
        require(is_integer(max_length, 1), "max_length", max_length, "an integer of at least 1")
        check_top_k(top_k)
        check_penalty_alpha(penalty_alpha)
        require(seed is None or is_integer(seed, 0, 2**63 - 1), "seed", seed, "an integer from 0 to 2**63 - 1")
        check_center(center, strategy == "contrastive", "strategy='contrastive'")
        if strategy == "contrastive":
            search: Search = ContrastiveSearch(penalty_alpha, top_k, temperature=temperature, center=center)
        else:
            of_contrastive = {
                "top_k": (top_k, 3),
                "penalty_alpha": (penalty_alpha, 0.5),
                "temperature": (temperature, None),
            }
            for name, (value, default) in of_contrastive.items():
                if value != default:
                    raise ValueError(
                        f"{name}={value} is of contrastive search, got strategy={strategy!r:.80}, whose settings are "
                        f"those of the object, {type(as_search(strategy)).__name__}(...)"
                    )
            search = copy.copy(as_search(strategy))
        if seed is not None and not search.is_random:
            raise ValueError(f"seed={seed} needs a temperature: without one no random choice is made")
        if seed is not None:
            search.generator = torch.Generator(self.device).manual_seed(seed)
        rows = self._encode(texts, max_length)
        answers = [""] * len(rows)
        most = min(self.batch_size, len(rows)) * (top_k if strategy == "contrastive" else 1)
        with torch.inference_mode(), fitting_threads(self.model), self._packed(most):
            for batch in self._batches(rows, max_length):
                tokens = self._generate([rows[index] for index in batch], max_length, search)
                for index, row in zip(batch, tokens.tolist(), strict=True):
                    before = [] if self._is_encoder_decoder else rows[index]
                    answers[index] = continuation_text(self.tokenizer, before, row)
        return answers

    def _packed(self, rows: int) -> AbstractContextManager[Any]:
        """With packed copies of the weights that a step reads, where products of so many rows are faster with them."""
        # Not the output embedding, which sees the winners alone, and not an encoder, which runs once.
        decoder = decoder_of(self.model) or self.model
        return fast_linears(decoder, rows, pack=True) if packing_pays(decoder, rows) else nullcontext()

    def _batches(self, rows: list[list[int]], max_length: int) -> Iterator[list[int]]:
        """Indices of rows that run together: of one length where the table of positions cuts the continuation, so that
        no row's text depends on the others."""
        limit = None if self._is_encoder_decoder else position_table(self.model)

        def is_full(batch: list[int], index: int) -> bool:
            longest = len(rows[batch[0]])
            cut = limit is not None and longest + max_length > limit and len(rows[index]) < longest
            return cut or len(batch) == self.batch_size

        return by_length(rows, is_full)

    def _encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Token ids of each text, cut to ``max_length``."""
        self.truncated = []
        if not texts:
            return []
        limit = position_table(self.model)
        # A prompt needs a position for the candidates of its first new token as well.
        room = None if limit is None else limit - (not self._is_encoder_decoder)
        side = "right" if self._is_encoder_decoder else "left"
        rows, truncated = cut_rows(self.tokenizer, texts, max_length, limit, room=room, side=side)
        self.truncated = list(truncated)
        return rows

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _generate(self, rows: list[list[int]], max_length: int, search: Search) -> Tensor:
        """New tokens ``(len(rows), n)`` of a batch."""
        pad = pad_token(self.tokenizer, self.model.config)
        inputs = padded_rows(self.model, rows, pad)
        start = 1 if self._is_encoder_decoder else inputs["input_ids"].shape[1]
        limit = position_table(self.model)
        # The last token's candidates are run as well, one position further than greedy search goes.
        most = max_length if limit is None else min(max_length, limit - start)
        return search_tokens(self.model, inputs, start + most, search, pad)[:, start:]


def search_tokens(model: Any, inputs: dict[str, Tensor], max_length: int, search: Search, pad: int) -> Tensor:
    """``(B, up to max_length)`` tokens, the prompt's or the decoder's first one among them."""
    # As max_length and not as max_new_tokens: checkpoints come with a max_length, and transformers would warn.
    return model.generate(
        **inputs,
        custom_generate=search,
        max_length=max_length,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
