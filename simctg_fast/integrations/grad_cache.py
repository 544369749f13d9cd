"""GradCache for losses over embeddings: a batch may be large, activations are those of one mini-batch at a time.

Embeddings without a graph, mini-batch by mini-batch; the loss and its gradient for them; and in the backward pass each
mini-batch once more, with the random numbers and under the autocast of the first time, its output times that gradient.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["cached_loss", "layers", "mini_batches"]

Features = dict[str, Any]
_BY_ROW = ("input_ids", "attention_mask")


def mini_batches(features: Features, size: int | None, tokens: int | None = None) -> list[Features]:
    """The rows of a batch of features, `size` at a time; or as many as hold `tokens` real tokens, one at least.

    Columns behind the last real token of a mini-batch are left out.

    Raises:
        ValueError: features that are not one row a sentence: flattened ones, images, `StaticEmbedding`'s.
    """
    rows = next((len(features[name]) for name in _BY_ROW if _is_batch(features.get(name))), None)
    odd = [name for name, value in features.items() if isinstance(value, Tensor) and value.dim() and len(value) != rows]
    odd = [name for name in odd if name != "prompt_length"]
    if rows is None or "cu_seq_lens_q" in features or odd:
        raise ValueError(
            "mini_batch_size takes features that hold one row a sentence, (rows, length) input_ids or attention_mask; "
            f"got {', '.join(odd or features)}"
        )
    mask = features.get("attention_mask")
    if tokens is not None and not _is_batch(mask):
        raise ValueError("mini_batch_num_tokens needs the attention_mask of the features, got none")
    lengths = mask.sum(dim=1).tolist() if tokens is not None and mask is not None else None
    result, first = [], 0
    while first < rows:
        end = min(rows, first + (size or rows))
        if lengths is not None and tokens is not None:
            end, total = first + 1, lengths[first]
            while end < rows and total + lengths[end] <= tokens:
                total, end = total + lengths[end], end + 1
        result.append(_rows_of(features, first, end))
        first = end
    return result


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def _rows_of(features: Features, first: int, end: int) -> Features:
    mask, width, length = features.get("attention_mask"), None, None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width = mask.shape[1]
        real = (mask[first:end] != 0).any(dim=0).nonzero()
        length = int(real.max()) + 1 if len(real) else width
    result = {}
    for name, value in features.items():
        if isinstance(value, Tensor) and value.dim() and name != "prompt_length":
            value = value[first:end]
            if length is not None and value.dim() >= 2 and value.shape[1] == width:
                value = value[:, :length]
        result[name] = value
    return result


def cached_loss(
    model: Any,
    columns: Sequence[Sequence[Features]],
    calculate: Callable[[list[list[Tensor]]], Tensor],
    progress: Callable[[Sequence[Features]], Iterator[Features]] = iter,
) -> Tensor:
    """The loss, whose backward pass is that of the whole batch at once.

    Args:
        model: returns ``"sentence_embedding"`` from features.
        columns: mini-batches of features, column by column.
        calculate: the loss from the embeddings of each mini-batch, at least float32; where they want gradients it makes
            them.
        progress: what the mini-batches of a column are looped over with.

    Raises:
        ValueError: a model under `DistributedDataParallel(static_graph=True)`, which takes one forward pass a step.
        RuntimeError: in the backward pass, where `model.forward` is not what it was.
    """
    if getattr(model, "static_graph", False):
        raise ValueError("mini_batch_size takes several forward passes a step, which static_graph=True does not allow")
    wanted = torch.is_grad_enabled()
    runs: list[tuple[Features, _State, Tensor]] = []
    embeddings: list[list[Tensor]] = []
    with torch.no_grad():
        for column in columns:
            embeddings.append([])
            for features in progress(column):
                state = _State(features)
                embedding = _embed(model, features).detach().requires_grad_(wanted)
                embeddings[-1].append(embedding)
                runs.append((features, state, embedding))
    loss = calculate(embeddings).detach()
    if not wanted:
        return loss
    forwards = [layer.forward for layer in layers(model)]

    def replay(grad: Tensor) -> None:
        if [layer.forward for layer in layers(model)] != forwards:
            raise RuntimeError(
                "mini_batch_size runs the model again in the backward pass, but its forward has been replaced since: a "
                "loss that replaces model.forward for the time of a forward pass needs mini_batch_size=None"
            )
        for index, (features, state, embedding) in enumerate(runs):
            # Data-parallel training exchanges gradients once, in the last backward pass.
            apart = index < len(runs) - 1 and hasattr(model, "no_sync")
            with model.no_sync() if apart else contextlib.nullcontext():
                with torch.enable_grad(), state.again():
                    output = _embed(model, features)
                if output.requires_grad and embedding.grad is not None:
                    output.backward(embedding.grad * grad)

    loss.requires_grad_()
    loss.register_hook(replay)
    return loss


def _embed(model: Any, features: Features) -> Tensor:
    embedding: Tensor = model(dict(features))["sentence_embedding"]  # a model may write into what it is handed
    # The gradients that are kept are not scaled, as the loss is later, and would vanish in 16 bits.
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


def layers(model: Any) -> list[Any]:
    """The model, and what DistributedDataParallel or torch.compile holds in it."""
    result = [model]
    while (inner := getattr(result[-1], "_orig_mod", None) or getattr(result[-1], "module", None)) is not None:
        result.append(inner)
    return result


class _State:
    """Random numbers and autocast as they were."""

    def __init__(self, features: Features):
        self.device = next(value.device for value in features.values() if isinstance(value, Tensor))
        self.cpu = torch.get_rng_state()
        self.device_rng = None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state()
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", self.device.type}
        }

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        module = None if self.device_rng is None else torch.get_device_module(self.device)
        now = torch.get_rng_state(), None if module is None else module.get_rng_state()
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            try:
                torch.set_rng_state(self.cpu)
                if module is not None:
                    module.set_rng_state(self.device_rng)
                yield
            finally:
                torch.set_rng_state(now[0])
                if module is not None:
                    module.set_rng_state(now[1])
