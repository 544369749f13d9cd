"""The loss module of sentence-transformers: the same numbers as its own, its Trainer, GradCache, two processes."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from functools import partial

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

from ..two_processes import run_two

try:
    from sentence_transformers.sentence_transformer import losses as theirs
except ImportError:  # before version 6
    from sentence_transformers import losses as theirs

MultipleNegativesRankingLoss = theirs.MultipleNegativesRankingLoss
CachedMultipleNegativesRankingLoss = theirs.CachedMultipleNegativesRankingLoss
THEIR_ARGUMENTS = tuple(inspect.signature(MultipleNegativesRankingLoss).parameters)
needs_hardness = pytest.mark.skipif(
    "hardness_mode" not in THEIR_ARGUMENTS, reason="this sentence-transformers has no directions and hardness"
)
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
EVERY_DIRECTION = [("query_to_doc", *rest) for n in range(4) for rest in itertools.combinations(DIRECTIONS[1:], n)]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")

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


def theirs_cosine():
    from sentence_transformers.util import cos_sim

    return cos_sim


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
        expected = MultipleNegativesRankingLoss(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
        torch.testing.assert_close(loss, expected.compute_loss_from_embeddings(columns, None))

    @needs_hardness
    @pytest.mark.parametrize("columns", [2, 3, 4])
    @pytest.mark.parametrize("hardness", HARDNESS)
    def test_every_option_of_theirs(self, columns, hardness):
        """Directions, partition, hardness, scale: value and gradients of each combination, ours put in by name."""
        for directions, scale, strength in itertools.product(EVERY_DIRECTION, (20.0, 2.0), (0.0, 5.0)):
            same_kind = {"query_to_query", "doc_to_doc"} & set(directions)
            for partition in ("joint",) if same_kind else ("joint", "per_direction"):
                # In their order, by position, as a swap of names leaves a call.
                options = (scale, theirs_cosine(), False, directions, partition, hardness, strength)
                ours, expected = embeddings(columns, rows=4), embeddings(columns, rows=4)
                loss = SimCSELoss(torch.nn.Identity(), *options).compute_loss_from_embeddings(ours, None)
                truth = MultipleNegativesRankingLoss(torch.nn.Identity(), *options)
                truth = truth.compute_loss_from_embeddings(expected, None)
                torch.testing.assert_close(loss, truth)
                loss.backward()
                truth.backward()
                for left, right in zip(ours, expected, strict=True):
                    torch.testing.assert_close(left.grad, right.grad)

    @needs_hardness
    def test_their_arguments_in_their_order(self):
        ours = tuple(inspect.signature(SimCSELoss).parameters)
        assert ours[: len(THEIR_ARGUMENTS)] == THEIR_ARGUMENTS
        cached = set(inspect.signature(CachedMultipleNegativesRankingLoss).parameters)
        assert cached <= set(ours)
        config = SimCSELoss(torch.nn.Identity()).get_config_dict()
        expected = MultipleNegativesRankingLoss(torch.nn.Identity()).get_config_dict()
        assert {name: config[name] for name in expected} == expected

    def test_weight_of_hard_negatives(self):
        """Added to the logit of the anchor's own, in each column of hard negatives."""
        anchors, positives, *negatives = embeddings(4)
        model = torch.nn.Identity()
        loss = SimCSELoss(model, hard_negative_weight=1.5).compute_loss_from_embeddings(
            [anchors, positives, *negatives]
        )
        unit = [F.normalize(each, dim=-1) for each in (anchors, positives, *negatives)]
        logits = 20.0 * unit[0] @ torch.cat(unit[1:]).T
        for column in (1, 2):
            logits = logits + 1.5 * torch.eye(6, 18, dtype=torch.float64).roll(6 * column, dims=1)
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(6)))
        with pytest.raises(ValueError, match=r"hard_negative_weight=1\.5 takes three columns or more, got 2"):
            SimCSELoss(model, hard_negative_weight=1.5).compute_loss_from_embeddings([anchors, positives])

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
        with pytest.raises(ValueError, match="scale is 0, must be positive, from 1e-30 to 1e30"):
            SimCSELoss(model, scale=0)
        with pytest.raises(ValueError, match="leave symmetric=False"):
            SimCSELoss(model, symmetric=True, in_view_negatives=True)
        with pytest.raises(ValueError, match="leave them out, or it, got"):
            SimCSELoss(model, symmetric=True, directions=DIRECTIONS)
        for options in (
            {"directions": DIRECTIONS},
            {"hardness_mode": "all_negatives"},
            {"hard_negative_weight": 1.0},
        ):
            with pytest.raises(ValueError, match=f"in_view_negatives=True takes no {next(iter(options))}"):
                SimCSELoss(model, in_view_negatives=True, **options)
        with pytest.raises(ValueError, match="takes one or two columns, got 3"):
            SimCSELoss(model, in_view_negatives=True).compute_loss_from_embeddings(embeddings(3))
        with pytest.raises(ValueError, match=r"anchors and positives at least, got 1 tensor\(s\)"):
            SimCSELoss(model).compute_loss_from_embeddings(embeddings(1))

    @pytest.mark.parametrize(
        ("options", "kind", "match"),
        [
            ({"scale": float("nan")}, ValueError, "scale is nan, must be positive"),
            ({"scale": float("inf")}, ValueError, "scale is inf, must be positive"),
            ({"scale": 1e-320}, ValueError, "scale is 1e-320, must be positive"),
            ({"scale": "20"}, TypeError, "scale is '20', must be a positive number"),
            ({"scale": torch.tensor(20.0)}, TypeError, "scale is tensor"),
            ({"scale": True}, TypeError, "scale is True"),
            ({"directions": ()}, ValueError, r"directions is \(\), must be a tuple of 'query_to_doc'"),
            ({"directions": "query_to_doc"}, ValueError, "directions is 'query_to_doc', must be a tuple"),
            ({"directions": ("doc_to_query",)}, ValueError, "must hold 'query_to_doc'"),
            ({"directions": ("query_to_doc", "docs")}, ValueError, "directions is .*'docs'"),
            ({"partition_mode": "both"}, ValueError, "partition_mode is 'both', must be 'joint' or 'per_direction'"),
            (
                {"partition_mode": "per_direction", "directions": ("query_to_doc", "doc_to_doc")},
                ValueError,
                "partition_mode='per_direction' takes .*, got 'doc_to_doc'",
            ),
            ({"hardness_mode": "hard"}, ValueError, "hardness_mode is 'hard', must be one of None, 'in_batch"),
            ({"hardness_strength": -1.0}, ValueError, r"hardness_strength is -1\.0, must be a number from 0"),
            ({"hardness_strength": float("nan")}, ValueError, "hardness_strength is nan"),
            ({"hardness_strength": None}, TypeError, "hardness_strength is None"),
            ({"hard_negative_weight": float("nan")}, ValueError, "hard_negative_weight is nan"),
            ({"similarity_fct": torch.nn.CosineSimilarity()}, ValueError, "similarity_fct is CosineSimilarity, must"),
            ({"similarity_fct": lambda a, b: a @ b.T}, ValueError, "similarity_fct is <lambda>, must be None or"),
            ({"mini_batch_size": 0}, ValueError, "mini_batch_size is 0, must be None or an integer from 1"),
            ({"mini_batch_size": 2.5}, ValueError, r"mini_batch_size is 2\.5"),
            ({"mini_batch_num_tokens": 0}, ValueError, "mini_batch_num_tokens is 0, must be None or an integer"),
        ],
    )
    def test_options_that_are_refused(self, options, kind, match):
        with pytest.raises(kind, match=match):
            SimCSELoss(torch.nn.Identity(), **options)

    def test_other_similarities_are_refused_by_name(self):
        from sentence_transformers.util import dot_score

        SimCSELoss(torch.nn.Identity(), similarity_fct=partial(theirs_cosine()))
        with pytest.raises(ValueError, match="similarity_fct is dot_score, must be None or sentence_transformers"):
            SimCSELoss(torch.nn.Identity(), similarity_fct=dot_score)

    def test_embeddings_of_another_kind_are_refused(self):
        anchors, positives = embeddings(2)
        loss = SimCSELoss(torch.nn.Identity())
        with pytest.raises(ValueError, match=r"embeddings\[1\] is \(3, 12\) torch.strided, must be \(n, width\)"):
            loss.compute_loss_from_embeddings([anchors, positives[:3]])
        with pytest.raises(ValueError, match=r"embeddings\[0\] is \(6, 12\) torch.sparse_coo"):
            loss.compute_loss_from_embeddings([anchors.to_sparse(), positives])


