"""Hugging Face Trainer: gradient accumulation and processes give the gradient of one big batch."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")

from transformers import Trainer, TrainingArguments

from simctg_fast.integrations import SimCTGComputeLoss, SimCTGSeq2SeqTrainer, SimCTGTrainer
from simctg_fast.integrations.trainer import SimCTGTrainerMixin
from simctg_fast.metrics import isotropy
from simctg_fast.reference import contraclm as reference_contraclm
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference_loss

from ..training_models import ARCHITECTURES, LENGTHS, collate, collate_for_compute_loss, dataset, tiny_model
from ..two_processes import run_two

# Models are float64, but GPT-2's own loss is computed in float32, and Trainer adds up what it logs in float32.
EXACT = {"rtol": 1e-5, "atol": 1e-7}
MARGIN, WEIGHT = 0.9, 0.7


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Plain gradient descent with step size 1: the change of the weights is the gradient."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def forward_terms(model: torch.nn.Module, batch: dict[str, Tensor], reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Likelihood, contrastive loss and hidden states of one batch, by the reference."""
    outputs = model(**batch, output_hidden_states=True)
    if model.config.is_encoder_decoder:
        states, mask = outputs.decoder_hidden_states[-1], batch["labels"].ne(-100)
    else:
        states, mask = outputs.hidden_states[-1], batch["attention_mask"]
    mask = None if reduction == "dense" else mask
    return outputs.loss, reference_loss(states, mask, MARGIN, reduction), states


