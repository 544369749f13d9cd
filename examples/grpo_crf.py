"""GRPO on a captioner's head: a tiny network writes a caption in one step, the CRF samples eight, a reward ranks them.

    python examples/grpo_crf.py           # a minute or two on a CPU; draws the curves as a picture

The "image" is a set of objects. The network reads it and emits scores for all positions at once (no autoregression);
the low-rank CRF on top decides which words go together. First it learns from poor captions, which name some objects
that are not there. Then GRPO improves a metric that has no gradient: F1 of the objects named, less what is said twice,
and a tenth for articles and objects that take turns.

What the library does here: training by negative log-likelihood; exact samples with the log-probabilities of the law
they came from; log-probabilities of the same paths under the moving weights, on the beams of the rollout, so that the
clipped ratio is a ratio of two laws on one set of paths; the exact divergence from the supervised policy, over all
32 ** 12 paths, in place of an estimate from samples; the greedy caption by Viterbi.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simctg_fast import LowRankCRF

ARTICLES, OBJECTS, LENGTH = 4, 60, 12
VOCABULARY = ARTICLES + OBJECTS
NAMED = LENGTH // 2
BEST = 1.1  # reward of a perfect caption
PICTURE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "crf_grpo.png"


class Captioner(nn.Module):
    """All positions at once from the set of objects: `(B, OBJECTS)` to `(B, LENGTH, VOCABULARY)`."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(OBJECTS, width), nn.GELU(), nn.Linear(width, LENGTH * width), nn.GELU())
        self.head = nn.Linear(width, VOCABULARY)
        self.crf = LowRankCRF(VOCABULARY, low_rank=16, beam_size=32)
        for table in (self.crf.E1, self.crf.E2):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image).view(len(image), LENGTH, -1))


def images(batch: int, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(batch, OBJECTS, generator=generator).topk(NAMED, 1).indices
    return torch.zeros(batch, OBJECTS).scatter_(1, chosen, 1.0)


def poor_captions(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`(B, LENGTH)`: article, object, article, …; about half of the objects are in the image."""
    batch = len(image)
    present = image.topk(NAMED, 1).indices.sort(1).values
    anything = torch.randint(OBJECTS, (batch, NAMED), generator=generator)
    objects = torch.where(torch.rand(batch, NAMED, generator=generator) < 0.5, present, anything)
    articles = torch.randint(ARTICLES, (batch, NAMED), generator=generator)
    return torch.stack([articles, objects + ARTICLES], 2).view(batch, LENGTH)


def reward(tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`(B, N)` for captions `(B, T, N)`: F1 of the objects, and a tenth of the share of positions of the right kind."""
    objects = (tokens - ARTICLES).clamp(min=0)
    is_object = tokens >= ARTICLES
    batch, _, count = tokens.shape
    named = torch.zeros(batch, OBJECTS, count).scatter_add_(1, objects, is_object.float())
    right = ((named > 0) * image[:, :, None]).sum(1)
    f1 = 2 * right / (named.sum(1) + NAMED)
    wanted = (torch.arange(LENGTH) % 2 == 1)[None, :, None]
    return f1 + (BEST - 1) * (is_object == wanted).float().mean(1)


def grpo_loss(model, reference, image, rollout, advantages, clip: float, kl_weight: float):
    """Clipped surrogate per token plus the exact divergence from `reference`; and that divergence, `(B,)`."""
    emissions = model(image)
    now = model.crf.log_prob(emissions, rollout.tokens, beam_tokens=rollout.beam_tokens, slots=rollout.slots)
    ratio = (now.token_log_probs - rollout.token_log_probs.detach()).exp()
    weight = advantages[:, None]
    surrogate = torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight).mean()
    with torch.no_grad():
        expected = reference(image)
    kl = model.crf.kl(reference.crf, emissions, expected, beam_tokens=rollout.beam_tokens)
    return kl_weight * kl.mean() - surrogate, kl.detach()


def supervise(model: Captioner, steps: int, batch: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        image = images(batch, generator)
        loss = model.crf.nll(model(image), poor_captions(image, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(
    steps: int,
    batch: int,
    samples: int,
    *,
    warmup: int = 300,
    kl_weight: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, list[float]]:
    """The curves: reward of the samples, reward of the greedy captions of held-out images, divergence per caption."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, held_out = Captioner(), images(128, generator)
    supervise(model, warmup, batch, generator)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history: dict[str, list[float]] = {"step": [], "sampled": [], "greedy": [], "kl": []}
    for step in range(steps + 1):
        image = images(batch, generator)
        with torch.no_grad():
            rollout = model.crf.sample(model(image), num_samples=samples, generator=generator)
            rewards = reward(rollout.tokens, image)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        if step % 10 == 0:
            with torch.no_grad():
                greedy = reward(model.crf.viterbi(model(held_out)).tokens[:, :, None], held_out).mean()
                kl = model.crf.kl(reference.crf, model(held_out), reference(held_out)).mean()
            for name, value in (("step", step), ("sampled", rewards.mean()), ("greedy", greedy), ("kl", kl)):
                history[name].append(float(value))
            if not quiet:
                print(f"step {step:4}  reward: samples {rewards.mean():.3f}, greedy {greedy:.3f}  KL {kl:.2f} nats")
        for _ in range(2):
            loss, _ = grpo_loss(model, reference, image, rollout, advantages, clip=0.2, kl_weight=kl_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return history


def draw(history: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    above.plot(history["step"], history["sampled"], label="samples, training images")
    above.plot(history["step"], history["greedy"], label="Viterbi, held-out images")
    above.axhline(BEST, color="grey", linewidth=0.8, linestyle="--", label="best possible")
    above.set(ylabel="reward", title="A caption head with a low-rank CRF, trained with GRPO")
    above.legend(frameon=False)
    below.plot(history["step"], history["kl"], color="tab:green")
    below.set(xlabel="GRPO step", ylabel="exact KL, nats\nper caption")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--samples", type=int, default=8, help="captions sampled for an image")
    parser.add_argument("--kl-weight", type=float, default=1e-3, help="of the divergence from the supervised policy")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    history = train(arguments.steps, arguments.batch, arguments.samples, kl_weight=arguments.kl_weight)
    try:
        draw(history, arguments.picture)
        print(f"the curves are in {arguments.picture}")
    except ImportError as error:
        print(f"no picture: {error}; pip install matplotlib")


if __name__ == "__main__":
    main()
