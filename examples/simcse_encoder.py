"""SimCSE: an encoder learns sentence embeddings, without labels (dropout makes the pairs) or from triples.

    python examples/simcse_encoder.py --mode unsupervised      # a small BERT, made here: a minute on a CPU
    python examples/simcse_encoder.py --mode supervised
    python examples/simcse_encoder.py --model distilbert-base-uncased --steps 500 --save embedder

Prints, before and after: alignment (mean squared distance of sentences of one meaning), the same as a share of the mean
squared distance of any two, uniformity (log of the mean Gaussian potential of all pairs), all better when smaller, and
Spearman's rank correlation of cosines with the known likeness of sentence pairs. An untrained encoder puts all
sentences into one place, which makes its alignment small and means nothing: the share tells.
(Wang and Isola 2020; Gao et al. 2021, section 3.)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from example_data import graded_pairs, train_tokenizer, triples

from simctg_fast import SimCSELoss, extract_features


def make_model(name: str | None, texts: list[str], size: str):
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    if name is not None:
        return AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = train_tokenizer(texts, 600)
    sizes = {
        "small": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
        "distilbert": {"num_hidden_layers": 6},
        "bert": {},
    }
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes[size])
    return BertModel(config), tokenizer


def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    return F.normalize(extract_features(model, tokenizer, texts, pooling="mean").values, dim=-1)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[inverse]


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]).double())[0, 1])


def measure(model, tokenizer, pairs: list[tuple[str, str, int]]) -> dict[str, float]:
    one, other = (embed(model, tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    likeness = torch.tensor([pair[2] for pair in pairs])
    same = likeness == 4
    distances = torch.pdist(torch.cat([one, other])).square()
    alignment = float((one - other)[same].square().sum(-1).mean())
    return {
        "alignment": alignment,
        "alignment_share": alignment / float(distances.mean()),
        "uniformity": float(distances.mul(-2).exp().mean().log()),
        "spearman": spearman((one * other).sum(-1), likeness),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("unsupervised", "supervised"), default="unsupervised")
    parser.add_argument("--model", help="folder or hub name; without it a BERT is made here")
    parser.add_argument("--size", choices=("small", "distilbert", "bert"), default="small", help="of the one made here")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--save", type=Path, help="folder for the encoder")
    options = parser.parse_args()

    torch.manual_seed(0)
    data, pairs = triples(20 * options.batch_size, 0), graded_pairs(500, 1)
    model, tokenizer = make_model(options.model, [text for row in data for text in row], options.size)
    before, start = measure(model, tokenizer, pairs), time.perf_counter()
    supervised = options.mode == "supervised"
    criterion = SimCSELoss(options.temperature, supervised=supervised)
    rate = options.learning_rate or (3e-5 if options.model else 5e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(options.steps):
        first = step * options.batch_size % len(data)
        rows = data[first : first + options.batch_size]
        # Rows 2i and 2i+1 are two views of sentence i; of a triple anchor, positive, hard negative follow one another.
        texts = [text for row in rows for text in (row if supervised else (row[0], row[0]))]
        inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        loss = criterion((states * mask).sum(1) / mask.sum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = measure(model, tokenizer, pairs)
    seconds = round(time.perf_counter() - start, 1)
    if options.save is not None:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
    print(json.dumps({"mode": options.mode, "steps": options.steps, "seconds": seconds, "loss": loss.item()}))
    for name, value in before.items():
        print(json.dumps({"measure": name, "before": round(value, 4), "after": round(after[name], 4)}))


if __name__ == "__main__":
    main()
