"""The T5 tutorial's generator restated, its flaw included: what `benchmarks/habits.py` measures against.

Texts are lower-cased, padded and truncated to ``max_length``; the encoder runs once; each step runs ``num_beams``
candidates a text as rows of one batch; a text stops at its end-of-sequence token, all of them after ``max_length``
steps. The flaw: behind a chosen candidate the cache is not selected anew, so row i of a text goes on with the keys of
its i-th candidates, whichever was chosen.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


class TutorialT5Generate:
    """``generator(list[str]) -> list[str]``.

    Args:
        model, tokenizer: a T5 and its tokenizer.
        max_length: most input tokens and most steps.
        num_beams: candidates a step.
        simctg_alpha: weight of the penalty.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int = 512, num_beams: int = 3, simctg_alpha: float = 0.5
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.num_beams, self.alpha = max_length, num_beams, simctg_alpha
        # The argument and the output of this name were renamed in transformers 5.24.
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[str]:
        encoded = self.tokenizer(
            [text.lower() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        tokens = self.tokens(encoded["input_ids"], encoded["attention_mask"])
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    @torch.no_grad()
    def tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``(B, n)`` new tokens."""
        model, k, config = self.model, self.num_beams, self.model.config
        batch = len(input_ids)
        encoder = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        encoder.last_hidden_state = encoder.last_hidden_state.repeat_interleave(k, dim=0)
        mask = attention_mask.repeat_interleave(k, dim=0)
        start = torch.full((batch * k, 1), config.decoder_start_token_id)
        output = self._run(start, encoder, mask, None)
        logits, history = output.logits[::k, -1], output.decoder_hidden_states[-1][::k]
        running = torch.ones(batch, dtype=torch.bool)
        written = []
        for _ in range(self.max_length):
            probabilities, candidates = logits.softmax(dim=-1).topk(k, dim=-1)
            output = self._run(candidates.reshape(-1, 1), encoder, mask, output[self.cache_name])
            states = output.decoder_hidden_states[-1].view(batch, k, -1)
            one = states / states.norm(dim=-1, keepdim=True)
            other = history / history.norm(dim=-1, keepdim=True)
            penalty = (one @ other.transpose(1, 2)).max(dim=-1).values
            chosen = ((1 - self.alpha) * probabilities - self.alpha * penalty).argmax(dim=-1)
            rows = torch.arange(batch)
            token = candidates[rows, chosen]
            token = torch.where(running, token, torch.full_like(token, config.pad_token_id))
            written.append(token)
            running = running & (token != config.eos_token_id if config.eos_token_id is not None else True)
            if not running.any():
                break
            history = torch.cat([history, states[rows, chosen][:, None]], dim=1)
            logits = output.logits[:, -1].view(batch, k, -1)[rows, chosen]
        return torch.stack(written, dim=1)

    def _run(self, tokens: torch.Tensor, encoder: Any, mask: torch.Tensor, cache: Any) -> Any:
        return self.model(
            encoder_outputs=encoder,
            attention_mask=mask,
            decoder_input_ids=tokens,
            use_cache=True,
            output_hidden_states=True,
            **{self.cache_name: cache},
        )
