"""What `simctg-fast eval` hands to its report: one made by hand, and one of real runs of the bundled model."""

from __future__ import annotations

import math
import random
from typing import Any

from simctg_fast.metrics import diversity, repetition

METRICS = {
    "tokens": ("length", "tokens", 0, None, "New tokens of a text, the end of the text not counted."),
    "diversity": ("diversity", "%", 1, "human", "The product over n = 2, 3, 4 of the share of n-grams that are new."),
    "rep_2": ("rep-2", "%", 1, "lower", "The share of pairs of tokens that the text had before."),
    "rep_4": ("rep-4", "%", 1, "lower", "The share of sequences of four tokens that the text had before."),
    "coherence": ("coherence", "nats", 2, "higher", "The mean log-probability of a token of the continuation."),
    "log_prob_per_byte": ("log p a byte", "nats", 3, None, "What the model itself thinks of the text."),
    "tokens_per_second": ("speed", "tokens/s", 0, "higher", "New tokens a second, all prompts together."),
}
LABELS = {
    "human": "human",
    "greedy": "greedy search",
    "sample": "nucleus sampling",
    "contrastive": "contrastive search",
    "fsd": "frustratingly simple decoding",
    "guard": "GUARD",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "human": {},
    "greedy": {},
    "sample": {"top_p": 0.95, "temperature": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "fsd": {"penalty_alpha": 0.65, "top_k": 3, "fsd_n": 3, "fsd_beta": 0.9},
    "guard": {"guard_window": 7, "guard_decay": 0.95},
}
PYTHON = {
    "human": "",
    "greedy": "model.generate(**inputs, max_new_tokens=96)",
    "sample": "model.generate(**inputs, do_sample=True, top_p=0.95, top_k=0, max_new_tokens=96)",
    "contrastive": "from simctg_fast import ContrastiveSearch\n\n"
    "model.generate(**inputs, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=96)",
    "fsd": "from simctg_fast import FSD\n\nmodel.generate(**inputs, custom_generate=FSD(), max_new_tokens=96)",
    "guard": "from simctg_fast import GUARD\n\nmodel.generate(**inputs, custom_generate=GUARD(), max_new_tokens=96)",
}
WORDS = [
    "the",
    "value",
    "of",
    "a",
    "function",
    "is",
    "returned",
    "when",
    "every",
    "name",
    "was",
    "bound",
    "before",
    "it",
]


def metrics() -> dict[str, dict[str, Any]]:
    names = ("name", "unit", "digits", "better", "about")
    return {key: dict(zip(names, values, strict=True)) for key, values in METRICS.items()}


def repeated(tokens: list[Any], n: int = 4) -> list[bool]:
    """Whether each token lies in an n-gram that was there before."""
    marks, seen = [False] * len(tokens), set()
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        if gram in seen:
            marks[i : i + n] = [True] * n
        seen.add(gram)
    return marks


def grid() -> dict[str, Any]:
    alphas, ks = [0.2, 0.4, 0.6, 0.8], [2, 4, 8, 16]
    up = [[round(100 / (1 + math.exp(2.4 - 7 * a - 0.35 * k**0.5)), 1) for k in ks] for a in alphas]
    down = [[round(-0.5 - 0.9 * a**2 - 0.12 * k**0.5 * a, 3) for k in ks] for a in alphas]
    return {
        "penalty_alpha": alphas,
        "top_k": ks,
        "diversity": up,
        "coherence": down,
        "recommended": {"penalty_alpha": 0.6, "top_k": 4},
        "reason": "The lowest α at four candidates whose texts hardly repeat themselves.",
    }


def frame(rows: list[dict[str, Any]], prompts: int, new_tokens: int) -> dict[str, Any]:
    return {
        "model": "bundled",
        "created": "2026-11-29T20:40:00Z",
        "machine": "AMD EPYC (2 cores), 2 threads",
        "versions": {"simctg_fast": "0.9.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "prompts": prompts,
        "max_new_tokens": new_tokens,
        "seed": 0,
        "dtype": "float32",
        "command": "simctg-fast eval bundled --prompts prompts.jsonl --strategies greedy,sample,contrastive,fsd,guard "
        f"--max-new-tokens {new_tokens} --report report.html",
        "metrics": metrics(),
        "rows": rows,
        "grid": grid(),
        "conclusion": [
            "Greedy search runs in loops: more than half of its four-token sequences were there before.",
            "Contrastive search, FSD and GUARD hardly ever repeat four tokens.",
            "So few prompts do not tell these three apart.",
        ],
    }


def row(strategy: str, figures: dict[str, Any], note: str = "") -> dict[str, Any]:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS[strategy].items())
    command = f"simctg-fast run bundled prompts.jsonl -o out.jsonl --strategy {strategy} {options}".strip()
    return {
        "strategy": strategy,
        "label": LABELS[strategy],
        "settings": SETTINGS[strategy],
        "command": "" if strategy == "human" else command,
        "python": PYTHON[strategy],
        "figures": figures,
        "note": note,
    }


def cosines(size: int, common: float, seed: int = 0) -> list[list[float]]:
    """Of random vectors with a part in common; symmetric, the diagonal 1."""
    draw = random.Random(seed)
    vectors = [[draw.gauss(common, 1) for _ in range(24)] for _ in range(size)]
    lengths = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]
    products = [[sum(map(lambda x, y: x * y, a, b)) for b in vectors] for a in vectors]
    return [[round(products[i][j] / (lengths[i] * lengths[j]), 3) for j in range(size)] for i in range(size)]


