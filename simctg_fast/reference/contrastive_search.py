"""Contrastive search as the paper writes it: no cache, no packing, nothing kept from one step to the next.

Every step runs the whole model over the whole text once per candidate. That is slow, and the reason to trust it: there
is no cache to get out of step, no position to miscount and no attention function of ours in the way.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417), equation 5.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["ReferenceOutput", "ReferenceStep", "contrastive_search", "degeneration_penalty", "true_float64"]


class _Float32BecomesFloat64(TorchFunctionMode):
    """Runs `x.float()`, `x.to(torch.float32)` and `softmax(…, dtype=torch.float32)` in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """Makes a float64 model compute in float64 throughout.

    Most models upcast to float32 inside norms, rotary embeddings and attention softmax. In a float64 model those are
    downcasts, and the result would be no better than float32. Tensors made without a dtype are float64 too: some models
    build masks from the smallest float64 that way, which float32 cannot hold.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float32BecomesFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class ReferenceStep:
    """What one step saw and chose, for B rows and k candidates.

    `candidates`, `probabilities`, `penalties`, `scores` are `(B, k)`, most probable candidate first; `tokens` `(B,)` is
    what was appended (the pad token for a finished row); `unfinished` `(B,)` says which rows really chose. The margins
    `(B,)` say how far the choice was from another one: `score_margin` is best minus second-best score,
    `candidate_margin` the difference of log-probability between the last candidate and the first token that is not one
    (`inf` where there is none).
    """

    candidates: torch.Tensor
    probabilities: torch.Tensor
    penalties: torch.Tensor
    scores: torch.Tensor
    tokens: torch.Tensor
    unfinished: torch.Tensor
    score_margin: torch.Tensor
    candidate_margin: torch.Tensor


@dataclass(frozen=True)
class ReferenceOutput:
    """`sequences` `(B, L + n)` (prompt included) and one `ReferenceStep` for each of the n steps."""

    sequences: torch.Tensor
    steps: tuple[ReferenceStep, ...]

    def new_tokens(self) -> torch.Tensor:
        """The tokens after the prompt, `(B, n)`."""
        return self.sequences[:, self.sequences.shape[1] - len(self.steps) :]

    def _smallest(self, margin: str) -> float:
        return min(
            (float(getattr(step, margin)[step.unfinished].min()) for step in self.steps if bool(step.unfinished.any())),
            default=float("inf"),
        )

    @property
    def score_margin(self) -> float:
        """The smallest lead of a winner over its runner-up, over all rows and steps."""
        return self._smallest("score_margin")

    @property
    def candidate_margin(self) -> float:
        """The smallest difference of log-probability between a last candidate and the first token left out."""
        return self._smallest("candidate_margin")


def degeneration_penalty(
    history: torch.Tensor, candidates: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest cosine similarity of each candidate to an earlier real position: the second term of equation 5.

    Args:
        history: hidden states of the text so far, `(N, L, D)`.
        candidates: hidden state of the appended token, `(N, D)`.
        attention_mask: 1 for real positions, 0 for padding, `(N, L)`; padding is no context and is left out.

    Returns:
        `(N,)`, in the dtype of the hidden states.
    """
    cosine = torch.nn.functional.cosine_similarity(history, candidates[:, None, :], dim=-1)  # (N, L)
    if attention_mask is not None:
        cosine = cosine.masked_fill(attention_mask == 0, -torch.inf)
    return cosine.amax(dim=-1)


