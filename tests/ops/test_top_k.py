"""The k most probable tokens, against the whole softmax in float64."""

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.top_k import top_k_probs

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "vocabulary", "k"), [(1, 1, 1), (3, 50, 4), (2, 1000, 64), (1, 70, 70)])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_equals_the_softmax(dtype, batch, vocabulary, k, impl):
    logits = (4 * torch.randn(batch, vocabulary)).to(dtype)
    probs, tokens = top_k_probs(logits, k, impl)
    truth = logits.double().softmax(dim=-1)
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probs.double(), truth.topk(k).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(truth.gather(1, tokens), truth.topk(k).values)
    assert all(len(set(row)) == k for row in tokens.tolist())


def test_banned_tokens_and_rows_without_probabilities():
    logits = torch.randn(3, 20)
    logits[0, 5:] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    probs, _ = top_k_probs(logits, 8)
    assert (probs[0, :5] > 0).all()
    assert not probs[0, 5:].any()
    assert probs[1:].isnan().any(dim=-1).all()


@pytest.mark.parametrize("vocabulary", [5, 255, 257, 1000, 32128])
def test_in_cpp_on_every_instruction_set(isa, vocabulary):
    """Groups of 256, whole or not, one row or several, ties, and winners side by side in one group."""
    for k in (1, 4, 5, 64)[: 3 if vocabulary == 5 else 4]:
        logits = (3 * torch.randn(7, vocabulary)).round(decimals=1)  # many are equal
        logits[1] = 7.0
        logits[2, : vocabulary // 2] -= 1e4
        logits[3, vocabulary // 3 : vocabulary // 3 + 4] = 50.0
        logits[4, 2:] = -torch.inf
        logits[5, 1] = torch.nan
        logits[6, 3] = torch.inf
        probs, tokens = top_k_probs(logits, k, "cpu")
        order = torch.sort(logits[:5], dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(tokens[:5], order)
        truth = logits[:5].double().softmax(dim=-1).gather(1, order)
        torch.testing.assert_close(probs[:5].double(), truth, atol=0, rtol=2e-6)
        assert probs[5:].isnan().all()
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
        assert torch.equal(top_k_probs(logits[3:4], k, "cpu")[0], probs[3:4])
        wide = torch.cat([logits, logits], dim=1)[:, :vocabulary]
        assert torch.equal(top_k_probs(wide, k, "cpu")[0][:5], probs[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_cpp(isa, dtype):
    """Widened, and of equal logits, which 16 bits make many, the earlier token first, also at the k-th place."""
    logits = (30 * torch.randn(5, 3001)).round().to(dtype) / 10
    for k in (1, 4, 64):
        for impl in ("auto", "cpu"):
            probs, tokens = top_k_probs(logits, k, impl)
            expected = top_k_probs(logits.float(), k, "cpu")
            assert torch.equal(probs, expected[0])
            assert torch.equal(tokens, expected[1])
        assert torch.equal(tokens, torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k])
    kth = logits.sort(dim=-1, descending=True).values[:, 63:64]
    assert ((logits == kth).sum(dim=-1) > 1).any()


@needs_extension
def test_what_cpp_does_not_take():
    logits = torch.randn(2, 100)
    for bad, k, text in [
        (logits.double(), 4, "logits is torch.float64 on cpu"),
        (logits, 65, "k is 65, must be at most 64"),
        (logits[0], 4, r"logits has shape \(100,\)"),
        (logits.clone().requires_grad_(), 4, "logits requires a gradient"),
        (logits.bfloat16().requires_grad_(), 4, "logits requires a gradient"),
    ]:
        with pytest.raises(ValueError, match=f"impl='cpu' does not take this call: {text}"):
            top_k_probs(bad, k, "cpu")


def test_refusals():
    logits = torch.randn(2, 9)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.9, got 10"):
        top_k_probs(logits, 10)
    with pytest.raises(ValueError, match="impl is 'mps', must be one of"):
        top_k_probs(logits, 2, "mps")
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        top_k_probs(logits, 2, "triton")


def test_operator_and_compilation():
    logits = torch.randn(2, 40)
    torch.library.opcheck(torch.ops.simctg_fast.top_k_probs, (logits, 4))
    torch.library.opcheck(torch.ops.simctg_fast.top_k_probs, (logits.mT.contiguous().mT, 4))
    compiled = torch.compile(top_k_probs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, 4), top_k_probs(logits, 4))