def example(prompts: int = 3, size: int = 40, seed: int = 0) -> dict[str, Any]:
    """Of every part something, no two figures alike by chance."""
    draw = random.Random(seed)
    rows = []
    for strategy in LABELS:
        figures = {}
        for key, (_, _, digits, _, _) in METRICS.items():
            if strategy == "human" and key == "tokens_per_second":
                continue
            mean = draw.uniform(10, 100) if digits < 2 else draw.uniform(-3, 0)
            figures[key] = {"mean": mean, "low": mean - draw.random(), "high": mean + draw.random()}
        figures["log_prob_per_byte"] |= {"low": None, "high": None}
        rows.append(row(strategy, figures, "2 of 100 prompts failed" if strategy == "guard" else ""))
    texts = []
    for i in range(prompts):
        written = {}
        for strategy in LABELS:
            pieces = [" " + draw.choice(WORDS) for _ in range(draw.randint(20, 40))]
            pieces += pieces[4:16] if strategy == "greedy" else []
            written[strategy] = {
                "pieces": pieces,
                "repeated": repeated(pieces),
                "tokens": len(pieces),
                "diversity": 100 * diversity(pieces),
            }
        texts.append({"id": f"p-{i}", "prompt": " ".join(draw.choices(WORDS, k=12)), "written": written})
    similarity = [
        {
            "strategy": strategy,
            "text": 0,
            "pieces": [" " + draw.choice(WORDS) for _ in range(size)],
            "prompt_tokens": 12,
            "cosines": cosines(size, 0.3 + 0.2 * i, i),
            "isotropy": 0.31 + 0.1 * i,
        }
        for i, strategy in enumerate(("greedy", "contrastive", "fsd"))
    ]
    parts = {
        "texts": texts,
        "similarity": similarity,
        "isotropy": {"of": "human texts", "layers": [0.912, 0.744, 0.653, 0.521, 0.358]},
    }
    return frame(rows, 100, 128) | parts


