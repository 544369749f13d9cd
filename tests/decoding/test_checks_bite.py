"""The parity cases would notice: what an architecture adds to attention changes the tokens when it is left out.

Each test drops one thing from the uncached reference itself (a bias, a window, a soft cap, sinks, a mask) and looks for
another outcome. Where none came, equality of our tokens with the reference's would say nothing about that thing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import transformers

from ..repository import repository

sys.path.append(str(repository("benchmarks")))
import parity_zoo as zoo

from simctg_fast.reference import contrastive_search as reference

SHORT = zoo.Case("bite", (22, 9), max_new_tokens=12)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@functools.cache
def model_of(name: str) -> torch.nn.Module:
    return zoo.build(name)


@functools.cache
def tokens_of(name: str) -> torch.Tensor:
    return zoo.reference(model_of(name), name, SHORT, 0).new_tokens()


def rebuilt(name: str, **overrides) -> torch.Tensor:
    return zoo.reference(zoo.build(name, **overrides), name, SHORT, 0).new_tokens()


def with_parameters(name: str, chosen: Callable[[str], bool], value: float) -> torch.Tensor:
    """Tokens after the chosen parameters are overwritten."""
    model = zoo.build(name)
    hit = [parameter for key, parameter in model.named_parameters() if chosen(key)]
    assert hit, f"{name} has no such parameter"
    with torch.no_grad():
        for parameter in hit:
            assert bool(parameter.ne(0).all()), "drawn weights are not zero"
            parameter.fill_(value)
    return zoo.reference(model, name, SHORT, 0).new_tokens()


# ---- what can be left out ------------------------------------------------------------------------------------------


def attention_bias(name: str) -> torch.Tensor:
    """Biases of the projections of attention (of the mixer, in state-space layers)."""
    layers = ("attn", "attention", "mixer", "mamba", "conv")

    def chosen(key: str) -> bool:
        return key.endswith("bias") and "norm" not in key and "relative" not in key and any(p in key for p in layers)

    return with_parameters(name, chosen, 0.0)


def relative_bias(name: str) -> torch.Tensor:
    """The decoder's relative position bias."""
    return with_parameters(name, lambda key: key.startswith("decoder") and "relative_attention_bias" in key, 0.0)


def sinks(name: str) -> torch.Tensor:
    return with_parameters(name, lambda key: key.endswith("sinks"), -1e9)


def alibi(name: str) -> torch.Tensor:
    """Linear biases by distance, replaced by zeros."""
    import transformers.models.bloom.modeling_bloom as bloom
    import transformers.models.falcon.modeling_falcon as falcon
    import transformers.models.mpt.modeling_mpt as mpt

    module, function = {
        "bloom": (bloom, "build_alibi_tensor"),
        "falcon_alibi": (falcon, "build_alibi_tensor"),
        "mpt": (mpt, "build_mpt_alibi_tensor"),
    }[name]
    original = getattr(module, function)
    with mock.patch.object(module, function, lambda *args, **kwargs: torch.zeros_like(original(*args, **kwargs))):
        return zoo.reference(model_of(name), name, SHORT, 0).new_tokens()


def window(name: str) -> torch.Tensor:
    if name == "gpt_neo":
        return rebuilt(name, window_size=256)
    layer_types = dict(zoo.ARCHITECTURES[name].config[1]).get("layer_types")
    return rebuilt(
        name, **{"layer_types": ["full_attention"] * len(layer_types)} if layer_types else {}, sliding_window=500
    )


def score_cap(name: str) -> torch.Tensor:
    return rebuilt(name, attn_logit_softcapping=None)


def logit_cap(name: str) -> torch.Tensor:
    return rebuilt(name, final_logit_softcapping=None)


def scaling(name: str) -> torch.Tensor:
    """The scale of scores, replaced by the usual one."""
    return rebuilt(name, query_pre_attn_scalar=16)


def pad_mask(name: str) -> torch.Tensor:
    """Padding taken for text, by the model and by the penalty."""
    mask = torch.ones_like(zoo.prompt_for(name, SHORT, 0)["attention_mask"])
    return zoo.reference(model_of(name), name, SHORT, 0, attention_mask=mask).new_tokens()


def cross_mask(name: str) -> torch.Tensor:
    """Padding of the encoder's input taken for text."""
    return pad_mask(name)


