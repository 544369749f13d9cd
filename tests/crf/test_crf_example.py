"""The GRPO example: what its step computes, and that its reward rises."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from ..repository import repository

_path = repository("examples/grpo_crf.py")
_spec = importlib.util.spec_from_file_location("grpo_crf", _path)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def test_reward():
    image = torch.zeros(1, example.OBJECTS)
    image[0, :6] = 1
    first = example.ARTICLES
    perfect = torch.tensor([0, first, 1, first + 1, 2, first + 2, 3, first + 3, 0, first + 4, 1, first + 5])
    repeated = torch.tensor([0, first] * 6)
    silent = torch.zeros(12, dtype=torch.int64)
    captions = torch.stack([perfect, repeated, silent], 1)[None]
    torch.testing.assert_close(example.reward(captions, image), torch.tensor([[1.1, 2 / 12 + 0.1, 0.05]]))


def test_one_update_follows_the_advantages():
    torch.manual_seed(0)
    model, image = example.Captioner(), example.images(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        rollout = model.crf.sample(model(image), num_samples=6)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0]).expand(4, 6)
    reference, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.05)
    arguments = (model, reference, image, rollout, advantages, 0.2, 0.1)
    loss, kl = example.grpo_loss(*arguments)
    # The policy has not moved: every ratio is 1, the divergence 0.
    torch.testing.assert_close(loss.detach(), torch.zeros(()), rtol=0, atol=1e-5)
    torch.testing.assert_close(kl, torch.zeros(4), rtol=0, atol=1e-5)
    loss.backward()
    optimizer.step()
    now = model.crf.log_prob(model(image), rollout.tokens, beam_tokens=rollout.beam_tokens).log_prob
    moved = (now - rollout.log_prob).detach()
    assert float((moved * advantages).mean()) > 0
    assert (example.grpo_loss(*arguments)[1] > 0).all()


@pytest.mark.full
def test_reward_rises():
    history = example.train(60, 32, 8, quiet=True)
    assert history["kl"][0] == 0
    assert 0 < history["kl"][-1] < 20
    assert history["sampled"][-1] > history["sampled"][0] + 0.2
