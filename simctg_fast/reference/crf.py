"""The low-rank CRF the slow, obvious way: enumeration of every path, and the codes that circulate, re-stated.

`enumerate_*` share no recursion with the library. `published_*` and `fairseq_*` restate what those codes compute, step
for step, so that results and costs can be compared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

# ---- enumeration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """Every path of one item, in float64: `slots (P, L)`, `scores (P,)`; ``log_probs = scores - log Z``."""

    slots: torch.Tensor
    scores: torch.Tensor

    @property
    def log_partition(self) -> torch.Tensor:
        return torch.logsumexp(self.scores, 0)

    @property
    def log_probs(self) -> torch.Tensor:
        return self.scores - self.log_partition

    def unary_marginals(self, size: int) -> torch.Tensor:
        """`(L, K)`"""
        probs = self.log_probs.exp()
        return torch.stack(
            [torch.stack([probs[self.slots[:, t] == k].sum() for k in range(size)]) for t in range(self.slots.shape[1])]
        )

    def entropy(self) -> torch.Tensor:
        probs = self.log_probs.exp()
        return -(probs * torch.where(probs > 0, self.log_probs, 0)).sum()

    def given_next(self, path: list[int], t: int) -> torch.Tensor:
        """log p(y_t | y_{t+1}) at `path`, the last position unconditionally."""
        later = slice(t + 1, t + 2)
        condition = (self.slots[:, later] == torch.tensor(path[later], dtype=torch.int64)).all(1)
        both = condition & (self.slots[:, t] == path[t])
        return torch.logsumexp(self.log_probs[both], 0) - torch.logsumexp(self.log_probs[condition], 0)


def enumerate_paths(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    length: int,
    temperature: float = 1.0,
) -> Paths:
    """All paths of one item: `scores`, `tokens` `(T, K)`, tables `(V, D)`; differentiable."""
    size = scores.shape[1]
    slots = torch.tensor(list(itertools.product(range(size), repeat=length)), dtype=torch.int64)
    slots = slots.view(size**length, length)
    total = torch.zeros(slots.shape[0], dtype=torch.float64)
    for t in range(length):
        total = total + scores[t].double()[slots[:, t]]
        if t > 0:
            source, target = tokens[t - 1][slots[:, t - 1]], tokens[t][slots[:, t]]
            total = total + (left.double()[source] * right.double()[target]).sum(1)
    return Paths(slots, total / temperature)


def stochastic_viterbi_law(paths: Paths, edges: list[torch.Tensor], scores: torch.Tensor, temperature: float):
    """Probability of every path of `paths` under the published sampler, by enumerating all back-pointer tables.

    `edges[t] (K, K)` lead from t to t + 1. For K ** (K * (L - 1)) tables: K = 2, L <= 5 or K = 3, L <= 3.
    """
    length, size = paths.slots.shape[1], scores.shape[1]
    index = {tuple(p.tolist()): i for i, p in enumerate(paths.slots)}
    law = torch.zeros(len(index), dtype=torch.float64)

    def walk(t: int, score: torch.Tensor, prefixes: list[tuple[int, ...]], probability: float) -> None:
        if t == length:
            law[index[prefixes[int(score.argmax())]]] += probability
            return
        candidates = score[:, None] + edges[t - 1].double()
        chances = torch.softmax(candidates / temperature, 0)
        for pointers in itertools.product(range(size), repeat=size):
            chance = 1.0
            for j, k in enumerate(pointers):
                chance *= float(chances[k, j])
            following = torch.stack([candidates[k, j] for j, k in enumerate(pointers)]) + scores[t].double()
            walk(t + 1, following, [(*prefixes[k], j) for j, k in enumerate(pointers)], probability * chance)

    walk(1, scores[0].double(), [(k,) for k in range(size)], 1.0)
    return law


# ---- the published sampler -------------------------------------------------------------------------------------------


def published_samples(emissions, left, right, beam, temperature=1.0, samples=8, pointers=None, uniforms=None):
    """The published `_compute_grpo_samples`: every transition materialised, a categorical draw per target slot.

    Args:
        pointers: `(B, T - 1, K, N)`: back-pointers to follow instead of drawing them.
        uniforms: the same shape: draw by inverse CDF in slot order instead of `torch.multinomial`.

    Returns:
        `beam_probs (B, T, K, N)`, `slots (B, T, N)`, `tokens (B, T, N)` and the back-pointers.
    """
    values, tokens = emissions.topk(beam, 2)
    return published_on_beam(values, tokens, left, right, temperature, samples, pointers, uniforms)


def published_on_beam(values, tokens, left, right, temperature=1.0, samples=8, pointers=None, uniforms=None):
    """The same for beams that are given: emissions `values` of `tokens`, `(B, T, K)` both."""
    batch, length, size = values.shape
    transitions = torch.matmul(left[tokens[:, :-1]], right[tokens[:, 1:]].transpose(2, 3))
    score = values[:, 0].unsqueeze(2).expand(-1, -1, samples)
    scores, table = [score], []
    for t in range(1, length):
        candidates = score[:, :, None] + transitions[:, t - 1].unsqueeze(3)  # (B, from, to, N)
        rows = candidates.permute(0, 2, 3, 1)
        if pointers is not None:
            pointer = pointers[:, t - 1].to(torch.int64)
        else:
            chances = torch.softmax(rows / temperature, dim=3)
            if uniforms is None:
                pointer = torch.multinomial(chances.reshape(-1, size), 1).view(batch, size, samples)
            else:
                running = chances.double().cumsum(3)
                pointer = (running <= uniforms[:, t - 1, :, :, None].double()).sum(3).clamp(max=size - 1)
        score = rows.gather(3, pointer.unsqueeze(3)).squeeze(3) + values[:, t].unsqueeze(2)
        scores.append(score)
        table.append(pointer)
    beam_probs = torch.softmax(torch.stack(scores, 1), dim=2)
    slot = score.argmax(1)
    path = [slot]
    for pointer in reversed(table):
        slot = pointer.gather(1, slot.unsqueeze(1)).squeeze(1)
        path.append(slot)
    slots = torch.stack(path[::-1], 1)
    stacked = torch.stack(table, 1) if table else tokens.new_zeros((batch, 0, size, samples))
    return beam_probs, slots, tokens.gather(2, slots), stacked


# ---- fairseq's formulation -------------------------------------------------------------------------------------------


def _fairseq_beam(emissions, left, right, beam, targets=None):
    ranking = emissions if targets is None else emissions.scatter(2, targets[:, :, None], float("inf"))
    tokens = ranking.topk(beam, 2)[1]
    values = emissions.gather(2, tokens)
    return tokens, values, torch.matmul(left[tokens[:, :-1]], right[tokens[:, 1:]].transpose(2, 3))


def fairseq_nll(emissions, left, right, targets, beam, unbind=False):
    """Negative log-likelihood `(B,)` as fairseq's DynamicCRF computes it.

    `unbind=False` slices the transitions step by step, whose backward writes a full tensor of zeros for each slice.
    """
    _, values, transitions = _fairseq_beam(emissions, left, right, beam, targets)
    numerator = emissions.gather(2, targets[:, :, None])[:, :, 0].sum(1)
    numerator = numerator + (left[targets[:, :-1]] * right[targets[:, 1:]]).sum((1, 2))
    steps = transitions.unbind(1) if unbind else [transitions[:, t] for t in range(transitions.shape[1])]
    return _log_partition(values, steps) - numerator


def fairseq_log_partition(emissions, left, right, beam):
    """log Z `(B,)` by the same recursion, which takes nothing off the scores."""
    _, values, transitions = _fairseq_beam(emissions, left, right, beam)
    return _log_partition(values, transitions.unbind(1))


def _log_partition(values, steps):
    score = values[:, 0]
    for t in range(1, values.shape[1]):
        score = torch.logsumexp(score[:, :, None] + steps[t - 1], 1) + values[:, t]
    return torch.logsumexp(score, 1)


def fairseq_viterbi(emissions, left, right, beam):
    """Best path `(B, T)` (tokens) and its score `(B,)` as fairseq's DynamicCRF decodes."""
    tokens, values, transitions = _fairseq_beam(emissions, left, right, beam)
    score, table = values[:, 0], []
    for t in range(1, values.shape[1]):
        score, pointer = (score[:, :, None] + transitions[:, t - 1]).max(1)
        score = score + values[:, t]
        table.append(pointer)
    best, slot = score.max(1)
    path = [slot]
    for pointer in reversed(table):
        slot = pointer.gather(1, slot[:, None])[:, 0]
        path.append(slot)
    slots = torch.stack(path[::-1], 1)
    return tokens.gather(2, slots[:, :, None])[:, :, 0], best