def true_gradient(name: str, reduction: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[dict[str, Tensor], float]:
    """Of one big batch."""
    model = tiny_model(name)
    mle, contrastive, _ = forward_terms(model, collate(dataset(name, lengths)), reduction)
    loss = mle + WEIGHT * contrastive
    loss.backward()
    return {key: value.grad for key, value in model.named_parameters()}, loss.item()


def change_of_weights(trainer: Trainer, name: str) -> dict[str, Tensor]:
    trainer.train()
    before = dict(tiny_model(name).named_parameters())
    return {key: before[key].detach() - value.detach().cpu() for key, value in trainer.model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **(tolerance or EXACT), msg=lambda text, key=key: f"{key}: {text}"
        )


# The last cut leaves two rows over. What differs by architecture is left to the full set where one of a kind is enough.
CUTS = [(2, 4), pytest.param(8, 1, marks=pytest.mark.full), pytest.param(3, 3, marks=pytest.mark.full)]
ALSO_BART = ["gpt2", "t5", pytest.param("bart", marks=pytest.mark.full)]


class TestExactness:
    @pytest.mark.parametrize("reduction", ["pairs", "paper"])
    @pytest.mark.parametrize("name", ALSO_BART)
    @pytest.mark.parametrize(("rows", "steps"), CUTS)
    def test_accumulation_equals_one_big_batch(self, name, reduction, rows, steps, tmp_path):
        trainer = SimCTGTrainer(
            tiny_model(name),
            arguments(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps),
            train_dataset=dataset(name),
            data_collator=collate,
            margin=MARGIN,
            reduction=reduction,
            contrastive_weight=WEIGHT,
        )
        gradient, loss = true_gradient(name, reduction)
        assert_same(change_of_weights(trainer, name), gradient)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)

    def test_the_likelihood_alone(self, tmp_path):
        """T5 takes `num_items_in_batch` and ignores it: with a plain Trainer its loss is too large by the number of
        accumulation steps."""
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        plain = Trainer(
            tiny_model("t5"),
            arguments(tmp_path, **settings),
            train_dataset=dataset("t5"),
            data_collator=collate,
        )
        plain.train()
        model = tiny_model("t5")
        mle = model(**collate(dataset("t5"))).loss
        assert plain.state.log_history[0]["loss"] > 3 * mle.item()
        ours = SimCTGTrainer(
            tiny_model("t5"),
            arguments(tmp_path, **settings),
            train_dataset=dataset("t5"),
            data_collator=collate,
            contrastive_weight=0.0,
        )
        mle.backward()
        assert_same(change_of_weights(ours, "t5"), {key: value.grad for key, value in model.named_parameters()})

    @pytest.mark.parametrize("accepts", [True, False])
    def test_a_model_that_takes_no_loss_arguments(self, accepts, tmp_path):
        model = tiny_model("gpt2")
        model.accepts_loss_kwargs = accepts
        trainer = SimCTGTrainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
            train_dataset=dataset("gpt2"),
            data_collator=collate,
            margin=MARGIN,
            contrastive_weight=WEIGHT,
        )
        assert_same(change_of_weights(trainer, "gpt2"), true_gradient("gpt2", "pairs")[0])

    @pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.full)])
    def test_gradient_checkpointing(self, name, tmp_path):
        model = tiny_model(name)
        model.gradient_checkpointing_enable()
        trainer = SimCTGTrainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2),
            train_dataset=dataset(name),
            data_collator=collate,
            margin=MARGIN,
            contrastive_weight=WEIGHT,
        )
        assert_same(change_of_weights(trainer, name), true_gradient(name, "pairs")[0])

    @pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.full)])
    def test_label_smoothing(self, name, tmp_path):
        """Trainer's own, which takes the labels out of the batch; for an encoder-decoder the collator then makes the
        decoder's inputs."""
        changes = []
        for rows, steps in ((8, 1), (2, 4)):
            trainer = SimCTGTrainer(
                tiny_model(name),
                arguments(
                    tmp_path,
                    per_device_train_batch_size=rows,
                    gradient_accumulation_steps=steps,
                    label_smoothing_factor=0.2,
                ),
                train_dataset=dataset(name),
                data_collator=collate if name == "gpt2" else collate_for_compute_loss,
                margin=MARGIN,
                contrastive_weight=WEIGHT,
            )
            changes.append(change_of_weights(trainer, name))
        assert_same(*changes)
        plain = true_gradient(name, "pairs")[0]
        assert any((changes[0][key] - value).abs().max() > 1e-4 for key, value in plain.items()), "nothing was smoothed"

    def test_dense_on_one_batch(self, tmp_path):
        lengths = (9,) * 4
        trainer = SimCTGTrainer(
            tiny_model("gpt2"),
            arguments(tmp_path, per_device_train_batch_size=4),
            train_dataset=dataset("gpt2", lengths),
            data_collator=collate,
            margin=MARGIN,
            reduction="dense",
            contrastive_weight=WEIGHT,
        )
        assert_same(change_of_weights(trainer, "gpt2"), true_gradient("gpt2", "dense", lengths)[0])

    def test_a_micro_batch_without_labels_or_pairs(self, tmp_path):
        """Every label masked in one row, another of a single token: shares of zero, not NaN."""
        rows = dataset("gpt2", (6, 1, 9))
        rows[0] = rows[0] | {"labels": [-100] * 6}
        trainer = SimCTGTrainer(
            tiny_model("gpt2"),
            arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3),
            train_dataset=rows,
            data_collator=collate,
            margin=MARGIN,
            contrastive_weight=WEIGHT,
        )
        model = tiny_model("gpt2")
        mle, contrastive, _ = forward_terms(model, collate(rows), "pairs")
        (mle + WEIGHT * contrastive).backward()
        assert_same(change_of_weights(trainer, "gpt2"), {key: p.grad for key, p in model.named_parameters()})


def other_term(states: tuple[Tensor, Tensor], mask: Tensor, settings: dict[str, Any]) -> Tensor:
    """A loss that is not SimCTG's, of two views of a batch, by the reference."""
    if settings["loss"] == "cosreg":
        return reference_contraclm.cosine_regularization(states[0], mask)
    temperature, reduction = settings.get("temperature", 0.05), settings.get("reduction", "sequences")
    return reference_contraclm.contraclm_token_loss(*states, mask, temperature, reduction)


def other_gradient(name: str, settings: dict[str, Any]) -> tuple[dict[str, Tensor], float, float]:
    """Of one big batch, of a model whose two views are alike: gradient, loss, and its second term."""
    model, batch = tiny_model(name), collate(dataset(name))
    outputs = [model(**batch, output_hidden_states=True) for _ in range(2)]
    key = "decoder_hidden_states" if name == "t5" else "hidden_states"
    term = other_term(tuple(out[key][-1] for out in outputs), batch["labels"].ne(-100), settings)
    loss = outputs[0].loss + WEIGHT * term
    loss.backward()
    return {key: value.grad for key, value in model.named_parameters()}, loss.item(), term.item()


