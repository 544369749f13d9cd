"""The k most probable tokens, against the whole softmax in float64."""

import pytest
import torch

from simctg_fast.ops.top_k import top_k_probs


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


def test_refusals():
    logits = torch.randn(2, 9)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.9, got 10"):
        top_k_probs(logits, 10)
    with pytest.raises(ValueError, match=r"impl must be one of .*got 'cpu'"):
        top_k_probs(logits, 2, "cpu")
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        top_k_probs(logits, 2, "triton")


def test_operator_and_compilation():
    logits = torch.randn(2, 40)
    torch.library.opcheck(torch.ops.simctg_fast.top_k_probs, (logits, 4))
    torch.library.opcheck(torch.ops.simctg_fast.top_k_probs, (logits.mT.contiguous().mT, 4))
    compiled = torch.compile(top_k_probs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, 4), top_k_probs(logits, 4))
