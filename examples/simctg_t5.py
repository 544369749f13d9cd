"""T5 with SimCTG, through Lightning or through the Hugging Face Trainer, and the answers of the trained model.

    python examples/simctg_t5.py --through trainer            # learns to reverse words: a minute on a CPU
    python examples/simctg_t5.py --through lightning
    python examples/simctg_t5.py --model google-t5/t5-small --data pairs.jsonl --save tuned

Without ``--model`` a small T5 and its sentencepiece tokenizer are made here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from example_data import reversal, t5_tokenizer

from simctg_fast import ContrastiveGenerator
from simctg_fast.loading import load_model
from simctg_fast.training.data import Collator, Example, encode, read_examples


def make_model(name: str | None, folder: Path):
    from transformers import T5Config, T5ForConditionalGeneration

    if name is not None:
        return load_model(name, dtype=torch.float32)
    tokenizer = t5_tokenizer(folder)
    config = T5Config(
        vocab_size=144, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), tokenizer


def through_trainer(model, rows, collator, options, folder: Path) -> list[dict]:
    from transformers import Seq2SeqTrainingArguments

    from simctg_fast.integrations import SimCTGSeq2SeqTrainer

    arguments = Seq2SeqTrainingArguments(
        str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=options.cpu,
        seed=0,
    )
    trainer = SimCTGSeq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator, margin=options.margin)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "mle_loss" in entry]


def through_lightning(model, rows, collator, options, folder: Path) -> list[dict]:
    from torch.utils.data import DataLoader

    from simctg_fast.integrations.lightning import SimCTGModule

    try:
        from lightning.pytorch import Callback, Trainer, seed_everything
    except ImportError:
        from pytorch_lightning import Callback, Trainer, seed_everything

    class Log(Callback):
        def __init__(self):
            self.entries = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step % max(1, options.steps // 10) == 0:
                names = ("mle_loss", "contrastive_loss", "isotropy")
                values = {name: float(trainer.callback_metrics[f"train_{name}"]) for name in names}
                self.entries.append({"step": trainer.global_step} | values)

    seed_everything(0, verbose=False)
    log = Log()
    trainer = Trainer(
        max_steps=options.steps,
        accelerator="cpu" if options.cpu else "auto",
        devices=1,
        callbacks=[log],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(rows, batch_size=options.batch_size, shuffle=True, collate_fn=collator)
    module = SimCTGModule(
        model, margin=options.margin, learning_rate=options.learning_rate, warmup_steps=options.steps // 10
    )
    trainer.fit(module, loader)
    return log.entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--through", choices=("trainer", "lightning"), default="trainer")
    parser.add_argument("--model", help="folder or hub name; without it a small T5 is made here")
    parser.add_argument("--data", help=".jsonl of source and target; without it words and their reverse")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, help="3e-4 for a model that is named, else 3e-3")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    options.learning_rate = options.learning_rate or (3e-4 if options.model else 3e-3)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = make_model(options.model, folder / "made")
        if options.data is None:
            examples = [Example(target, source) for source, target in reversal(32 * 400, seed=0)]
            held_out = [Example(target, source) for source, target in reversal(100, seed=1)]
        else:
            examples = read_examples(options.data)
            held_out, examples = examples[:100], examples[100:] or examples
        rows = encode(examples, tokenizer, options.max_length, is_encoder_decoder=True)
        collator = Collator(tokenizer.pad_token_id)
        train = {"trainer": through_trainer, "lightning": through_lightning}[options.through]
        for entry in train(model, rows, collator, options, folder):
            print(json.dumps({name: entry[name] for name in ("step", "mle_loss", "contrastive_loss", "isotropy")}))
    model = model.eval()
    answers = ContrastiveGenerator(model, tokenizer)(
        [example.source for example in held_out], max_length=options.max_length, top_k=3, penalty_alpha=0.5
    )
    right = sum(answer == example.text for answer, example in zip(answers, held_out, strict=True))
    print(json.dumps({"through": options.through, "right": right, "of": len(held_out)}))
    print(json.dumps({"text": held_out[0].source, "answer": answers[0]}))
    if options.save is not None:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)


if __name__ == "__main__":
    main()
