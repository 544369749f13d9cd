"""GPT-2 fine-tuned with SimCTG through the Hugging Face Trainer, and what contrastive search writes before and after.

    python examples/simctg_gpt2.py                            # the bundled model: a few minutes on a CPU
    python examples/simctg_gpt2.py --model gpt2 --dataset Salesforce/wikitext --config wikitext-2-raw-v1

Isotropy is 1 - the mean cosine of hidden states, diversity the share of n-grams that do not repeat.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from example_data import hub_texts, prose

from simctg_fast import ContrastiveGenerator, extract_features
from simctg_fast.integrations import SimCTGTrainer
from simctg_fast.loading import load_model
from simctg_fast.metrics import diversity, isotropy
from simctg_fast.training.data import Collator, Example, encode

PROMPTS = ["The return value of the function is", "Raised when", "This method is called"]


def describe(model, tokenizer, texts: list[str], new_tokens: int) -> dict:
    states, mask = extract_features(model, tokenizer, texts, max_length=64).padded()
    generator = ContrastiveGenerator(model.eval(), tokenizer)
    written = generator(PROMPTS, max_length=new_tokens, top_k=4, penalty_alpha=0.6)
    tokens = [tokenizer(text)["input_ids"] for text in written]
    return {
        "isotropy": round(isotropy(states, mask), 4),
        "diversity": round(sum(map(diversity, tokens)) / len(tokens), 4),
        "written": PROMPTS[0] + written[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="`bundled`, a folder or a hub name")
    parser.add_argument("--dataset", help="of the hub; without it the documentation of Python's standard library")
    parser.add_argument("--config", help="of the data set")
    parser.add_argument("--column", default="text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()

    from transformers import TrainingArguments

    torch.manual_seed(0)
    model, tokenizer = load_model(options.model, dtype=torch.float32)
    if options.dataset is None:
        texts = prose()
    else:
        texts = hub_texts(options.dataset, options.config, "train", options.column)
    held_out, texts = texts[:: len(texts) // 40][:40], [text for i, text in enumerate(texts) if i % (len(texts) // 40)]
    rows = encode([Example(text) for text in texts], tokenizer, options.max_length, is_encoder_decoder=False)
    before = describe(model, tokenizer, held_out, options.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=0,
        )
        collator = Collator(tokenizer.pad_token_id)
        trainer = SimCTGTrainer(model, arguments, train_dataset=rows, data_collator=collator, margin=options.margin)
        trainer.train()
    names = ("step", "loss", "mle_loss", "contrastive_loss", "isotropy")
    for entry in trainer.state.log_history:
        if "mle_loss" in entry:
            print(json.dumps({name: entry[name] for name in names if name in entry}))
    after = describe(model, tokenizer, held_out, options.new_tokens)
    for name, value in before.items():
        print(json.dumps({"measure": name, "before": value, "after": after[name]}))
    if options.save is not None:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)


if __name__ == "__main__":
    main()