OTHERS = {
    "contraclm": {"loss": "contraclm"},
    "tokens": {"loss": "contraclm", "reduction": "tokens", "temperature": 0.2},
    "cosreg": {"loss": "cosreg"},
}


class TestOtherLosses:
    @pytest.mark.parametrize("kind", OTHERS)
    @pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.full)])
    @pytest.mark.parametrize(("rows", "steps"), [(2, 4), pytest.param(3, 3, marks=pytest.mark.full)])
    def test_accumulation_equals_one_big_batch(self, name, kind, rows, steps, tmp_path):
        trainer = SimCTGTrainer(
            tiny_model(name),
            arguments(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps),
            train_dataset=dataset(name),
            data_collator=collate,
            contrastive_weight=WEIGHT,
            **OTHERS[kind],
        )
        gradient, loss, term = other_gradient(name, OTHERS[kind])
        assert_same(change_of_weights(trainer, name), gradient)
        line = trainer.state.log_history[0]
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
        assert line[f"{OTHERS[kind]['loss']}_loss"] == pytest.approx(term, rel=1e-5)
        assert "contrastive_loss" not in line

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_the_second_view_has_a_dropout_of_its_own(self, name, tmp_path):
        model, batch = tiny_model(name, dropout=0.3), collate(dataset(name))
        trainer = SimCTGTrainer(model, arguments(tmp_path), loss="contraclm", contrastive_weight=WEIGHT)
        key = "decoder_hidden_states" if name == "t5" else "hidden_states"
        passes = []
        hook = model.register_forward_pre_hook(lambda *_: passes.append(model.training))
        for training, views in ((True, 2), (False, 1)):
            model.train(training)
            torch.manual_seed(3)
            outputs = [model(**batch, output_hidden_states=True) for _ in range(views)]
            states = [out[key][-1] for out in outputs]
            assert not torch.equal(states[0], states[-1]) or not training
            term = other_term((states[0], states[-1]), batch["labels"].ne(-100), OTHERS["contraclm"])
            passes.clear()
            torch.manual_seed(3)
            loss = trainer.compute_loss(model, dict(batch))
            assert loss.item() == pytest.approx((outputs[0].loss + WEIGHT * term).item(), rel=1e-6)
            assert passes == [training] * views
        hook.remove()

    def test_evaluation(self, tmp_path):
        trainer = SimCTGTrainer(
            tiny_model("gpt2", dropout=0.3),
            arguments(tmp_path, per_device_eval_batch_size=8),
            eval_dataset=dataset("gpt2"),
            data_collator=collate,
            contrastive_weight=WEIGHT,
            loss="contraclm",
        )
        metrics = trainer.evaluate()
        _, loss, term = other_gradient("gpt2", OTHERS["contraclm"])
        assert metrics["eval_contraclm_loss"] == pytest.approx(term, rel=1e-6)
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "simcse"}, "loss is 'simcse', must be one of 'simctg', 'contraclm', 'cosreg'"),
            ({"loss": "contraclm", "margin": 0.5}, "margin is 0.5, must be left out with loss='contraclm'"),
            ({"loss": "contraclm", "reduction": "pairs"}, "reduction is 'pairs', must be one of 'sequences', 'tokens'"),
            ({"loss": "contraclm", "temperature": 0.0}, "temperature is 0.0, must be positive"),
            ({"loss": "cosreg", "temperature": 0.05}, "temperature is 0.05, must be left out with loss='cosreg'"),
            ({"loss": "cosreg", "reduction": "paper"}, "reduction is 'paper', must be left out with loss='cosreg'"),
            ({"loss": "cosreg", "contrastive_weight": -1}, "contrastive_weight is -1, must be a number of at least 0"),
            ({"temperature": 0.05}, "temperature is 0.05, must be left out with loss='simctg'"),
        ],
    )
    def test_settings(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path), **settings)

    def test_defaults(self, tmp_path):
        found = {}
        for loss in ("simctg", "contraclm", "cosreg"):
            trainer = SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path), loss=loss)
            found[loss] = trainer.margin, trainer.reduction, trainer.temperature
        assert found == {
            "simctg": (0.5, "pairs", None),
            "contraclm": (None, "sequences", 0.05),
            "cosreg": (None, None, None),
        }