def of_the_bundled_model(prompts: int = 5, new_tokens: int = 96, with_grid: bool = False) -> dict[str, Any]:
    """Real texts and states; references are pages of Python's own documentation. ``with_grid``: 16 runs more."""
    import time
    from pydoc_data.topics import topics

    import torch

    from simctg_fast.engine import Engine
    from simctg_fast.loading import load_model

    model, tokenizer = load_model("bundled", "cpu", "float32")
    pages = [" ".join(topics[name].split()[:400]) for name in sorted(topics) if len(topics[name]) > 2500][:prompts]
    ids = [tokenizer(page, add_special_tokens=False)["input_ids"] for page in pages]
    starts, references = [page[:24] for page in ids], [page[24 : 24 + new_tokens] for page in ids]
    written, seconds = {"human": references}, {"human": 0.0}
    for strategy in (name for name in LABELS if name != "human"):
        engine = Engine(model, tokenizer, strategy=strategy, max_new_tokens=new_tokens, **SETTINGS[strategy])
        began = time.perf_counter()
        results = {r.id: r for r in engine.generate([{"id": i, "prompt": p, "seed": i} for i, p in enumerate(starts)])}
        seconds[strategy] = time.perf_counter() - began
        written[strategy] = [list(results[i].token_ids) for i in range(prompts)]

    @torch.no_grad()
    def opinion(prompt: list[int], tokens: list[int]) -> float:
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum())

    @torch.no_grad()
    def similarity(strategy: str) -> dict[str, Any]:
        tokens = starts[0] + written[strategy][0]
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
        unit = torch.nn.functional.normalize(states, dim=-1)
        found = (unit @ unit.T).clamp(-1, 1)
        off = (found.sum() - len(tokens)) / (len(tokens) * (len(tokens) - 1))
        rounded = [[round(value, 3) for value in line] for line in found.tolist()]
        pieces = [tokenizer.decode([token]) for token in tokens]
        own = {"strategy": strategy, "text": 0, "pieces": pieces, "prompt_tokens": 24}
        return own | {"cosines": rounded, "isotropy": 1 - float(off)}

    def real_grid() -> dict[str, Any]:
        found = grid()
        for i, alpha in enumerate(found["penalty_alpha"]):
            for j, k in enumerate(found["top_k"]):
                own = {"penalty_alpha": alpha, "top_k": k, "max_new_tokens": new_tokens}
                engine = Engine(model, tokenizer, strategy="contrastive", **own)
                results = {r.id: r for r in engine.generate([{"id": i, "prompt": p} for i, p in enumerate(starts)])}
                texts = [list(results[n].token_ids) for n in range(prompts)]
                pairs = zip(starts, texts, strict=True)
                found["diversity"][i][j] = sum(100 * diversity(text) for text in texts) / prompts
                found["coherence"][i][j] = sum(opinion(p, t) / max(1, len(t)) for p, t in pairs) / prompts
        return found

    def summary(values: list[float]) -> dict[str, float]:
        draw, count = random.Random(0), len(values)
        means = sorted(sum(draw.choices(values, k=count)) / count for _ in range(1000))
        return {"mean": sum(values) / count, "low": means[25], "high": means[974]}

    rows = []
    for strategy, texts in written.items():
        logs = [opinion(prompt, tokens) for prompt, tokens in zip(starts, texts, strict=True)]
        sizes = [len(tokenizer.decode(tokens).encode()) for tokens in texts]
        figures: dict[str, Any] = {
            "tokens": summary([float(len(tokens)) for tokens in texts]),
            "diversity": summary([100 * diversity(tokens) for tokens in texts]),
            "rep_2": summary([100 * repetition(tokens, 2) for tokens in texts]),
            "rep_4": summary([100 * repetition(tokens, 4) for tokens in texts]),
            "coherence": summary([log / max(1, len(tokens)) for log, tokens in zip(logs, texts, strict=True)]),
            "log_prob_per_byte": {"mean": sum(logs) / sum(sizes), "low": None, "high": None},
        }
        if seconds[strategy]:
            speed = sum(map(len, texts)) / seconds[strategy]
            figures["tokens_per_second"] = {"mean": speed, "low": None, "high": None}
        rows.append(row(strategy, figures))
    shown = [
        {
            "id": f"topic-{i}",
            "prompt": tokenizer.decode(starts[i]),
            "written": {
                strategy: {
                    "pieces": [tokenizer.decode([token]) for token in texts[i]],
                    "repeated": repeated(texts[i]),
                    "tokens": len(texts[i]),
                    "diversity": 100 * diversity(texts[i]),
                }
                for strategy, texts in written.items()
            },
        }
        for i in range(prompts)
    ]
    with torch.no_grad():
        layers = model(torch.tensor([starts[0] + references[0]]), output_hidden_states=True).hidden_states
    isotropies = []
    for states in layers:
        unit = torch.nn.functional.normalize(states[0], dim=-1)
        count = len(unit)
        isotropies.append(1 - float((unit.sum(0).square().sum() - count) / (count * (count - 1))))
    parts = {
        "texts": shown,
        "similarity": [similarity(strategy) for strategy in written],
        "isotropy": {"of": "human texts", "layers": isotropies},
    }
    return frame(rows, prompts, new_tokens) | parts | ({"grid": real_grid()} if with_grid else {})
