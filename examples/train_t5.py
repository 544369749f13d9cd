"""A training script written for the T5 tutorial's class. To change over, exchange the import:

    from simctg_fast.integrations.lightning import T5FineTuner

Learns to answer a line of a module of the standard library with the next one, and prints a line of JSON a step.

    python examples/train_t5.py t5-small --steps 20
"""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap

import torch
from published_t5_finetuner import T5FineTuner
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

try:
    from lightning.pytorch import Callback, Trainer, seed_everything
except ImportError:
    from pytorch_lightning import Callback, Trainer, seed_everything


def examples(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    lines = [line.strip() for line in inspect.getsource(textwrap).splitlines() if line.strip()][: count + 1]
    encoded = tokenizer(lines, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    return [
        {"source_ids": ids[i], "source_mask": mask[i], "target_ids": ids[i + 1], "target_mask": mask[i + 1]}
        for i in range(count)
    ]


class PrintLoss(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        padding = int((batch["target_ids"] == -100).sum())
        print(json.dumps({"step": trainer.global_step, "loss": outputs["loss"].item(), "overwritten": padding}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    args = argparse.Namespace(
        model_name_or_path=options.model,
        tokenizer_name_or_path=options.model,
        learning_rate=3e-4,
        weight_decay=0.01,
        adam_epsilon=1e-8,
    )
    seed_everything(0)
    model = T5FineTuner(args)
    model.train()
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PrintLoss()],
    )
    trainer.fit(model, DataLoader(examples(options.model, 4 * 6), batch_size=4))


if __name__ == "__main__":
    main()