def _forward(
    model: torch.nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after the last token `(N, V)` and last-layer hidden states of all positions `(N, T, D)`."""
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    inputs = dict(inputs)
    inputs[f"{prefix}input_ids"] = ids
    if mask is not None:
        inputs[f"{prefix}attention_mask"] = mask
        # Models with rotary or learned positions count real tokens; those with their own rule (multimodal rotary
        # embeddings, relative biases) are left to apply it.
        if not prefix and _positions_are_counted(model):
            inputs["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    # The types of text tokens: a generated token has the type of the last one, and is never an image.
    for name, fill in (("token_type_ids", None), ("mm_token_type_ids", 0)):
        if (types := inputs.get(name)) is not None:
            last = types[:, -1:] if fill is None else torch.full_like(types[:, -1:], fill)
            inputs[name] = torch.cat([types, last.expand(-1, ids.shape[1] - types.shape[1])], dim=1)
    outputs = model(**inputs, use_cache=False, output_hidden_states=True, return_dict=True)
    hidden = outputs.decoder_hidden_states if prefix else outputs.hidden_states
    return outputs.logits[:, -1, :], hidden[-1]


def _positions_are_counted(model: torch.nn.Module) -> bool:
    from transformers.generation import GenerationMixin

    own_rule = getattr(type(model), "_prepare_position_ids_for_generation", None)
    standard_rule = getattr(GenerationMixin, "_prepare_position_ids_for_generation", None)
    return own_rule is standard_rule and "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def contrastive_search(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    penalty_alpha: float,
    top_k: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    decoder_attention_mask: torch.Tensor | None = None,
    penalty: Callable[..., torch.Tensor] | None = None,
    **model_inputs: torch.Tensor,
) -> ReferenceOutput:
    """Contrastive search by recomputing everything at every step.

    Args:
        model: a causal language model or an encoder-decoder of transformers, in any dtype; a float64 one is run in
            float64 throughout.
        input_ids: `(B, L)`; the encoder's input for an encoder-decoder (any main input, such as `input_features`, may
            be given instead, by name, with `input_ids=None`).
        attention_mask: `(B, L)`, 0 for padding (on the left for a causal model).
        penalty_alpha: weight α of the penalty, in [0, 1].
        top_k: number of candidates k, at least 1.
        max_new_tokens: steps at most; fewer when every row has met `eos_token_id`.
        eos_token_id: token or tokens that finish a row; it is filled up with `pad_token_id`.
        logits_processor: called as `(ids (B, T), logits (B, V))` before the softmax, like those of `generate`.
        decoder_input_ids: the decoder's prompt `(B, L)`, default one start token (encoder-decoders only).
        decoder_attention_mask: `(B, L)`, 0 for padding of that prompt.
        penalty: in the place of `degeneration_penalty`, with its arguments.
        model_inputs: further inputs of the model (`pixel_values`, …), passed to every forward.

    Returns:
        The sequences and, for each step, candidates, scores and margins.
    """
    if model.config.is_encoder_decoder:
        encoder_inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        model_inputs |= {name: value for name, value in encoder_inputs.items() if value is not None}
        ids, mask = decoder_input_ids, decoder_attention_mask
        if ids is None:
            rows = next(iter(model_inputs.values()))
            start: Any = model.config.decoder_start_token_id
            ids = torch.full((rows.shape[0], 1), start, device=rows.device)
    else:
        ids, mask = input_ids, attention_mask
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, device=ids.device, dtype=ids.dtype).reshape(-1)
    exact = true_float64() if next(model.parameters()).dtype == torch.float64 else contextlib.nullcontext()
    with exact:
        return _search(
            model, ids, mask, model_inputs, penalty_alpha, top_k, max_new_tokens, ends, pad_token_id, logits_processor,
            penalty or degeneration_penalty,
        )  # fmt: skip


def _search(model, ids, mask, inputs, alpha, top_k, max_new_tokens, ends, pad_token_id, logits_processor, penalty):
    batch = ids.shape[0]
    unfinished = torch.ones(batch, dtype=torch.bool, device=ids.device)
    steps = []
    logits, _ = _forward(model, ids, mask, inputs)
    for _ in range(max_new_tokens):
        if logits_processor is not None:
            logits = logits_processor(ids, logits)
        ranked, order = logits.log_softmax(dim=-1).sort(dim=-1, descending=True)
        candidates, probabilities = order[:, :top_k], ranked[:, :top_k].exp()  # (B, k)

        candidate_logits, penalties = _look_ahead(model, ids, mask, inputs, candidates, penalty)  # (B, k, V), (B, k)
        scores = (1.0 - alpha) * probabilities - alpha * penalties
        selected = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        tokens = candidates.gather(1, selected).squeeze(1)
        if ends.numel():
            tokens = torch.where(unfinished, tokens, pad_token_id)
        steps.append(
            ReferenceStep(
                candidates=candidates,
                probabilities=probabilities,
                penalties=penalties,
                scores=scores,
                tokens=tokens,
                unfinished=unfinished,
                score_margin=_lead(scores.sort(dim=-1, descending=True).values, 1),
                candidate_margin=_lead(ranked, top_k),
            )
        )
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits = candidate_logits[torch.arange(batch), selected.squeeze(1)]
        unfinished = unfinished & ~torch.isin(tokens, ends)
        if not bool(unfinished.any()):
            break
    return ReferenceOutput(sequences=ids, steps=tuple(steps))


def _look_ahead(model, ids, mask, inputs, candidates, penalty_of):
    """Runs the text with each candidate appended: logits after it `(B, k, V)` and its penalty `(B, k)`."""
    # All candidates at once where inputs have one row a sequence. Images may have any number of rows: one by one, then.
    at_once = candidates.shape[1] if model.config.is_encoder_decoder or not inputs else 1
    logits, penalties = [], []
    for some in candidates.split(at_once, dim=1):
        width = some.shape[1]
        wide_ids = torch.cat([ids.repeat_interleave(width, dim=0), some.reshape(-1, 1)], dim=1)  # (B·k, T + 1)
        wide_inputs = {name: value.repeat_interleave(width, dim=0) for name, value in inputs.items()}
        wide_mask = history_mask = None
        if mask is not None:
            history_mask = mask.repeat_interleave(width, dim=0)
            wide_mask = torch.cat([history_mask, torch.ones_like(history_mask[:, :1])], dim=1)
        wide_logits, hidden = _forward(model, wide_ids, wide_mask, wide_inputs)
        penalty = penalty_of(hidden[:, :-1], hidden[:, -1], history_mask)
        logits.append(wide_logits.unflatten(0, (-1, width)))
        penalties.append(penalty.unflatten(0, (-1, width)))
    return torch.cat(logits, dim=1), torch.cat(penalties, dim=1)


def _lead(ranked: torch.Tensor, place: int) -> torch.Tensor:
    """How far the value at `place - 1` of a descending row is above the one at `place`, `(B,)`."""
    if place >= ranked.shape[-1]:
        return torch.full_like(ranked[:, 0], torch.inf)
    return (ranked[:, place - 1] - ranked[:, place]).nan_to_num(nan=torch.inf)
