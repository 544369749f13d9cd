"""`SimCTGLoss` under its published signature, the tutorial's functions, and the cosine matrix."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from simctg_fast import SimCTGLoss, contrastive_loss, cosine_similarity_matrix
from simctg_fast.compat import compute_contrastive_loss, t5_cosine_similarity
from simctg_fast.losses import ContrastiveLoss, padding_mask
from simctg_fast.ops import _backends
from simctg_fast.reference.contrastive_search import true_float64

from ..decoding_models import VOCABULARY, build, prompt

PAD, VOCAB = 0, 30


def published(margin, states, logits, input_ids, labels):
    """The published class's arithmetic: every `pad_token_id` is padding, pairs of all sequences share one mean."""
    likelihood = F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
    unit = states / states.norm(dim=-1, keepdim=True)
    similarity = unit @ unit.mT
    hinge = torch.relu(margin - similarity.diagonal(dim1=1, dim2=2).unsqueeze(-1) + similarity)
    total, pairs = 0.0, 0
    for b in range(len(input_ids)):
        n = int((input_ids[b] != PAD).sum())
        total = total + hinge[b, :n, :n].masked_fill(torch.eye(n, dtype=torch.bool), 0.0).sum()
        pairs += n * (n - 1)
    return likelihood, total / pairs