PROCESSES = """
from transformers import Trainer
from simctg_fast.integrations import SimCTGComputeLoss, SimCTGTrainer
from tests.training.test_integration_trainer import *
result = {}
for name in ("gpt2", "t5"):
    for reduction in ("pairs", "paper"):
        trainer = SimCTGTrainer(
            tiny_model(name),
            arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2),
            train_dataset=dataset(name),
            data_collator=collate,
            margin=MARGIN,
            reduction=reduction,
            contrastive_weight=WEIGHT,
        )
        assert trainer.args.world_size == 2
        result[name, reduction] = change_of_weights(trainer, name), trainer.state.log_history[0]
for kind, settings in OTHERS.items():
    trainer = SimCTGTrainer(
        tiny_model("gpt2"),
        arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=dataset("gpt2"),
        data_collator=collate,
        contrastive_weight=WEIGHT,
        **settings,
    )
    result[kind] = change_of_weights(trainer, "gpt2"), trainer.state.log_history[0]
model = tiny_model("gpt2")
trainer = Trainer(
    model,
    arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    train_dataset=dataset("gpt2", (9,) * 8),
    data_collator=collate,
    compute_loss_func=SimCTGComputeLoss(model, margin=MARGIN, contrastive_weight=WEIGHT),
)
result["compute_loss"] = change_of_weights(trainer, "gpt2"), trainer.state.log_history[0]
try:
    SimCTGTrainer(tiny_model("gpt2"), arguments(folder), reduction="dense")
except ValueError as error:
    result["dense"] = str(error)
"""


@pytest.mark.full
def test_two_processes_equal_one_big_batch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = run_two(tmp_path, PROCESSES, init=False, port=port)
    for result in results:
        for name in ("gpt2", "t5"):
            for reduction in ("pairs", "paper"):
                gradient, loss = true_gradient(name, reduction)
                change, log = result[name, reduction]
                assert_same(change, gradient)
                assert log["loss"] == pytest.approx(loss, rel=1e-6)
                assert log["mle_loss"] + WEIGHT * log["contrastive_loss"] == pytest.approx(loss, rel=1e-5)
        for kind, settings in OTHERS.items():
            gradient, loss, _ = other_gradient("gpt2", settings)
            assert_same(result[kind][0], gradient)
            assert result[kind][1]["loss"] == pytest.approx(loss, rel=1e-6)
        # Where all sequences have one length the share of the labels is that of the pairs.
        gradient, loss = true_gradient("gpt2", "pairs", (9,) * 8)
        assert_same(result["compute_loss"][0], gradient)
        assert result["compute_loss"][1]["loss"] == pytest.approx(loss, rel=1e-6)
        assert "gradient_accumulation_steps=1 and 2 processes" in result["dense"]


