"""What runs on a CUDA device runs on the emulated one, with the CPU's results: `test_emulated_device.py` starts it.

    python -m tests.device_cases CASE ...

A script, as Triton's interpreter is chosen at import.
"""

from __future__ import annotations

import copy
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

torch.inference_mode = torch.no_grad  # which does not know tensors of an emulated device
torch.set_num_threads(1)

from simctg_fast import (  # noqa: E402
    ContrastiveGenerator,
    ContrastiveSearch,
    Engine,
    LinearChainCRF,
    LowRankCRF,
    StochasticViterbiSamples,
    contrastive_loss,
    cosine_similarity_matrix,
    extract_features,
    simcse_sup_loss,
    simcse_unsup_loss,
    viterbi_backtrace,
)
from simctg_fast.decoding.decode_step import DecodeStep  # noqa: E402

from .decoding_models import PAD, build, inputs_for, tokenizer  # noqa: E402
from .emulated_cuda import CudaTensor, emulated_device, to_cuda  # noqa: E402
from .engine.test_engine_slots import lines  # noqa: E402

STEPS: list[DecodeStep] = []


def there(tree):
    """The same on the device."""
    if isinstance(tree, dict):
        return {key: there(x) for key, x in tree.items()}
    return CudaTensor(tree.clone()) if isinstance(tree, torch.Tensor) else tree


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.device.type == "cuda", ours.device
    torch.testing.assert_close(ours.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)


def generated(driver, name: str, new_tokens: int = 8, strategy: dict | None = None):
    """The tokens of a padded batch."""
    inputs, strategy = inputs_for(build(name), 2), strategy or {}
    options = {"max_new_tokens": new_tokens, "pad_token_id": PAD, "do_sample": False}
    expected = build(name).generate(**inputs, custom_generate=ContrastiveSearch(0.6, 4), **options)
    search = ContrastiveSearch(0.6, 4, **strategy)
    ours = to_cuda(build(name)).generate(**there(inputs), custom_generate=search, **options)
    assert ours.device.type == "cuda"
    assert torch.equal(ours.cpu(), expected)


def captured(driver, name: str):
    generated(driver, name, 30)
    assert STEPS[-1].graph.reason is None
    assert (driver.recorded, driver.as_before()) == (1, True)
    assert driver.replayed >= 27


def engine(driver, name: str, **options):
    options = {"slots": 2, "max_new_tokens": 4} | options
    requests = lines(build(name), (3, 9, 5))
    expected = {r.id: r.token_ids for r in Engine(build(name), tokenizer(), **options).generate(requests)}
    ours = Engine(to_cuda(build(name)), tokenizer(), **options)
    assert {result.id: result.token_ids for result in ours.generate(requests)} == expected
    assert ours.stats["batching"] == options.get("batching", "slots")


def texts(driver):
    words, prompts = tokenizer(), [line["prompt"] for line in lines(build("gpt2"), (3, 9, 5))]
    expected = ContrastiveGenerator(build("gpt2"), words)(prompts, max_length=10)
    assert ContrastiveGenerator(to_cuda(build("gpt2")), words)(prompts, max_length=10) == expected
    features, ours = (
        extract_features(m, words, prompts, pooling="mean") for m in (build("gpt2"), to_cuda(build("gpt2")))
    )
    torch.testing.assert_close(torch.as_tensor(ours.values).cpu(), torch.as_tensor(features.values))


