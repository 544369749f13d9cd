"""A sentence classifier on features: extracted once, then a linear layer learns on them in a second.

    python examples/simcse_encoder.py --mode supervised --save embedder
    python examples/classify_features.py --model embedder
    python examples/classify_features.py --model distilbert-base-uncased --pooling mean

The classes are ten places, each named by either of two words; in training only the first words occur, in the test both,
so that an encoder is needed that knows of likeness. ``--pooling`` and ``--layer`` are those of ``extract_features``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from example_data import SLOTS, labelled_sentences

from simctg_fast import extract_features
from simctg_fast.text.features import load_backbone


def train_head(values: torch.Tensor, labels: torch.Tensor, classes: int, steps: int) -> torch.nn.Module:
    """Multinomial logistic regression with a little weight decay, on standardised features."""
    head = torch.nn.Sequential(
        torch.nn.BatchNorm1d(values.shape[-1], affine=False), torch.nn.Linear(values.shape[-1], classes)
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-1)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(head(values), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--pooling", choices=("mean", "cls", "last"), default="mean")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--sentences", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_backbone(options.model, dtype=torch.float32)
    synonyms = {second for _, second in SLOTS[2]}
    train, test = labelled_sentences(2 * options.sentences, 0), labelled_sentences(options.sentences, 1)
    train = [row for row in train if not synonyms & set(row[0].split())]

    def features(rows):
        found = extract_features(model, tokenizer, [text for text, _ in rows], options.layer, options.pooling)
        return found.values, torch.tensor([label for _, label in rows])

    values, labels = features(train)
    head = train_head(values, labels, len(SLOTS[2]), options.steps)
    values, labels = features(test)
    with torch.no_grad():
        right = head(values).argmax(-1) == labels
    unseen = torch.tensor([bool(synonyms & set(text.split())) for text, _ in test])
    print(
        json.dumps(
            {
                "model": options.model,
                "train": len(train),
                "accuracy_known_words": round(float(right[~unseen].float().mean()), 4),
                "accuracy_unseen_words": round(float(right[unseen].float().mean()), 4),
                "chance": round(1 / len(SLOTS[2]), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
