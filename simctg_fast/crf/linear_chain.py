"""`LinearChainCRF`: one dense matrix of transitions between tags, as sequence taggers use.

A path y scores ``start[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_t, y_{t+1}] + end[y_T]``, and has that
score's exponential over the sum of all paths as its probability (Lafferty, McCallum and Pereira 2001).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..checks import check_choice
from ..ops.crf_checks import (
    checked_ends,
    checked_expectations,
    checked_parameter,
    checked_paths,
    checked_rows,
    checked_scores,
    checked_tokens,
)
from ..ops.crf_dense import dense_ffbs, dense_filter, dense_kbest, dense_log_partition, dense_marginals, dense_viterbi
from ..ops.dispatch import IMPLS
from .arguments import (
    as_paths,
    check_count,
    check_device,
    check_no_count,
    check_temperature,
    check_tensor,
    checked_uniforms,
    draw_seed,
)
from .divergence import entropy as _entropy
from .divergence import kl as _kl
from .forward import Chain, Filtered, conditionals, filtered, missing_paths, path_scores, reduced
from .results import LogProb, TagPath, TagPaths, TagSample
from .spans import Span, as_span

PARAMETERS = ("start_transitions", "end_transitions", "transitions")


@dataclass(frozen=True)
class Potentials(Chain):
    """What the operators take, see `ops.crf_dense`; the scores are emissions with the start and end transitions added,
    over the temperature."""

    transitions: torch.Tensor  # (K, K)

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.scores, self.transitions, self.lengths

    def step(self, t: int) -> torch.Tensor:
        return self.transitions

    def edges(self, paths: torch.Tensor) -> torch.Tensor:
        return self.transitions[paths[:, :-1], paths[:, 1:]]


class LinearChainCRF(nn.Module):
    """A linear-chain CRF over `num_tags` tags.

    Args:
        num_tags: K.
        allowed_transitions: `(K, K)` bool, from row to column; what is not allowed has no probability. None: all are.
            `simctg_fast.crf.constraints` makes the three for BIO, BIOES and BILOU tags.
        allowed_start, allowed_end: `(K,)` bool: tags that may be first and last.
        batch_first: False takes and returns `(T, B, …)` in place of `(B, T, …)`.
        impl: ``"auto"``, ``"cpu"`` (C++, fp32) or ``"torch"`` (any device, float64 too).

    Parameters `transitions (K, K)` from row to column, `start_transitions (K,)`, `end_transitions (K,)`, which may hold
    -inf. What is allowed is no part of the `state_dict`.

    In every method `emissions` is `(B, T, K)`, of any floating dtype; computed in fp32, or in fp64 where emissions or
    parameters are fp64. Which positions exist is said by `lengths (B,)` or by `mask (B, T)`, non-zero at one run of
    positions of each item, with padding on either side; padding is never looked at. `temperature` divides emissions and
    transitions.

    A score of -inf, wherever it stands, is a forbidden move: results are exact, and its gradient is 0.

    Raises, in every method: TypeError or ValueError for an argument of a wrong type, shape, dtype, device or range;
    ValueError for NaN or +inf in emissions or parameters, and for an item without any allowed path, naming it;
    RuntimeError where a named `impl` is not installed. Values are looked at on the CPU (in compiled graphs too); on a
    CUDA device they would have to be waited for, so bad ones give NaN, -inf or paths of -1.
    """

    def __init__(
        self,
        num_tags: int,
        *,
        allowed_transitions: torch.Tensor | None = None,
        allowed_start: torch.Tensor | None = None,
        allowed_end: torch.Tensor | None = None,
        batch_first: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_count("num_tags", num_tags)
        check_choice("impl", impl, IMPLS)
        if not isinstance(batch_first, bool):
            raise ValueError(f"batch_first is {batch_first!r:.80}, must be True or False")
        self.num_tags, self.batch_first, self.impl = int(num_tags), batch_first, impl
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.reset_parameters()
        self.constrain(allowed_transitions, allowed_start, allowed_end)

    def reset_parameters(self) -> None:
        """Uniform in [-0.1, 0.1)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def constrain(
        self,
        allowed_transitions: torch.Tensor | None = None,
        allowed_start: torch.Tensor | None = None,
        allowed_end: torch.Tensor | None = None,
    ) -> LinearChainCRF:
        """Replaces what is allowed, also of a trained CRF; without arguments everything is. Returns the CRF."""
        tags = self.num_tags
        for name, allowed, shape in (
            ("allowed_transitions", allowed_transitions, (tags, tags)),
            ("allowed_start", allowed_start, (tags,)),
            ("allowed_end", allowed_end, (tags,)),
        ):
            forbidden = None
            if allowed is not None:
                if not isinstance(allowed, torch.Tensor) or allowed.dtype != torch.bool or allowed.shape != shape:
                    found = type(allowed).__name__
                    if isinstance(allowed, torch.Tensor):
                        found = f"{allowed.dtype} {tuple(allowed.shape)}"
                    raise ValueError(f"{name} is {found}, must be a bool tensor of shape {shape}")
                forbidden = ~allowed.to(self.transitions.device)
            self.register_buffer(name.replace("allowed", "_forbidden"), forbidden, persistent=False)
        return self

    def extra_repr(self) -> str:
        names = ("transitions", "start", "end")
        constrained = [f"allowed_{x}=…" for x in names if getattr(self, f"_forbidden_{x}") is not None]
        return ", ".join([f"num_tags={self.num_tags}", *constrained])

    # ---- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        emissions: torch.Tensor,
        tags: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor | TagPath:
        """:meth:`nll` of `tags` where they are given, else :meth:`viterbi`."""
        if tags is None:
            return self.viterbi(emissions, lengths, mask=mask)
        return self.nll(emissions, tags, lengths, mask=mask, reduction=reduction)

    def nll(
        self,
        emissions: torch.Tensor,
        tags: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """Negative log-likelihood of `tags (B, T)`; inf for a path that is not allowed.

        Args:
            reduction: over the sequences ``"mean"``, ``"sum"``, ``"none"`` for `(B,)`; ``"token_mean"``: the sum over
                the number of positions.
        """
        result, p = self._log_prob(emissions, tags, lengths, mask, 1.0, several=False)
        return reduced(-result.sum(1), reduction, lambda: p.span.positions(p.scores))

    def partial_nll(
        self,
        emissions: torch.Tensor,
        allowed_tags: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """-log of the probability that every tag is one of a set: for labels that are known in part.

        log Z less the log-partition of the allowed paths (Tsuboi et al. 2008, "Training Conditional Random Fields Using
        Incomplete Annotations").

        Args:
            allowed_tags: `(B, T, K)` bool; all of a row where nothing is known, one where the tag is.
            reduction: as in :meth:`nll`.

        Raises:
            ValueError: also where a position allows no tag, or an item no path.
        """
        p = self._potentials(emissions, lengths, mask)
        check_tensor("allowed_tags", allowed_tags)
        if allowed_tags.dtype != torch.bool or allowed_tags.shape != emissions.shape:
            raise ValueError(
                f"allowed_tags is {allowed_tags.dtype} {tuple(allowed_tags.shape)}, must be a bool tensor of shape "
                f"{tuple(emissions.shape)}"
            )
        check_device("allowed_tags", allowed_tags, emissions.device)
        allowed = p.span.front(self._items_first(checked_rows(allowed_tags, self._past(p.span), "allowed_tags")))
        restricted = p.scores.masked_fill(~allowed, float("-inf"))
        loss = dense_log_partition(*p.arguments(), impl=self.impl)
        try:
            loss = loss - dense_log_partition(restricted, p.transitions, p.lengths, impl=self.impl)
        except ValueError as error:
            raise ValueError(f"{error}, those of allowed_tags among what forbids") from error
        loss = loss.to(p.scores.dtype)
        return reduced(loss, reduction, lambda: p.span.positions(p.scores))

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def viterbi(
        self, emissions: torch.Tensor, lengths: torch.Tensor | None = None, *, mask: torch.Tensor | None = None
    ) -> TagPath:
        """The best path; -1 and scores of 0 at padding. The scores are differentiable."""
        p = self._potentials(emissions, lengths, mask)
        tags = dense_viterbi(*p.arguments(), impl=self.impl)
        position_scores = path_scores(p, tags[:, :, None]).squeeze(2)
        return TagPath(self._back(p, tags, -1), position_scores.sum(1), self._back(p, position_scores, 0))

    def kbest(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        n: int = 8,
        mask: torch.Tensor | None = None,
    ) -> TagPaths:
        """The `n` best paths, best first: `tags`, `position_scores` `(B, T, n)`, `score (B, n)`.

        Where there are fewer allowed paths than `n`, tags are -1 and scores -inf.
        """
        check_no_count(lengths, "kbest(emissions, n")
        check_count("n", n)
        p = self._potentials(emissions, lengths, mask)
        tags = checked_paths(dense_kbest(*p.arguments(), n, impl=self.impl), p.lengths)
        position_scores = path_scores(p, tags)
        score = position_scores.sum(1).masked_fill(missing_paths(tags, p.lengths), float("-inf"))
        return TagPaths(self._back(p, tags, -1), score, self._back(p, position_scores, 0))

    def sample(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        num_samples: int = 1,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: torch.Tensor | None = None,
    ) -> TagSample:
        """`num_samples` independent exact samples per item, `tags (B, T, N)`, with their log-probabilities.

        By filtering forward and sampling backward. Random numbers as in :meth:`LowRankCRF.sample`: functions of a seed
        and of (b, t, n), t counted from the item's first position; or `uniforms (B, T, N)` in [0, 1). Differentiable in
        the log-probabilities.
        """
        check_no_count(lengths, "sample(emissions, num_samples")
        check_count("num_samples", num_samples)
        p = self._potentials(emissions, lengths, mask, temperature)
        uniforms = checked_uniforms(uniforms, (*p.scores.shape[:2], num_samples), p.scores)
        seed = 0 if uniforms is not None else draw_seed(generator)
        f = self._filter(p)
        with torch.no_grad():
            tags = dense_ffbs(f.messages, f.norms, *p.arguments(), num_samples, seed, uniforms)
        token_log_probs = conditionals(p, f, tags)
        return TagSample(self._back(p, tags, -1), token_log_probs.sum(1), self._back(p, token_log_probs, 0))

    # ---- probabilities -----------------------------------------------------------------------------------------------

    def log_prob(
        self,
        emissions: torch.Tensor,
        tags: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> LogProb:
        """Log-probabilities of paths `tags (B, T)` or `(B, T, N)`, whatever stands at padding; -inf: not allowed.

        Per token they are log p(y_t | y_{t+1}), the last one log p(y_T). One reverse sweep gives the gradient of all.
        """
        result, p = self._log_prob(emissions, tags, lengths, mask, temperature, several=True)
        return LogProb(result.sum(1), self._back(p, result, 0))

    def log_partition(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """`(B,)`; 0 for an item of length 0."""
        p = self._potentials(emissions, lengths, mask, temperature)
        return dense_log_partition(*p.arguments(), impl=self.impl).to(p.scores.dtype)

    def marginals(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """p(y_t = k), `(B, T, K)`; 0 at padding. Not differentiable."""
        with torch.no_grad():
            p = self._potentials(emissions, lengths, mask, temperature)
            f = self._filter(p)
            result = dense_marginals(f.messages, f.norms, *p.arguments(), impl=self.impl)
            return self._back(p, result, 0)

    def entropy(
        self,
        emissions: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Entropy of the law of paths, `(B,)`, in nats, differentiable."""
        return checked_expectations(_entropy(self._chain(emissions, lengths, mask, temperature)))

    def kl(
        self,
        other: LinearChainCRF,
        emissions: torch.Tensor,
        other_emissions: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """KL(self || other), `(B,)`, in nats, differentiable in both; inf where `other` forbids what `self` allows."""
        if not isinstance(other, LinearChainCRF) or other.num_tags != self.num_tags:
            found = f"{type(other).__name__} of {getattr(other, 'num_tags', 'no')} tags"
            raise TypeError(f"other is a {found}, must be a LinearChainCRF of {self.num_tags}")
        p = self._chain(emissions, lengths, mask, temperature)
        if other_emissions is None:
            other_emissions = emissions
        check_tensor("other_emissions", other_emissions, "a tensor or None")
        if other_emissions.shape != emissions.shape:
            hint = "; lengths are named: lengths=" if other_emissions.dim() == 1 else ""
            raise ValueError(
                f"other_emissions has shape {tuple(other_emissions.shape)}, must be {tuple(emissions.shape)} as "
                f"emissions has{hint}"
            )
        if other.batch_first != self.batch_first:
            other_emissions, mask = (None if x is None else x.transpose(0, 1) for x in (other_emissions, mask))
        q = other._chain(other_emissions, lengths, mask, temperature)
        return checked_expectations(_kl(p, q))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _items_first(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.batch_first else values.transpose(0, 1)

    def _back(self, p: Potentials, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Results `(B, T, …)` as the caller counts positions and dimensions."""
        return self._items_first(p.span.back(values, fill))

    def _check_emissions(self, emissions: torch.Tensor) -> None:
        check_tensor("emissions", emissions)
        first = ("batch", "length") if self.batch_first else ("length", "batch")
        shape = tuple(emissions.shape)
        if len(shape) != 3 or shape[2] != self.num_tags or shape[first.index("length")] < 1:
            raise ValueError(
                f"emissions has shape {shape}, must be ({first[0]}, {first[1]}, {self.num_tags}), length >= 1"
            )
        if not emissions.dtype.is_floating_point:
            raise ValueError(f"emissions has dtype {emissions.dtype}, must be floating point")
        check_device("emissions", emissions, self.transitions.device)

    def _span(self, emissions, lengths, mask) -> Span:
        if isinstance(mask, torch.Tensor):
            if mask.shape != emissions.shape[:2]:
                raise ValueError(f"mask has shape {tuple(mask.shape)}, must be {tuple(emissions.shape[:2])}")
            mask = self._items_first(mask)
        return as_span(lengths, mask, self._items_first(emissions))

    def _past(self, span: Span) -> torch.Tensor | None:
        """Positions that do not exist, in the caller's layout: errors name places as they were handed over."""
        return None if span.past is None else self._items_first(span.past)

    def _parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        parameter = getattr(self, name)
        forbidden = getattr(self, "_forbidden_" + name.removesuffix("_transitions"))
        return (parameter if forbidden is None else parameter.masked_fill(forbidden, float("-inf"))).to(dtype)

    def _potentials(self, emissions, lengths, mask, temperature: float = 1.0) -> Potentials:
        """Start and end transitions are emissions of the first and last position."""
        self._check_emissions(emissions)
        temperature = check_temperature(temperature)
        span = self._span(emissions, lengths, mask)
        emissions = span.front(self._items_first(checked_scores(emissions, self._past(span), "tag")))
        double = torch.float64 in (emissions.dtype, self.transitions.dtype)
        dtype = torch.float64 if double else torch.float32
        start, end, transitions = (self._parameter(name, dtype) for name in PARAMETERS)
        batch, length, tags = emissions.shape
        past = span.past_in_front(length)
        if span.lengths is None or past is None:
            between = start.new_zeros((max(0, length - 2), tags))
            edges = checked_ends(torch.cat([start[None], between, end[None]]))
            scores = emissions.to(dtype) + (edges if length > 1 else edges.sum(0))
        else:
            edges = checked_ends(torch.stack([start, end]))
            scores = emissions.to(dtype).masked_fill(past[:, :, None], 0)
            last = (span.lengths - 1).clamp(min=0)
            items = torch.arange(batch, device=last.device).repeat(2)
            values = edges.repeat_interleave(batch, 0)
            values = values.masked_fill((span.lengths == 0).repeat(2)[:, None], 0)
            scores = scores.index_put((items, torch.cat([torch.zeros_like(last), last])), values, accumulate=True)
        if temperature != 1.0:
            scores, transitions = scores / temperature, transitions / temperature
        return Potentials(scores, span, past, transitions)

    def _chain(self, emissions, lengths, mask, temperature) -> Potentials:
        """For the recursions of `divergence`, which no operator with checks of its own runs."""
        p = self._potentials(emissions, lengths, mask, temperature)
        return replace(p, transitions=checked_parameter(p.transitions, "transitions"))

    def _filter(self, p: Potentials) -> Filtered:
        _, messages, norms = dense_filter(*p.arguments(), impl=self.impl)
        return filtered(messages, norms, p)

    def _log_prob(
        self, emissions, tags, lengths, mask, temperature, *, several: bool
    ) -> tuple[torch.Tensor, Potentials]:
        """`(B, T)`, or `(B, T, N)` for as many paths, from each item's first position on."""
        p = self._potentials(emissions, lengths, mask, temperature)
        paths = as_paths("tags", tags, emissions, several=several)
        # Their places are named as they were handed over, without a dimension that `as_paths` added.
        as_passed = paths.squeeze(2) if tags.dim() == 2 else paths
        checked = checked_tokens(as_passed, self.num_tags, self._past(p.span), "tags").view(paths.shape)
        paths = p.span.front(self._items_first(checked))
        if p.past is not None:
            paths = paths.masked_fill(p.past[:, :, None], 0)
        result = conditionals(p, self._filter(p), paths)
        return result.squeeze(2) if tags.dim() == 2 else result, p