def crf(driver):
    torch.manual_seed(0)
    model, emissions, lengths = LowRankCRF(50, 20, 8), torch.randn(2, 5, 50), torch.tensor([5, 3])
    ours, e, n = to_cuda(copy.deepcopy(model)), there(emissions), there(lengths)
    close(ours.log_partition(e, n), model.log_partition(emissions, lengths))
    close(ours.marginals(e, n).probs, model.marginals(emissions, lengths).probs)
    close(ours.entropy(e, n), model.entropy(emissions, lengths))
    best = model.viterbi(emissions, lengths)
    close(ours.viterbi(e, n).score, best.score)
    close(ours.kbest(e, n, n=3).score, model.kbest(emissions, lengths, n=3).score)
    close(ours.log_prob(e, there(best.tokens), n).log_prob, model.log_prob(emissions, best.tokens, lengths).log_prob)
    for mode in ("ffbs", "stochastic_viterbi"):
        drawn = [
            m.sample(x, y, num_samples=3, mode=mode, generator=torch.Generator().manual_seed(1)).tokens
            for m, x, y in ((ours, e, n), (model, emissions, lengths))
        ]
        assert torch.equal(drawn[0].cpu(), drawn[1])
    published = StochasticViterbiSamples(50, 20, 8, num_samples=3)
    uniforms = torch.rand(2, 4, 8, 3)
    expected = published(emissions, uniforms=uniforms)[1]
    assert torch.equal(to_cuda(copy.deepcopy(published))(e, uniforms=there(uniforms))[1].cpu(), expected)
    chain, tags = LinearChainCRF(6), torch.randint(6, (2, 5))
    few = torch.randn(2, 5, 6)
    on_device = to_cuda(copy.deepcopy(chain))
    close(on_device.nll(there(few), there(tags), n), chain.nll(few, tags, lengths))
    close(on_device.viterbi(there(few), n).score, chain.viterbi(few, lengths).score)
    pointers, last = torch.randint(8, (2, 5, 8)), torch.tensor([3, 7])
    assert torch.equal(
        viterbi_backtrace(there(pointers), there(last), n).cpu(), viterbi_backtrace(pointers, last, lengths)
    )


def losses(driver):
    """Forward; autograd's engine asks for a device that is there."""
    torch.manual_seed(0)
    states, mask = torch.randn(2, 140, 24), torch.ones(2, 140, dtype=torch.long)
    mask[1, :9] = 0
    for options in ({}, {"attention_mask": mask}, {"reduction": "paper"}, {"reduction": "dense"}):
        close(contrastive_loss(there(states), **there(options)), contrastive_loss(states, **options))
    close(cosine_similarity_matrix(there(states)), cosine_similarity_matrix(states))
    for loss in (simcse_unsup_loss, simcse_sup_loss):
        for impl in ("auto", "triton", "torch"):
            expected = loss(states[0, :138], impl="torch")
            close(loss(there(states[0, :138]), impl=impl), expected)


CASES = {
    **{f"captured-{name}": (captured, {"name": name}) for name in ("gpt2", "llama", "mistral", "gemma2")},
    **{f"generated-{name}": (generated, {"name": name}) for name in ("t5", "bart", "bloom")},
    "generated-uncached": (generated, {"name": "llama", "strategy": {"path": "uncached"}}),
    "engine-gpt2": (engine, {"name": "gpt2"}),
    "engine-t5": (engine, {"name": "t5"}),
    "engine-greedy": (engine, {"name": "llama", "strategy": "greedy"}),
    "engine-sample": (engine, {"name": "llama", "strategy": "sample", "temperature": 0.8}),
    "engine-stochastic": (engine, {"name": "mistral", "strategy": "stochastic-contrastive", "temperature": 0.8}),
    "engine-static": (engine, {"name": "llama", "batching": "static"}),
    "texts": (texts, {}),
    "crf": (crf, {}),
    "losses": (losses, {}),
}


def main() -> None:
    made = DecodeStep.__init__

    def init(self, *args, **options):
        made(self, *args, **options)
        STEPS.append(self)

    DecodeStep.__init__ = init
    for name in sys.argv[1:]:
        case, options = CASES[name]
        patch = pytest.MonkeyPatch()
        with emulated_device(patch) as driver:
            case(driver, **options)
        print(f"{name} as on the CPU", flush=True)


if __name__ == "__main__":
    main()