class TestLogs:
    def test_both_terms_and_isotropy(self, tmp_path):
        trainer = SimCTGTrainer(
            tiny_model("gpt2"),
            arguments(
                tmp_path,
                max_steps=4,
                logging_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-9,
            ),
            train_dataset=dataset("gpt2"),
            data_collator=collate,
            margin=MARGIN,
            contrastive_weight=WEIGHT,
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [line["step"] for line in lines] == [2, 4]
        batch = collate(dataset("gpt2"))
        states = forward_terms(tiny_model("gpt2"), batch, "pairs")[2]
        for line in lines:
            assert line["loss"] == pytest.approx(line["mle_loss"] + WEIGHT * line["contrastive_loss"], rel=1e-6)
            # Two steps of four rows see each row once.
            assert line["isotropy"] == pytest.approx(isotropy(states, batch["attention_mask"]), rel=1e-5)
        assert "mle_loss" not in trainer.state.log_history[-1]  # the summary of the run

    @pytest.mark.parametrize("name", ALSO_BART)
    def test_evaluation_gathers_no_hidden_states(self, name, tmp_path):
        model = tiny_model(name)
        model.config.output_hidden_states = True  # as a user may have left it
        trainer = SimCTGTrainer(
            model,
            arguments(tmp_path, per_device_eval_batch_size=3),
            eval_dataset=dataset(name),
            data_collator=collate,
            margin=MARGIN,
            contrastive_weight=WEIGHT,
        )
        seen = []
        trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
        metrics = trainer.evaluate()
        predictions = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
        assert predictions[0].shape[-1] == 32
        # An encoder-decoder also returns its encoder's last state: not asked for by us, and one tensor, not a tuple.
        assert len(predictions) == (1 if name == "gpt2" else 2)
        total = metrics["eval_mle_loss"] + WEIGHT * metrics["eval_contrastive_loss"]
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)
        terms = [forward_terms(model, collate(dataset(name)[i : i + 3]), "pairs")[1] for i in (0, 3, 6)]
        expected = (3 * terms[0] + 3 * terms[1] + 2 * terms[2]) / 8
        assert metrics["eval_contrastive_loss"] == pytest.approx(expected.item(), rel=1e-6)

    def test_evaluation_between_training_steps_leaves_training_alone(self, tmp_path):
        curves = []
        for evaluate in (False, True):
            trainer = SimCTGTrainer(
                tiny_model("gpt2"),
                arguments(
                    tmp_path,
                    max_steps=3,
                    learning_rate=0.1,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                    eval_strategy="steps" if evaluate else "no",
                    eval_steps=1,
                ),
                train_dataset=dataset("gpt2"),
                eval_dataset=dataset("gpt2"),
                data_collator=collate,
            )
            trainer.train()
            curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(curves[0]) == 3
        assert curves[0] == curves[1]


class TestArguments:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"margin": 1.5}, "margin is 1.5, must lie in"),
            ({"reduction": "mean"}, "reduction is 'mean', must be one of 'pairs', 'paper', 'dense'"),
            ({"contrastive_weight": -1.0}, "contrastive_weight is -1.0, must be a number of at least 0"),
        ],
    )
    def test_settings(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path), **settings)
        with pytest.raises(ValueError, match=message):
            SimCTGComputeLoss(tiny_model("gpt2"), **settings)

    def test_dense_is_refused_with_accumulation(self, tmp_path):
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2 and 1 processes; take 'pairs' or 'paper'"):
            SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path, gradient_accumulation_steps=2), reduction="dense")
        with pytest.raises(ValueError, match="take 'pairs' or 'paper'"):
            SimCTGComputeLoss(tiny_model("gpt2"), reduction="dense")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seq_idx": torch.zeros(1)}, "several sequences share a row"),
            ({"attention_mask": None, "position_ids": torch.zeros(1)}, "position_ids but no attention_mask"),
            ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask has shape \(1, 1, 4, 4\)"),
            ({"attention_mask": torch.ones(8, 41)}, "the model's last hidden states have shape"),
        ],
    )
    def test_batches(self, change, message, tmp_path):
        trainer = SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path))
        # A model that takes anything, so that the error is ours.
        states = torch.zeros(8, 40, 4)
        outputs = {"loss": torch.tensor(0.0), "hidden_states": (states,)}
        trainer.model.forward = lambda **inputs: outputs
        with pytest.raises(ValueError, match=message):
            trainer.compute_loss(trainer.model, collate(dataset("gpt2")) | change)

    def test_no_attention_mask_means_no_padding(self, tmp_path):
        trainer = SimCTGTrainer(tiny_model("gpt2"), arguments(tmp_path), margin=MARGIN, contrastive_weight=WEIGHT)
        batch = collate(dataset("gpt2", (9, 9)))
        expected = trainer.compute_loss(trainer.model, dict(batch))
        del batch["attention_mask"]
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-6)

    def test_seq2seq_and_custom_trainers(self, tmp_path):
        assert issubclass(SimCTGSeq2SeqTrainer, SimCTGTrainerMixin)

        class Custom(SimCTGTrainerMixin, Trainer):
            pass

        assert Custom(tiny_model("gpt2"), arguments(tmp_path), margin=0.25).margin == 0.25


