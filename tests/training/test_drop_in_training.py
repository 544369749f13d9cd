"""Training scripts written for the published classes run with their import changed and give the same curve."""

from __future__ import annotations

import json
import pathlib
import runpy
import sys

import pytest
import torch

from ..repository import repository
from ..training_models import tiny_model

EXAMPLES = repository("examples")


def curve(script: pathlib.Path, arguments: list[str], monkeypatch, capsys) -> list[dict[str, float]]:
    """What the script prints, a line of JSON a step."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def exchange_import(name: str, old: str, new: str, folder: pathlib.Path) -> pathlib.Path:
    text = (EXAMPLES / name).read_text()
    assert text.count(old) == 1
    assert new in text, "the script's own help tells the line"
    path = folder / name
    path.write_text(text.replace(old, new))
    return path


def test_the_published_loss_class(tmp_path, monkeypatch, capsys):
    changed = exchange_import(
        "train_simctg.py",
        "from published_simctg_loss import SimCTGLoss",
        "from simctg_fast import SimCTGLoss",
        tmp_path,
    )
    arguments = ["--steps", "12"]
    published = curve(EXAMPLES / "train_simctg.py", arguments, monkeypatch, capsys)
    ours = curve(changed, arguments, monkeypatch, capsys)
    assert len(ours) == len(published) == 12
    for left, right in zip(ours, published, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    # It is a curve: both terms are there, and training changes them.
    assert ours[-1]["mle_loss"] < 0.9 * ours[0]["mle_loss"]
    assert max(line["cl_loss"] for line in ours) > 0.01


def test_the_t5_tutorial(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning", reason="Lightning is not installed (simctg_fast[lightning])")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet[:29])}, "<unk>": 31}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path / "t5"
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_model("t5", dtype=torch.float32).save_pretrained(folder)

    changed = exchange_import(
        "train_t5.py",
        "from published_t5_finetuner import T5FineTuner",
        "from simctg_fast.integrations.lightning import T5FineTuner",
        tmp_path,
    )
    arguments = [str(folder), "--steps", "8"]
    published = curve(EXAMPLES / "train_t5.py", arguments, monkeypatch, capsys)
    ours = curve(changed, arguments, monkeypatch, capsys)
    assert len(ours) == len(published) == 8
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in published], rel=1e-4)
    assert ours[-1]["loss"] < ours[0]["loss"]
    # The tutorial's writes -100 into the caller's batch, ours does not.
    assert any(line["overwritten"] > 0 for line in published)
    assert all(line["overwritten"] == 0 for line in ours)
