"""`LowRankCRF`: a linear-chain CRF over a beam of tokens per position, with transitions of low rank.

A path y of one token per position scores ``sum_t e[t, y_t] + sum_t E1[y_t] · E2[y_{t+1}]``; its probability is that
score's exponential over the sum of all paths through the beams. The model is that of fairseq's DynamicCRF (Sun et al.
2019, arXiv 1910.11555) and of NAG-BERT (Su et al. 2021, arXiv 2102.08220).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..checks import check_choice
from ..ops._autograd import tracked
from ..ops.crf_beam import crf_beam_select
from ..ops.crf_checks import checked_scores, checked_slots, checked_tokens, slots_of
from ..ops.crf_common import last_law, take_along, transition
from ..ops.crf_filter import crf_filter, crf_filter_backward
from ..ops.crf_sample import crf_ffbs
from ..ops.crf_stochastic import crf_stochastic_viterbi
from ..ops.crf_viterbi import crf_kbest, crf_viterbi
from ..ops.dispatch import IMPLS
from .arguments import (
    as_paths,
    check_count,
    check_device,
    check_emissions,
    check_no_count,
    check_temperature,
    check_tensor,
    checked_uniforms,
    draw_seed,
)
from .divergence import entropy as _entropy
from .divergence import kl as _kl
from .forward import Chain, Filtered, conditionals, filtered, missing_paths, path_scores, reduced
from .results import Beam, KBest, LogProb, Marginals, Sample, ViterbiPath
from .spans import as_span

MODES = ("ffbs", "stochastic_viterbi")
EDGES = 1 << 18  # numbers gathered at a time where no gradient keeps them


@dataclass(frozen=True)
class Potentials(Chain):
    """The arguments of the operators, see `ops.crf_common`."""

    tokens: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def beam_tokens(self) -> torch.Tensor:
        """`(B, T, K)` at the caller's positions."""
        return self.span.back(self.tokens, 0)

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.scores, self.tokens, self.left, self.right, self.lengths

    def step(self, t: int) -> torch.Tensor:
        return transition(self.tokens, t - 1, self.left, self.right, self.scale)

    def edges(self, paths: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens.gather(2, paths)

        def products(tokens: torch.Tensor) -> torch.Tensor:
            source = nn.functional.embedding(tokens[:, :-1], self.left)
            target = nn.functional.embedding(tokens[:, 1:], self.right)
            return self.scale * (source * target).sum(-1)

        if torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad):
            return products(tokens)
        # The rows of all paths at once would be 2 N T D numbers.
        each = max(1, EDGES // max(1, tokens[:, :, 0].numel() * self.left.shape[1]))
        return torch.cat([products(part) for part in tokens.split(each, 2)], 2)


class LowRankCRF(nn.Module):
    """A CRF over the K best tokens of every position, whose transitions are ``E1[a] · E2[b]``.

    Args:
        num_embeddings: size of the vocabulary, V.
        low_rank: rank of the transitions, D.
        beam_size: tokens kept per position, K; a beam wider than the vocabulary is the vocabulary.
        pad_id: token written beyond an item's length.
        impl: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` or ``"torch"`` (any device, float64 too).

    Parameters `E1` and `E2` are ``nn.Embedding(V, D)``, initialised as those are.

    In every method `emissions` is `(B, T, V)` in fp32, fp16, bf16 (computed in fp32) or fp64; -inf bans a token;
    `lengths` `(B,)` says how many positions of each item exist, or `mask (B, T)`, non-zero at one run of positions of
    each item, with padding on either side; padding is never looked at;
    `beam_size` overrides the width for one call. `beam_tokens (B, T, K)` freezes the support: emissions are gathered at
    these tokens instead of choosing the best, so that two models, or one before and after an update, are compared on
    the same paths. `temperature` is the model's: emissions and transitions are divided by it.

    Called as a module it is :meth:`nll` of targets, or :meth:`viterbi` without. Under `torch.autocast` every number is
    what it is without. A batch may be empty, an item's length 0 (its only path is the empty one: probability 1, score
    0); emissions have at least one position.

    Raises, in every method: TypeError or ValueError for an argument of a wrong type, shape, dtype, device or range,
    naming it, its value and what is allowed; ValueError for a position whose emissions are all -inf, or hold NaN or
    +inf, within its beam; RuntimeError where a named `impl` is not installed.

    Checks of values (banned positions, NaN, tokens out of range) raise on the CPU, inside of a compiled graph too. On a
    CUDA device they would have to wait for it, so they are left out, and bad values give NaN. `E1` and `E2` must be
    finite (a transition is a sum of products, and cannot be forbidden). They are never looked at: where they are not,
    probabilities are NaN, and paths mean nothing.

    What is differentiable is so as often as one likes, also under `torch.func.grad`, `vjp` and `jacrev`; second
    derivatives run the recursion in PyTorch and hold T K² numbers an item. Forward mode through the partition function
    raises a RuntimeError.
    """

    def __init__(
        self, num_embeddings: int, low_rank: int = 32, beam_size: int = 64, *, pad_id: int = 0, impl: str = "auto"
    ) -> None:
        super().__init__()
        for name, value in (("num_embeddings", num_embeddings), ("low_rank", low_rank), ("beam_size", beam_size)):
            check_count(name, value)
        check_choice("impl", impl, IMPLS)
        self.E1 = nn.Embedding(num_embeddings, low_rank)
        self.E2 = nn.Embedding(num_embeddings, low_rank)
        self.num_embeddings, self.low_rank, self.beam_size = num_embeddings, low_rank, beam_size
        self.pad_id, self.impl = pad_id, impl

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, low_rank={self.low_rank}, beam_size={self.beam_size}"

    def forward(
        self,
        emissions: torch.Tensor,
        targets: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
        beam_size: int | None = None,
    ) -> torch.Tensor | ViterbiPath:
        """:meth:`nll` of `targets` where they are given, else :meth:`viterbi`.

        So a CRF can be the last module of an `nn.Sequential`, and `DistributedDataParallel`, which sees only this
        method, adds up its gradients.
        """
        if targets is None:
            return self.viterbi(emissions, lengths, mask=mask, beam_size=beam_size)
        return self.nll(emissions, targets, lengths, mask=mask, reduction=reduction, beam_size=beam_size)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def viterbi(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
    ) -> ViterbiPath:
        """The best path (max-product; fairseq's DynamicCRF decodes the same).

        Returns `tokens`, `slots` `(B, T)`, `score` `(B,)`, `position_scores` `(B, T)` and the beams. The scores are
        differentiable, with the path as the subgradient.
        """
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size)
        slots = crf_viterbi(*p.arguments(), impl=self.impl).unsqueeze(2)
        tokens, slots, position_scores = (x.squeeze(2) for x in self._path(p, slots))
        return ViterbiPath(tokens, slots, position_scores.sum(1), position_scores, p.beam_tokens)

    def kbest(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        n: int = 8,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
    ) -> KBest:
        """The `n` best paths, best first: `tokens`, `slots`, `position_scores` `(B, T, n)`, `score` `(B, n)`.

        Of paths with equal scores the one with the lower last slot comes first, then the one with the lower slot before
        it, and so on. Where the beams hold fewer than `n` paths of finite score, slots are -1 and scores -inf. In C++
        by recursive enumeration, in PyTorch by list Viterbi; whatever the scores, they keep n T K numbers an item.
        """
        check_no_count(lengths, "kbest(emissions, n")
        check_count("n", n)
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size)
        slots = crf_kbest(*p.arguments(), n, impl=self.impl)
        missing = missing_paths(slots, p.lengths)
        tokens, slots, position_scores = self._path(p, slots)
        score = position_scores.sum(1).masked_fill(missing, float("-inf"))
        return KBest(tokens, slots, score, position_scores, p.beam_tokens)

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        num_samples: int = 1,
        mode: str = "ffbs",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
    ) -> Sample:
        """`num_samples` independent paths per item, with their log-probabilities.

        Every random number is a function of a seed and of its own indices (b, t, n), so results depend on no thread
        count, tile or batch mate, and the backends agree but for rounding at the edge between two slots.

        Args:
            mode: ``"ffbs"`` draws from the CRF exactly. ``"stochastic_viterbi"`` is the published sampler, a noisy
                Viterbi whose own law has no tractable density: its `log_prob` is the CRF's (at temperature 1), which is
                *not* the law that was sampled from, so no PPO ratio can be formed from it. There, `temperature` divides
                only the softmax that draws the back-pointers.
            generator: gives the seed; None: torch's default generator.
            uniforms: numbers in [0, 1) in place of the seeded ones: `(B, T, N)` for ``"ffbs"``, `(B, T - 1, K, N)` for
                ``"stochastic_viterbi"``, t counted from the item's first position; used by inverse CDF in slot order.

        The result is differentiable in `log_prob` and `token_log_probs`, not in the choice of paths.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, must be one of {', '.join(map(repr, MODES))}")
        check_no_count(lengths, "sample(emissions, num_samples")
        check_count("num_samples", num_samples)
        temperature = check_temperature(temperature)
        exact = mode == "ffbs"
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature if exact else 1.0)
        batch, length, size = p.scores.shape
        shape = (batch, length, num_samples) if exact else (batch, length - 1, size, num_samples)
        uniforms = checked_uniforms(uniforms, shape, p.scores)
        seed = 0 if uniforms is not None else draw_seed(generator)
        f = self._filter(p)
        with torch.no_grad(), torch.autocast(emissions.device.type, enabled=False):
            if exact:
                slots = crf_ffbs(
                    f.messages, f.norms, *p.arguments(), p.scale, num_samples, seed, uniforms, impl=self.impl
                )
            else:
                slots = crf_stochastic_viterbi(
                    *p.arguments(), temperature, num_samples, seed, uniforms, impl=self.impl
                )[0]
        token_log_probs = p.span.back(conditionals(p, f, slots), 0)
        tokens = p.span.back(self._tokens(p, slots), self.pad_id)
        return Sample(tokens, p.span.back(slots, -1), token_log_probs.sum(1), token_log_probs, p.beam_tokens)

    # ---- probabilities -----------------------------------------------------------------------------------------------

    def log_prob(
        self,
        emissions: torch.Tensor,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        beam_size: int | None = None,
        temperature: float = 1.0,
    ) -> LogProb:
        """Log-probabilities of given paths, differentiable in `emissions`, `E1` and `E2`: a `LogProb`, whose field
        `log_prob` is `(B,)` or `(B, N)` and `token_log_probs` has the shape of `tokens`.

        Per token they are log p(y_t | y_{t+1}), the last one log p(y_T): what backward sampling draws from. The
        gradient is one reverse sweep, whatever the number of paths.

        Args:
            tokens: `(B, T)` or `(B, T, N)`; anything beyond the lengths.
            beam_tokens: the beams the paths were drawn from (`Sample.beam_tokens`). None: the best tokens of
                `emissions`, with `tokens` forced in.
            slots: the tokens' places in `beam_tokens` (`Sample.slots`), which saves looking them up.
            temperature: the one they were sampled at.

        Raises:
            ValueError: also where a token is not in `beam_tokens`: a path outside the beams has no probability.
        """
        return self._log_prob("tokens", emissions, tokens, lengths, mask, beam_tokens, slots, beam_size, temperature)[0]

    def nll(
        self,
        emissions: torch.Tensor,
        targets: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
        beam_size: int | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood of `targets (B, T)`, which are forced into the beams. For training.

        It is inf where a target is banned, and so is the mean or the sum; in a beam of one, whose only token is then
        banned, that is an error.

        Args:
            reduction: over the sequences ``"mean"`` (0 for an empty batch), ``"sum"``, ``"none"`` for `(B,)`;
                ``"token_mean"``: the sum over the number of positions.
        """
        as_paths("targets", targets, check_emissions(emissions, self.num_embeddings), several=False)
        result, p = self._log_prob("targets", emissions, targets, lengths, mask, None, None, beam_size, 1.0)
        return reduced(-result.log_prob, reduction, lambda: p.span.positions(emissions))

    def log_partition(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Log of the sum over all paths through the beams, `(B,)`, differentiable; 0 for an item of length 0.

        The recursion is renormalised at each position, and what is taken off is summed in fp64.
        """
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature)
        f = self._filter(p)
        return (f.last_total.double() + f.norms.double().sum(1)).to(p.scores.dtype)

    def marginals(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
        temperature: float = 1.0,
    ) -> Marginals:
        """p(y_t = token of slot k) for every position and slot; 0 beyond the lengths. Not differentiable."""
        with torch.no_grad():
            p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature)
            f = self._filter(p)
            seed = last_law(f.messages, p.scores, p.lengths)
            into = crf_filter_backward(seed, f.messages, f.norms, *p.arguments(), p.scale, False, impl=self.impl)[0]
            return Marginals(p.span.back(into + seed, 0), p.beam_tokens)

    def entropy(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Entropy of the law of paths, `(B,)`, in nats, differentiable."""
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature)
        return _entropy(p)

    def kl(
        self,
        other: LowRankCRF,
        emissions: torch.Tensor,
        other_emissions: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        beam_tokens: torch.Tensor | None = None,
        beam_size: int | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Exact KL(self || other) over the paths of one set of beams, `(B,)`, in nats, differentiable in both models.

        The beams are `beam_tokens`, or the best tokens of `emissions`. `other_emissions` None: the same as `emissions`.
        It is infinite where `other` bans what `self` allows.
        """
        if not isinstance(other, LowRankCRF):
            raise TypeError(f"other is {type(other).__name__}, must be a LowRankCRF")
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature)
        other_emissions = emissions if other_emissions is None else other_emissions
        if isinstance(other_emissions, torch.Tensor) and other_emissions.shape[:2] != emissions.shape[:2]:
            hint = "; lengths are named: lengths=" if other_emissions.dim() == 1 else ""
            raise ValueError(
                f"other_emissions has shape {tuple(other_emissions.shape)}, "
                f"must begin with {tuple(emissions.shape[:2])}{hint}"
            )
        q = other._potentials(other_emissions, lengths, mask, p.beam_tokens, None, temperature)
        return _kl(p, q)

    def beam(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        include: torch.Tensor | None = None,
        beam_size: int | None = None,
    ) -> Beam:
        """The beams of `emissions`, with the tokens of `include` `(B, T)` or `(B, T, N)` forced in."""
        check_emissions(emissions, self.num_embeddings)
        check_no_count(lengths, "beam(emissions, beam_size")
        forced = None if include is None else ("include", include)
        p = self._potentials(emissions, lengths, mask, None, beam_size, forced=forced)
        return Beam(p.beam_tokens, p.span.back(p.scores, 0))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _potentials(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None,
        mask: torch.Tensor | None,
        beam_tokens: torch.Tensor | None,
        beam_size: int | None,
        temperature: float = 1.0,
        forced: tuple[str, torch.Tensor] | None = None,
    ) -> Potentials:
        """`forced`: a name, and tokens `(B, T)` or `(B, T, N)` that must be in the beams."""
        check_emissions(emissions, self.num_embeddings)
        check_device("emissions", emissions, self.E1.weight.device)
        temperature = check_temperature(temperature)
        span = as_span(lengths, mask, emissions)
        past = span.past_in_front(emissions.shape[1])
        dtype = torch.float64 if emissions.dtype == torch.float64 else torch.float32
        values = None
        if beam_tokens is not None:
            check_tensor("beam_tokens", beam_tokens, "a tensor or None")
            if beam_size is not None and beam_size != beam_tokens.shape[-1]:
                raise ValueError(f"beam_size is {beam_size}, but beam_tokens holds {beam_tokens.shape[-1]} a position")
            if beam_tokens.dim() != 3 or beam_tokens.shape[2] < 1:
                raise ValueError(f"beam_tokens has shape {tuple(beam_tokens.shape)}, must be (batch, length, beam)")
            tokens = as_paths("beam_tokens", beam_tokens, emissions)
            tokens = span.front(checked_tokens(tokens, self.num_embeddings, None, "beam_tokens"))
            emissions = span.front(emissions)
        else:
            width = min(
                check_count("beam_size", self.beam_size if beam_size is None else beam_size), self.num_embeddings
            )
            wanted = None if forced is None else self._forced(*forced, emissions, span, width)
            emissions = span.front(emissions)
            tokens, values = crf_beam_select(emissions.detach(), width, span.lengths, wanted, impl=self.impl)
        if values is None or tracked(emissions):
            values = take_along(emissions, tokens).to(dtype)
            if past is not None:
                values = values.masked_fill(past[:, :, None], 0)  # padding may hold anything, NaN too
        values = span.front(checked_scores(span.back(values, 0), span.past))  # errors name the caller's positions
        scale = 1.0 / temperature
        left, right = self.E1.weight.to(dtype), self.E2.weight.to(dtype)
        scores = values if temperature == 1.0 else values * scale
        return Potentials(scores, span, past, tokens, left, right, scale)

    def _forced(self, name, tokens, emissions, span, width):
        """`(B, T, N)`, every item from position 0 on, -1 at positions that do not exist."""
        paths = as_paths(name, tokens, emissions)
        if paths.shape[2] > width:
            raise ValueError(
                f"{name} holds {paths.shape[2]} tokens a position, must be at most the {width} of a beam (beam_size)"
            )
        # Their places are named as they were handed over, without a dimension that `as_paths` added.
        as_passed = paths.squeeze(2) if tokens.dim() == 2 else paths
        paths = checked_tokens(as_passed, self.num_embeddings, span.past, name).view(paths.shape)
        return span.front(paths if span.past is None else paths.masked_fill(span.past[:, :, None], -1))

    def _log_prob(
        self, name, emissions, tokens, lengths, mask, beam_tokens, slots, beam_size, temperature
    ) -> tuple[LogProb, Potentials]:
        """:meth:`log_prob` of `tokens`, which the caller calls `name`."""
        check_emissions(emissions, self.num_embeddings)
        paths = as_paths(name, tokens, emissions)
        forced = (name, tokens) if beam_tokens is None else None
        p = self._potentials(emissions, lengths, mask, beam_tokens, beam_size, temperature, forced=forced)
        if slots is None:
            slots = slots_of(p.beam_tokens, paths, p.span.past)
        else:
            if beam_tokens is None:
                raise ValueError("slots is given without beam_tokens; slots number the tokens of a beam")
            slots = as_paths("slots", slots, emissions)
            if slots.shape != paths.shape:
                raise ValueError(f"slots has shape {tuple(slots.shape)}, must be {tuple(paths.shape)} as tokens has")
            slots = checked_slots(slots, p.beam_tokens, paths, p.span.past)
        result = p.span.back(conditionals(p, self._filter(p), p.span.front(slots)), 0)
        if tokens.dim() == 2:
            result = result.squeeze(2)
        return LogProb(result.sum(1), result), p

    def _filter(self, p: Potentials) -> Filtered:
        messages, norms = crf_filter(*p.arguments(), p.scale, impl=self.impl)
        return filtered(messages, norms, p)

    def _path(self, p: Potentials, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, slots and per-position scores of paths `(B, T, N)` of slots, at the caller's positions."""
        back = p.span.back
        return back(self._tokens(p, slots), self.pad_id), back(slots, -1), back(path_scores(p, slots), 0)

    def _tokens(self, p: Potentials, slots: torch.Tensor) -> torch.Tensor:
        return p.tokens.gather(2, slots.clamp(min=0)).masked_fill(slots < 0, self.pad_id)
