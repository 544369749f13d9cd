"""What a batch costs whose rows end at different lengths, beside what its rows would cost if they left at once.

    python benchmarks/ragged.py                      # 8 rows that end after 16 to 256 tokens, GPT-2-small shape
    python benchmarks/ragged.py --quick              # a tiny model: does it run at all?

c(n, t) is the time of the t-th new token in a batch of n rows that all go on; the cost to compare with is the sum of
c(n_t, t) over the tokens, n_t the rows that are still running. Runs of all sizes and of the ragged batch take turns in
one process; times are minima. The tokens of every row are compared with those of the batch that goes on to the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import processor
from decode import make_model

from simctg_fast import ContrastiveSearch

GOAL = 1.15


class Ends(StoppingCriteria):
    """Ends row i after ``lengths[i]`` new tokens, and notes the time of every token."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.prompt, self.times = torch.tensor(lengths), 0, [time.perf_counter()]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return input_ids.shape[1] - self.prompt >= self.lengths

    def milliseconds(self) -> torch.Tensor:
        return torch.tensor(self.times, dtype=torch.float64).diff() * 1e3


def run(model, ids: torch.Tensor, lengths: list[int], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the time of each; the first one's has the prompt in it."""
    ends = Ends(lengths)
    ends.prompt = ids.shape[1]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=ContrastiveSearch(0.6, top_k),
        stopping_criteria=[ends],
        max_new_tokens=max(lengths),
        eos_token_id=model.config.vocab_size - 1,
        suppress_tokens=[model.config.vocab_size - 1],
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :], ends.milliseconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16,32,64,96,128,160,192,256")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lengths = [int(x) // (8 if options.quick else 1) for x in options.lengths.split(",")]
    model = make_model("tiny" if options.quick else "gpt2-small")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (len(lengths), options.prompt), generator=generator)
    sizes = sorted({sum(length > token for length in lengths) for token in range(max(lengths))})
    best: dict[int, torch.Tensor] = {}
    ragged = None
    for _ in range(options.repeats):
        for size in sizes:
            whole, times = run(model, ids[:size], [max(lengths)] * size, options.top_k)
            best[size] = torch.minimum(times, best.get(size, times))
        ours, times = run(model, ids, lengths, options.top_k)
        ragged = times if ragged is None else torch.minimum(times, ragged)
    for row, length in enumerate(lengths):  # `whole` is of all rows: the largest size comes last
        if not torch.equal(ours[row, :length], whole[row, :length]) or bool(ours[row, length:].any()):
            sys.exit(f"row {row} has other tokens than in the batch that goes on: no figure")
    running = [sum(length > token for length in lengths) for token in range(1, max(lengths))]
    floor = sum(best[n][token + 1].item() for token, n in enumerate(running))
    taken, kept = ragged[1:].sum().item(), best[len(lengths)][1:].sum().item()
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, lengths {lengths}")
    print(f"ragged batch {taken:.0f} ms, sum of c(n_t, t) {floor:.0f} ms: {taken / floor:.3f} (goal {GOAL})")
    print(f"the same batch with all rows to the end {kept:.0f} ms: {taken / kept:.3f} of it")


if __name__ == "__main__":
    main()
