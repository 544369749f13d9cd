"""`simctg-fast isotropy` and `compare`: how alike a model's hidden states are, layer by layer, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import is_integer, require, user_path
from ..loading import context_length, load_model
from ..text.continuation import continuation_pieces
from ..text.features import read_texts
from .evaluate import Evaluation, Options
from .heat_map import heat_map_png, heat_maps_svg
from .prompts import PROMPT_TOKENS, Prompt, documentation_prompts, split
from .settings import parse_settings
from .states import cosines, hidden_states, isotropy_of_layers
from .verdict import PILOT, PILOT_PROMPTS, Verdict, verdict
from .writing import tokenize

TEXTS = 16  # of documentation, where no file is given
LENGTH = 128  # tokens of a text, at most, behind its first ones
SUFFIXES = (".svg", ".png")

Writing = Callable[[int], AbstractContextManager[Callable[[], None]]]


@dataclass
class States:
    """What was found of one model: ``layers``, the isotropy of the embeddings and of each layer; the last layer's
    cosines of the first text, whose tokens are ``pieces``; and the pilot."""

    name: str
    texts: int
    layers: list[float]
    cosines: Any
    pieces: list[str]
    pilot: dict[str, Any] | None = None
    verdict: Verdict | None = None


def checked_picture(path: str | os.PathLike[str]) -> Path:
    """Raises ValueError for another ending than .svg or .png, and for what cannot be written."""
    target = user_path(path)
    require(target.suffix.lower() in SUFFIXES, "out", str(path), "a file that ends in .svg or .png")
    is_file_of_a_folder = target.parent.is_dir() and not target.is_dir()
    may_write = os.access(target if target.exists() else target.parent, os.W_OK)
    require(is_file_of_a_folder and may_write, "out", str(path), "a file that can be written, in a folder that exists")
    return target


def measure(
    model_name: str,
    text: str | None = None,
    *,
    pilot: bool = True,
    new_tokens: int = LENGTH,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    loading: AbstractContextManager[Any] | None = None,
    writing: Writing = lambda total: nullcontext(lambda: None),
) -> States:
    """Isotropy of a model's layers on texts, and the verdict of a pilot of `PILOT_PROMPTS` prompts.

    Args:
        text: a file as of `read_texts`, a text a line; None: passages of Python's documentation. The pilot continues
            the first tokens of the texts, and measures by how they go on.
        pilot: False leaves it out, and the verdict with it.
        new_tokens: longest continuation of the pilot, and of a text what is looked at behind its first tokens.
        loading, writing: as of `run`.

    Raises:
        ValueError: ``new_tokens`` below 16, a file that holds no text of two tokens; as `read_texts` and `Evaluation`.
        ModelError, OSError: the model or the file cannot be had.
    """
    require(is_integer(new_tokens, 16), "new_tokens", new_tokens, "an integer of at least 16")
    texts = None if text is None else read_texts(text)
    with loading or nullcontext():
        model, tokenizer = load_model(model_name, device, dtype, trust_remote_code=trust_remote_code)
    limit = context_length(model)
    if limit is not None:
        new_tokens = min(new_tokens, max(limit - 48, limit // 2))
    prompts = (
        documentation_prompts(tokenizer, TEXTS, new_tokens) if texts is None else passages(tokenizer, texts, new_tokens)
    )
    ready, refused = tokenize(model, tokenizer, prompts, new_tokens)
    rows = [(each, each.prompt.reference_ids(tokenizer, new_tokens)) for each in ready]
    rows = [(each, ids) for each, ids in rows if ids]
    if refused and not ready:
        name, message = next(iter(refused.items()))
        raise ValueError(f"none of the {len(prompts)} texts can be continued; {name!r}: {message}")
    if not rows:
        raise ValueError(f"text is {text!r}, which must hold a text of at least 2 tokens")
    layers = isotropy_of_layers(model, rows)
    first, ids = rows[0]
    matrix = cosines(hidden_states(model, first, ids)[-1])
    pieces = list(continuation_pieces(tokenizer, [], [*first.ids, *ids]))
    found = States(model_name, len(rows), layers, matrix.tolist(), pieces)
    if pilot:
        chosen = [each.prompt for each, _ in rows[:PILOT_PROMPTS]]
        evaluation = Evaluation(model, tokenizer, chosen, parse_settings(PILOT), Options(new_tokens))
        with writing(evaluation.total) as advance:
            evaluation.on_text = advance
            found.pilot = evaluation.run()
        found.verdict = verdict(layers[-1], found.pilot)
    return found


def passages(tokenizer: Any, texts: Sequence[str], new_tokens: int) -> list[Prompt]:
    """Of each text with at least two tokens the first `PROMPT_TOKENS`, or half of them, and how it goes on."""
    prompts = []
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= 2:
            prompts.append(split(tokenizer, ids, min(PROMPT_TOKENS, len(ids) // 2), new_tokens, f"text-{index}"))
    return prompts


def draw(found: Sequence[States], out: Path) -> None:
    """The last layer's cosines as a picture: of one model, or of several side by side (SVG)."""
    if out.suffix.lower() == ".png":
        require(len(found) == 1, "out", str(out), "a file that ends in .svg for several models")
        out.write_bytes(heat_map_png(found[0].cosines))
        return
    maps = [(f"{each.name}: isotropy {each.layers[-1]:.2f}", each.cosines, each.pieces) for each in found]
    out.write_text(heat_maps_svg(maps), encoding="utf-8")