class TestComputeLoss:
    @staticmethod
    def approximation(name: str, batches: list[dict[str, Tensor]]) -> tuple[float, float, float]:
        """What the micro-batches add up to, what is exact, and the bound of the documentation."""
        model = tiny_model(name)
        loss_function = SimCTGComputeLoss(model, margin=MARGIN, contrastive_weight=WEIGHT)
        shift = slice(1 if name == "gpt2" else 0, None)
        labels = torch.tensor([batch["labels"][:, shift].ne(-100).sum() for batch in batches], dtype=torch.float64)
        lengths = [batch["labels"].ne(-100).sum(dim=1) for batch in batches]
        pairs = torch.stack([(length * (length - 1)).sum() for length in lengths]).double()
        total, mle_sum, contrastive = 0.0, 0.0, []
        for batch, count in zip(batches, labels, strict=True):
            mle, value, _ = forward_terms(model, {k: v for k, v in batch.items() if k != "decoder_input_ids"}, "pairs")
            mle_sum += mle.item() * count.item() / labels.sum().item()
            contrastive.append(value.item())
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            total += loss_function(model(**inputs), batch["labels"], num_items_in_batch=labels.sum().long()).item()
        losses = torch.tensor(contrastive, dtype=torch.float64)
        exact = mle_sum + WEIGHT * (losses * pairs / pairs.sum()).sum().item()
        shift_of_weight = (labels / labels.sum() - pairs / pairs.sum()).abs().sum().item() / 2
        return total, exact, WEIGHT * (losses.max() - losses.min()).item() * shift_of_weight

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_error_stays_within_the_documented_bound(self, name):
        make = collate if name == "gpt2" else collate_for_compute_loss
        rows = dataset(name)
        if name == "bart":  # its own shift begins with its own start token
            make = with_bart_inputs
        total, exact, bound = self.approximation(name, [make(rows[i : i + 2]) for i in range(0, 8, 2)])
        assert abs(total - exact) <= bound + 1e-12
        assert abs(total - exact) > 1e-6, "the test would not notice an approximation that is not there"
        # The bound is not idle: the error is a fair part of it.
        assert bound < 0.2 * WEIGHT

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_exact_where_all_lengths_are_equal(self, name):
        make = collate if name == "gpt2" else collate_for_compute_loss
        rows = dataset(name, (9,) * 6)
        total, exact, bound = self.approximation(name, [make(rows[i : i + 2]) for i in range(0, 6, 2)])
        assert bound == pytest.approx(0.0, abs=1e-12)
        assert total == pytest.approx(exact, rel=1e-6)

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_with_trainer(self, name, tmp_path):
        model = tiny_model(name)
        trainer = Trainer(
            model,
            arguments(
                tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, per_device_eval_batch_size=3
            ),
            train_dataset=dataset(name, (9,) * 8),
            eval_dataset=dataset(name),
            data_collator=collate if name == "gpt2" else collate_for_compute_loss,
            compute_loss_func=SimCTGComputeLoss(model, margin=MARGIN, contrastive_weight=WEIGHT),
        )
        gradient, loss = true_gradient(name, "pairs", (9,) * 8)
        assert_same(change_of_weights(trainer, name), gradient)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)
        seen = []
        trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
        trainer.evaluate()
        assert len(seen[0] if isinstance(seen[0], tuple) else (seen[0],)) == (1 if name == "gpt2" else 2)
        assert "output_hidden_states" not in model.config.to_diff_dict()

    def test_what_it_needs(self):
        with pytest.raises(ValueError, match="Linear has no output embedding to read hidden states at"):
            SimCTGComputeLoss(torch.nn.Linear(2, 2))
        model = tiny_model("t5")
        loss_function = SimCTGComputeLoss(model)
        batch = collate(dataset("t5"))
        labels = batch.pop("labels")
        with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
            model(**batch)
        with pytest.raises(RuntimeError, match="no hidden states reached the output embedding"):
            loss_function({"logits": torch.zeros(8, 40, 32)}, labels)
        outputs = model(**collate_for_compute_loss(dataset("t5")))
        with pytest.raises(ValueError, match=r"labels has shape \(8, 39\)"):
            loss_function(outputs, labels[:, 1:])
        model(**collate_for_compute_loss(dataset("t5")))
        with pytest.raises(ValueError, match="no labels"):
            loss_function(outputs, None)
        loss_function.remove()
        assert not model._forward_pre_hooks
        assert not model.get_output_embeddings()._forward_pre_hooks


def with_bart_inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    model = tiny_model("bart")
    return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
