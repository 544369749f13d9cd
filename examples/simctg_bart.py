"""BART learns to put a title over a text, with SimCTG; the run may be stopped anywhere and goes on from its checkpoint.

    python examples/simctg_bart.py --out run                  # a small BART, made here: minutes on a CPU
    python examples/simctg_bart.py --out run --stop-after 50  # as if killed there; the line above goes on
    python examples/simctg_bart.py --out run --model facebook/bart-base --data pairs.jsonl

The texts are docstrings of the standard library, a title is the first sentence. ROUGE-1 is the F1 of the words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from example_data import summaries, train_tokenizer

from simctg_fast import ContrastiveGenerator
from simctg_fast.integrations import SimCTGSeq2SeqTrainer
from simctg_fast.loading import load_model
from simctg_fast.training.data import Collator, Example, encode, read_examples


def make_model(name: str | None, texts: list[str]):
    from transformers import BartConfig, BartForConditionalGeneration

    if name is not None:
        return load_model(name, dtype=torch.float32)
    tokenizer = train_tokenizer(texts, 2000, pairs=True)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=192, decoder_ffn_dim=192, max_position_embeddings=160,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config), tokenizer


def rouge_1(written: str, truth: str) -> float:
    one, other = Counter(written.lower().split()), Counter(truth.lower().split())
    common = sum((one & other).values())
    return 2 * common / max(1, sum(one.values()) + sum(other.values()))


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished one is continued")
    parser.add_argument("--model", help="folder or hub name; without it a small BART is made here")
    parser.add_argument("--data", help=".jsonl of source and target")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--stop-after", type=int, help="leave after this step, without a word to the checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, help="3e-5 for a model that is named, else 1e-3")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    options = parser.parse_args()

    from transformers import Seq2SeqTrainingArguments, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    torch.manual_seed(0)
    if options.data is None:
        examples = [Example(title, body) for body, title in summaries()]
    else:
        examples = read_examples(options.data)
    held_out, examples = examples[::20], [each for number, each in enumerate(examples) if number % 20]
    model, tokenizer = make_model(options.model, [text for each in examples for text in (each.source, each.text)])
    rows = encode(examples, tokenizer, options.max_length, is_encoder_decoder=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == options.stop_after

    arguments = Seq2SeqTrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate or (3e-5 if options.model else 1e-3),
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_steps=options.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=options.cpu,
        seed=0,
    )
    trainer = SimCTGSeq2SeqTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        margin=options.margin,
        callbacks=[Stop()],
    )
    last = get_last_checkpoint(str(options.out)) if options.out.is_dir() else None
    if last is not None:
        print(json.dumps({"continued_from": Path(last).name}))
    trainer.train(resume_from_checkpoint=last)
    for entry in trainer.state.log_history:
        if "mle_loss" in entry:
            print(json.dumps({name: entry[name] for name in ("step", "mle_loss", "contrastive_loss", "isotropy")}))
    if trainer.state.global_step < options.steps:
        print(json.dumps({"stopped_at": trainer.state.global_step}))
        return
    generator = ContrastiveGenerator(model.eval(), tokenizer)
    sources = [each.source for each in held_out]
    written = [text.strip() for text in generator(sources, max_length=options.max_length, top_k=3, penalty_alpha=0.5)]
    rouge = sum(rouge_1(text, each.text) for text, each in zip(written, held_out, strict=True)) / len(held_out)
    print(json.dumps({"steps": trainer.state.global_step, "weights": fingerprint(model), "rouge_1": round(rouge, 4)}))
    print(json.dumps({"title": held_out[0].text, "written": written[0]}))
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
