"""Speed of the habits: the loop over plain models, texts in and texts out, the trial before a first call, and DRY.

    python benchmarks/habits.py loop      # generate(step, ...) against the bare calls it makes, GPT-2-small shape
    python benchmarks/habits.py text      # ContrastiveGenerator against the tutorial's class and 4.55.4's search
    python benchmarks/habits.py trial     # what the first call on a model costs more than the second, GPT-2-small shape
    python benchmarks/habits.py dry       # DRY's share of a step behind 4,096 tokens, GPT-2-small shape
    python benchmarks/habits.py text --threads 1 --clock cpu    # where others use the machine too: processor time

``loop`` compares `simctg_fast.generate` with a loop that calls the same model and the same processors and does nothing
else: what is on top is the library's. ``text`` is a T5-small shape, 16 texts, 64 new tokens, k = 3, random weights;
each provider has a worker process, rounds go through all in turn, the minimum counts; our texts are compared with those
of 4.55.4 first. ``dry`` clocks the processor within each step, so that both see the same moment of the machine, after
comparing its scores with the definition.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, Row, Worker, append_csv, interleaved, processor, quantiles

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROVIDERS = ("ours", "tutorial's class", "4.55.4 contrastive")


# ---- the loop over a plain model -------------------------------------------------------------------------------------


def loop(options: argparse.Namespace) -> list[Row]:
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    from simctg_fast import generate
    from simctg_fast.decoding.caches import CACHE_NAME

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {} if options.model == "small" else {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500}
    config = GPT2Config(initializer_range=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    model = GPT2LMHeadModel(config).eval()
    prompt, count = 32, options.new_tokens

    def step(ids, state):
        output = model(ids, **{CACHE_NAME: DynamicCache() if state is None else state})
        return output.logits, output[CACHE_NAME]

    settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    settings |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    rows = []
    for batch in (1, 4):
        ids = torch.randint(1, config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))

        def timed(function, clock=CLOCKS[options.clock]):
            def run() -> float:
                torch.manual_seed(0)
                start = clock()
                function()
                return clock() - start

            return run

        @torch.no_grad()
        def bare(ids=ids):
            from transformers.generation import logits_process as p

            processors = p.LogitsProcessorList(
                [
                    p.RepetitionPenaltyLogitsProcessor(1.2),
                    p.NoRepeatNGramLogitsProcessor(3),
                    p.TemperatureLogitsWarper(0.8),
                    p.TopKLogitsWarper(50),
                    p.TopPLogitsWarper(0.9),
                ]
            )
            logits, state = step(ids, None)
            for number in range(count):
                scores = processors(ids, logits[:, -1].float())
                token = torch.multinomial(scores.softmax(dim=-1), 1)
                ids = torch.cat([ids, token], dim=1)
                if number < count - 1:
                    logits, state = step(token, state)
            return ids

        def ours(ids=ids):
            return generate(step, ids, max_new_tokens=count, eos_token_id=config.vocab_size - 1, **settings)

        def theirs(ids=ids):
            options = settings | {"eos_token_id": config.vocab_size - 1, "pad_token_id": 0}
            return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)

        variants = {"bare": bare, "simctg_fast.generate": ours, "model.generate": theirs}
        found = {}
        for name, function in variants.items():
            torch.manual_seed(0)
            found[name] = function()
        width = min(each.shape[1] for each in found.values())
        if any(not torch.equal(each[:, :width], found["bare"][:, :width]) for each in found.values()):
            print(f"batch {batch}: NOT REPORTED: the variants wrote different tokens")
            continue
        seconds = interleaved({name: timed(function) for name, function in variants.items()}, options.repeats)
        best = {name: min(values) * 1e3 / count for name, values in seconds.items()}
        print(f"\nplain loop, batch {batch}, prompt {prompt}, {count} new tokens")
        for name, milliseconds in best.items():
            # The share of rounds' pairs, which the machine's moods reach alike.
            pairs = sorted(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
            paired = pairs[len(pairs) // 2]
            share = f"{milliseconds / best['bare']:.3f} of bare ({paired:.3f} paired)"
            print(f"  {name:24}{milliseconds:9.3f} ms/token  {share}")
            values = [value * 1e3 / count for value in seconds[name]]
            rows.append(_row("plain_loop", name, "batch", str(batch), values, options, "ms_per_token"))
    return rows


# ---- the trial before a first call -----------------------------------------------------------------------------------


def trial(options: argparse.Namespace) -> list[Row]:
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from simctg_fast import ContrastiveSearch
    from simctg_fast.decoding.report import _known

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {} if options.model == "small" else {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500}
    config = GPT2Config(initializer_range=0.1, bos_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    model = GPT2LMHeadModel(config).eval()
    clock, rows = CLOCKS[options.clock], []
    for batch, length in ((1, 32), (1, 512), (8, 256)):
        ids = torch.randint(1, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))

        def timed(known: bool, ids=ids) -> float:
            if not known:
                _known.clear()  # as if nothing had been tried yet
            start = clock()
            model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=options.new_tokens)
            return clock() - start

        seconds = interleaved(
            {"first call": lambda: timed(False), "known": lambda: timed(True)},
            options.repeats,
        )
        first, known = min(seconds["first call"]), min(seconds["known"])
        print(f"\ntrial, batch {batch}, prompt {length}, {options.new_tokens} new tokens")
        print(f"  first call {first:.3f} s, known {known:.3f} s: {first - known:.3f} s, {(first - known) / known:.1%}")
        for name, values in seconds.items():
            rows.append(_row("trial", name, "batch x prompt", f"{batch}x{length}", values, options, "seconds"))
    return rows


# ---- DRY within a step -----------------------------------------------------------------------------------------------


def dry(options: argparse.Namespace) -> list[Row]:
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from simctg_fast import ContrastiveSearch, DRYLogitsProcessor
    from simctg_fast.reference.dry import dry_penalties

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    length = 4096 if options.model == "small" else 256
    sizes = {} if options.model == "small" else {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500}
    sizes |= {"n_positions": length + options.new_tokens}
    config = GPT2Config(initializer_range=0.1, bos_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    model = GPT2LMHeadModel(config).eval()
    breakers = list(range(1, 40))  # so that repetitions are cut, too
    clock, processor_, rows = CLOCKS[options.clock], DRYLogitsProcessor(sequence_breakers=breakers), []
    ids = torch.randint(1, 400, (1, length), generator=torch.Generator().manual_seed(1))
    ids[0, length // 2 :] = ids[0, : length - length // 2]  # and it repeats itself

    class Clocked:
        """The processor, and when each of its calls began and ended."""

        def __init__(self):
            self.began, self.ended = [], []

        def __call__(self, input_ids, scores):
            self.began.append(clock())
            result = processor_(input_ids, scores)
            self.ended.append(clock())
            self.last = input_ids, scores, result
            return result

    for name, search in {
        "contrastive search, k 4": {"custom_generate": ContrastiveSearch(0.6, 4)},
        "greedy search of transformers": {"do_sample": False},
    }.items():
        shares, costs = [], []
        for _ in range(options.repeats):
            clocked = Clocked()
            mask = torch.ones_like(ids)
            model.generate(
                ids, attention_mask=mask, max_new_tokens=options.new_tokens, logits_processor=[clocked], **search
            )
            spent = [end - begin for begin, end in zip(clocked.began, clocked.ended, strict=True)]
            steps = [after - begin for begin, after in itertools.pairwise(clocked.began)]
            shares += [one / step for one, step in zip(spent, steps, strict=False)]
            costs += [one * 1e3 for one in spent]
        tokens, scores, result = clocked.last
        expected = scores.clone()
        for token, penalty in dry_penalties(tokens[0].tolist(), breakers=set(breakers)).items():
            expected[0, token] -= penalty
        if not torch.allclose(result, expected, rtol=1e-5, atol=1e-4):
            print(f"{name}: NOT REPORTED: the scores are not those of the definition")
            continue
        _, share, _ = quantiles(shares)
        _, cost, _ = quantiles(costs)
        print(f"\nDRY behind {length} tokens, {name}: {share:.2%} of a step, {cost:.3f} ms")
        rows.append(_row("dry", name, "tokens", str(length), shares, options, "share_of_step"))
    return rows


# ---- texts in, texts out: a worker in either environment -------------------------------------------------------------


def make_folder(folder: Path, size: str) -> None:
    """A T5 of random weights with a sentencepiece tokenizer, as both environments can read it."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    sys.path.insert(0, str(ROOT / "examples"))
    from example_data import prose

    lines = prose()
    (folder / "texts.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"), model_prefix=str(folder / "spiece"), vocab_size=4000, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
    if size == "tiny":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 4200}
    torch.manual_seed(0)
    # No end of sequence: every provider writes the same number of tokens.
    # Tied, as T5-small is: transformers 4 and 5 read an untied head's scale from the configuration differently.
    config = T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.shared.weight.normal_(std=3.0)
        # Ids that the tokenizer does not have must not be written: of some thousand random logits the best are above 0.
        pieces = len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")))
        model.shared.weight[pieces:] = 0.0
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def worker(folder: Path, threads: int) -> None:
    """Reads one JSON request a line, answers one JSON line."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    lines = (folder / "texts.txt").read_text().splitlines()
    texts = [line.lower() for line in lines if 90 < len(line) < 130][:16]
    if transformers.__version__.startswith("4."):
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder, legacy=True)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    print(json.dumps({"ready": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        count = request["new_tokens"]
        run = _provider(request["provider"], model, tokenizer, count)
        with torch.inference_mode():
            clock = CLOCKS[request["clock"]]
            start = clock()
            answers = run(texts)
            seconds = clock() - start
        inputs = tokenizer(texts)["input_ids"]
        print(json.dumps({"seconds": seconds, "texts": answers, "inputs": inputs}), flush=True)


def _provider(name: str, model, tokenizer, count: int):
    if name == "4.55.4 contrastive":

        def run(texts):
            encoded = tokenizer(texts, padding=True, return_tensors="pt")
            arguments = {"penalty_alpha": 0.5, "top_k": 3, "max_new_tokens": count, "do_sample": False}
            out = model.generate(**encoded, **arguments)
            return tokenizer.batch_decode(out, skip_special_tokens=True)

        return run
    if name == "tutorial's class":
        from simctg_fast.reference.t5_tutorial import TutorialT5Generate

        generator = TutorialT5Generate(model, tokenizer, max_length=count, num_beams=3, simctg_alpha=0.5)

        def run_tutorial(texts):
            generator.max_length = 512
            encoded = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
            generator.max_length = count
            tokens = generator.tokens(encoded["input_ids"], encoded["attention_mask"])
            return tokenizer.batch_decode(tokens, skip_special_tokens=True)

        return run_tutorial
    from simctg_fast import ContrastiveGenerator

    generator = ContrastiveGenerator(model, tokenizer)
    return lambda texts: generator(texts, max_length=count, top_k=3, penalty_alpha=0.5)


def text(options: argparse.Namespace) -> list[Row]:
    sys.path.insert(0, str(ROOT))
    from parity_zoo.environment import oracle_python

    oracle = None if options.no_oracle else oracle_python()
    providers = [name for name in PROVIDERS if oracle or name != "4.55.4 contrastive"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, options.model)
        workers = {
            name: Worker(
                oracle if name == "4.55.4 contrastive" else sys.executable,
                __file__,
                "worker",
                "--folder",
                folder,
                "--threads",
                options.threads,
                threads=options.threads,
            )
            for name in providers
        }
        try:
            request = {"new_tokens": options.new_tokens, "clock": options.clock}
            first = {name: each.ask(provider=name, **request) for name, each in workers.items()}
            if oracle:
                ours, theirs = first["ours"], first["4.55.4 contrastive"]
                if ours["inputs"] != theirs["inputs"]:
                    print("NOT REPORTED: the tokenizers of the two environments differ")
                    return []
                # The two environments' tokenizers put blanks around some pieces differently.
                pairs = [[text.replace(" ", "") for text in found["texts"]] for found in (ours, theirs)]
                if different := [row for row, (one, other) in enumerate(zip(*pairs, strict=True)) if one != other]:
                    print(f"NOT REPORTED: our texts and those of 4.55.4 differ in rows {different}")
                    return []
            seconds = interleaved(
                {
                    name: lambda name=name, each=each: each.ask(provider=name, **request)["seconds"]
                    for name, each in workers.items()
                },
                options.repeats,
            )
        finally:
            for each in workers.values():
                each.close()
    best = {name: min(values) for name, values in seconds.items()}
    print(f"\ntexts in, texts out: T5-small shape, 16 texts, {options.new_tokens} new tokens, k = 3")
    for name, value in best.items():
        print(f"  {name:24}{value:9.3f} s   {value / best['ours']:.2f} times ours")
        rows.append(_row("text_to_text", name, "texts", "16", seconds[name], options, "seconds"))
    return rows


def _row(kernel: str, provider: str, x_name: str, x_value: str, values: list[float], options, metric: str) -> Row:
    p20, p50, p80 = quantiles(values)
    config = json.dumps(
        {name: getattr(options, name) for name in ("model", "new_tokens", "threads", "repeats", "clock")}
    )
    import torch

    version = json.dumps({"torch": torch.__version__})
    return Row(kernel, provider, "decode", metric, x_name, x_value, p20, p50, p80, config, processor(), version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("loop", "text", "trial", "dry", "worker"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--model", choices=("small", "tiny"), default="small")
    parser.add_argument("--no-oracle", action="store_true", help="leave transformers 4.55.4 out")
    parser.add_argument("--csv", type=Path, default=RESULTS / "habits.csv")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "worker":
        worker(options.folder, options.threads)
        return
    print(f"{processor()}, {options.threads} threads, {options.clock} clock, float32")
    append_csv(options.csv, {"loop": loop, "text": text, "trial": trial, "dry": dry}[options.part](options))


if __name__ == "__main__":
    main()
