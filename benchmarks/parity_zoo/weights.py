"""Weights drawn by parameter name: large enough to matter, the same in every process and version."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

# Buffers that are part of the function a model computes, drawn like biases. (Others, such as rotary frequencies, are
# constants.)
_DRAWN_BUFFERS = ("final_logits_bias",)


def draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standard normal float32 values for one parameter."""
    return torch.from_numpy(_generator(name, seed).standard_normal(shape).astype(np.float32))


def draw_integers(name: str, shape: tuple[int, ...], seed: int, low: int, high: int) -> torch.Tensor:
    """Uniform int64 values in [low, high)."""
    return torch.from_numpy(_generator(name, seed).randint(low, high, shape, dtype=np.int64))


def _generator(name: str, seed: int) -> np.random.RandomState:
    """The old generator, because it is frozen: its streams never change."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int, std: float = 0.35, stds: dict[str, float] | None = None) -> torch.nn.Module:
    """Overwrites every parameter of `model` in place.

    Args:
        model: a freshly initialised model (norm weights at their neutral value, decay rates at theirs).
        seed: with the parameter's name, decides the values.
        std: standard deviation of matrices, embeddings and biases. Fixed, not scaled by width: attention gets sharp,
            and an error in any mask or bias is large.
        stds: other standard deviations, by a part of the parameter's name.
    """
    stds = {} if stds is None else stds
    # Weights of matrices sum to zero over their inputs. Otherwise the positive mean of GELU and ReLU pushes every
    # position the same way, hidden states become alike, and a model says one word for ever.
    inputs_first = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    inputs_last = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    for name, value in model.named_parameters():  # tied weights come once, under the name of their first owner
        noise = draw(name, tuple(value.shape), seed)
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in inputs_first | inputs_last and id(value) not in embeddings:
            noise = noise - noise.mean(dim=0 if owner in inputs_first else 1, keepdim=True)
        if owner in norms or leaf in ("A_log", "D"):
            # Around their neutral value: 1 for the weights of most norms, 0 for Gemma's, graded for decay rates.
            value.add_(0.2 * noise)
        elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
            # Step sizes of state-space layers: softplus of this lies between about 0.1 and 1.
            value.copy_(math.log(math.expm1(0.4)) + 0.5 * noise)
        else:
            value.copy_(next((other for part, other in stds.items() if part in name), std) * noise)
    for name, value in model.named_buffers():
        if name.rpartition(".")[2] in _DRAWN_BUFFERS:
            value.copy_(std * draw(name, tuple(value.shape), seed))
    return model