@pytest.fixture(scope="module")
def model(folder):
    return load(folder).double()


def features_of(model, columns: int, rows: int = 7, shortest: int = 1) -> list[dict[str, torch.Tensor]]:
    """Texts of several lengths, five words at most."""
    generator = random.Random(columns)
    result = []
    for column in range(columns):
        texts = [" ".join(text.split()[: generator.randint(shortest, 5)]) for text in sentences(rows, column + 1)]
        encoded = model.tokenizer(texts, return_tensors="pt", padding=True)
        result.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return result


def value_and_gradients(model, loss, features, seed: int = 0, factor: float = 1.0):
    model.zero_grad()
    torch.manual_seed(seed)
    random.seed(seed)
    value = loss(features, None)
    if isinstance(value, dict):
        value = sum(value.values())
    (value * factor).backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, **tolerance):
    torch.testing.assert_close(got[0], expected[0], **tolerance)
    assert got[1].keys() == expected[1].keys()
    assert expected[1]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, msg=lambda text, name=name: name + text, **tolerance)


WRAPPERS = {
    "none": lambda model, loss: loss,
    "adaptive layers": lambda model, loss: theirs.AdaptiveLayerLoss(model, loss),
    "some adaptive layers": lambda model, loss: theirs.AdaptiveLayerLoss(model, loss, n_layers_per_step=1),
    "matryoshka": lambda model, loss: theirs.MatryoshkaLoss(model, loss, [16, 8, 4], [1.0, 0.5, 0.25]),
    "some of matryoshka": lambda model, loss: theirs.MatryoshkaLoss(model, loss, [16, 8, 4], n_dims_per_step=2),
    "2d matryoshka": lambda model, loss: theirs.Matryoshka2dLoss(model, loss, [16, 8]),
}


