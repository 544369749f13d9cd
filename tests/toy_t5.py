"""A sentencepiece T5 that learns, in seconds, to write the words of a text in reverse order."""

from __future__ import annotations

import random
from pathlib import Path

import torch

WORDS = ["red", "blue", "green", "one", "two", "three", "four", "sun", "moon", "star", "tree", "house", "river"]
WORDS += ["stone", "bird"]


def text(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(2, 3)))


def answer(source: str) -> str:
    return " ".join(source.split()[::-1])


def held_out(count: int) -> list[str]:
    """Texts from another seed than the training's."""
    rng = random.Random(9)
    return [text(rng) for _ in range(count)]


def train_sentencepiece(folder: Path, lines: list[str], **options) -> Path:
    """``spiece.model`` with T5's special tokens."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines))
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, minloglevel=2, **options
    )
    corpus.unlink()
    return folder / "spiece.model"


def train(folder: Path, steps: int = 400) -> Path:
    """A folder as checkpoints come: config, weights and ``spiece.model``, no ``tokenizer.json``."""
    from transformers import T5Config, T5ForConditionalGeneration

    from simctg_fast.loading import load_tokenizer

    rng = random.Random(0)
    train_sentencepiece(folder, [text(rng) for _ in range(400)])
    config = T5Config(
        vocab_size=144,  # 37 pieces, the 100 sentinels that T5's tokenizer adds, and room, as real checkpoints have
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    config.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) <= config.vocab_size
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        sources = [text(rng) for _ in range(32)]
        inputs = tokenizer(sources, padding=True, return_tensors="pt")
        labels = tokenizer([answer(each) for each in sources], padding=True, return_tensors="pt").input_ids
        loss = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return folder
