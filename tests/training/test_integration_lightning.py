"""The Lightning module: values, what it leaves alone, training of all three architectures, checkpoints."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("lightning", reason="Lightning is not installed (simctg_fast[lightning])")

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from simctg_fast.integrations.lightning import SimCTGModule, T5FineTuner, simctg_step
from simctg_fast.metrics import isotropy
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference_loss

from ..training_models import ARCHITECTURES, PAD, collate, dataset, tiny_model


def tutorial_batch(name: str = "t5") -> dict[str, torch.Tensor]:
    """Targets padded with the pad token and a mask, as the tutorial's data set has them."""
    batch = collate(dataset(name))
    real = batch["labels"].ne(-100)
    return {
        "source_ids": batch["input_ids"],
        "source_mask": batch["attention_mask"],
        "target_ids": batch["labels"].masked_fill(~real, PAD),
        "target_mask": real.long(),
    }


def trainer(steps: int = 4, **settings) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", **{**quiet, **settings})


class TestStep:
    @pytest.mark.parametrize("reduction", ["pairs", "paper", "dense"])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_value(self, name, reduction):
        model, batch = tiny_model(name), collate(dataset(name))
        losses = simctg_step(model, batch, margin=0.9, reduction=reduction, contrastive_weight=0.7)
        outputs = model(**batch, output_hidden_states=True)
        states = (outputs.hidden_states if name == "gpt2" else outputs.decoder_hidden_states)[-1]
        mask = batch["labels"].ne(-100)
        contrastive = reference_loss(states, None if reduction == "dense" else mask, 0.9, reduction)
        torch.testing.assert_close(losses.mle_loss, outputs.loss.detach())
        torch.testing.assert_close(losses.contrastive_loss, contrastive.detach())
        torch.testing.assert_close(losses.loss, outputs.loss + 0.7 * contrastive)
        assert float(losses.isotropy) == pytest.approx(isotropy(states, mask), rel=1e-5)

    def test_the_tutorials_batch_is_the_same_batch_and_stays_as_it_is(self):
        model, batch = tiny_model("t5"), tutorial_batch()
        before = {name: tensor.clone() for name, tensor in batch.items()}
        losses = simctg_step(model, batch)
        expected = simctg_step(model, collate(dataset("t5")))
        torch.testing.assert_close(losses, expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in batch.items())
        assert batch["target_ids"].eq(PAD).any(), "there is padding that could have been overwritten"

    def test_a_decoder_learns_its_input(self):
        model, batch = tiny_model("gpt2"), collate(dataset("gpt2"))
        expected = simctg_step(model, batch)
        del batch["labels"]
        torch.testing.assert_close(simctg_step(model, batch), expected)

    def test_an_encoder_decoder_needs_labels(self):
        with pytest.raises(ValueError, match=r"must have labels \(or target_ids\), got input_ids"):
            simctg_step(tiny_model("t5"), {"input_ids": torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fit(name, tmp_path):
    module = SimCTGModule(
        tiny_model(name, dtype=torch.float32), margin=0.9, learning_rate=3e-3, weight_decay=0.01, warmup_steps=2
    )
    loader = DataLoader(dataset(name), batch_size=4, collate_fn=collate)
    first = module.losses(collate(dataset(name)))
    fit = trainer(12, val_check_interval=2, num_sanity_val_steps=0)
    fit.fit(module, loader, loader)
    logged = {key: float(value) for key, value in fit.callback_metrics.items()}
    for stage in ("train", "val"):
        terms = [f"{stage}_{name}" for name in ("loss", "mle_loss", "contrastive_loss", "isotropy")]
        assert logged.keys() >= set(terms)
        assert logged[terms[0]] == pytest.approx(logged[terms[1]] + logged[terms[2]], rel=1e-5)
    last = module.losses(collate(dataset(name)))
    assert last.loss < first.loss
    optimizer = fit.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9), "it has fallen to zero by the last step"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])


def test_a_checkpoint_is_loaded_again(tmp_path):
    module = SimCTGModule(tiny_model("gpt2", dtype=torch.float32), margin=0.9, reduction="paper")
    fit = trainer(1)
    fit.fit(module, DataLoader(dataset("gpt2"), batch_size=4, collate_fn=collate))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = SimCTGModule.load_from_checkpoint(
        tmp_path / "last.ckpt", model=tiny_model("gpt2", dtype=torch.float32), weights_only=True
    )
    assert (again.hparams["margin"], again.hparams["reduction"]) == (0.9, "paper")
    batch = collate(dataset("gpt2"))
    torch.testing.assert_close(again.losses(batch).loss, module.losses(batch).loss)


def test_the_tutorials_module_is_loaded_again(tmp_path):
    module = T5FineTuner(argparse.Namespace(model_name_or_path="bundled", learning_rate=1e-3, train_batch_size=8))
    assert module.hparams["train_batch_size"] == 8
    assert (module.hparams["reduction"], module.hparams["learning_rate"]) == ("dense", 1e-3)
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    fit = trainer(1)
    fit.fit(module, DataLoader([batch], batch_size=None))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = T5FineTuner.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.hparams["train_batch_size"] == 8
    assert torch.equal(again.model.transformer.wte.weight, module.model.transformer.wte.weight)


def test_settings():
    with pytest.raises(ValueError, match=r"margin is 1\.1, must lie in"):
        SimCTGModule(tiny_model("gpt2"), margin=1.1)
    with pytest.raises(ValueError, match="hparams must have model_name_or_path, got learning_rate"):
        T5FineTuner(argparse.Namespace(learning_rate=1.0))
    module = SimCTGModule("bundled")
    assert module.model.training
    assert module.model.config.model_type == "gpt2"