# ---- one dense matrix of transitions ---------------------------------------------------------------------------------


def dense_log_partition(emissions, transitions, lengths=None):
    """`(B,)`: emissions `(B, T, K)`, transitions `(K, K)` from row to column; one item and one step at a time."""
    result = []
    for b in range(emissions.shape[0]):
        length = emissions.shape[1] if lengths is None else int(lengths[b])
        if length == 0:
            result.append(emissions.new_zeros(()))
            continue
        score = emissions[b, 0]
        for t in range(1, length):
            score = torch.logsumexp(score[:, None] + transitions, 0) + emissions[b, t]
        result.append(torch.logsumexp(score, 0))
    return torch.stack(result) if result else emissions.new_zeros((0,))


def dense_viterbi(emissions, transitions, lengths=None):
    """Best path of every item, `(B, T)`, -1 beyond the lengths."""
    path = torch.full(emissions.shape[:2], -1, dtype=torch.int64)
    for b in range(emissions.shape[0]):
        length = emissions.shape[1] if lengths is None else int(lengths[b])
        if length == 0:
            continue
        score, table = emissions[b, 0], []
        for t in range(1, length):
            score, pointer = (score[:, None] + transitions).max(0)
            score = score + emissions[b, t]
            table.append(pointer)
        slot = int(score.argmax())
        for t in range(length - 1, -1, -1):
            path[b, t] = slot
            if t > 0:
                slot = int(table[t - 1][slot])
    return path
