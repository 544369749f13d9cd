"""What contrastive search chooses: on every path, in batches, at the edges of its arguments, in every precision."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from simctg_fast import ContrastiveSearch
from simctg_fast.decoding import slots
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.report import recall
from simctg_fast.ops.top_k import top_k_probs
from simctg_fast.reference.contrastive_search import contrastive_search as by_definition

from ..decoding_models import VOCABULARY, build, decode, greedy, inputs_for, left_padded, prompt, shared
from ..near_ties import same_tokens

PATHS = ("shared_prefix", "reorder", "uncached")
ON_SHARED_PREFIX = ("gpt2", "llama", "mistral", "gemma2", "bart", "t5")
ON_REORDER = ("bloom", "mamba")
EVERY_PATH = [("llama", "shared_prefix"), ("llama", "reorder"), ("llama", "uncached"), ("bloom", "reorder")]


# ---- the same tokens everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ON_SHARED_PREFIX + ON_REORDER)
def test_paths_agree(name, batch):
    model = shared(name)
    inputs = inputs_for(model, batch)
    truth = decode(model, inputs, path="uncached")
    assert len(truth[:, -12:].unique()) > 6  # a model that repeats itself shows nothing
    paths = PATHS[:2] if name in ON_SHARED_PREFIX else PATHS[1:2]
    for path in paths:
        same_tokens(decode(model, inputs, path=path), truth, model, inputs, what=path)
    same_tokens(decode(model, inputs), truth, model, inputs)


@pytest.mark.parametrize("penalty_alpha", [0.2, 0.6, 1.0])
def test_equals_equation_five(penalty_alpha):
    model, inputs = shared("llama"), left_padded(9, 7)
    truth = by_definition(model, **inputs, penalty_alpha=penalty_alpha, top_k=5, max_new_tokens=15)
    ours = decode(model, inputs, penalty_alpha=penalty_alpha, top_k=5, new_tokens=15)
    same_tokens(ours, truth.sequences, model, inputs, penalty_alpha=penalty_alpha, top_k=5)
    if penalty_alpha >= 0.6:
        assert not torch.equal(ours, greedy(model, inputs, new_tokens=15))


def test_model_takes_the_path_it_is_meant_to():
    for name in ON_SHARED_PREFIX + ON_REORDER:
        decode(shared(name), inputs_for(shared(name)))
        assert recall(shared(name)).path == ("shared_prefix" if name in ON_SHARED_PREFIX else "reorder"), name


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "bart", "t5"])
@pytest.mark.parametrize(("penalty_alpha", "top_k"), [(0.0, 4), (0.6, 1), (0.0, 1), (1.0, 1)])
def test_is_greedy_without_penalty_or_choice(name, penalty_alpha, top_k):
    model = shared(name)
    inputs = inputs_for(model, 2)
    same_tokens(
        decode(model, inputs, penalty_alpha=penalty_alpha, top_k=top_k),
        greedy(model, inputs),
        model,
        inputs,
        penalty_alpha=penalty_alpha,
        top_k=top_k,
    )


def test_every_token_may_be_a_candidate():
    model, inputs = shared("llama"), inputs_for(shared("llama"), 2)
    truth = by_definition(model, **inputs, penalty_alpha=0.6, top_k=VOCABULARY, max_new_tokens=5)
    same_tokens(decode(model, inputs, top_k=VOCABULARY, new_tokens=5), truth.sequences, model, inputs, top_k=VOCABULARY)


def test_candidates_are_the_most_probable():
    logits = torch.randn(3, 50)
    probs, tokens = top_k_probs(logits, 6)
    expected = logits.softmax(dim=-1).topk(6)
    torch.testing.assert_close(probs, expected.values)
    assert torch.equal(tokens, expected.indices)


# ---- batches and padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [*EVERY_PATH, ("gpt2", "shared_prefix"), ("mistral", "shared_prefix")])
def test_left_padded_rows_are_as_if_alone(name, path):
    model, lengths = shared(name), (10, 4, 7)
    inputs = left_padded(*lengths)
    together = decode(model, inputs, path=path)
    for row, length in enumerate(lengths):
        alone = decode(model, {"input_ids": inputs["input_ids"][row : row + 1, -length:]}, path=path)
        mine = {name: value[row : row + 1] for name, value in inputs.items()}
        padded = torch.cat([mine["input_ids"][:, :-length], alone], dim=1)
        same_tokens(together[row : row + 1], padded, model, mine, what=f"row {row}")


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("path", PATHS)
def test_right_padded_encoder_inputs_are_as_if_alone(name, path):
    model, lengths = shared(name), (9, 5)
    inputs = {key: value.flip(1) for key, value in left_padded(*lengths).items()}
    together = decode(model, inputs, path=path)
    for row, length in enumerate(lengths):
        mine = {"input_ids": inputs["input_ids"][row : row + 1, :length]}
        same_tokens(together[row : row + 1], decode(model, mine, path=path), model, mine, what=f"row {row}")


def test_padding_is_no_context():
    """What stands at padding must reach neither the attention nor the penalty."""
    model, inputs = shared("llama"), left_padded(9, 4)
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 0, 55, inputs["input_ids"])}
    assert torch.equal(decode(model, inputs)[:, 9:], decode(model, other)[:, 9:])


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "t5"])
def test_mask_of_ones_is_no_mask(name):
    model, ids = shared(name), prompt(2)
    masked = decode(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    same_tokens(decode(model, {"input_ids": ids, "attention_mask": None}), masked, model, {"input_ids": ids})
    same_tokens(decode(model, {"input_ids": ids}), masked, model, {"input_ids": ids})


@pytest.mark.parametrize(("name", "path"), EVERY_PATH)
def test_prompt_as_embeddings(name, path):
    model, ids = shared(name), prompt(2)
    embeddings = model.get_input_embeddings()(ids).detach()
    by_ids = decode(model, {"input_ids": ids}, path=path)
    by_embeddings = torch.cat([ids, decode(model, {"inputs_embeds": embeddings}, path=path)], dim=1)
    same_tokens(by_embeddings, by_ids, model, {"input_ids": ids})


def test_padded_prompt_as_embeddings():
    model, inputs = shared("llama"), left_padded(9, 6)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    by_embeddings = decode(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})
    same_tokens(torch.cat([inputs["input_ids"], by_embeddings], dim=1), decode(model, inputs), model, inputs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_decoder_prompt(name, path):
    model = shared(name)
    start = model.config.decoder_start_token_id
    inputs = {"input_ids": prompt(2), "decoder_input_ids": torch.tensor([[start, 11, 7], [start, 30, 8]])}
    out = decode(model, inputs, path=path)
    assert out[:, :3].tolist() == inputs["decoder_input_ids"].tolist()
    truth = by_definition(model, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=12)
    same_tokens(out, truth.sequences, model, inputs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("chunk", [1, 4, 9, 50])
def test_prompt_in_chunks(name, chunk):
    model, inputs = shared(name), left_padded(9, 6)
    same_tokens(decode(model, inputs, prefill_chunk_size=chunk), decode(model, inputs), model, inputs)


# ---- buffers -------------------------------------------------------------------------------------------------------


def test_buffers_that_grow_change_nothing(monkeypatch):
    model, inputs = shared("llama"), left_padded(9, 6)
    truth = decode(model, inputs, path="uncached", new_tokens=40)
    grown = []
    original = slots.next_capacity
    monkeypatch.setattr(slots, "next_capacity", lambda *given: grown.append(given) or original(*given))
    monkeypatch.setattr(slots, "GROWTH", 3)
    same_tokens(decode(model, inputs, path="shared_prefix", new_tokens=40), truth, model, inputs)
    assert len({needed for needed, _ in grown}) > 10


def test_more_tokens_than_a_block():
    """520 tokens by one copy of the prefix; the last eight again by recomputing everything."""
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    assert slots.GROWTH < 520
    long = decode(model, inputs, new_tokens=520)
    start = {"input_ids": long[:, :-8], "attention_mask": torch.ones_like(long[:, :-8])}
    same_tokens(decode(model, start, path="uncached", new_tokens=8), long, model, start)


def test_unbounded_generation_reserves_a_block_at_a_time():
    history = slots.History(slots.Extent(2, 2, max_length=10**9))
    history.write(slice(0, 2), 0, torch.randn(2, 7, 4))
    assert history.states.shape[1] == 7 + slots.GROWTH

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 15)

    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    out = decode(model, inputs, new_tokens=10**9, stopping_criteria=[Stop()])
    same_tokens(out, decode(model, inputs, new_tokens=6), model, inputs)


def test_history_is_normalised_once_and_grows_with_its_mask(monkeypatch):
    monkeypatch.setattr(slots, "GROWTH", 2)
    states, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 1], [0, 0, 1]])
    history = slots.History(slots.Extent(2, 2))
    history.write(slice(0, 2), 0, states, mask)
    added = torch.randn(2, 5, 8)
    for step in range(5):
        history.append(added[:, step])
    everything = torch.cat([states, added], dim=1)
    torch.testing.assert_close(history.states[:, :8], torch.nn.functional.normalize(everything, dim=-1))
    candidates = torch.randn(2, 4, 8)
    cosine = torch.nn.functional.cosine_similarity(candidates[:, :, None], everything[:, None], dim=-1)
    cosine[1, :, :2] = -2
    penalty, position = history.penalty(candidates)
    torch.testing.assert_close(penalty, cosine.amax(dim=-1))
    assert torch.equal(position, cosine.argmax(dim=-1))


# ---- choices at the edge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_of_equal_scores_the_more_probable_wins(path):
    model = build("llama")
    with torch.no_grad():  # every token looks the same, so that all candidates get one hidden state and one penalty
        model.model.embed_tokens.weight.copy_(
            model.model.embed_tokens.weight[5].expand_as(model.model.embed_tokens.weight)
        )
    inputs = {"input_ids": prompt(2)}
    assert torch.equal(decode(model, inputs, path=path, penalty_alpha=1.0), greedy(model, inputs))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_candidate_without_a_hidden_state_never_wins(rank):
    inputs = {"input_ids": prompt(1, seed=5)}
    token = shared("llama")(**inputs).logits[0, -1].topk(4).indices[rank].item()
    assert token not in inputs["input_ids"]
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    outs = {path: decode(model, inputs, path=path) for path in PATHS}
    for path, out in outs.items():
        assert token not in out[0].tolist(), path
        same_tokens(out, outs["uncached"], model, inputs, what=path)
    decode(model, inputs)
    assert recall(model).path == "shared_prefix"  # a NaN of the model's own does not speak against a path


def test_banned_token_is_never_chosen_even_where_the_penalty_favours_it():
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    allowed = [10, 11]  # fewer than candidates: the rest have probability 0
    out = decode(model, inputs, penalty_alpha=1.0, prefix_allowed_tokens_fn=lambda batch, ids: allowed)
    assert set(out[0, 9:].tolist()) <= set(allowed)


# ---- random choices ------------------------------------------------------------------------------------------------


def sample(model, inputs, seed, *, temperature=0.2, new_tokens=12, path="auto", **kwargs):
    generator = torch.Generator().manual_seed(seed)
    strategy = ContrastiveSearch(0.6, 4, temperature=temperature, generator=generator, path=path)
    return model.generate(**inputs, custom_generate=strategy, max_new_tokens=new_tokens, **kwargs)


def test_random_choices_follow_the_seed():
    model, inputs = shared("llama"), inputs_for(shared("llama"), 2)
    first = sample(model, inputs, 1)
    assert torch.equal(sample(model, inputs, 1), first)
    assert not torch.equal(sample(model, inputs, 2), first)
    for path in PATHS:
        assert torch.equal(sample(model, inputs, 1, path=path), first)


def test_random_choices_without_a_generator_follow_the_global_seed():
    model, inputs = shared("llama"), inputs_for(shared("llama"))
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(model.generate(**inputs, custom_generate=ContrastiveSearch(temperature=0.2), max_new_tokens=12))
    assert torch.equal(*outs)


def test_several_different_texts():
    model, inputs = shared("llama"), inputs_for(shared("llama"))
    out = sample(model, inputs, 0, do_sample=True, num_return_sequences=5)
    assert len({tuple(row) for row in out.tolist()}) == 5


def test_small_temperature_is_deterministic():
    model, inputs = shared("llama"), inputs_for(shared("llama"), 2)
    assert torch.equal(sample(model, inputs, 3, temperature=1e-5), decode(model, inputs))


def test_random_choices_are_distributed_as_promised():
    """Candidate i with probability proportional to exp(score_i / temperature)."""
    model, inputs, draws = shared("llama"), {"input_ids": prompt(1)}, 2000
    step = by_definition(model, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=1).steps[0]
    out = sample(model, inputs, 11, new_tokens=1, do_sample=True, num_return_sequences=draws)[:, -1]
    counts = torch.tensor([(out == token).sum() for token in step.candidates[0]])
    expected = draws * (step.scores[0] / 0.2).softmax(dim=-1)
    assert counts.sum() == draws
    assert expected.min() > 20
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # three degrees of freedom, p = 0.001


def test_same_seed_same_text_on_a_model_that_changes_paths():
    """Noise is drawn once a step, also where a path is refused after it has chosen."""
    model, inputs = build("llama"), {"input_ids": prompt(1)}
    _bypass_the_attention_interface(model)
    first, second = sample(model, inputs, 3), sample(model, inputs, 3)
    assert recall(model).path == "reorder"
    assert torch.equal(first, second)


def _bypass_the_attention_interface(model) -> None:
    """Have the last layer of a llama compute its attention itself."""

    class OwnAttention(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            projections = (self.q_proj, self.k_proj, self.v_proj)
            query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if (cache := kwargs.get(CACHE_NAME)) is not None:
                key, value = cache.update(key, value, self.layer_idx)
            key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
            causal = query.shape[2] > 1
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
            return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    model.model.layers[-1].self_attn.__class__ = OwnAttention


def test_attention_that_bypasses_the_interface_is_noticed():
    model, inputs = build("llama"), {"input_ids": prompt(1)}
    _bypass_the_attention_interface(model)
    same_tokens(decode(model, inputs), decode(model, inputs, path="uncached"), model, inputs)
    assert recall(model).path == "reorder"
    assert "bypasses the attention interface" in recall(model).reason
    with pytest.raises(ValueError, match=r"path='shared_prefix'.*bypasses the attention interface"):
        decode(model, inputs, path="shared_prefix")


# ---- a model whose head does not read its last hidden state --------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_head_that_reads_something_else(path):
    """The penalty is made of hidden states, not of what a model makes of them before its output embedding."""

    class SquaredHead(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
            out = self.model(input_ids=input_ids, **kwargs)
            logits = self.lm_head(torch.tanh(3 * out.last_hidden_state) ** 2)
            return CausalLMOutputWithPast(
                logits=logits, hidden_states=out.hidden_states, **{CACHE_NAME: getattr(out, CACHE_NAME)}
            )

    model, ids = build("llama"), prompt(2)
    model.__class__ = SquaredHead
    truth = by_definition(model, ids, penalty_alpha=0.6, top_k=4, max_new_tokens=12)
    same_tokens(decode(model, {"input_ids": ids}, path=path), truth.sequences, model, {"input_ids": ids})


def test_decoder_that_is_not_called_as_a_module():
    """Neither the decoder's nor the head's hooks run: the model has to be asked for its hidden states."""

    class Direct(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
            out = self.model.forward(input_ids=input_ids, **kwargs)
            logits = torch.nn.functional.linear(out.last_hidden_state, self.lm_head.weight)
            return CausalLMOutputWithPast(
                logits=logits, hidden_states=out.hidden_states, **{CACHE_NAME: getattr(out, CACHE_NAME)}
            )

    model, inputs = build("llama"), left_padded(9, 7)
    model.__class__ = Direct
    for path in ("auto", *PATHS):
        same_tokens(decode(model, inputs, path=path), decode(shared("llama"), inputs), model, inputs, what=path)
    assert recall(model).path == "shared_prefix"
    assert not recall(model).head


def test_model_that_cannot_use_our_cache_falls_back():
    class Picky(LlamaAttention):
        def forward(self, *args, **kwargs):
            cache = kwargs.get(CACHE_NAME)
            if cache is not None and cache.get_seq_length():
                cache.layers[self.layer_idx].cumulative  # noqa: B018 - what no cache layer of ours has
            return super().forward(*args, **kwargs)

    model, inputs = build("llama"), left_padded(9, 7)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Picky
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLayer, "cumulative", 1, raising=False)
        same_tokens(decode(model, inputs), decode(shared("llama"), inputs), model, inputs)
    assert recall(model).path == "reorder"
    assert "cumulative" in recall(model).reason


# ---- precision and modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_half_precision(name, dtype):
    model = build(name).to(dtype)
    inputs = inputs_for(model, 2)
    out = decode(model, inputs, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert out.sequences.shape[0] == 2
    assert all(step.dtype == torch.float32 and torch.isfinite(step).all() for step in (*out.scores, *out.logits))
    expected = "reorder" if name == "bloom" else "shared_prefix"
    assert recall(model).path == expected
    again = decode(model, inputs, path="uncached", return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(out.logits[0], again.logits[0], atol=0.3, rtol=0.05)


def test_float64_model():
    model = build("llama").double()
    inputs = inputs_for(model, 2)
    assert torch.equal(decode(model, inputs), decode(model, inputs, path="uncached"))


def test_training_mode_without_dropout():
    model, inputs = build("llama").train(), inputs_for(shared("llama"), 2)
    same_tokens(decode(model, inputs), decode(shared("llama"), inputs), model, inputs)
    assert model.training
    assert recall(model).path == "shared_prefix"


def test_training_mode_with_dropout_takes_the_exact_path():
    model = build("gpt2").train()
    out = decode(model, inputs_for(model), new_tokens=5)
    assert out.shape == (1, 14)
    assert model.training
    assert recall(model).path == "uncached"
    assert "gives something else each time (model.eval() ends dropout)" in recall(model).checks[-1].detail
    model.eval()
    same_tokens(decode(model, inputs_for(model)), decode(shared("gpt2"), inputs_for(model)), model, inputs_for(model))
    assert recall(model).path == "shared_prefix"


def test_model_that_changes_after_it_was_found_fit_falls_back():
    model, inputs = build("llama", attention_dropout=0.5), inputs_for(shared("llama"))
    decode(model, inputs)
    assert recall(model).path == "shared_prefix"
    model.model.layers[0].self_attn.train()
    assert decode(model, inputs).shape == (1, 21)
    assert recall(model).path == "uncached"


# ---- use_cache -----------------------------------------------------------------------------------------------------


def test_no_cache_warns_and_is_exact(caplog):
    model, inputs = shared("llama"), inputs_for(shared("llama"), 2)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = decode(model, inputs, use_cache=False)
    assert [record.message for record in caplog.records if "use_cache=False" in record.message]
    same_tokens(out, decode(model, inputs), model, inputs)


def test_use_cache_left_false_by_training_is_not_a_wish(caplog):
    model = build("llama")
    model.generation_config.use_cache = False
    inputs = inputs_for(model, 2)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = decode(model, inputs)
    assert not caplog.records
    same_tokens(out, decode(shared("llama"), inputs), model, inputs)
    assert recall(model).path == "shared_prefix"


@pytest.mark.parametrize("name", ["llama", "mistral", "t5", "bloom"])
def test_static_cache_implementation(name):
    model = shared(name)
    inputs = inputs_for(model, 2)
    same_tokens(decode(model, inputs, cache_implementation="static"), decode(model, inputs), model, inputs)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.6", True, None])
def test_penalty_alpha_outside_its_range(value):
    if value is not None:
        with pytest.raises(ValueError, match=r"penalty_alpha must be a number in \[0, 1\], got"):
            ContrastiveSearch(penalty_alpha=value)
    if isinstance(value, float):
        with pytest.raises(ValueError, match=r"penalty_alpha must be a number in \[0, 1\], got"):
            shared("llama").generate(
                prompt(1), custom_generate=ContrastiveSearch(), penalty_alpha=value, max_new_tokens=2
            )


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
def test_top_k_below_one_or_not_an_integer(value):
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, got"):
        ContrastiveSearch(top_k=value)


def test_top_k_beyond_the_vocabulary():
    with pytest.raises(
        ValueError, match=f"top_k must be at most the vocabulary size {VOCABULARY}, got {VOCABULARY + 1}"
    ):
        decode(shared("llama"), {"input_ids": prompt(1)}, top_k=VOCABULARY + 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_outside_its_range(value):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got"):
        ContrastiveSearch(temperature=value)


def test_generator_without_temperature():
    with pytest.raises(ValueError, match="generator is given, but without a temperature"):
        ContrastiveSearch(generator=torch.Generator())


def test_unknown_path():
    with pytest.raises(
        ValueError, match=r"path must be 'auto' or one of \('shared_prefix', 'reorder', 'uncached'\), got 'x'"
    ):
        ContrastiveSearch(path="x")


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_path_that_does_not_serve_the_model(name):
    with pytest.raises(ValueError, match=f"{type(shared(name)).__name__} cannot be decoded .* on path='shared_prefix'"):
        decode(shared(name), {"input_ids": prompt(1)}, path="shared_prefix")


class Inject(LogitsProcessor):
    """Sets the logits of one row to a value from the ``after``-th new token on."""

    def __init__(self, row: int, value: float, after: int):
        self.row, self.value, self.calls, self.after = row, value, 0, after

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        if self.calls > self.after:
            scores[self.row] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), -torch.inf])
def test_logits_without_probabilities(value):
    processors = LogitsProcessorList([Inject(1, value, after=2)])
    with pytest.raises(ValueError, match=r"row 1.*NaN, or every token banned"):
        decode(shared("llama"), left_padded(9, 6), logits_processor=processors)


def test_logits_of_a_finished_row_do_not_matter():
    model, inputs = shared("llama"), left_padded(9, 9)
    plain = decode(model, inputs)
    end = plain[0, 11].item()
    assert end not in plain[1].tolist()
    expected = decode(model, inputs, eos_token_id=end)
    processors = LogitsProcessorList([Inject(0, float("nan"), after=3)])
    same_tokens(decode(model, inputs, eos_token_id=end, logits_processor=processors), expected, model, inputs)


def test_row_without_a_real_token():
    inputs = left_padded(9, 6)
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="attention_mask has no real token in row 1"):
        decode(shared("llama"), inputs)


def test_beams_are_refused():
    with pytest.raises(ValueError, match="num_beams must be 1 for contrastive search, got 3"):
        decode(shared("llama"), {"input_ids": prompt(1)}, num_beams=3)


def test_quantized_cache_is_refused():
    pattern = r"cache_implementation must be .*got 'quantized'|quanto"
    with pytest.raises((ValueError, ImportError), match=pattern):
        decode(shared("llama"), {"input_ids": prompt(1)}, cache_implementation="quantized")


def test_top_k_beyond_the_logits():
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, 60, bias=False)
    with pytest.raises(ValueError, match="top_k must be at most the 60 logits of the model, got 61"):
        decode(model, {"input_ids": prompt(1)}, top_k=61)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_end_of_the_table_of_positions(name):
    """Candidates for the last token are run as well: the table ends one token earlier than for greedy search."""
    model = build(name, **({"n_positions": 16} if name == "gpt2" else {"max_position_embeddings": 16}))
    inputs, room = {"input_ids": prompt(1)}, 16 - (9 if name == "gpt2" else 1)
    assert decode(model, inputs, new_tokens=room).shape[1] == 16
    with pytest.raises(
        ValueError, match=f"max_new_tokens is too large: .* table of 16 positions ends after {room} new"
    ):
        decode(model, inputs, new_tokens=room + 1)


def test_position_table_counts_real_tokens():
    model, inputs = build("gpt2", n_positions=16), left_padded(4, 3)
    inputs = {key: torch.nn.functional.pad(value, (5, 0)) for key, value in inputs.items()}
    out = decode(model, inputs, new_tokens=12)
    same_tokens(out, decode(model, inputs, path="uncached", new_tokens=12), model, inputs)


def test_numbers_of_numpy():
    strategy = ContrastiveSearch(np.float32(0.5), np.int64(3))
    out = shared("llama").generate(prompt(1), custom_generate=strategy, max_new_tokens=12)
    same_tokens(
        out,
        decode(shared("llama"), {"input_ids": prompt(1)}, penalty_alpha=0.5, top_k=3),
        shared("llama"),
        {"input_ids": prompt(1)},
        penalty_alpha=0.5,
        top_k=3,
    )
