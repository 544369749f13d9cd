"""The loss module of sentence-transformers: the same numbers as its own, its Trainer, GradCache, two processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sentence_transformers", reason="not installed (simctg_fast[sentence-transformers])")
pytest.importorskip("datasets", reason="not installed (simctg_fast[sentence-transformers])")

import datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from simctg_fast.integrations.sentence_transformers import SimCSELoss

from .two_processes import run_two

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before version 6
    from sentence_transformers.losses import MultipleNegativesRankingLoss

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "red",
    "blue",
    "big",
    "small",
    "one",
    "two",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two small layers and a tokenizer of one token a word."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def load(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, 16, (5,), generator=generator)) for _ in range(count)]


def embeddings(columns: int, rows: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 12, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(columns)]


class TestValues:
    @pytest.mark.parametrize("columns", [2, 3, 4])
    @pytest.mark.parametrize("scale", [20.0, 5.0])
    def test_equals_multiple_negatives_ranking_loss(self, columns, scale):
        ours, theirs = embeddings(columns), embeddings(columns)
        model = torch.nn.Identity()
        loss = SimCSELoss(model, scale=scale).compute_loss_from_embeddings(ours)
        expected = MultipleNegativesRankingLoss(model, scale=scale).compute_loss_from_embeddings(theirs, None)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left.grad, right.grad)

    def test_symmetric(self):
        model, columns = torch.nn.Identity(), embeddings(2)
        loss = SimCSELoss(model, symmetric=True).compute_loss_from_embeddings(columns)
        theirs = MultipleNegativesRankingLoss(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
        torch.testing.assert_close(loss, theirs.compute_loss_from_embeddings(columns, None))

    def test_in_view_negatives_are_all_other_rows(self):
        anchors, positives = embeddings(2)
        loss = SimCSELoss(torch.nn.Identity(), in_view_negatives=True).compute_loss_from_embeddings(
            [anchors, positives]
        )
        unit = F.normalize(torch.cat([anchors, positives]), dim=-1)
        logits = (20.0 * unit @ unit.T).fill_diagonal_(float("-inf"))
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(12).roll(6)))

    def test_arguments(self):
        model = torch.nn.Identity()
        with pytest.raises(ValueError, match="scale is 0, must be above 0"):
            SimCSELoss(model, scale=0)
        with pytest.raises(ValueError, match="leave symmetric=False"):
            SimCSELoss(model, symmetric=True, in_view_negatives=True)
        with pytest.raises(ValueError, match="takes one or two columns, got 3"):
            SimCSELoss(model, in_view_negatives=True).compute_loss_from_embeddings(embeddings(3))
        with pytest.raises(ValueError, match=r"anchors and positives at least, got 1 tensor\(s\)"):
            SimCSELoss(model).compute_loss_from_embeddings(embeddings(1))


def train(folder, out, columns: dict[str, list[str]], make_loss, steps: int = 6, **settings) -> list[float]:
    model = load(folder)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=make_loss(model),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class TestTrainer:
    def test_same_curve_as_multiple_negatives_ranking_loss(self, folder, tmp_path):
        columns = {"anchor": sentences(16, 1), "positive": sentences(16, 2)}
        ours = train(folder, tmp_path, columns, SimCSELoss)
        theirs = train(folder, tmp_path, columns, MultipleNegativesRankingLoss)
        assert len(ours) == 6
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours[-1] < ours[0]

    def test_one_column_is_encoded_twice(self, folder, tmp_path):
        """Dropout makes the views different: the loss is neither 0 nor that of unrelated sentences, and it falls."""
        losses = train(
            folder,
            tmp_path,
            {"text": sentences(8, 3)},
            lambda model: SimCSELoss(model, in_view_negatives=True),
            steps=8,
        )
        assert losses[-1] < losses[0]

    def test_the_model_card_names_the_loss(self, folder):
        loss = SimCSELoss(load(folder), scale=10.0)
        assert loss.get_config_dict()["scale"] == 10.0
        assert loss.temperature == pytest.approx(0.1)
        assert "SimCSE" in loss.citation


@pytest.mark.parametrize("in_view_negatives", [False, True])
def test_grad_cache(in_view_negatives, folder):
    """Embeddings without a graph, the loss and its gradient for them, then chunk by chunk through the encoder: the
    gradient of the weights is that of the whole batch at once."""
    model = load(folder).eval()  # no dropout, so that the second pass sees the embeddings of the first
    loss_function = SimCSELoss(model, in_view_negatives=in_view_negatives)
    columns = [model.tokenizer(sentences(8, seed), return_tensors="pt", padding=True) for seed in (1, 2)]
    columns = [{"input_ids": c["input_ids"], "attention_mask": c["attention_mask"]} for c in columns]
    expected_loss = loss_function(columns, None)
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def chunks(column):
        return [{name: tensor[i : i + 3] for name, tensor in column.items()} for i in range(0, 8, 3)]

    with torch.no_grad():
        cached = [torch.cat([model(c)["sentence_embedding"] for c in chunks(column)]) for column in columns]
    cached = [each.requires_grad_() for each in cached]
    loss = loss_function.compute_loss_from_embeddings(cached)
    loss.backward()
    for column, embedding in zip(columns, cached, strict=True):
        for i, chunk in enumerate(chunks(column)):
            output = model(chunk)["sentence_embedding"]
            (output * embedding.grad[3 * i : 3 * i + 3]).sum().backward()
    torch.testing.assert_close(loss, expected_loss)
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


GATHERED = """
from simctg_fast.integrations.sentence_transformers import SimCSELoss
result = {}
for name, (settings, columns, cut) in argument.items():
    own = [c[:cut] if rank == 0 else c[cut:] for c in columns]
    own = [c.clone().requires_grad_() for c in own]
    loss = SimCSELoss(torch.nn.Identity(), gather_across_devices=True, **settings).compute_loss_from_embeddings(own)
    loss.backward()
    result[name] = loss.item(), [c.grad for c in own]
"""


@pytest.mark.full
def test_gather_across_devices(tmp_path):
    """What data-parallel training makes of two processes, the average of their gradients, is the gradient of one."""
    cases = {
        "pairs": ({}, 2, 3),
        "uneven": ({}, 2, 2),
        "symmetric": ({"symmetric": True}, 2, 2),
        "hard negatives": ({"scale": 5.0}, 4, 4),
        "in view": ({"in_view_negatives": True}, 2, 2),
    }
    argument = {
        name: (settings, [c.detach() for c in embeddings(columns)], cut)
        for name, (settings, columns, cut) in cases.items()
    }
    results = run_two(tmp_path, GATHERED, argument)
    for name, (settings, columns, cut) in argument.items():
        whole = [c.clone().requires_grad_() for c in columns]
        loss = SimCSELoss(torch.nn.Identity(), **settings).compute_loss_from_embeddings(whole)
        loss.backward()
        assert sum(result[name][0] for result in results) / 2 == pytest.approx(loss.item(), rel=1e-6), name
        for i, column in enumerate(whole):
            grad = torch.cat([results[rank][name][1][i] for rank in range(2)]) / 2
            torch.testing.assert_close(grad, column.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: name + text)
        assert results[0][name][1][0].shape[0] == cut
