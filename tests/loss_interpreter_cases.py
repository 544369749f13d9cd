"""Runs the losses' Triton kernels in Triton's interpreter, against float64.

A script, as the interpreter is chosen at import.

Prints one JSON line a case: the case and what it measured. `test_kernels_interpreter_losses.py` starts it and judges.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from simctg_fast.functional import (
    contraclm_token_loss,
    contrastive_loss,
    cosine_similarity_matrix,
    simcse_sup_loss,
    simcse_unsup_loss,
)
from simctg_fast.ops.simcse import pair_loss
from simctg_fast.ranking import ranking_loss
from simctg_fast.reference import contraclm as contraclm_reference
from simctg_fast.reference import simcse as simcse_reference
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-12))


def gradient_of(loss_function, tensor: torch.Tensor, factor: float = 1.0):
    """The loss, and the gradient of ``factor * loss``."""
    leaf = tensor.detach().requires_grad_()
    loss = loss_function(leaf)
    (loss * factor).backward()
    return loss.detach(), leaf.grad


def contrastive(shape, bias, dtype, reduction, precision, normalizer=None) -> dict[str, float]:
    torch.set_float32_matmul_precision(precision)
    batch, length, _ = shape
    states = (torch.randn(shape) + bias * torch.randn(shape[2])).to(DTYPES[dtype])
    mask = None
    if reduction != "dense":
        mask = torch.ones(batch, length, dtype=torch.bool if batch == 1 else torch.int64)
        mask[0, : length // 5] = 0
        mask[-1, length - length // 4 :] = 0
    if length > 9:
        states[0, length // 2] = 0.0
    junk = states if mask is None else states.masked_fill(mask[..., None] == 0, float("nan"))
    wide = states.double()
    factor = float(length**2)  # as a gradient scaler would: float16 has no room for what a pair adds to a mean
    truth, gradient = gradient_of(lambda s: reference(s, mask, 0.5, reduction), wide, factor)
    if normalizer is not None:
        count = float((mask.sum(1) * (mask.sum(1) - 1)).sum())
        truth, gradient = truth * count / normalizer, gradient * count / normalizer
    gradient = gradient.masked_fill((wide == 0).all(-1, keepdim=True), 0.0)
    loss, got = gradient_of(
        lambda s: contrastive_loss(s, 0.5, mask, reduction, normalizer=normalizer, impl="triton"), junk, factor
    )
    # A permuted view, no gradient kept.
    permuted = junk.transpose(0, 1).contiguous().transpose(0, 1)
    again = contrastive_loss(permuted, 0.5, mask, reduction, normalizer=normalizer, impl="triton")
    return {
        "loss": float((loss - truth).abs() / truth.abs().clamp_min(1e-9)),
        "gradient": relative(got, gradient),
        "largest": float((got - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)),
        "same": float(torch.equal(again, loss)),
        "active": float(truth > 0),
    }


def edges() -> dict[str, float]:
    loss, gradient = gradient_of(lambda s: contrastive_loss(s, impl="triton"), torch.randn(2, 1, 8))
    bad = torch.randn(1, 5, 8)
    bad[0, 2, 3] = float("inf")
    empty, _ = gradient_of(lambda s: contrastive_loss(s, impl="triton"), torch.randn(0, 5, 8))
    return {
        "one_token": float(loss.abs() + gradient.abs().max()),
        "not_finite": float(contrastive_loss(bad, impl="triton").isnan()),
        "empty": float(empty),
    }


def odd_arguments() -> dict[str, int]:
    """How often the kernels say anything else than tiled PyTorch to counts, masks and sizes at the edge."""
    states = torch.randn(3, 20, 8) + 1.0
    states[0, 3] = 0.0
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[0, 4:] = real[1, :1] = real[2, :15] = True
    counts = [torch.tensor(value) for value in (float("nan"), float("inf"), 0, 0.0, -2.0, 7)]
    counts += [torch.full((1, 1), 7).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.uint16)]
    masks = [
        None,
        real,
        real & False,
        *(real.to(d) for d in (torch.bfloat16, torch.float16, torch.float64, torch.int8)),
    ]
    masks.append(torch.where(real, 1.0, -0.0).to(torch.bfloat16))
    masks.append(torch.where(real, torch.nan, 0.0))
    masks.append(real.T.contiguous().T)
    calls = [{"attention_mask": mask} for mask in masks]
    calls += [{"normalizer": count, "attention_mask": real} for count in counts]
    calls += [{"normalizer": torch.tensor(0), "attention_mask": masks[2]}, {"reduction": "dense", "margin": -0.3}]
    sizes = [states, states[:, :1], states[:, :0], states[:0], states[..., :0], states[:, :1] * torch.nan]
    wrong = 0
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        cases = [(states, call) for call in (calls if default == torch.float32 else calls[:2])]
        cases += [(each, {"reduction": reduction}) for each in sizes for reduction in ("pairs", "paper", "dense")]
        for given, call in cases:
            loss, gradient = gradient_of(lambda s, call=call: contrastive_loss(s, impl="triton", **call), given)
            want, grad = gradient_of(lambda s, call=call: contrastive_loss(s, impl="torch", **call), given)
            same = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
            wrong += not (torch.allclose(loss, want, **same) and torch.allclose(gradient, grad, **same))
    torch.set_default_dtype(torch.float32)
    return {"wrong": wrong}


def simcse(rows, width, dtype, supervised, temperature) -> dict[str, float]:
    embeddings = (torch.randn(rows, width) + 0.3).to(DTYPES[dtype])
    mine = simcse_sup_loss if supervised else simcse_unsup_loss
    theirs = simcse_reference.simcse_sup_loss if supervised else simcse_reference.simcse_unsup_loss
    truth, gradient = gradient_of(lambda e: theirs(e, temperature), embeddings.double())
    loss, got = gradient_of(lambda e: mine(e, temperature=temperature, impl="triton"), embeddings)
    return {"loss": float((loss - truth).abs() / truth), "gradient": relative(got, gradient)}


def contraclm(shape, dtype, temperature, strip=None) -> dict[str, float]:
    """Padding on the left, on the right and in the middle, a single token, and NaN where nothing is real."""
    from simctg_fast.kernels import contraclm as kernels

    if strip is not None:
        kernels._STRIP_ELEMENTS = strip
    batch, length, _ = shape
    views = (torch.randn(2, *shape) * 0.4 + torch.randn(shape) + 0.3).to(DTYPES[dtype])
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 4] = mask[0, length // 2] = mask[-1, 1:] = 0
    if batch > 2:
        mask[1, length - length // 3 :] = 0
    views[0, 0, length - 2] = 0.0
    junk = views.masked_fill(mask[..., None] == 0, float("nan"))
    factor = float(length)
    truth, gradient = gradient_of(
        lambda v: contraclm_reference.contraclm_token_loss(v[0], v[1], mask, temperature), views.double(), factor
    )
    loss, got = gradient_of(lambda v: contraclm_token_loss(v[0], v[1], mask, temperature, impl="triton"), junk, factor)
    return {"loss": float((loss - truth).abs() / truth), "gradient": relative(got, gradient)}


def left_out(rows, width, dtype) -> dict[str, float]:
    """Some rows against all, each left out where it is a key itself; the whole loss of one set in three parts."""
    vectors = torch.randn(rows, width).to(DTYPES[dtype])
    targets = torch.arange(rows) ^ 1
    parts = [slice(0, 2), slice(2, rows // 2), slice(rows // 2, rows)]

    def in_parts(v):
        return sum(pair_loss(v[part], v, targets[part], 20.0, "triton", part.start).sum() for part in parts)

    truth, gradient = gradient_of(lambda v: rows * simcse_reference.simcse_unsup_loss(v), vectors.double())
    loss, got = gradient_of(in_parts, vectors)
    return {"loss": float((loss - truth).abs() / truth), "gradient": relative(got, gradient)}


def ranking(rows, width, dtype, options) -> dict[str, float]:
    """An anchor, a positive and two hard negatives a row."""
    stacked = (torch.randn(4, rows, width) + 0.3).to(DTYPES[dtype])
    truth, gradient = gradient_of(
        lambda c: simcse_reference.ranking_loss(c[0], list(c[1:]), 20.0, **options), stacked.double()
    )
    loss, got = gradient_of(lambda c: ranking_loss(c[0], list(c[1:]), 20.0, impl="triton", **options), stacked)
    return {"loss": float((loss - truth).abs() / truth), "gradient": relative(got, gradient)}


def cosine(shape, dtype) -> dict[str, float]:
    states = torch.randn(shape).to(DTYPES[dtype])
    states[0, 3] = 0.0
    wide = states.double()
    truth, gradient = gradient_of(lambda s: cosine_similarity_matrix(s, impl="torch").square().sum(), wide)
    loss, got = gradient_of(lambda s: cosine_similarity_matrix(s, impl="triton").float().square().sum(), states)
    matrix = cosine_similarity_matrix(states, impl="triton")
    difference = (matrix - cosine_similarity_matrix(wide, impl="torch")).abs().max()
    return {
        "value": float(difference),
        "gradient": relative(got, gradient),
        "zero": float(matrix[0, 3].abs().max() + got[0, 3].abs().max()),
        "loss": float((loss - truth).abs() / truth),
    }


def main() -> None:
    for index, line in enumerate(sys.stdin):
        torch.manual_seed(index)
        case = json.loads(line)
        result = globals()[case["function"]](**case["arguments"])
        print(json.dumps({"case": case, "result": result}), flush=True)


if __name__ == "__main__":
    main()
