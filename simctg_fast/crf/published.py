"""The published stochastic Viterbi classes, name for name, over the operators of this library.

Their sampler is a noisy Viterbi, not a sample of the CRF: see `LowRankCRF.sample` for exact samples.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops._autograd import tracked
from ..ops.crf_beam import crf_beam_select
from ..ops.crf_checks import checked_scores
from ..ops.crf_common import take_along
from ..ops.crf_stochastic import crf_stochastic_viterbi
from .arguments import check_count, check_device, check_emissions, check_temperature, draw_seed
from .spans import Span, as_span


class _Published(nn.Module):
    def __init__(self, num_embedding: int, low_rank: int = 32, beam_size: int = 256, temp: float = 1.0) -> None:
        super().__init__()
        for name, value in (("num_embedding", num_embedding), ("low_rank", low_rank), ("beam_size", beam_size)):
            check_count(name, value)
        self.E1 = nn.Embedding(num_embedding, low_rank)
        self.E2 = nn.Embedding(num_embedding, low_rank)
        self.rank, self.beam, self.temp = low_rank, beam_size, temp
        self.impl = "auto"

    def _sample(self, emissions, masks, beam, samples, generator, uniforms):
        check_emissions(emissions, self.E1.num_embeddings)
        check_device("emissions", emissions, self.E1.weight.device)
        temperature = check_temperature(self.temp)
        width = check_count("beam", self.beam if beam is None else beam)
        if width > self.E1.num_embeddings:
            raise ValueError(f"beam is {width}, must be in 1..{self.E1.num_embeddings}")
        check_count("num_samples", samples)
        span = Span(None) if masks is None else as_span(_prefix_lengths(masks, emissions), None, emissions)
        lengths, past = span.lengths, span.past
        tokens, scores = crf_beam_select(emissions.detach(), width, lengths, impl=self.impl)
        if tracked(emissions):
            scores = take_along(emissions, tokens).to(scores.dtype)
            scores = scores if past is None else scores.masked_fill(past[:, :, None], 0)
        scores = checked_scores(scores, past)
        left, right = self.E1.weight.to(scores.dtype), self.E2.weight.to(scores.dtype)
        seed = 0 if uniforms is not None else draw_seed(generator)
        slots, prefixes, _ = crf_stochastic_viterbi(
            scores, tokens, left, right, lengths, temperature, samples, seed, uniforms, impl=self.impl
        )
        if tracked(prefixes):
            beam_probs = prefixes.softmax(2)
        else:  # in place: the scores are ours and as large as the result; their largest value is 0 already
            beam_probs = prefixes.exp_()
            beam_probs /= beam_probs.sum(2, keepdim=True)
        slots = slots.clamp(min=0)
        return (
            beam_probs,
            slots,
            tokens.gather(2, slots) if past is None else tokens.gather(2, slots).masked_fill(past[:, :, None], 0),
        )


def _prefix_lengths(masks: torch.Tensor, emissions: torch.Tensor) -> torch.Tensor:
    """Lengths from a mask `(B, T)` that is on for a leading run of positions."""
    if not isinstance(masks, torch.Tensor) or masks.shape != emissions.shape[:2]:
        shape = tuple(masks.shape) if isinstance(masks, torch.Tensor) else type(masks).__name__
        raise ValueError(f"masks is {shape}, must be a tensor of shape {tuple(emissions.shape[:2])}")
    on = masks != 0
    if masks.device.type == "cpu" and bool((on[:, 1:] & ~on[:, :-1]).any()):
        raise ValueError("masks has a hole; it must be on for the first positions of an item and off for the rest")
    return on.sum(1)


class StochasticViterbiSample(_Published):
    """The published sampler of one path per item; `forward` is `_compute_stochastic_viterbi_sample`.

    Args:
        num_embedding: vocabulary size. low_rank: rank of the transitions. beam_size: tokens kept per position.
        temp: divides the softmax that draws the back-pointers, and nothing else.
    """

    def forward(self, emissions: torch.Tensor, beam: int | None = None, *, generator=None, uniforms=None):
        """`(beam_probs (B, T, K), sampled_beam_idx (B, T, 1), tokens (B, T))` for `emissions (B, T, V)`.

        `beam_probs` is the softmax over slots of the prefix scores, at temperature 1; it is no path probability.
        """
        probs, slots, tokens = self._sample(emissions, None, beam, 1, generator, uniforms)
        return probs.squeeze(3), slots, tokens.squeeze(2)

    def _compute_stochastic_viterbi_sample(self, emissions: torch.Tensor, beam: int | None = None):
        return self.forward(emissions, beam)


class StochasticViterbiSamples(_Published):
    """The published sampler of `num_samples` paths per item; `forward` is `_compute_grpo_samples`.

    Args: as those of `StochasticViterbiSample`, and `num_samples`.
    """

    def __init__(
        self,
        num_embedding: int,
        low_rank: int = 32,
        beam_size: int = 256,
        temp: float = 1.0,
        num_samples: int = 8,
    ) -> None:
        super().__init__(num_embedding, low_rank, beam_size, temp)
        self.num_samples = num_samples

    def forward(
        self,
        emissions: torch.Tensor,
        masks: torch.Tensor | None = None,
        beam: int | None = None,
        *,
        generator=None,
        uniforms=None,
    ):
        """`(beam_probs (B, T, K, N), sampled_beam_idx (B, T, N), tokens (B, T, N))` for `emissions (B, T, V)`.

        `masks (B, T)`, on for a leading run of positions, ends items early; the published code accepts and ignores it.
        """
        return self._sample(emissions, masks, beam, self.num_samples, generator, uniforms)

    def _compute_grpo_samples(
        self, emissions: torch.Tensor, masks: torch.Tensor | None = None, beam: int | None = None
    ):
        return self.forward(emissions, masks, beam)