def make_batch(lengths=(12, 7, 9)):
    batch, length = len(lengths), max(lengths)
    input_ids = torch.randint(1, VOCAB, (batch, length))
    for b, n in enumerate(lengths):
        input_ids[b, n:] = PAD
    states = torch.randn(batch, length, 16) + torch.randn(16)
    return states, torch.randn(batch, length, VOCAB), input_ids, input_ids.masked_fill(input_ids == PAD, -100)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_equals_the_published_class(impl):
    states, logits, input_ids, labels = make_batch()
    leaves = [(states.clone().requires_grad_(), logits.clone().requires_grad_()) for _ in range(2)]
    expected = published(0.5, *leaves[0], input_ids, labels)
    got = SimCTGLoss(margin=0.5, vocab_size=VOCAB, pad_token_id=PAD, impl=impl)(*leaves[1], input_ids, labels)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    (expected[0] + expected[1]).backward()
    (got[0] + got[1]).backward()
    for mine, theirs in zip(leaves[1], leaves[0], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_a_published_training_script_gives_the_same_curve():
    """The loop such scripts have; only the class differs between the two runs."""
    torch.manual_seed(1)
    _, _, input_ids, labels = make_batch((12, 12, 5, 9))
    start = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, 16), torch.nn.Tanh())
    head = torch.nn.Linear(16, VOCAB)

    def train(loss_function):
        body, output = copy.deepcopy(start), copy.deepcopy(head)
        optimizer = torch.optim.AdamW([*body.parameters(), *output.parameters()], 1e-2)
        curve = []
        for _ in range(10):
            states = body(input_ids)
            mle_loss, cl_loss = loss_function(states, output(states), input_ids, labels)
            (mle_loss + cl_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append([mle_loss.item(), cl_loss.item()])
        return torch.tensor(curve)

    ours = train(SimCTGLoss(0.9, VOCAB, PAD))
    theirs = train(lambda *batch: published(0.9, *batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert ours[-1].sum() < ours[0].sum()


class Watched:
    """The extension, and which of its functions are looked up."""

    def __init__(self, extension):
        self.extension, self.names = extension, []

    def __getattr__(self, name):
        self.names.append(name)
        return getattr(self.extension, name)


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_go_through_the_kernels(dtype, monkeypatch):
    """Loss and gradients of a model's weights are as close to float64 as the published arithmetic's in its type."""
    model, ids = build("gpt2").to(dtype), prompt(3, 20)
    watched = Watched(_backends.require_extension())
    monkeypatch.setattr(_backends, "require_extension", lambda: watched)

    def trained(model, loss_function):
        out = model(ids, output_hidden_states=True)
        model.zero_grad()
        loss = loss_function(out.hidden_states[-1], out.logits)
        loss.backward()
        return loss.detach().double(), torch.cat([p.grad.flatten().double() for p in model.transformer.parameters()])

    def plain(states, logits):
        unit = states / states.norm(dim=-1, keepdim=True)
        similarity = unit @ unit.mT
        pairs = ~torch.eye(20, dtype=torch.bool).expand(3, -1, -1)
        return torch.relu(0.9 - similarity.diagonal(dim1=1, dim2=2).unsqueeze(-1) + similarity)[pairs].mean()

    ours = trained(model, lambda states, logits: SimCTGLoss(0.9, VOCABULARY, PAD)(states, logits, ids, ids)[1])
    assert {"contrastive_hinge", "contrastive_reduce", "contrastive_gradient"} <= set(watched.names)
    theirs = trained(model, plain)
    with true_float64():
        exact = trained(copy.deepcopy(model).double(), plain)
    for got, own, truth in zip(ours, theirs, exact, strict=True):
        assert (got - truth).norm() <= 1.2 * (own - truth).norm() + 1e-3 * truth.norm()


def test_padding_is_a_run_at_either_end():
    tokens = torch.tensor([[0, 0, 5, 0, 6, -100, 0], [1, 2, 3, 4, 5, 6, 7], [0] * 7, [-100, 3, -100, 4, 0, 0, 0]])
    expected = [[0, 0, 1, 1, 1, 0, 0], [1] * 7, [0] * 7, [0, 1, 1, 1, 0, 0, 0]]
    assert padding_mask(tokens, 0).tolist() == torch.tensor(expected).bool().tolist()


def test_padding_inside_the_text_is_a_token_and_a_mask_goes_first():
    states, logits, input_ids, labels = make_batch()
    input_ids[1, 3] = PAD
    loss = SimCTGLoss(0.5, VOCAB, PAD)
    mask = torch.arange(12) < torch.tensor([[12], [7], [9]])
    torch.testing.assert_close(loss(states, logits, input_ids, labels)[1], contrastive_loss(states, 0.5, mask))
    got = loss(states, logits, input_ids, labels, attention_mask=mask[:, :1].expand(-1, 12))[1]
    torch.testing.assert_close(got, contrastive_loss(states))


def test_encoder_decoder_labels():
    states, logits, _, labels = make_batch()
    encoder_ids = torch.randint(1, VOCAB, (3, 20))
    got = SimCTGLoss(0.5, VOCAB, PAD)(states, logits, encoder_ids, labels)
    torch.testing.assert_close(got[1], contrastive_loss(states, 0.5, labels != -100))
    torch.testing.assert_close(got[0], F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_errors():
    states, logits, input_ids, labels = make_batch()
    loss = SimCTGLoss(0.5, VOCAB, PAD)
    with pytest.raises(ValueError, match=r"margin is 2, must lie in \[-1, 1\]"):
        SimCTGLoss(2, VOCAB, PAD)
    with pytest.raises(ValueError, match="last dimension of 29, must be vocab_size=30"):
        loss(states, logits[..., 1:], input_ids, labels)
    with pytest.raises(ValueError, match=r"labels has shape \(3, 11\)"):
        loss(states, logits, input_ids, labels[:, 1:])
    with pytest.raises(ValueError, match=r"last_hidden_states has shape \(3, 11, 16\)"):
        loss(states[:, 1:], logits, input_ids, labels)


def test_the_module_is_the_function():
    states = torch.randn(2, 9, 8)
    mask = torch.ones(2, 9)
    module = ContrastiveLoss(0.4, "paper")
    torch.testing.assert_close(module(states, mask), contrastive_loss(states, 0.4, mask, "paper"))
    assert "margin=0.4" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_similarity_matrix(dtype):
    layers = [(torch.randn(2, 7, 40) + 1).to(dtype) for _ in range(3)]
    layers[0][1, 2] = 0.0
    matrix = cosine_similarity_matrix(layers[0])
    expected = F.cosine_similarity(layers[0].double()[:, :, None], layers[0].double()[:, None], dim=-1)
    assert (matrix.shape, matrix.dtype) == ((2, 7, 7), dtype)
    torch.testing.assert_close(matrix.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not matrix[1, 2].any()
    stacked = cosine_similarity_matrix(tuple(layers))
    assert stacked.shape == (3, 2, 7, 7)
    assert torch.equal(stacked[1], cosine_similarity_matrix(layers[1]))


def test_cosine_similarity_matrix_differentiates():
    states = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_similarity_matrix, (states,))
    permuted = states.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.simctg_fast.cosine_similarity_matrix.default, (permuted, "auto"))
    zero = torch.zeros(1, 3, 4, requires_grad=True)
    cosine_similarity_matrix(zero).sum().backward()  # a stride-0 gradient
    assert not zero.grad.any()
    compiled = torch.compile(lambda s: cosine_similarity_matrix(s * 2).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states), cosine_similarity_matrix(states).sum())
    with pytest.raises(ValueError, match="empty sequence"):
        cosine_similarity_matrix(())


def test_the_tutorials_two_calls_train():
    states = (torch.randn(3, 20, 12) + torch.randn(12)).requires_grad_()
    outputs = SimpleNamespace(decoder_hidden_states=(torch.zeros(3, 20, 12), states))
    loss = compute_contrastive_loss(t5_cosine_similarity(outputs), 0.5)
    (gradient,) = torch.autograd.grad(loss, states)
    dense = contrastive_loss(states, 0.5, reduction="dense")
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, states)[0], rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        t5_cosine_similarity(SimpleNamespace(decoder_hidden_states=None))
    with pytest.raises(ValueError, match=r"score_matrix has shape \(3, 20\)"):
        compute_contrastive_loss(torch.zeros(3, 20), 0.5)


def test_input_ids_are_not_read_beside_a_mask():
    states, logits, labels = torch.randn(2, 5, 4), torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    loss = SimCTGLoss(0.5, 7, 0)
    torch.testing.assert_close(
        loss(states, logits, None, labels, attention_mask=mask),
        loss(states, logits, labels, labels, attention_mask=mask),
    )
    with pytest.raises(TypeError, match="input_ids is None, must be a tensor"):
        loss(states, logits, None, labels)