class TestWrappers:
    """A loss of sentence-transformers around ours gives what it gives around theirs, with dropout and without."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("columns", [2, 3, 4])
    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
    def test_around_ours_and_theirs(self, wrap, columns, training, model):
        model.train(training)
        got, expected = (
            value_and_gradients(model, wrap(model, loss(model)), features_of(model, columns))
            for loss in (SimCSELoss, MultipleNegativesRankingLoss)
        )
        assert_same(got, expected)

    @pytest.mark.parametrize("in_view_negatives", [False, True])
    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
    def test_one_column_is_two_views(self, wrap, in_view_negatives, model):
        """As of two columns with the same texts: every layer sees two views, also where a wrapper calls again."""
        model.train()
        loss = SimCSELoss(model, in_view_negatives=in_view_negatives)
        (column,) = features_of(model, 1)
        got = value_and_gradients(model, wrap(model, loss), [column])
        loss = SimCSELoss(model, in_view_negatives=in_view_negatives)
        expected = value_and_gradients(model, wrap(model, loss), features_of(model, 1) + features_of(model, 1))
        assert_same(got, expected)
        copy.deepcopy(loss)  # nothing of the batch is left in it

    def test_what_would_land_in_another_argument_is_refused(self, model):
        with pytest.raises(ValueError, match=r"gather_across_devices is 32, must be True or False.*mini_batch_size"):
            SimCSELoss(model, 20.0, None, 32)
        with pytest.raises(ValueError, match="impl is 'xx', must be one of"):
            SimCSELoss(model, impl="xx")

    def test_sparse_encoders_wrappers(self, folder):
        """SPLADE's losses take the main loss from embeddings."""
        pytest.importorskip("sentence_transformers.sparse_encoder")
        from sentence_transformers import SparseEncoder
        from sentence_transformers.sparse_encoder import losses as sparse
        from sentence_transformers.sparse_encoder.modules import SpladePooling
        from transformers import BertForMaskedLM

        try:
            from sentence_transformers.base.modules import Transformer

            modules = [Transformer(str(folder), transformer_task="fill-mask"), SpladePooling()]
        except (ImportError, TypeError):
            pytest.skip("this sentence-transformers builds a sparse encoder in another way")
        model = SparseEncoder(modules=modules, device="cpu").double().train()
        assert any(isinstance(module, BertForMaskedLM) for module in model.modules())
        results = []
        for loss in (
            SimCSELoss(model),
            sparse.SparseMultipleNegativesRankingLoss(model, 20.0, theirs_cosine()),
        ):
            for wrapper in (sparse.SpladeLoss, getattr(sparse, "CachedSpladeLoss", None)):
                if wrapper is not None:
                    whole = wrapper(model, loss, document_regularizer_weight=0.1, query_regularizer_weight=0.1)
                    results.append(value_and_gradients(model, whole, features_of(model, 3)))
        half = len(results) // 2
        for got, expected in zip(results[:half], results[half:], strict=True):
            assert_same(got, expected)

    @needs_hardness
    def test_documents_share_a_forward_pass_as_theirs_do(self, model, monkeypatch):
        calls = []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda f, **kw: calls.append(len(f["input_ids"])) or forward(f, **kw))
        for loss in (MultipleNegativesRankingLoss(model), SimCSELoss(model)):
            for columns in (2, 4):
                loss(features_of(model, columns), None)
        assert calls[: len(calls) // 2] == calls[len(calls) // 2 :] == [7, 7, 7, 21]


class TestMiniBatches:
    """The cached form: the same number and gradient, whatever is encoded at a time."""

    @pytest.mark.parametrize("options", [{"mini_batch_size": 3}, {"mini_batch_size": 50}, {"mini_batch_num_tokens": 8}])
    @pytest.mark.parametrize("columns", [2, 4])
    def test_equals_the_whole_batch(self, columns, options, model):
        model.eval()
        for extra in (
            {},
            {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
            {"symmetric": True},
        ):
            features = features_of(model, columns)
            got = value_and_gradients(model, SimCSELoss(model, **extra, **options), features, factor=0.25)
            expected = value_and_gradients(model, SimCSELoss(model, **extra), features_of(model, columns), factor=0.25)
            assert_same(got, expected)
            assert all(feature.keys() == {"input_ids", "attention_mask"} for feature in features)

    @needs_hardness
    @pytest.mark.parametrize("wrap", ["none", "matryoshka"])
    @pytest.mark.parametrize("tokens", [None, 8])
    def test_equals_their_cached_loss_with_dropout(self, tokens, wrap, model):
        model.train()
        options = {"mini_batch_size": 3, "mini_batch_num_tokens": tokens}
        got, expected = (
            value_and_gradients(model, WRAPPERS[wrap](model, loss(model, **options)), features_of(model, 3))
            for loss in (SimCSELoss, CachedMultipleNegativesRankingLoss)
        )
        assert_same(got, expected)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_dropout_is_the_same_both_times(self, columns, model):
        """Against a graph of all mini-batches, in the order in which they were encoded."""
        model.train()
        loss = SimCSELoss(model, mini_batch_size=3, in_view_negatives=columns == 1)
        got = value_and_gradients(model, loss, features_of(model, columns, shortest=5))
        after = torch.rand(1)

        def whole(features, _):
            features = features * 2 if columns == 1 else features
            reps = [
                torch.cat(
                    [
                        model({name: value[i : i + 3] for name, value in f.items()})["sentence_embedding"]
                        for i in range(0, 7, 3)
                    ]
                )
                for f in features
            ]
            return SimCSELoss(model, in_view_negatives=columns == 1).compute_loss_from_embeddings(reps)

        assert_same(got, value_and_gradients(model, whole, features_of(model, columns, shortest=5)))
        assert torch.equal(torch.rand(1), after), "a backward pass leaves the random numbers where they were"

    def test_two_losses_before_one_backward_pass(self, model):
        model.eval()
        loss = SimCSELoss(model, mini_batch_size=3)
        plain = SimCSELoss(model)
        got, expected = (
            value_and_gradients(model, lambda f, _, each=each: each(f[:2]) + 2 * each(f[1:]), features_of(model, 3))
            for each in (loss, plain)
        )
        assert_same(got, expected)

    def test_autocast_of_the_forward_pass_is_that_of_the_second(self, folder, monkeypatch):
        model = load(folder).eval()
        forward, seen = model.forward, []
        monkeypatch.setattr(model, "forward", lambda f: seen.append(torch.is_autocast_enabled("cpu")) or forward(f))

        def cast(loss):
            def run(features, _):
                with torch.autocast("cpu", torch.bfloat16):
                    return loss(features)

            return run

        got, expected = (
            value_and_gradients(model, cast(SimCSELoss(model, mini_batch_size=size)), features_of(model, 2))
            for size in (3, None)
        )
        assert seen == [True] * (2 * 6 + 2)
        torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=0.02)
        norm = torch.stack([g.norm() for g in expected[1].values()]).norm()
        error = torch.stack([(got[1][name] - g).norm() for name, g in expected[1].items()]).norm()
        assert error < 0.05 * norm

    def test_without_gradients(self, model):
        model.eval()
        with torch.no_grad():
            value = SimCSELoss(model, mini_batch_size=3)(features_of(model, 3))
            torch.testing.assert_close(value, SimCSELoss(model)(features_of(model, 3)))
        assert not value.requires_grad

    @needs_hardness
    @pytest.mark.filterwarnings("ignore:.*:UserWarning")
    @pytest.mark.parametrize("wrap", ["adaptive layers", "2d matryoshka"])
    def test_wrappers_of_layers_are_refused(self, wrap, model):
        loss = WRAPPERS[wrap](model, SimCSELoss(model, mini_batch_size=3))
        with pytest.raises(ValueError, match="mini_batch_size is 3, must be None inside a loss that replaces model"):
            loss(features_of(model, 2), None)

    def test_a_forward_that_was_replaced_meanwhile(self, model):
        value = SimCSELoss(model, mini_batch_size=3)(features_of(model, 2))
        original = model.forward
        model.forward = lambda features: original(features)
        try:
            with pytest.raises(RuntimeError, match="its forward has been replaced since"):
                value.backward()
        finally:
            del model.forward

    @pytest.mark.parametrize(
        ("features", "match"),
        [
            ({"input_ids": torch.ones(9), "offsets": torch.ones(3)}, "one row a sentence.*got input_ids, offsets"),
            ({"input_ids": torch.ones(1, 9), "cu_seq_lens_q": torch.ones(4)}, "one row a sentence"),
            ({"input_ids": torch.ones(3, 9), "pixel_values": torch.ones(8, 4)}, "got pixel_values"),
        ],
    )
    def test_features_that_are_not_one_row_a_sentence(self, features, match, model):
        with pytest.raises(ValueError, match=match):
            SimCSELoss(model, mini_batch_size=3)([features, features])

    def test_trains(self, folder, tmp_path):
        columns = {"anchor": sentences(16, 1), "positive": sentences(16, 2)}
        cached = train(folder, tmp_path, columns, lambda model: SimCSELoss(model, mini_batch_size=3), steps=4)
        assert cached[-1] < cached[0]


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


DATA_PARALLEL = """
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from simctg_fast.integrations.sentence_transformers import SimCSELoss

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(argument["weight"].clone())

    def forward(self, features):
        return {"sentence_embedding": (F.one_hot(features["input_ids"], 9).double() @ self.weight).tanh().sum(1)}

result = {}
for name, settings in argument["cases"].items():
    model = Encoder()
    wrapped = DistributedDataParallel(model)
    exchanges = []
    wrapped.register_comm_hook(None, lambda _, bucket: (exchanges.append(1), torch.distributed.all_reduce(
        bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / 2))[1])
    own = [{"input_ids": c[:3] if rank == 0 else c[3:]} for c in argument["columns"]]
    loss = SimCSELoss(wrapped, gather_across_devices=True, **settings)(own)
    loss.backward()
    result[name] = loss.item(), model.weight.grad, len(exchanges)
"""


@pytest.mark.full
def test_mini_batches_in_data_parallel_training(tmp_path):
    """Gradients are exchanged once a step, and are those of the whole batch in one process."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, 9, (6, 4), generator=generator) for _ in range(3)]
    weight = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    cases = {"cached": {"mini_batch_size": 2}, "whole": {}}
    results = run_two(tmp_path, DATA_PARALLEL, {"columns": columns, "weight": weight, "cases": cases})
    leaf = weight.clone().requires_grad_()
    reps = [(F.one_hot(column, 9).double() @ leaf).tanh().sum(1) for column in columns]
    loss = SimCSELoss(torch.nn.Identity()).compute_loss_from_embeddings(reps)
    loss.backward()
    for name in cases:
        assert sum(result[name][0] for result in results) / 2 == pytest.approx(loss.item(), rel=1e-9)
        for result in results:
            torch.testing.assert_close(result[name][1], leaf.grad)
    assert [result["cached"][2] for result in results] == [1, 1]
