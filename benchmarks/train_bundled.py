"""Train the bundled model from scratch: a small GPT-2 on Python's own documentation, on the CPU, from a fixed seed.

    python benchmarks/train_bundled.py        # writes simctg_fast/assets/bundled, some 15 minutes on 2 idle cores
    python benchmarks/train_bundled.py --steps 400 --out /some/folder

Likelihood plus the SimCTG contrastive loss. A checkpoint is written every few minutes; the same command with --resume
continues from it and ends with the same weights as an unbroken run, because the data and the dropout of a step depend
on the seed and the number of that step only.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bundled_card import Progress, write_card  # noqa: E402
from bundled_corpus import Corpus, build_corpus  # noqa: E402

from simctg_fast import contrastive_loss  # noqa: E402

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
END_OF_TEXT_ID, PADDING_ID = 0, 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. The card prints it."""

    steps: int = 1000
    batch_tokens: int = 4096
    length: int = 256
    context: int = 512
    long_share: float = 0.15  # of the steps, at the end, with sequences as long as the context
    vocab_size: int = 3072
    width: int = 192
    layers: int = 7
    heads: int = 6
    margin: float = 0.5
    contrastive_weight: float = 1.0
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    decay: float = 0.4  # of the steps, at the end, over which the learning rate falls to zero
    dropout: float = 0.1
    clip: float = 1.0
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text is encoded without an unknown token, and decoding gives it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],  # GPT-2 would add an embedding for token_type_ids
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """One stream of token ids, an end-of-text token after every document."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, END_OF_TEXT_ID]])


def build_model(recipe: Recipe, vocab_size: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        # GPT-2's own activation, computed by one fused function: training is a quarter faster.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
    )
    torch.manual_seed(recipe.seed)
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear to zero."""
    left = (recipe.steps - step) / max(1.0, recipe.decay * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


def sample_batch(stream: Tensor, step: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Windows at random places of the stream: tokens `(B, length + 1)` and positions `(B, length)`.

    Short windows start at a random position half of the time, so that every position of the context is trained
    throughout.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    long = step >= recipe.steps * (1 - recipe.long_share)
    length = recipe.context if long else recipe.length
    rows = max(1, recipe.batch_tokens // length)
    starts = torch.randint(0, len(stream) - length, (rows,), generator=generator)
    first = torch.randint(0, recipe.context - length + 1, (rows,), generator=generator)
    first = first * torch.randint(0, 2, (rows,), generator=generator)
    tokens = torch.stack([stream[start : start + length + 1] for start in starts])
    return tokens, first.unsqueeze(1) + torch.arange(length)


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, stream: Tensor, length: int) -> float:
    """Mean cross-entropy per token over consecutive windows of `length`, in nats."""
    model.eval()
    usable = (len(stream) - 1) // length * length
    inputs, labels = stream[:usable].view(-1, length), stream[1 : usable + 1].view(-1, length)
    total = 0.0
    for x, y in zip(inputs.split(16), labels.split(16), strict=True):
        total += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / usable


def train(
    model: GPT2LMHeadModel, stream: Tensor, held_out: Tensor, recipe: Recipe, options: argparse.Namespace
) -> Progress:
    """Runs the steps that are left and returns what the card reports."""
    optimizers = build_optimizers(model, recipe)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    progress = Progress()
    checkpoint = options.work / "checkpoint.pt"
    if options.resume and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizers, recipe)
        print(f"resumed at step {progress.step}")

    model.train()
    recent: list[tuple[float, float, int]] = []
    started = since = saved = time.perf_counter()
    seconds_before = progress.seconds
    last = recipe.steps if options.stop_after is None else min(recipe.steps, options.stop_after)
    for step in range(progress.step, last):
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout
        factor = learning_rate_factor(step, recipe)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        tokens, positions = sample_batch(stream, step, recipe)
        hidden = model.transformer(tokens[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
        likelihood = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        contrast = contrastive_loss(hidden, margin=recipe.margin)
        (likelihood + recipe.contrastive_weight * contrast).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        recent.append((likelihood.item(), contrast.item(), positions.numel()))
        progress.step = step + 1
        progress.tokens += positions.numel()
        progress.seconds = seconds_before + time.perf_counter() - started
        if progress.step % options.log_every == 0 or progress.step == recipe.steps:
            now = time.perf_counter()
            mle, contrastive = (sum(column) / len(recent) for column in list(zip(*recent, strict=True))[:2])
            rate = sum(count for *_, count in recent) / (now - since)
            left = (recipe.steps - progress.step) * (now - since) / len(recent)
            line = f"step {progress.step:5d}/{recipe.steps}  loss {mle:.3f} + {contrastive:.3f}"
            if progress.step % (5 * options.log_every) == 0 or progress.step == recipe.steps:
                progress.validation = validation_loss(model, held_out, recipe.length)
                model.train()
                line += f"  val {progress.validation:.3f}"
            print(f"{line}  {rate:,.0f} tokens/s  {left / 60:.0f} min left", flush=True)
            progress.likelihood, progress.contrastive = mle, contrastive
            recent, since = [], time.perf_counter()
        if time.perf_counter() - saved > options.checkpoint_minutes * 60 or progress.step == last:
            save_checkpoint(checkpoint, model, optimizers, progress, recipe)
            saved = time.perf_counter()
    return progress


def save_checkpoint(
    path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], progress: Progress, recipe: Recipe
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": asdict(recipe),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)  # a run that is stopped here leaves the previous checkpoint whole


def load_checkpoint(
    path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], recipe: Recipe
) -> Progress:
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise SystemExit(f"{path} was written with other settings: {state['recipe']}; drop --resume to start afresh")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def export(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> GPT2LMHeadModel:
    """Writes model and tokenizer, the weights in half precision; returns the model as a user will load it."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Half precision is for the disk: loading gives fp32. And the class by the name that every release knows.
    _edit_json(folder / "config.json", {"dtype": "float32"})
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for path in folder.iterdir():
        path.chmod(0o644)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def _edit_json(path: Path, changes: dict[str, str]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Recipe()
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens, help="tokens a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--contrastive-weight",
        type=float,
        default=defaults.contrastive_weight,
        help="0: likelihood alone (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "simctg_fast" / "assets" / "bundled", help="model folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bundled", help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop behind this step; --resume continues")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as torch chooses)")
    parser.add_argument("--log-every", type=int, default=20, help="steps between lines (%(default)s)")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--validation-tokens", type=int, help="validate on this many held-out tokens (all of them)")
    parser.add_argument("--sources", type=int, help="of the text, the first so many (all of them)")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts for the card's figures; 0: none")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = Recipe(
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
        contrastive_weight=options.contrastive_weight,
    )

    corpus: Corpus = build_corpus(options.sources)
    train_texts, held_out_texts = corpus.split()
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size, recipe.context)
    stream, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    held_out = held_out[: options.validation_tokens]
    model = build_model(recipe, len(tokenizer))
    print(
        f"{len(corpus.documents)} documents, {len(stream):,} tokens to train on, {len(held_out):,} held out; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {torch.get_num_threads()} threads"
    )
    progress = train(model, stream, held_out, recipe, options)
    if progress.step < recipe.steps:
        print(f"stopped behind step {progress.step}; --resume continues")
        return
    exported = export(model, tokenizer, options.out)
    progress.validation = validation_loss(exported, held_out, recipe.length)
    progress.validation_long = validation_loss(exported, held_out, recipe.context)
    facts = {
        "corpus": corpus.describe() | {"train_tokens": len(stream), "validation_tokens": len(held_out)},
        "recipe": asdict(recipe),
        "progress": asdict(progress),
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_card(options.out, exported, tokenizer, held_out, facts, options.prompts)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # for the whole process, so not in main(), which tests call
    main()
