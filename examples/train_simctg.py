"""A training script written for the published loss class. To change over, exchange the import:

    from simctg_fast import SimCTGLoss

Trains a small GPT-2 from scratch, on the bytes of a module of the standard library, and prints a line of JSON a step.

    python examples/train_simctg.py --steps 20
"""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap

import torch
from published_simctg_loss import SimCTGLoss
from transformers import GPT2Config, GPT2LMHeadModel

PAD = 0


def sequences() -> list[list[int]]:
    """The paragraphs of a source file as bytes, shifted by one to make room for padding; of very different lengths."""
    paragraphs = inspect.getsource(textwrap).split("\n\n")
    return [[byte + 1 for byte in text.encode()][:96] for text in paragraphs if len(text) > 8]


def batch_of(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--margin", type=float, default=0.5)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=96, n_embd=48, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    criterion = SimCTGLoss(margin=options.margin, vocab_size=config.vocab_size, pad_token_id=PAD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = sequences()

    for step in range(options.steps):
        start = step * options.batch_size % (len(rows) - options.batch_size)
        tokens = batch_of(rows[start : start + options.batch_size])
        input_ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[labels == PAD] = -100
        outputs = model(input_ids=input_ids, attention_mask=input_ids.ne(PAD).long(), output_hidden_states=True)
        mle_loss, cl_loss = criterion(outputs.hidden_states[-1], outputs.logits, input_ids, labels)
        loss = mle_loss + cl_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(json.dumps({"step": step + 1, "mle_loss": mle_loss.item(), "cl_loss": cl_loss.item()}))


if __name__ == "__main__":
    main()