def cross_attention(name: str) -> torch.Tensor:
    """What the decoder reads from the encoder."""
    return with_parameters(name, lambda key: "encoder_attn.out_proj.weight" in key, 1e-9)


def image(name: str) -> torch.Tensor:
    pixels = zoo.prompt_for(name, SHORT, 0)["pixel_values"]
    return zoo.reference(model_of(name), name, SHORT, 0, pixel_values=pixels.flip(0)).new_tokens()


def image_positions(name: str) -> torch.Tensor:
    """Image tokens counted one by one, like text."""
    types = torch.zeros_like(zoo.prompt_for(name, SHORT, 0)["mm_token_type_ids"])
    return zoo.reference(model_of(name), name, SHORT, 0, mm_token_type_ids=types).new_tokens()


WITHOUT: dict[str, tuple[Callable[[str], torch.Tensor], ...]] = {
    "gpt2": (attention_bias, pad_mask),
    "opt": (attention_bias, pad_mask),
    "opt_project_out": (attention_bias, pad_mask),
    "llama": (attention_bias, pad_mask),
    "qwen2": (attention_bias, pad_mask),
    "qwen2_window": (attention_bias, window, pad_mask),
    "qwen3": (attention_bias, pad_mask),
    "mistral": (pad_mask,),
    "mistral_window": (window, pad_mask),
    "mixtral": (pad_mask,),
    "gpt_neox": (attention_bias, pad_mask),
    "phi": (attention_bias, pad_mask),
    "phi3": (pad_mask,),
    "gemma": (attention_bias, pad_mask),
    "olmo2": (attention_bias, pad_mask),
    "bloom": (attention_bias, alibi, pad_mask),
    "falcon": (attention_bias, pad_mask),
    "falcon_alibi": (attention_bias, alibi, pad_mask),
    "gptj": (pad_mask,),
    "gpt_neo": (attention_bias, window, pad_mask),
    "t5": (relative_bias, cross_mask),
    "mt5": (relative_bias, cross_mask),
    "bart": (attention_bias, cross_mask),
    "mbart": (attention_bias, cross_mask),
    "pegasus": (attention_bias, cross_mask),
    "gemma2": (attention_bias, window, score_cap, logit_cap, scaling, pad_mask),
    "gemma3": (attention_bias, window, scaling, pad_mask),
    "gpt_oss": (attention_bias, window, sinks, pad_mask),
    "mpt": (alibi, pad_mask),
    "xglm": (attention_bias, pad_mask),
    "mamba": (attention_bias, pad_mask),
    "mamba2": (attention_bias, pad_mask),
    "bamba": (attention_bias, pad_mask),
    "lfm2": (attention_bias, pad_mask),
    "llama_static": (attention_bias, pad_mask),
    "whisper": (attention_bias, cross_attention),
    "llava": (attention_bias, pad_mask, image),
    "qwen2_vl": (attention_bias, pad_mask, image, image_positions),
}


@pytest.mark.parametrize(
    ("name", "left_out"),
    [pytest.param(name, what, id=f"{name}-{what.__name__}") for name in WITHOUT for what in WITHOUT[name]],
)
def test_what_is_left_out_changes_the_tokens(name: str, left_out: Callable[[str], torch.Tensor]) -> None:
    assert not torch.equal(left_out(name), tokens_of(name))


def test_no_architecture_is_forgotten() -> None:
    assert set(WITHOUT) == set(zoo.ARCHITECTURES)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "phi3", "bloom", "mpt"])
def test_a_penalty_that_counts_padding_is_seen(name: str) -> None:
    """Padding as context of the penalty alone: it decides where a padded position is the most alike."""
    case = zoo.Case("penalty", (24, 6), penalty_alpha=0.9, max_new_tokens=20)
    original = reference.degeneration_penalty

    def unmasked(history, candidates, mask):
        assert bool((mask == 0).any())
        return original(history, candidates)

    def tokens(prompt: int) -> torch.Tensor:
        return zoo.reference(model_of(name), name, case, prompt).new_tokens()

    prompts = range(4)
    expected = [tokens(prompt) for prompt in prompts]
    with mock.patch.object(reference, "degeneration_penalty", unmasked):
        found = [tokens(prompt) for prompt in prompts]
    assert not all(map(torch.equal, found, expected))
